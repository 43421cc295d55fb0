"""Clients that are not Python packages of the tests themselves: found on PATH, or installed once under .venv.

A test is skipped with the reason where a tool is missing and cannot be had; in CI that is a failure.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

__all__ = ["DRIVERS", "ROOT", "Driver", "heard", "linkkit_python", "needs", "node_modules", "recipes_python"]

ROOT = Path(__file__).resolve().parents[2]
DRIVERS = Path(__file__).parent / "drivers"
CACHE = ROOT / ".venv"
NPM_PACKAGES = ("mqtt@5.16.0", "rhea@3.0.5", "standardwebhooks@1.1.0")


def needs(*tools: str) -> pytest.MarkDecorator:
    missing = [tool for tool in tools if shutil.which(tool) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} is not installed")


def node_modules() -> Path:
    """The folder node_modules with NPM_PACKAGES in it."""
    folder = CACHE / "npm"
    with _once(folder, " ".join(NPM_PACKAGES)) as wanted:
        if wanted:
            install = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder), *NPM_PACKAGES]
            _run(install, "npm's packages could not be installed")
    return folder / "node_modules"


def linkkit_python() -> Path:
    """A Python with aliyun-iot-linkkit, which needs another paho-mqtt than the tests."""
    return _python("linkkit", "aliyun-iot-linkkit")


def recipes_python() -> Path:
    """A Python with what docs/en/recipes.md asks for, and a broker to try it with."""
    return _python("recipes", "what the recipes need")


def _python(name: str, what: str) -> Path:
    """The Python of a virtual environment of its own with what requirements/`name`.txt locks."""
    folder = CACHE / name
    python = folder / "bin" / "python"
    locked = ROOT / "requirements" / f"{name}.txt"
    with _once(folder, locked.read_text()) as wanted:
        if wanted:
            _run([sys.executable, "-m", "venv", "--clear", str(folder)], "a virtual environment could not be made")
            pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "--require-hashes"]
            _run([*pip, "-r", str(locked)], f"{what} could not be installed")
    return python


@contextlib.contextmanager
def _once(folder: Path, version: str) -> Iterator[bool]:
    """Whether `folder` has to be made; nobody else makes it meanwhile, and nobody again when it went well."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    stamp = folder.with_name(folder.name + ".stamp")
    with folder.with_name(folder.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        wanted = not (folder.is_dir() and stamp.exists() and stamp.read_text() == version)
        yield wanted
        if wanted:
            stamp.write_text(version)


def _run(command: list[str], fault: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    if done.returncode:
        pytest.skip(f"{fault}: {done.stderr.strip()[-300:]}")


def heard(
    command: list[str], line: str, meanwhile: Callable[[], object], *, cwd: Path, within: float = 15, **environment: str
) -> str:
    """What `command` printed, until `line` was in it or the time was over; `meanwhile` is called again and again."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd, env={**os.environ, **environment}
    )
    lines: list[str] = []
    assert process.stdout
    reader = threading.Thread(target=lines.extend, args=(process.stdout,), daemon=True)
    reader.start()
    try:
        end = time.monotonic() + within
        while f"{line}\n" not in lines and process.poll() is None and time.monotonic() < end:
            meanwhile()
    finally:
        process.kill()
        process.wait(5)
        reader.join(5)
        process.stdout.close()
    return "".join(lines)


class Driver:
    """A client in its own process that takes one JSON command a line and tells one JSON event a line."""

    def __init__(self, program: list[str], *, cwd: Path) -> None:
        self._process = subprocess.Popen(
            program,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
            env={**os.environ, "NODE_NO_WARNINGS": "1"},
        )
        self._events: queue.Queue[dict[str, Any]] = queue.Queue()
        self._seen: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._events.put(json.loads(line))

    def do(self, **command: Any) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def event(self, name: str, within: float = 10) -> dict[str, Any]:
        """The next event of this name; others are passed over."""
        end = time.monotonic() + within
        while True:
            try:
                event = self._events.get(timeout=max(0.01, end - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no {name!r} within {within} s, but {self._seen} and {self._errors()}") from None
            self._seen.append(event)
            if event["event"] == name:
                return event

    def both(self, one: str, other: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """The next event of each name, in whichever order they come."""
        seen = len(self._seen)
        last = self.event(one)
        before = next((event for event in self._seen[seen:] if event["event"] == other), None)
        return last, before or self.event(other)

    def message(self, within: float = 10) -> tuple[str, bytes]:
        event = self.event("message", within)
        return event["topic"], base64.b64decode(event["payload"])

    def _errors(self) -> str:
        self._process.kill()
        assert self._process.stderr
        return self._process.stderr.read()[-2000:]

    def close(self) -> None:
        self._process.kill()
        self._process.wait(5)
        self._reader.join(5)
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
