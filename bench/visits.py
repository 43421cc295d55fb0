"""Short visits and long rests: devices in C on the load's core, since wrk opens no connection for two requests that differ, and a
client in Python costs more than the server that is measured."""

from __future__ import annotations

import argparse
import contextlib
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.load import LOAD_CORE, Measured, timed
from bench.peers import PIN, PRODUCT, SECRET, Peer, nginx, pss, uplinkd
from uplinkd.client import login_body

__all__ = ["IDLE", "build", "holding", "measure_idle", "stay_load", "visit_load"]

IDLE = 20_000
_SOURCE = Path(__file__).with_suffix(".c")


def build(folder: Path) -> tuple[Path | None, str]:
    """The program, compiled into `folder`; or None, and why not in a line."""
    binary = folder / "visits"
    if not (compiler := shutil.which("gcc")):
        return None, "gcc is missing; on Debian: apt-get install gcc libc6-dev libssl-dev"
    done = subprocess.run(
        [compiler, "-O2", "-o", str(binary), str(_SOURCE), "-lssl", "-lcrypto"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode:
        fault = next((line for line in done.stderr.splitlines() if "error" in line), "no reason given")
        return None, f"{_SOURCE.name} could not be compiled ({fault}); on Debian: apt-get install libc6-dev libssl-dev"
    return binary, ""


def visit_load(binary: Path, peer: Peer, folder: Path, *, connections: int, seconds: float) -> Measured:
    """Visits, so many at a time. nginx returns one fixed answer in each; to the others a device signs in and reports."""
    return _run(binary, peer, folder, connections, seconds, "fixed" if "nginx" in peer.name else "device")


def stay_load(binary: Path, peer: Peer, folder: Path, *, connections: int, seconds: float) -> Measured:
    """Reports over so many connections that stay, each of a device of its own from first to last. wrk's requests go to whichever
    connection is ready next: where the answers of two workers come in any order, each brings another device every time."""
    return _run(binary, peer, folder, connections, seconds, "stay")


def _run(binary: Path, peer: Peer, folder: Path, connections: int, seconds: float, what: str) -> Measured:
    logins = _logins(folder, connections)
    command = [*PIN, LOAD_CORE, str(binary), str(peer.port), f"{seconds:g}", str(connections), str(logins), what]
    return timed(command, peer, within=seconds + 30)


def _logins(folder: Path, devices: int) -> Path:
    file = folder / f"{devices}.logins"
    names = [f"device{number:04}" for number in range(devices)]
    file.write_text(
        "".join(
            f"/topic/{PRODUCT}/{name}/user/update\t{login_body(PRODUCT, name, SECRET, method='hmacsha1')}\n"
            for name in names
        )
    )
    return file


@contextlib.contextmanager
def holding(binary: Path, peer: Peer, folder: Path, connections: int) -> Iterator[Callable[[], None]]:
    """One connection that has signed in and rests; what it gives opens the others of `connections`, and returns when they rest."""
    command = [*PIN, LOAD_CORE, str(binary), str(peer.port), "0", str(connections), str(_logins(folder, 1)), "hold"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        output = process.stdout

        def held(count: int) -> None:
            if (line := output.readline()) != f"HELD {count}\n":
                raise SystemExit(f"{peer.name} does not hold {count:,} connections: {line.strip() or 'no word'}")

        def others() -> None:
            assert process.stdin
            process.stdin.write("\n")
            process.stdin.flush()
            held(connections)

        try:
            held(1)
            yield others
        finally:
            process.stdin.close()
            process.terminate()


def measure_idle(folder: Path, options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """`{"idle": {"connections": …, "uplinkd": {"name": …, "bytes": …}, "nginx": …}}`: bytes of one connection; or, where it cannot
    be measured, nothing."""
    binary, fault = build(folder)
    if binary is None:
        say(f"idle connections are left out: {fault}")
        return {}
    count = min(options.idle, _files() - 200)
    if count < options.idle:
        say(f"only {count:,} connections at rest: a process may open no more than {_files():,} files here (ulimit -n)")
    found: dict[str, Any] = {"connections": count}
    with (
        uplinkd(folder / "uplinkd", 1, "--max-connections", str(count + 100)) as ours,
        nginx(folder, folder / "uplinkd" / "data" / "tls") as theirs,
    ):
        for name, peer in {"uplinkd": ours, "nginx": theirs}.items():
            say(f"memory of {count:,} connections at rest: {peer.name} …")
            with holding(binary, peer, folder, count) as others:
                before = pss(*peer.roots)
                others()
                found[name] = {"name": peer.name, "bytes": (pss(*peer.roots) - before) / (count - 1)}
    return {"idle": found}


def _files() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
