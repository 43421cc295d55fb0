"""`python -m bench.micro`: how long each part of a request takes, by pyperf, whose options it takes (`--fast`, `-o FILE`)."""

from __future__ import annotations

import pyperf

from bench.micro import parts


def main() -> None:
    runner = pyperf.Runner(program_args=("-m", "bench.micro"))
    with parts() as found:
        for name, act in found.items():
            runner.bench_func(name, act)


if __name__ == "__main__":
    main()
