"""How the cost of a request grows with what there is of everything: µs of the server's CPU for one, at several sizes in turn, and the
exponent of each curve."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import http.client
import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench import plot, visits
from bench.filling import fill
from bench.load import Measured, auth_load, publish_load
from bench.peers import PRODUCT, SECRET, Peer, context, cpu_seconds, import_devices, start_uplinkd, uplinkd
from uplinkd.client import login_body
from uplinkd.core.model import Right
from uplinkd.registry import open_registry
from uplinkd.settings import Settings

__all__ = ["FLAT", "PICTURES", "flat_faults", "measure", "never_asked"]

PICTURES = Path(__file__).parent.parent / "docs" / "pictures"
FLAT = 0.1
"""A curve that should be flat may rise with no greater exponent: on a noisy machine none is 0."""

_ACTIVE = 64
_FIRST = 1000  # logins of devices that nobody has asked for yet
_DEVICES = (1_000, 10_000, 100_000, 1_000_000)
_CLASSES = (1, 5, 20, 50)
_PAYLOADS = (0, 200, 2_000, 16_000, 64_000, 131_072)
_REPORTING = (1, 8, 64, 512)
_AT_REST = (100, 1_000, 5_000, 19_500)
_WORKERS = (1, 2)
_STORED = (0, 10_000, 100_000, 1_000_000, 10_000_000)
_QUICK = 10_000  # the most of anything in a quick run, but of bytes

# Of each axis: what its picture says, and which of its curves should be flat.
_AXES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "devices": ("Devices in the registry", "devices", ("publish", "/auth", "first /auth")),
    "classes": ("Topic classes of the product", "topic classes of its own", ("publish", "/auth")),
    "payload": ("Size of a report", "payload, bytes", ()),
    "reporting": ("Connections that report", "connections", ("publish",)),
    "at rest": ("Connections at rest, 64 report", "connections at rest", ("publish", "/auth")),
    "workers": ("Workers, on one core together", "workers", ("publish, 64 each", "/auth")),
    "stored": ("Messages stored already", "messages", ("publish",)),
}

Act = Callable[[], float]
"""Measures once: µs of the server's CPU for one request."""
Points = dict[str, dict[int, Act]]
"""By curve and size."""


