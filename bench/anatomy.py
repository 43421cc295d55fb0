"""Where the time of a report and of a login goes, by part: samples of the worker's stack under full load, C functions included
(py-spy), and the CPU time of each process without anybody looking. py-spy finds a process where it stands while another one has its
core; so while it looks, nats-server is on the load's. What of the time is the kernel's, perf tells, with all where it belongs."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.load import LOAD_CORE, Measured, auth_load, publish_load
from bench.peers import PIN, Peer, cpu_seconds, tree, uplinkd

__all__ = ["WAITING", "corrected", "kernels", "measure", "part_of", "shares"]

# Each look stops the worker for milliseconds, and all devices wait then: the next one comes only once they are out of step again.
_RATE = 23
_SECONDS = 60
WAITING = "waiting"
_KERNEL = "sockets: read and write"
# The C library's own last frames have no names; what waits is no work.
_WAITS = re.compile(
    r"epoll_p?wait|futex|pthread_cond_|sem_\w*wait|PyThread_acquire_lock|_queue_SimpleQueue_get|take_gil"
)
_INNERMOST = 4
_READS_AND_WRITES = re.compile(r"(read|write|writev|send\w*|recv\w*|accept4?) \(")
# Whoever calls these decides.
_FOR_OTHERS = re.compile(r"\(uplinkd/core/mac.py")
# The innermost frame that one of these fits decides.
_PARTS = tuple(
    (re.compile(pattern), part)
    for pattern, part in (
        (r"\(uplinkd/core/tokens.py|Gateway\._token ", "token"),
        (r"\(uplinkd/core/topics.py|Gateway\.(_topic|_check_right|_remember) |media_type_is ", "topic and right to it"),
        (r"\(uplinkd/core/signature.py", "sign of a login"),
        (r"^(login|_members|_checked) \(uplinkd/core/wire.py", "login's members"),
        (r"\(uplinkd/flow.py", "flow control"),
        (r"\(uplinkd/(presence|roster).py", "presence"),
        (r"\(uplinkd/registry/", "registry"),
        (r"\(uplinkd/(metrics|journal|floods|observe).py", "metrics and record"),
        (r"libssl|_ssl\.c|SSLProtocol|\(ssl.py|\(uplinkd/(tls|secured).py", "TLS"),
        (r"\(uplinkd/core/wire.py|Connection\.(_answer|_stored|_rest)", "answer"),
        (r"\(uplinkd/engine/", "engine's client"),
        (r"llhttp|\(parser.c|Connection\.(on_|_feed)", "HTTP parse"),
        (r"Connection\.|Gateway\.|\(uplinkd/gateway.py", "gateway, connection"),
        (r"\(uplinkd/", "other duties"),
        (r"\((loop|core|stream|linux|loop-watcher)\.c|^uv_|\(queue.h|asyncio", "event loop"),
    )
)


def part_of(stack: list[str]) -> str:
    """The part of a request that a stack (frames `name (file:line)`, outermost first) is at work for."""
    if any(_WAITS.match(frame) for frame in stack[-_INNERMOST:]):
        return WAITING
    if stack and _READS_AND_WRITES.match(stack[-1]):
        return _KERNEL
    for frame in reversed(stack):
        if _FOR_OTHERS.search(frame):
            continue
        for pattern, part in _PARTS:
            if pattern.search(frame):
                return part
    return "other"


def shares(samples: str) -> tuple[dict[str, float], int]:
    """What part of the work each part of a request is, largest first, and of how many samples: of `a;b;c 12`, a stack a line."""
    found: dict[str, int] = {}
    for line in samples.splitlines():
        stack, _, count = line.rpartition(" ")
        frames = stack.split(";")
        # What stands before is how the process began.
        begin = next((place for place, frame in enumerate(frames) if frame.startswith("run (uplinkd/worker.py")), -1)
        part = part_of(frames[begin + 1 :])
        found[part] = found.get(part, 0) + int(count)
    found.pop(WAITING, None)
    total = sum(found.values())
    return {part: count / total for part, count in sorted(found.items(), key=lambda each: -each[1])}, total


def kernels(report: str) -> float:
    """What share of the samples is the kernel's: of `perf report --sort dso`, a line for each library, with its percentage."""
    lines = re.findall(r"^\s*([0-9.]+)%\s+(\S+)", report, re.MULTILINE)
    return sum(float(percent) for percent, name in lines if name.startswith("[") and name != "[vdso]") / 100


