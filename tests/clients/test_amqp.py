"""The usual clients of AMQP 1.0 as consumers, over TLS: python-qpid-proton's and npm's package rhea, and the examples with each."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.clients.tools import DRIVERS, ROOT, Driver, heard, needs, node_modules
from tests.delivery.peer import APP, GROUP, SETTINGS, Doorway, credentials, doorway, message, needs_proton, proton
from uplinkd import tls
from uplinkd.core.model import Message

pytestmark = needs_proton

T = TypeVar("T")
EXAMPLES = ROOT / "examples"


class Porch:
    """A door in a thread of its own, as clients of these tests block."""

    def __init__(self, data: Path) -> None:
        self.ca = data / "tls" / "ca.pem"
        self._context = tls.server_context(tls.ensure_material(SETTINGS.model_copy(update={"data": data})))
        self._ready = threading.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._run(),), daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    async def _run(self) -> None:
        async with doorway(tls=self._context) as self.house:
            self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
            self.port = self.house.port
            self._ready.set()
            await self._over.wait()

    def do(self, act: Callable[[Doorway], T]) -> T:
        """Have `act` done in the door's thread."""

        async def acting() -> T:
            return act(self.house)

        return asyncio.run_coroutine_threadsafe(acting(), self._loop).result(10)

    def offer(self, *messages: Message) -> None:
        self.do(lambda house: house.memory.offer(*messages))

    def keep_one_waiting(self) -> None:
        if not self.do(lambda house: len(house.memory._waiting)):
            self.offer(message(1))
        threading.Event().wait(0.01)

    def until(self, condition: Callable[[Doorway], object]) -> None:
        for _ in range(500):
            if self.do(condition):
                return
            threading.Event().wait(0.01)
        raise AssertionError("it did not come true")

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(10)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the certificates are that all tests share: a key takes half a second."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def porch(data: Path) -> Iterator[Porch]:
    opened = Porch(data)
    yield opened
    opened.close()


# -- python-qpid-proton


@pytest.fixture
def proton_client(porch: Porch) -> Iterator[Callable[..., Any]]:
    """Gives a connection of Proton's blocking client."""
    from proton.utils import BlockingConnection

    connections = []

    def connect(*, heartbeat: float = 60, **of: str) -> Any:
        user, password = credentials(**of)
        domain = proton.SSLDomain(proton.SSLDomain.MODE_CLIENT)
        domain.set_trusted_ca_db(str(porch.ca))
        domain.set_peer_authentication(proton.SSLDomain.VERIFY_PEER_NAME)
        url = f"amqps://localhost:{porch.port}"
        more: Any = {"user": user, "password": password, "allowed_mechs": "PLAIN", "heartbeat": heartbeat}
        connection = BlockingConnection(url, timeout=5, ssl_domain=domain, **more)
        connections.append(connection)
        return connection

    yield connect
    for connection in connections:
        connection.close()


def test_a_proton_consumer_receives(porch: Porch, proton_client: Callable[..., Any]) -> None:
    """What it accepts is done with, what it rejects or releases comes again."""
    receiver = proton_client(method="hmacsha256").create_receiver("any/address", credit=1)
    porch.offer(message(1), message(2))
    first = receiver.receive(5)
    assert first.body == b"payload 1"
    assert first.properties == {
        "topic": "/pk/lamp/user/update",
        "messageId": str(message(1).id),
        "generateTime": message(1).generate_time,
    }
    receiver.reject()
    assert receiver.receive(5).body == b"payload 2"
    receiver.accept()
    again = receiver.receive(5)
    assert (again.body, again.delivery_count) == (b"payload 1", 1)
    receiver.release(delivered=False)
    assert receiver.receive(5).delivery_count == 2
    receiver.accept()
    receiver.connection.close()  # this client says nothing before it waits for something
    porch.until(lambda house: len(house.memory.accepted) == 2)


def test_proton_consumers_share_a_group(porch: Porch, proton_client: Callable[..., Any]) -> None:
    """And what one of them held when it went goes to the other."""
    leaving, staying = (proton_client().create_receiver("", credit=2) for _ in range(2))
    porch.until(lambda house: len(house.door.consumers()) == 2)
    porch.offer(*map(message, range(4)))
    mine = [leaving.receive(5) for _ in range(2)]
    others = []
    leaving.connection.close()
    for _ in range(4):
        others.append(staying.receive(5))
        staying.accept()
    assert {each.id for each in others} == {str(message(number).id) for number in range(4)}
    assert {each.id for each in mine} < {each.id for each in others}


def test_proton_hears_why_not(porch: Porch, proton_client: Callable[..., Any]) -> None:
    """A wrong sign; a second link; an idle time-out beyond the rule: Proton announces half of its heartbeat."""
    with pytest.raises(proton.ConnectionException, match="unauthorized-access"):
        proton_client(secret="wrong")
    connection = proton_client()
    connection.create_receiver("", credit=1)
    with pytest.raises(proton.LinkException, match="just one"):
        connection.create_receiver("", credit=1, name="second")
    with pytest.raises(proton.LinkException, match="only receive"):
        connection.create_sender("up")
    with pytest.raises(proton.ConnectionException, match="30,000 to 300,000 ms, and not 10,000"):
        proton_client(heartbeat=20)


