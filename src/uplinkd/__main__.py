"""`python -m uplinkd` is the `uplinkd` command."""

from uplinkd.cli import main

main()
