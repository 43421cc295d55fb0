"""One session of each device, who is online, and doors that shut within a second."""

from __future__ import annotations

import itertools
import json
import re
import time

import pytest

from tests.clients import packets
from tests.clients.conftest import MakeSession
from tests.clients.fleet import SHARED, Fleet, Thing, ask, until
from tests.clients.packets import PINGREQ, Wire
from tests.clients.session import Message, Session
from tests.clients.workers import worker_of


def statuses(thing: Thing) -> list[str]:
    """What was told of a device, in its order: `online`, `offline`."""
    return [json.loads(row["payload"])["status"] for row in thing.stored() if row["origin"] == "status"]


def test_a_second_session_ends_the_first_whichever_worker_it_meets(session: MakeSession, thing: Thing) -> None:
    """The newest is the one that lives and hears; it is so on the same worker and on another one."""
    current = session(thing).opened()
    holder, same = worker_of(thing.server, current.port), set()
    for _ in range(40):
        following = session(thing).opened()
        assert current.ended()
        successor = worker_of(thing.server, following.port)
        same.add(successor == holder)
        current, holder = following, successor
        if same == {True, False}:
            break
    assert False in same, "the kernel gave every connection to one worker"
    current.subscribe(thing.topic("user/get"))
    thing.send("to the newest")
    assert current.next() == Message(thing.topic("user/get"), b"to the newest")


@pytest.mark.parametrize("command", ["disable", "delete", "reset-secret"])
def test_a_session_ends_within_a_second_of_the_command(session: MakeSession, fleet: Fleet, command: str) -> None:
    """Disabled, deleted, or with another secret; on every worker, and nobody else's session ends."""
    thing, bystander = fleet.take(), fleet.take()
    other = session(bystander).opened()
    device = session(thing).opened()
    thing.change(command)
    assert device.ended(within=1)
    assert session(thing).connect() == (5 if command == "disable" else 4)
    assert other.open


def test_device_show_tells_where_a_device_is(session: MakeSession, thing: Thing) -> None:
    """inactive; online by MQTT from an address; offline; lastSeen is of now."""
    shown = thing.shown()
    assert (shown["state"], shown["connection"], shown["lastSeen"]) == ("inactive", "", None)
    device = session(thing).opened()
    assert thing.shows(state="online", connection="mqtt", clientIp="127.0.0.1")
    assert abs(thing.shown()["lastSeen"] / 1000 - time.time()) < 20
    device.disconnect()
    assert thing.shows(state="offline", connection="")


def test_a_device_that_breaks_off_is_offline(session: MakeSession, thing: Thing) -> None:
    """Its closed connection is enough; nobody waits for the keep-alive."""
    device = session(thing).opened()
    assert thing.shows(state="online")
    device.break_off()
    assert thing.shows(state="offline", connection="")


def test_each_change_is_told_once(session: MakeSession, thing: Thing) -> None:
    """Online, offline, online, offline: stored once each, as the platform words it."""
    for _ in range(2):
        device = session(thing).opened()
        assert thing.shows(state="online")
        device.disconnect()
        assert thing.shows(state="offline")
    assert until(lambda: len(statuses(thing)) >= 4)
    assert statuses(thing) == ["online", "offline"] * 2
    rows = [row for row in thing.stored() if row["origin"] == "status"]
    assert {row["topic"] for row in rows} == {f"/as/mqtt/status/{thing.product}/{thing.name}"}
    body = json.loads(rows[0]["payload"])
    assert body.keys() >= {
        "status",
        "productKey",
        "deviceName",
        "time",
        "utcTime",
        "lastTime",
        "utcLastTime",
        "clientIp",
    }
    assert (body["productKey"], body["deviceName"], body["clientIp"]) == (thing.product, thing.name, "127.0.0.1")
    for name in ("time", "lastTime"):
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}", body[name])
    for name in ("utcTime", "utcLastTime"):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", body[name])


def test_a_takeover_leaves_the_device_online(session: MakeSession, thing: Thing) -> None:
    """The old session's end is not the device's; afterwards the last end is."""
    devices: list[Session] = []
    for _ in range(6):
        devices.append(session(thing).opened())
    assert thing.shows(state="online", connection="mqtt")
    time.sleep(0.5)
    assert thing.shown()["state"] == "online"
    devices[-1].disconnect()
    assert thing.shows(state="offline", connection="")
    assert until(lambda: statuses(thing)[-1:] == ["offline"])
    told = statuses(thing)
    assert all(one != other for one, other in itertools.pairwise(told)), told


def test_mqtt_and_https_are_one_presence(session: MakeSession, thing: Thing) -> None:
    """A report over HTTPS beside a session changes nothing; without one the device counts as online for a while."""
    device = session(thing).opened()
    assert thing.shows(state="online", connection="mqtt")
    thing.report((SHARED, b"x"))
    time.sleep(0.5)
    assert thing.shown()["connection"] == "mqtt"
    assert device.open


def test_ping_is_answered(fleet: Fleet) -> None:
    """With PINGRESP, nothing else."""
    with Wire(fleet.server) as wire:
        assert wire.open(fleet.take().login()) == 0
        wire.send(PINGREQ * 3)
        assert [wire.read() for _ in range(3)] == [b"\xd0\x00"] * 3


@pytest.mark.slow
def test_a_device_that_falls_silent_is_let_go_after_one_and_a_half_keep_alives(fleet: Fleet) -> None:
    """At 45 s for a keep-alive of 30 s; one that pings stays; the refused one is told as offline."""
    silent, chatty = fleet.take(), fleet.take()
    with Wire(fleet.server) as one, Wire(fleet.server, tls=True) as other:
        assert one.open(silent.login(), 30) == 0
        assert other.open(chatty.login(), 30) == 0
        started = time.monotonic()
        while one.read(5) is None and time.monotonic() - started < 60:
            other.send(PINGREQ)
            assert other.read() == b"\xd0\x00"
        assert 44 < time.monotonic() - started < 50
        assert other.read(0.1) is None
        other.send(packets.publish(chatty.topic(), b"still here"))
        assert other.read() == b"\x40\x02\x00\x01"
        assert silent.shows(state="offline")
    assert ask("device", "show", chatty.product, chatty.name, data=fleet.server.data)["lastSeen"]