def test_the_example_with_proton_reads_a_group(porch: Porch, tmp_path: Path) -> None:
    """examples/read_group.py as it stands."""
    url = f"amqps://localhost:{porch.port}"
    printed = heard(
        [sys.executable, str(EXAMPLES / "read_group.py"), url, APP.key, "secret", GROUP.name, str(porch.ca)],
        "/pk/lamp/user/update payload 1",
        porch.keep_one_waiting,
        cwd=tmp_path,
    )
    assert "/pk/lamp/user/update payload 1\n" in printed


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_documents_have_the_examples(language: str) -> None:
    """What was tried is what is read there, but for the comment at its head."""
    document = (ROOT / "docs" / language / "amqp.md").read_text()
    for name, comment in (("read_group.py", "#"), ("read_group.mjs", "//")):
        lines = (EXAMPLES / name).read_text().splitlines(keepends=True)
        code = "".join(itertools.dropwhile(lambda line, mark=comment: line.startswith(mark), lines))  # type: ignore[misc]
        assert code in document, f"docs/{language}/amqp.md has another {name}"


# -- rhea


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a script finds the package: modules are looked for beside the file that imports them."""
    (tmp_path / "node_modules").symlink_to(node_modules())
    for script in (DRIVERS / "consumer.mjs", EXAMPLES / "read_group.mjs"):
        shutil.copy(script, tmp_path)
    return tmp_path


@pytest.fixture
def rhea(folder: Path) -> Iterator[Callable[[], Driver]]:
    started: list[Driver] = []

    def start() -> Driver:
        started.append(Driver(["node", "consumer.mjs"], cwd=folder))
        return started[-1]

    yield start
    for each in started:
        each.close()


def options(porch: Porch, **of: str) -> dict[str, Any]:
    user, password = credentials(**of)
    return {"port": porch.port, "ca": str(porch.ca), "username": user, "password": password, "idle_time_out": 60000}


@needs("node", "npm")
def test_a_rhea_consumer_receives(porch: Porch, rhea: Callable[[], Driver]) -> None:
    """Ids as text with all their digits; accept, release, reject, modified; credit of one."""
    client = rhea()
    client.do(command="connect", **options(porch), credit=1)
    client.event("link")
    porch.offer(message(1), message(2))
    first = client.event("message")
    assert first["id"] == first["properties"]["messageId"] == str(message(1).id)
    assert first["properties"]["generateTime"] == message(1).generate_time
    assert porch.do(lambda house: len(house.memory._waiting)) == 1
    for count, outcome in enumerate(("release", "reject", "modified")):
        client.do(command="settle", outcome=outcome)
        porch.until(lambda house, count=count: len(house.memory.again) == count + 1)  # type: ignore[misc]
        client.do(command="credit", count=1)
        client.event("message")
    client.do(command="settle", outcome="accept")
    porch.until(lambda house: house.memory.accepted)


@needs("node", "npm")
def test_what_a_killed_rhea_consumer_held_goes_to_another(porch: Porch, rhea: Callable[[], Driver]) -> None:
    """kill -9 while it holds messages."""
    dying, other = rhea(), rhea()
    dying.do(command="connect", **options(porch), credit=2)
    dying.event("link")
    porch.offer(message(1), message(2))
    dying.event("message")
    dying.event("message")
    other.do(command="connect", **options(porch), credit=2)
    other.event("link")
    dying.close()
    assert {other.event("message")["id"] for _ in range(2)} == {str(message(1).id), str(message(2).id)}


@needs("node", "npm")
def test_rhea_hears_why_not(porch: Porch, rhea: Callable[[], Driver]) -> None:
    """A second link, a link on which it would send, an idle time-out beyond the rule, a wrong sign."""
    client = rhea()
    client.do(command="connect", **options(porch), credit=1)
    client.event("link")
    client.do(command="second")
    assert client.event("link_error")["description"] == "there is a receiver link already: a connection has just one"
    client.do(command="sender")
    assert "only receive" in client.event("link_error")["description"]
    client = rhea()
    client.do(command="connect", **options(porch) | {"idle_time_out": 10000})
    assert client.event("error")["condition"] == "amqp:invalid-field"
    client = rhea()
    client.do(command="connect", **options(porch, secret="wrong"))
    assert "authenticate" in client.event("error")["description"]


@needs("node", "npm")
def test_the_example_with_rhea_reads_a_group(porch: Porch, folder: Path) -> None:
    """examples/read_group.mjs as it stands."""
    printed = heard(
        ["node", "read_group.mjs", f"localhost:{porch.port}", APP.key, "secret", GROUP.name],
        "/pk/lamp/user/update payload 1",
        porch.keep_one_waiting,
        cwd=folder,
        NODE_EXTRA_CA_CERTS=str(porch.ca),
    )
    assert "/pk/lamp/user/update payload 1\n" in printed