def measure(folder: Path, options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """`{"growth": {axis: {curve: {"points": [[size, µs], …], "exponent": … or None}}}}`; pictures go to docs/pictures,
    of a quick run to bench/results."""
    folder.mkdir()
    found: dict[str, Any] = {}
    pictures = Path("bench/results") if options.quick else PICTURES
    pictures.mkdir(parents=True, exist_ok=True)
    for axis, prepare in {
        "devices": _devices,
        "classes": _classes,
        "payload": _payload,
        "reporting": _reporting,
        "at rest": _at_rest,
        "workers": _workers,
        "stored": _stored,
    }.items():
        place = folder / axis.replace(" ", "-")
        place.mkdir()
        say(f"growth, {axis}: preparing …")
        with ExitStack() as stack:
            points = prepare(place, options, stack)
            if not any(points.values()):
                say(f"growth, {axis}: left out: {visits.build(place)[1]}")
                continue
            found[axis] = _curves(points, options.rounds, functools.partial(_say_round, say, axis))
        title, unit, _ = _AXES[axis]
        curves = {name: [(size, micros) for size, micros in curve["points"]] for name, curve in found[axis].items()}
        picture = pictures / f"growth-{axis.replace(' ', '-')}.svg"
        picture.write_text(plot.plot(title, unit, "server's CPU for a request, µs", curves))
    say(f"plots: {pictures}/growth-*.svg")
    return {"growth": found}


def _say_round(say: Callable[[str], None], axis: str, number: int) -> None:
    say(f"growth, {axis}: round {number} …")


def _curves(points: Points, rounds: int, say: Callable[[int], None]) -> dict[str, Any]:
    """The median of the rounds at each size, the sizes in turn: a machine whose speed drifts bends no curve."""
    taken: dict[str, dict[int, list[float]]] = {name: {size: [] for size in acts} for name, acts in points.items()}
    for number in range(rounds):
        say(number + 1)
        for name, acts in points.items():
            for size, act in acts.items():
                taken[name][size].append(act())
    found = {}
    for name, sizes in taken.items():
        curve = [(size, statistics.median(values)) for size, values in sizes.items()]
        found[name] = {"points": curve, "exponent": plot.exponent(curve)}
    return found


def flat_faults(growth: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(axis and curve, exponent) of each curve that should be flat."""
    for axis, curves in growth.items():
        for name in _AXES[axis][2]:
            if name in curves and curves[name]["exponent"] is not None:
                yield f"{name} with {axis}", curves[name]["exponent"]


def _sizes(sizes: Sequence[int], options: argparse.Namespace) -> list[int]:
    return [size for size in sizes if not options.quick or size <= _QUICK]


def _micros(found: Measured) -> float:
    if found.bad or found.errors or not found.good:
        raise SystemExit(f"growth: {found.bad + found.errors} answers were not right; {found.sample or 'none came'}")
    return found.server_cpu / found.good * 1e6


def _publish(peer: Peer, folder: Path, options: argparse.Namespace, **changes: Any) -> Act:
    given = {"connections": _ACTIVE, "seconds": options.seconds, **changes}
    return lambda: _micros(publish_load(peer, folder, **given))


def _auth(peer: Peer, folder: Path, options: argparse.Namespace, **changes: Any) -> Act:
    given = {"connections": _ACTIVE, "seconds": options.seconds, "keep_alive": True, **changes}
    return lambda: _micros(auth_load(peer, folder, **given))


def _devices(folder: Path, options: argparse.Namespace, stack: ExitStack) -> Points:
    points: Points = {"publish": {}, "/auth": {}, "first /auth": {}}
    for count in _sizes(_DEVICES, options):
        place = folder / str(count)
        peer = stack.enter_context(uplinkd(place, count))
        # Spread over the registry, not its first ones.
        names = [f"device{number:04}" for number in range(0, count, count // _ACTIVE)][:_ACTIVE]
        points["publish"][count] = _publish(peer, place, options, names=names)
        points["/auth"][count] = _auth(peer, place, options, names=names)
        fresh = (f"device{number:04}" for number in never_asked(count, options.rounds * _some(count, options)))
        points["first /auth"][count] = lambda peer=peer, fresh=fresh, count=count: _first_logins(  # type: ignore[misc]
            peer, [next(fresh) for _ in range(_some(count, options))]
        )
    return points


def _some(count: int, options: argparse.Namespace) -> int:
    """How many devices a round may take that no round has taken."""
    return min(_FIRST, (count - 2 * _ACTIVE) // int(options.rounds))


def never_asked(count: int, most: int) -> Iterator[int]:
    """Numbers spread over the registry, but for those of the devices that report."""
    step = count // _ACTIVE
    return (number for number in range(0, count, max(1, count // (most + _ACTIVE))) if number % step)


def _first_logins(peer: Peer, names: Sequence[str]) -> float:
    """µs of CPU for the login of a device that is not in memory and has never been heard of: looked up, and noted as activated."""
    door = http.client.HTTPSConnection("localhost", peer.port, timeout=30, context=context(peer.ca))
    with contextlib.closing(door):
        door.connect()
        before = cpu_seconds(*peer.roots)
        for name in names:
            body = login_body(PRODUCT, name, SECRET, method="hmacsha1")
            door.request("POST", "/auth", body, {"Content-Type": "application/json"})
            if (answer := json.loads(door.getresponse().read()))["code"]:
                raise SystemExit(f"growth: the first login of {name} was refused: {answer}")
        return (cpu_seconds(*peer.roots) - before) / len(names) * 1e6


def _classes(folder: Path, options: argparse.Namespace, stack: ExitStack) -> Points:
    points: Points = {"publish": {}, "/auth": {}}
    for count in _CLASSES:
        place = folder / str(count)
        place.mkdir()
        data = place / "data"
        import_devices(place / "fleet.csv", data, _ACTIVE)
        registry = open_registry(Settings(data=data))
        for number in range(count):
            registry.add_topic_class(PRODUCT, f"user/extra/{number}", Right.PUBLISH)
        registry.close()
        peer = stack.enter_context(start_uplinkd(place, data))
        points["publish"][count] = _publish(peer, place, options)
        points["/auth"][count] = _auth(peer, place, options)
    return points


def _payload(folder: Path, options: argparse.Namespace, stack: ExitStack) -> Points:
    peer = stack.enter_context(uplinkd(folder / "one", _ACTIVE))
    return {"publish": {size: _publish(peer, folder, options, payload=size) for size in _PAYLOADS}}


def _reporting(folder: Path, options: argparse.Namespace, stack: ExitStack) -> Points:
    peer = stack.enter_context(uplinkd(folder / "one", max(_REPORTING)))
    return {
        "publish": {
            count: _stay(binary, peer, folder, options, count) for binary in _built(folder) for count in _REPORTING
        }
    }


def _stay(binary: Path, peer: Peer, folder: Path, options: argparse.Namespace, count: int) -> Act:
    """Long enough that the handshakes of so many, which are in the figure, hardly count."""
    seconds = max(float(options.seconds), count / 50)
    return lambda: _micros(visits.stay_load(binary, peer, folder, connections=count, seconds=seconds))


def _built(folder: Path) -> list[Path]:
    """The program of bench.visits, if it can be compiled."""
    binary, _ = visits.build(folder)
    return [binary] if binary else []


def _at_rest(folder: Path, options: argparse.Namespace, stack: ExitStack) -> Points:
    """A server for each count, which holds its connections at rest while the others are measured."""
    points: Points = {"publish": {}, "/auth": {}}
    for binary, count in itertools.product(_built(folder), _sizes(_AT_REST, options)):
        place = folder / str(count)
        peer = stack.enter_context(uplinkd(place, _ACTIVE, "--idle-timeout", "1h"))
        stack.enter_context(visits.holding(binary, peer, place, count))()
        points["publish"][count] = _publish(peer, place, options)
        points["/auth"][count] = _auth(peer, place, options)
    return points


def _workers(folder: Path, options: argparse.Namespace, stack: ExitStack) -> Points:
    """Two on one core share its cache, and, where the connections are as many as before, each has half of them, and batches of half
    the size."""
    points: Points = {"publish, 64 shared": {}, "publish, 64 each": {}, "/auth": {}}
    for binary, count in itertools.product(_built(folder), _WORKERS):
        place = folder / str(count)
        peer = stack.enter_context(uplinkd(place, _ACTIVE * count, "--workers", str(count)))
        points["publish, 64 shared"][count] = _stay(binary, peer, place, options, _ACTIVE)
        points["publish, 64 each"][count] = _stay(binary, peer, place, options, _ACTIVE * count)
        points["/auth"][count] = _auth(peer, place, options)
    return points


def _stored(folder: Path, options: argparse.Namespace, stack: ExitStack) -> Points:
    points: Points = {"publish": {}}
    for count in _sizes(_STORED, options):
        place = folder / str(count)
        place.mkdir()
        data = place / "data"
        import_devices(place / "fleet.csv", data, _ACTIVE)
        if count:
            asyncio.run(fill(Settings(data=data, nats_listen=""), count, _topic))
        peer = stack.enter_context(start_uplinkd(place, data))
        points["publish"][count] = _publish(peer, place, options)
    return points


def _topic(number: int) -> str:
    return f"/{PRODUCT}/device{number % 1000:04}/user/update"