def corrected(parts: Mapping[str, float], kernel: float) -> dict[str, float]:
    """The shares, with `kernel` for what reads and writes sockets, and the others as they stand to each other."""
    rest = 1 - parts.get(_KERNEL, 0.0)
    return {part: kernel if part == _KERNEL else share / rest * (1 - kernel) for part, share in parts.items()}


def measure(folder: Path, options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """`{"profile": {"publish": {"worker": …, "engine": …, "rest": …, "parts": {…}, "samples": …}, "/auth": …}}`: µs of CPU for one, of
    the worker, of nats-server and of the other processes; and the shares of the worker's parts."""
    spy = shutil.which("py-spy", path=str(Path(sys.executable).parent))
    if spy is None:
        say("the profile is left out: py-spy is not installed; `make bench` installs it")
        return {}
    folder.mkdir()
    count = options.connections
    with uplinkd(folder / "uplinkd", count) as peer:
        loads: dict[str, Callable[[float], Measured]] = {
            "publish": lambda seconds: publish_load(peer, folder, connections=count, seconds=seconds),
            "/auth": lambda seconds: auth_load(peer, folder, connections=count, seconds=seconds, keep_alive=True),
        }
        return {"profile": {name: _look(spy, folder, peer, name, act, options, say) for name, act in loads.items()}}


def _look(
    spy: str,
    folder: Path,
    peer: Peer,
    name: str,
    act: Callable[[float], Measured],
    options: argparse.Namespace,
    say: Callable[[str], None],
) -> dict[str, Any]:
    pids = {Path(f"/proc/{pid}/comm").read_text().strip(): pid for pid in tree(*peer.roots)}
    worker, engine = pids["uplinkd-worker"], pids["nats-server"]

    def load(seconds: float) -> int:
        found = act(seconds)
        if found.bad or found.errors:
            raise SystemExit(f"profile, {name}: {found.bad + found.errors} answers were not right; {found.sample}")
        return found.good

    def used() -> tuple[float, float, float]:
        return cpu_seconds(worker), cpu_seconds(engine), cpu_seconds(*peer.roots)

    say(f"profile, {name}: without looking …")
    load(1)
    before = used()
    count = load(options.seconds * options.rounds)
    of_worker, of_engine, of_all = ((now - then) / count * 1e6 for now, then in zip(used(), before, strict=True))
    say(f"profile, {name}: {_RATE} samples a second for {_SECONDS} s …")
    output = folder / f"stacks.{name.strip('/')}"
    command = [*PIN, LOAD_CORE, spy, "record", "--native", "--rate", str(_RATE), "--duration", str(_SECONDS)]
    command += ["--format", "raw", "--output", str(output), "--pid", str(worker)]
    cores = ",".join(map(str, os.sched_getaffinity(engine)))
    _move(engine, LOAD_CORE)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as spying:
        load(_SECONDS + 2)
        words, _ = spying.communicate(timeout=60)
    _move(engine, cores)
    if not output.exists():
        raise SystemExit(f"py-spy could not look at the worker: {words.strip().splitlines()[-1:]}")
    parts, samples = shares(output.read_text())
    if perf := shutil.which("perf"):
        say(f"profile, {name}: how much of it is the kernel's …")
        data = folder / f"perf.{name.strip('/')}"
        command = [*PIN, LOAD_CORE, perf, "record", "-e", "cpu-clock", "-F", "999", "-o", str(data), "-p", str(worker)]
        with subprocess.Popen([*command, "--", "sleep", "5"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
            load(6)
        command = [perf, "report", "-i", str(data), "--stdio", "--sort", "dso"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        parts = corrected(parts, kernels(done.stdout))
    else:
        say(f"perf is not installed (Debian: linux-perf): the share of {_KERNEL!r} is py-spy's, which is too high")
    rest = of_all - of_worker - of_engine
    return {"worker": of_worker, "engine": of_engine, "rest": rest, "parts": parts, "samples": samples}


def _move(process: int, cores: str) -> None:
    """All its threads."""
    subprocess.run(["taskset", "-a", "-p", "-c", cores, str(process)], check=True, stdout=subprocess.DEVNULL)
