"""What others on this machine see of a process."""

from __future__ import annotations

import subprocess
import sys

from uplinkd.processes import environment_of_children

PROGRAM = """
import ctypes, resource
from uplinkd.processes import call_me, keep_memory_private
prctl = ctypes.CDLL(None).prctl
before = prctl(3, 0, 0, 0, 0)
keep_memory_private()
call_me("uplinkd-console")
comm = open("/proc/self/comm").read().strip()
print(before, prctl(3, 0, 0, 0, 0), *resource.getrlimit(resource.RLIMIT_CORE), comm)
"""


def test_memory_is_kept_private_and_a_name_is_borne() -> None:
    """No core dumps, no tracing by the same user: PR_GET_DUMPABLE says so. A name can still be taken afterwards."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout.split() == ["1", "0", "0", "0", "uplinkd-console"]


def test_other_programs_are_not_given_the_settings() -> None:
    """Among them may be a key or a password; the rest of the environment stays."""
    assert environment_of_children({"UPLINKD_SECRET_KEY": "k", "PATH": "/bin"}) == {"PATH": "/bin"}
