"""kill -9 under load over MQTT: of a worker, of the engine, of everything. What was acknowledged is stored, or reaches its device."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.clients.fleet import Fleet, Login, Thing, make_fleet, until
from tests.clients.session import TRANSPORTS, Session
from tests.clients.workers import worker_of
from tests.house import Server, cli, cli_json, command, freeze, serving, stored

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("faults")]

LIMITS = ("--workers", "2", "--device-rate", "0", "--device-bytes", "0", "--auth-rate", "0", "--address-auth-rate", "0")

# Between two messages of a device, so that no test stores more than one `messages list` can show.
PAUSE = 0.005

Fault = Callable[[Server, int], None]


class Device(threading.Thread):
    """A paho device that makes its session anew whenever it ends; `step` is what it does while there is one."""

    clean = True

    def __init__(self, thing: Thing, number: int) -> None:
        super().__init__(daemon=True)
        self.thing = thing
        self.number = number
        self.ends = 0
        self.port = 0
        self.running = True
        self.last_success = 0.0
        self.problem: Exception | None = None

    def run(self) -> None:
        try:
            while self.running:
                session = Session(self.thing.server, self.sign_in(), TRANSPORTS[self.number % 3], clean=self.clean)
                with contextlib.suppress(OSError, AssertionError):
                    self._serve(session)
                session.close()
                self.ends += 1
                time.sleep(0.05)
        except Exception as problem:  # the test tells it
            self.problem = problem

    def _serve(self, session: Session) -> None:
        if session.connect(within=5) == 0:
            self.port = session.port
            self.prepare(session)
            while self.running and session.open:
                self.step(session)

    def sign_in(self) -> Login:
        return self.thing.login()

    def prepare(self, session: Session) -> None: ...

    def step(self, session: Session) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        self.running = False
        self.join(20)
        assert not self.is_alive()
        assert self.problem is None, self.problem


class Reporter(Device):
    """Publishes with QoS 1, one after the other; what was not acknowledged it does not count."""

    def __init__(self, thing: Thing, number: int) -> None:
        super().__init__(thing, number)
        self.acknowledged: list[bytes] = []
        self._count = itertools.count()

    def step(self, session: Session) -> None:
        payload = b"%d/%d" % (self.number, next(self._count))
        if session.publish(self.thing.topic(), payload):
            self.acknowledged.append(payload)
            self.last_success = time.monotonic()
        time.sleep(PAUSE)


class Listener(Device):
    """A persistent session that hears what is sent down."""

    clean = False

    def __init__(self, thing: Thing, number: int) -> None:
        super().__init__(thing, number)
        self.heard: Counter[str] = Counter()
        self.ready = threading.Event()

    def prepare(self, session: Session) -> None:
        if not session.present:
            assert session.subscribe(self.thing.topic("user/get")) == 1
        self.ready.set()

    def step(self, session: Session) -> None:
        with contextlib.suppress(AssertionError):
            self.heard[session.next(within=0.1).payload.decode()] += 1


class Poster(threading.Thread):
    """A device without MQTT: it reports over HTTPS, and reads what rides home."""

    def __init__(self, thing: Thing) -> None:
        super().__init__(daemon=True)
        self.thing = thing
        self.running = True
        self.acknowledged: list[bytes] = []
        self.heard: list[str] = []
        self.last_success = 0.0
        self.problem: Exception | None = None

    def run(self) -> None:
        try:
            for count in itertools.count():
                if not self.running:
                    return
                payload = b"%b/%d" % (self.thing.name.encode(), count)
                with contextlib.suppress(OSError, http.client.HTTPException, AssertionError, KeyError):
                    (info,) = self.thing.report(("user/update", payload))
                    assert info["messageId"]
                    self.acknowledged.append(payload)
                    self.last_success = time.monotonic()
                    if "data" in info:
                        self.heard.append(info["data"])
                time.sleep(PAUSE)
        except Exception as problem:  # the test tells it
            self.problem = problem

    def finish(self) -> None:
        self.running = False
        self.join(20)
        assert self.problem is None, self.problem


class Subscriber(Device):
    """An application that hears what the devices of its product report."""

    def __init__(self, thing: Thing, login: Login, number: int) -> None:
        super().__init__(thing, number)
        self.login = login
        self.heard: set[bytes] = set()
        self.ready = threading.Event()

    def sign_in(self) -> Login:
        return self.login

    def prepare(self, session: Session) -> None:
        assert session.subscribe(f"/{self.thing.product}/#") == 1
        self.ready.set()

    def step(self, session: Session) -> None:
        with contextlib.suppress(AssertionError):
            self.heard.add(session.next(within=0.1).payload)
            self.last_success = time.monotonic()


class Operator(threading.Thread):
    """Sends down to devices by `uplinkd send`, each call a process of its own; what ended well it counts as acknowledged."""

    def __init__(self, things: list[Thing], name: str) -> None:
        super().__init__(daemon=True)
        self._things = itertools.cycle(things)
        self._label = name
        self.running = True
        self.acknowledged: list[tuple[str, str]] = []
        self.refused = 0
        self.problem: BaseException | None = None

    def run(self) -> None:
        try:
            for count in itertools.count():
                if not self.running:
                    return
                thing, text = next(self._things), f"{self._label}/{count}"
                words = ("send", thing.product, thing.name, thing.topic("user/get"), text)
                if command(*words, data=thing.server.data).returncode == 0:
                    self.acknowledged.append((thing.name, text))
                else:
                    self.refused += 1
        except BaseException as problem:  # the test tells it
            self.problem = problem

    def finish(self) -> None:
        self.running = False
        self.join(90)
        assert self.problem is None, self.problem


def kill_a_worker(server: Server, port: int) -> None:
    """The one that holds the connection from `port`."""
    os.kill(worker_of(server, port), signal.SIGKILL)


def kill_the_engine(server: Server, _: int) -> None:
    (engine,) = server.children("nats-server")
    os.kill(engine, signal.SIGKILL)


def kill_everything(server: Server, _: int) -> None:
    server.kill()
    server.start()


def freeze_the_engine(server: Server, _: int) -> None:
    (engine,) = server.children("nats-server")
    freeze(engine)
    time.sleep(4)
    os.kill(engine, signal.SIGCONT)


FAULTS = (kill_a_worker, kill_the_engine, kill_everything, freeze_the_engine)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with serving(tmp_path / "data", *LIMITS) as server:
        yield make_fleet(server, 12)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_was_acknowledged_to_reporting_devices_is_stored(fleet: Fleet, fault: Fault) -> None:
    """Eight devices over three transports; they come back by themselves, and every PUBACK stands for a stored message."""
    reporters = [Reporter(fleet.take(), number) for number in range(9)]
    for reporter in reporters:
        reporter.start()
    assert until(lambda: all(reporter.acknowledged for reporter in reporters), within=25)
    time.sleep(1)
    fault(fleet.server, reporters[0].port)
    struck = time.monotonic()
    time.sleep(4)
    assert until(lambda: all(reporter.last_success > struck for reporter in reporters), within=25)
    for reporter in reporters:
        reporter.finish()
    acknowledged = {payload for reporter in reporters for payload in reporter.acknowledged}
    assert 300 < len(acknowledged) < 9000
    found = set(stored(fleet.server.data, fleet.product).values())
    assert not acknowledged - found, f"{len(acknowledged - found)} of {len(acknowledged)} are not stored"
    assert "Traceback" not in fleet.server.log.read_text()


@pytest.mark.parametrize("fault", FAULTS)
def test_what_was_acknowledged_to_senders_reaches_the_devices(
    fleet: Fleet, fault: Fault, record_property: Callable[[str, object], None]
) -> None:
    """Persistent sessions get each of them at least once, through the fault; some may come twice."""
    listeners = [Listener(fleet.take(), number) for number in range(6)]
    for listener in listeners:
        listener.start()
    assert all(listener.ready.wait(10) for listener in listeners)
    things = [listener.thing for listener in listeners]
    operators = [Operator(things[number:] + things[:number], f"operator {number}") for number in range(3)]
    for operator in operators:
        operator.start()
    assert until(lambda: all(operator.acknowledged for operator in operators), within=25)
    fault(fleet.server, listeners[0].port)
    time.sleep(4)
    for operator in operators:
        operator.finish()
    acknowledged = [pair for operator in operators for pair in operator.acknowledged]
    heard = {listener.thing.name: listener.heard for listener in listeners}

    def missing() -> list[tuple[str, str]]:
        return [(name, text) for name, text in acknowledged if not heard[name][text]]

    complete = until(lambda: not missing(), within=15)
    for listener in listeners:
        listener.finish()
    assert complete, f"{len(missing())} of {len(acknowledged)} never came: {missing()[:10]}"
    record_property("duplicates", sum(counter.total() - len(counter) for counter in heard.values()))
    assert "Traceback" not in fleet.server.log.read_text()


@pytest.mark.parametrize("fault", FAULTS)
def test_what_was_acknowledged_to_senders_rides_home(fleet: Fleet, fault: Fault) -> None:
    """Devices without MQTT get each of them at least once, in the order of sending but for those that come twice."""
    posters = [Poster(fleet.take()) for _ in range(4)]
    for poster in posters:
        poster.start()
    operators = [Operator([poster.thing], f"to {poster.thing.name}") for poster in posters[:2]]
    for operator in operators:
        operator.start()
    assert until(lambda: all(len(operator.acknowledged) > 1 for operator in operators), within=15)
    with socket.create_connection(("127.0.0.1", fleet.server.mqtt_plain_port)) as somewhere:
        fault(fleet.server, somewhere.getsockname()[1])
    struck = time.monotonic()
    time.sleep(4)
    for operator in operators:
        operator.finish()
    assert until(lambda: all(poster.last_success > struck for poster in posters), within=25)
    for poster, operator in zip(posters, operators, strict=False):
        wanted = [text for _, text in operator.acknowledged]
        assert until(lambda poster=poster, wanted=wanted: not set(wanted) - set(poster.heard), within=15), (  # type: ignore[misc]
            set(wanted) - set(poster.heard)
        )
        first = list(dict.fromkeys(poster.heard))
        assert [text for text in first if text in wanted] == wanted
    for poster in posters:
        poster.finish()
    acknowledged = {payload for poster in posters for payload in poster.acknowledged}
    assert not acknowledged - set(stored(fleet.server.data, fleet.product).values())


@pytest.mark.parametrize("fault", FAULTS)
def test_a_subscriber_hears_on_after_the_fault(fleet: Fleet, fault: Fault) -> None:
    """A plain subscription is live: it has gaps where the server was away, and everything again afterwards."""
    made = cli_json("app", "create", "reader", "--product", fleet.product, data=fleet.server.data)
    posters = [Poster(fleet.take()) for _ in range(3)]
    reader = Subscriber(posters[0].thing, Login("reader", made["key"], made["secret"]), 1)
    reader.start()
    assert reader.ready.wait(10)
    for poster in posters:
        poster.start()
    assert until(lambda: len(reader.heard) > 20, within=15)
    fault(fleet.server, reader.port)
    time.sleep(5)
    struck = time.monotonic()
    assert until(lambda: reader.last_success > struck, within=25)
    time.sleep(2)
    before = [len(poster.acknowledged) for poster in posters]
    time.sleep(2)
    after = [set(poster.acknowledged[count:]) for poster, count in zip(posters, before, strict=True)]
    assert all(after)
    assert until(lambda: not set().union(*after) - reader.heard, within=5)
    for poster in posters:
        poster.finish()
    reader.finish()


@pytest.mark.parametrize("fault", FAULTS[1:])
def test_what_waits_for_an_absent_session_outlives_the_fault(fleet: Fleet, fault: Fault) -> None:
    """Its subscription and its messages are on disk: it gets them in their order when it returns."""
    thing = fleet.take()
    first = Session(fleet.server, thing.login(), clean=False).opened()
    assert first.subscribe(thing.topic("user/get")) == 1
    first.disconnect()
    for number in range(5):
        cli("send", thing.product, thing.name, thing.topic("user/get"), str(number), data=fleet.server.data)
    fault(fleet.server, 0)
    sessions: list[Session] = []

    def returned() -> bool:
        session = Session(fleet.server, thing.login(), clean=False)
        with contextlib.suppress(OSError, AssertionError):
            if session.connect() == 0:
                sessions.append(session)
                return True
        session.close()
        return False

    assert until(returned, within=25)
    (again,) = sessions
    assert again.present
    assert [again.next(10).payload for _ in range(5)] == [b"%d" % number for number in range(5)]
    again.disconnect()


def test_persistent_sessions_outlive_a_restart(fleet: Fleet) -> None:
    """A stop and a start, as for an upgrade."""
    server, thing = fleet.server, fleet.take()
    first = Session(server, thing.login(), clean=False).opened()
    assert first.subscribe(thing.topic("user/get")) == 1
    assert server.stop() == 0
    assert first.ended()
    first.close()
    server.start()
    cli("send", thing.product, thing.name, thing.topic("user/get"), "after the restart", data=server.data)
    again = Session(server, thing.login(), clean=False).opened()
    assert again.present
    assert again.next().payload == b"after the restart"
    again.disconnect()


def test_presence_is_right_after_a_worker_was_killed(fleet: Fleet) -> None:
    """A device whose session died with its worker is offline, or online again when it came back; each change is told once."""
    gone, back = fleet.take(), fleet.take()
    first = Session(fleet.server, gone.login()).opened()
    assert gone.shows(state="online")
    kill_a_worker(fleet.server, first.port)
    assert first.ended()
    first.close()
    again = Session(fleet.server, back.login()).opened()
    assert back.shows(state="online", connection="mqtt")
    assert until(lambda: gone.shown()["state"] == "offline", within=30)

    def told() -> list[bool]:
        return [b"online" in row["payload"] for row in gone.stored() if row["origin"] == "status"]

    assert until(lambda: len(told()) > 1, within=20)
    assert told() == [True, False]
    assert again.open
    again.disconnect()
