"""The AMQP door with consumers of proton's engine, over a loopback socket without TLS; what they are given is in memory."""

from __future__ import annotations

import asyncio
import gc
import struct
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.delivery.peer import APP, GROUP, SETTINGS, Doorway, credentials, doorway, message, needs_proton, proton
from tests.house import until
from uplinkd.core.errors import Code, Unavailable
from uplinkd.core.groups import Plan, Webhook
from uplinkd.core.model import App, ProductKey
from uplinkd.delivery import amqp, link
from uplinkd.delivery.budget import Budget
from uplinkd.registry import Change, open_registry
from uplinkd.settings import Settings

pytestmark = needs_proton

ACCEPTED, REJECTED, RELEASED, MODIFIED = 0x24, 0x25, 0x26, 0x27
SASL, AMQP = b"AMQP\x03\x01\x00\x00", b"AMQP\x00\x01\x00\x00"


@pytest.fixture
async def house(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Doorway]:
    """Refusals take a second, which tests do not wait for."""
    monkeypatch.setattr(amqp, "_REFUSE_SECONDS", 0.02)
    monkeypatch.setattr(amqp, "_FAREWELL_SECONDS", 0.2)
    async with doorway() as opened:
        yield opened


def change(*, group: int | None = None, app: int | None = None) -> Change:
    return Change(ProductKey(""), None, app, group)


# -- messages


async def test_a_consumer_gets_what_its_group_gets(house: Doorway) -> None:
    """The payload as binary; topic, messageId (text) and generateTime (a number) as application properties; message-id too."""
    peer = await house.consumer(credit=10)
    house.memory.offer(message(1, b"\x00\xff"))
    (got,) = await peer.messages(1)
    assert bytes(got.body) == b"\x00\xff"
    assert got.inferred
    number = str((1 << 60) + 1)
    assert got.properties == {"topic": "/pk/lamp/user/update", "messageId": number, "generateTime": 1_700_000_000_001}
    assert (got.id, got.delivery_count) == (number, 0)
    peer.settle()
    await peer.until(lambda: house.memory.accepted == [message(1, b"\x00\xff")])


@pytest.mark.parametrize("size", [0, 1, 255, 256, 4096, 128 * 1024])
async def test_a_payload_of_any_size_arrives(house: Doorway, size: int) -> None:
    """Also in several frames, and beside a topic as long as can be."""
    peer = await house.consumer(credit=1)
    sent = replace(message(1, topic="/pk/lamp/" + "ü" * 200), payload=bytes(size))
    house.memory.offer(sent)
    (got,) = await peer.messages(1)
    assert bytes(got.body) == sent.payload
    assert got.properties["topic"] == sent.topic


@pytest.mark.parametrize("outcome", [REJECTED, RELEASED, MODIFIED])
async def test_what_is_not_accepted_comes_again(house: Doorway, outcome: int) -> None:
    """With pauses that grow from a second, to whoever has credit; and it says that it came before."""
    peer = await house.consumer(credit=1)
    house.memory.offer(message(1))
    await peer.messages(1)
    peer.settle(outcome)
    (again,) = await peer.messages(1)
    assert again.delivery_count == 1
    peer.settle(outcome)
    (again,) = await peer.messages(1)
    peer.settle(ACCEPTED)
    await peer.until(lambda: house.memory.accepted)
    assert house.memory.again == [(message(1), 1.0), (message(1), 2.0)]


async def test_only_an_outcome_makes_it_done_with(house: Doorway) -> None:
    """A client that settles without one has not accepted."""
    peer = await house.consumer(credit=1)
    house.memory.offer(message(1))
    await peer.messages(1)
    peer.got[0][0].settle()
    await peer.until(lambda: house.memory.again)
    assert not house.memory.accepted


async def test_an_outcome_of_a_client_that_settles_second_is_settled(house: Doorway) -> None:
    """A receiver may say the outcome first and wait until the server is done with it."""
    peer = await house.consumer(credit=1)
    house.memory.offer(message(1))
    await peer.messages(1)
    delivery = peer.got[0][0]
    delivery.update(ACCEPTED)
    await peer.until(lambda: delivery.settled)
    assert house.memory.accepted == [message(1)]


async def test_a_client_that_wants_settled_messages_gets_unsettled_ones(house: Doorway) -> None:
    """Nothing counts as accepted that the client has not accepted. Any source is taken, and told back."""
    peer = await house.connect()
    receiver = peer.attach(source="any/where", snd_settle_mode=1, rcv_settle_mode=1)
    receiver.flow(1)
    house.memory.offer(message(1))
    await peer.messages(1)
    assert not peer.got[0][0].settled
    assert receiver.remote_source.address == "any/where"
    assert (receiver.remote_snd_settle_mode, receiver.remote_rcv_settle_mode) == (0, 0)
    peer.leave()
    await until(lambda: house.memory.again)


# -- credit


async def test_credit_is_respected(house: Doorway) -> None:
    """With a credit of one there is one message, and the next when more credit is given; the others stay with the engine."""
    peer = await house.consumer(credit=1)
    house.memory.offer(*map(message, range(5)))
    await peer.messages(1)
    await asyncio.sleep(0.05)
    assert len(peer.got) == 1
    assert len(house.memory._waiting) == 4
    peer.settle(credit=False)
    await asyncio.sleep(0.02)
    assert len(peer.got) == 0
    peer.receiver.flow(2)
    assert len(await peer.messages(2)) == 2
    assert len(house.memory._waiting) == 2


async def test_two_consumers_share_a_group(house: Doorway) -> None:
    """Each message goes to one of them."""
    peers = [await house.consumer(credit=10) for _ in range(2)]
    house.memory.offer(*map(message, range(10)))
    await until(lambda: sum(len(each.got) for each in peers) == 10)
    assert all(each.got for each in peers)
    assert len({each.id for peer in peers for _, each in peer.got}) == 10


async def test_what_a_consumer_held_when_it_died_goes_to_others(house: Doorway) -> None:
    """After a second, with all that it had not settled."""
    dying = await house.consumer(credit=3)
    house.memory.offer(*map(message, range(3)))
    await dying.messages(3)
    other = await house.consumer(credit=10)
    dying.leave()
    got = await other.messages(3)
    assert {each.id for each in got} == {str(message(number).id) for number in range(3)}
    assert {after for _, after in house.memory.again} == {1.0}


async def test_a_closed_link_gives_back_what_it_held(house: Doorway) -> None:
    """The connection stands, and may have another link."""
    peer = await house.consumer(credit=1)
    house.memory.offer(message(1))
    await peer.messages(1)
    peer.receiver.close()
    await peer.until(lambda: house.memory.again)
    assert house.door.consumers() == []
    peer.got.clear()
    peer.attach("another").flow(1)
    assert len(await peer.messages(1)) == 1


async def test_a_closed_session_gives_back_what_it_held(house: Doorway) -> None:
    """As a closed link does."""
    peer = await house.consumer(credit=1)
    house.memory.offer(message(1))
    await peer.messages(1)
    peer.session.close()
    await peer.until(lambda: house.memory.again)


async def test_withdrawn_credit_is_withdrawn_from_the_group(house: Doorway) -> None:
    """Messages that come afterwards go to others."""
    peer = await house.consumer(credit=5)
    await until(lambda: house.memory._feeds)
    peer.receiver.drain(0)
    await peer.until(lambda: not house.memory._feeds and peer.receiver.credit == 0)
    house.memory.offer(message(1))
    await asyncio.sleep(0.02)
    assert not peer.got
    peer.receiver.flow(1)
    assert len(await peer.messages(1)) == 1


async def test_a_client_that_drains_gets_what_there_is(house: Doorway) -> None:
    """And then hears that there is no more."""
    peer = await house.consumer()
    house.memory.offer(message(1))
    peer.receiver.drain(10)
    await peer.until(lambda: not peer.receiver.draining())
    assert len(peer.got) == 1
    assert peer.receiver.credit == 0


async def test_however_much_credit_there_is_a_window_bounds_what_is_held(
    house: Doorway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that settles nothing gets so many messages and no more; each that it settles makes room for one."""
    monkeypatch.setattr(link, "WINDOW", 10)
    peer = await house.consumer(credit=100_000)
    house.memory.offer(*map(message, range(30)))
    await peer.messages(10)
    await asyncio.sleep(0.05)
    assert len(peer.got) == 10
    assert house.door.consumers()[0].held == 10
    peer.settle(count=4, credit=False)
    assert len(await peer.messages(10)) == 10
    await asyncio.sleep(0.02)
    assert len(peer.got) == 10


async def test_bytes_are_bounded_as_well(house: Doorway) -> None:
    """Of large messages a client holds about 4 MiB: what comes first is asked for as if it were large."""
    peer = await house.consumer(credit=1000)
    house.memory.offer(*(message(number, bytes(100_000)) for number in range(200)))
    await peer.messages(64)
    await asyncio.sleep(0.05)
    assert len(peer.got) == 64
    peer.settle()
    await peer.messages(41)
    await asyncio.sleep(0.05)
    assert len(peer.got) == 41


async def test_a_client_that_does_not_read_is_not_written_to(house: Doorway) -> None:
    """Messages stay with the engine while the socket is full; the client gets them all when it reads again."""
    peer = await house.consumer(credit=1000)
    assert peer._transport
    peer._transport.pause_reading()
    count = 300
    house.memory.offer(*(message(number, bytes(100_000)) for number in range(count)))
    await asyncio.sleep(0.1)
    assert len(house.memory._waiting) > count / 2
    peer._transport.resume_reading()
    got: set[str] = set()
    while len(got) < count:
        got |= {each.id for each in await peer.messages(1)}
        peer.settle()
    await until(lambda: len(house.memory.accepted) == count)


async def test_a_client_that_never_reads_again_is_cut(house: Doorway, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it held goes to others."""
    monkeypatch.setattr(amqp, "_READ_SECONDS", 0.1)
    peer = await house.consumer(credit=1000)
    assert peer._transport
    peer._transport.pause_reading()
    house.memory.offer(*(message(number, bytes(1024 * 1024)) for number in range(12)))
    assert "has not read for 0.1 s" in (await house.reasons())[0]
    await until(lambda: not house.door.connections)
    assert house.memory.again


# -- signing in


@pytest.mark.parametrize("method", ["hmacmd5", "hmacsha1", "hmacsha256", "Hmacsha1"])
async def test_each_sign_method_opens(house: Doorway, method: str) -> None:
    """Those of the platform, in whatever letter case."""
    await house.consumer(method=method)
    assert not house.refusals


async def test_a_wrong_sign_is_refused(house: Doorway) -> None:
    """The client hears that it may not, and nothing else; the record says what was signed, never the sign."""
    peer = await house.connect(secret="wrong")
    assert (await peer.closed())[0] == "amqp:unauthorized-access"
    (refusal,) = house.refusals
    assert (refusal.endpoint, refusal.code, refusal.status, refusal.address) == (
        "amqp",
        Code.AUTH_CHECK_ERROR,
        1,
        "127.0.0.1",
    )
    assert f"'authId={APP.key}&timestamp=1573489088171'" in refusal.reason
    assert credentials(secret="wrong")[1] not in refusal.reason


async def test_a_no_takes_its_time() -> None:
    """A second, so that nobody tries out many."""
    async with doorway() as house:
        begun = asyncio.get_running_loop().time()
        peer = await house.connect(key="app-unknown")
        await peer.closed()
        assert asyncio.get_running_loop().time() - begun > 0.9


async def test_a_registry_that_is_away_is_no_wrong_password(house: Doorway) -> None:
    """The client may try again later, and the record says why."""
    house.known.fault = Unavailable("the database is away")
    peer = await house.connect()
    await peer.closed()
    (refusal,) = house.refusals
    assert (refusal.code, refusal.status) == (Code.UPDATE_SESSION_ERROR, 4)
    assert "the database is away" in refusal.reason


async def test_a_fault_of_ours_is_one_too(house: Doorway, caplog: pytest.LogCaptureFixture) -> None:
    """It is logged with its traceback."""
    house.known.fault = ZeroDivisionError()
    peer = await house.connect()
    await peer.closed()
    assert house.refusals[0].code == Code.COMMON_ERROR
    assert "a fault of ours while a consumer signs in" in caplog.text


async def raw(house: Doorway, sent: bytes) -> bytes:
    """What is answered to these bytes until the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", house.port)
    writer.write(sent)
    answer = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    return answer


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "it begins with b'GET / HT'"),
        (b"AMQP\x00\x00\x09\x01", "AMQP without SASL"),
        (b"AMQP\x00\x01\x00\x00", "AMQP without SASL"),
    ],
)
async def test_another_protocol_is_told_what_is_spoken(
    house: Doorway, sent: bytes, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The header of AMQP 1.0 with SASL, and the end; no traceback."""
    assert await raw(house, sent) == SASL
    assert reason in (await house.reasons())[0]
    assert not caplog.records


async def signed_in(house: Doorway, sent: bytes) -> bytes:
    """What is answered to these bytes after a right sign-in."""
    user, password = (each.encode() for each in credentials())
    response = b"\0" + user + b"\0" + password
    values = b"\xa3\x05PLAIN\xb0" + len(response).to_bytes(4, "big") + response
    body = b"\0\x53\x41\xd0" + (len(values) + 4).to_bytes(4, "big") + b"\0\0\0\x02" + values
    answer = await raw(house, SASL + (len(body) + 8).to_bytes(4, "big") + b"\x02\x01\0\0" + body + sent)
    begin, _, rest = answer.partition(b"\0\x53\x44\xc0\x03\x01\x50\x00")
    assert begin.startswith(SASL)
    return rest


async def test_nobody_signs_in_twice(house: Doorway) -> None:
    """After the sign-in comes AMQP itself: another SASL header is answered with that, and the end."""
    assert await signed_in(house, SASL) == AMQP
    assert "no header of AMQP 1.0" in (await house.reasons())[0]


@pytest.mark.parametrize(
    "sent", [b"\0\0\0\x01\x02\0\0\0", b"\xff\xff\xff\xff\x02\0\0\0", b"\0\0\0\x0c\x02\0\0\0\0\x53\x14\x45"]
)
async def test_malformed_frames_end_a_connection(
    house: Doorway, sent: bytes, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """With proton's condition for the client, a record, and neither a traceback nor a word on standard error."""
    assert b"amqp:" in await signed_in(house, AMQP + sent)
    assert "malformed AMQP: " in (await house.reasons())[0]
    assert not caplog.records
    assert capfd.readouterr().err == ""


async def test_proton_prints_nothing(house: Doorway, capfd: pytest.CaptureFixture[str]) -> None:
    """A client that says something odd would write into the log as often as it likes."""
    login = b"\0%b\0%b" % tuple(each.encode() for each in credentials())
    init = b"\x00\x53\x41\xd0%b\xa3\x05PLAIN\xb0%b" % (
        struct.pack(">II", len(login) + 16, 2),
        struct.pack(">I", len(login)),
    )
    head = struct.pack(">IBBH", 8 + len(init) + len(login), 2, 1, 0)
    _, writer = await asyncio.open_connection("127.0.0.1", house.port)
    writer.write(SASL + head + init + login + AMQP + performative(0x10, b"\xa1\x01c", b"\x40", number(1)))
    await until(lambda: house.door.connections and not house.door.strangers)
    await asyncio.sleep(0.05)
    writer.close()
    assert capfd.readouterr().err == ""


async def test_who_does_not_sign_in_is_closed(house: Doorway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 15 s, as on the platform."""
    monkeypatch.setattr(amqp, "_ARRIVE_SECONDS", 0.05)
    assert await raw(house, SASL[:4]) == b""
    assert house.refusals[0].reason == "no sign-in came within 0.05 s"


async def test_who_opens_no_link_is_closed(house: Doorway, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, with a condition that says so."""
    monkeypatch.setattr(amqp, "_ARRIVE_SECONDS", 0.2)
    peer = await house.connect()
    assert await peer.closed() == ("amqp:not-allowed", "no receiver link was opened within 0.2 s")
    assert house.refusals[0].reason.startswith("consumer 'client-1' of the group 'invoices': no receiver link")


async def test_connections_are_bounded() -> None:
    """All of them."""
    async with doorway(settings=SETTINGS.model_copy(update={"max_connections": 1})) as house:
        await house.consumer()
        assert await raw(house, b"") == b""


async def test_a_silent_connection_gives_way_to_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise as many as may be there without having signed in would keep every consumer out, for 15 seconds each."""
    monkeypatch.setattr(amqp, "_STRANGERS", 3)
    async with doorway() as house:
        await house.consumer()
        silent = [await asyncio.open_connection("127.0.0.1", house.port) for _ in range(3)]
        await until(lambda: len(house.door.strangers) == 3)
        await house.consumer()
        assert await silent[0][0].read() == b""
        assert len(house.door.strangers) == 2
        assert await house.reasons() == ["no sign-in had come, and 3 connections wait for theirs"]
        for _, writer in silent:
            writer.close()


async def test_who_is_being_checked_does_not_give_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that have said who they are; one more is refused then."""
    monkeypatch.setattr(amqp, "_STRANGERS", 1)
    async with doorway() as house:
        wrong = await house.connect(secret="wrong")
        await house.reasons()
        assert await raw(house, b"") == b""
        assert not wrong.lost


async def test_a_real_registry_is_asked(tmp_path: Path) -> None:
    """Its application signs with its secret, and consumes the group that it was let into; a new secret ends that."""
    registry = open_registry(Settings(data=tmp_path))
    app, secret = registry.create_app("billing")
    group = registry.groups.create("invoices", Plan(apps=("billing",)))
    async with doorway(registry=registry) as house:
        peer = await house.consumer(key=app.key, secret=secret)
        registry.renew_app_secret("billing")
        house.door.changed(change(app=app.id))
        assert (await peer.closed())[0] == "amqp:connection:forced"
        assert registry.groups.by_name("invoices") == group
    registry.close()


# -- the link


async def test_there_is_one_link_on_a_connection(house: Doorway) -> None:
    """A second one is detached with a sentence, and the first goes on."""
    peer = await house.consumer(credit=1)
    second = peer.attach("second")
    await peer.until(lambda: second.remote_condition)
    assert second.remote_condition.name == "amqp:not-allowed"
    assert second.remote_condition.description == "there is a receiver link already: a connection has just one"
    assert second.remote_source.type == proton.Terminus.UNSPECIFIED
    house.memory.offer(message(1))
    assert len(await peer.messages(1)) == 1


async def test_consumers_do_not_send(house: Doorway) -> None:
    """A link on which the client would send is detached with a sentence; a client that sends all the same is closed."""
    peer = await house.consumer()
    sender = peer.session.sender("up")
    sender.open()
    await peer.until(lambda: sender.remote_condition)
    assert sender.remote_condition.name == "amqp:not-allowed"
    assert "only receive" in sender.remote_condition.description


async def test_a_client_that_tries_links_without_end_is_closed(house: Doorway) -> None:
    """After 16 refused ones."""
    peer = await house.consumer()
    for number in range(17):
        peer.attach(f"more {number}")
    assert (await peer.closed())[0] == "amqp:not-allowed"
    assert len(house.refusals) == 1


def performative(code: int, *fields: bytes, channel: int = 0) -> bytes:
    """A frame as a client writes it that proton would not be."""
    body = b"\x00\x53%c\xd0" % code + struct.pack(">II", sum(map(len, fields)) + 4, len(fields)) + b"".join(fields)
    return struct.pack(">IBBH", 8 + len(body), 2, 0, channel) + body


def number(value: int) -> bytes:
    return b"\x70" + struct.pack(">I", value)


async def test_sessions_that_come_and_go_leave_nothing_behind(house: Doorway) -> None:
    """As many as a client opens one after the other, also where it does not wait for the end of the one before."""
    peer = await house.consumer(credit=1)
    begin, end = performative(0x11, b"\x40", number(0), number(9), number(9), channel=1), performative(0x17, channel=1)
    for _ in range(50):
        before = peer.heard
        peer.write((begin + end) * 3)
        await until(lambda before=before: peer.heard >= before + 100)  # type: ignore[misc]
    house.memory.offer(message(1))
    await peer.messages(1)
    gc.collect()
    assert sum(isinstance(each, proton.Session) for each in gc.get_objects()) < 10


async def test_a_client_that_opens_sessions_without_end_is_closed(house: Doorway) -> None:
    """Proton cannot tell it so: it prints a line, and is deaf and dumb from then on, while each session costs 3 KB."""
    peer = await house.consumer()
    begin, end = performative(0x11, b"\x40", number(0), number(9), number(9), channel=1), performative(0x17, channel=1)
    peer.write((begin + end) * 500)
    await until(lambda: not house.door.connections)
    (reason,) = await house.reasons()
    assert reason.endswith("a connection has at most 8 sessions, with those that have just ended")


@pytest.mark.parametrize("credit", [2**31, 2**32 - 1])
async def test_credit_beyond_what_can_be_counted_is_refused(house: Doorway, credit: int) -> None:
    """And not taken for none, which a consumer would not learn of."""
    peer = await house.consumer()
    peer.write(performative(0x13, *map(number, (0, 1000, 0, 1000, 0, 0, credit))))
    assert await peer.closed() == ("amqp:invalid-field", "link-credit is at most 2,147,483,647")


async def test_the_largest_credit_is_one(house: Doorway) -> None:
    peer = await house.consumer()
    peer.write(performative(0x13, *map(number, (0, 1000, 0, 1000, 0, 0, 2**31 - 1))))
    house.memory.offer(message(1))
    await peer.messages(1)


async def test_consumers_together_hold_a_bounded_number_of_bytes() -> None:
    """Whoever comes when the others have everything gets a little all the same."""
    async with doorway(budget=Budget(1024**2)) as house:
        for _ in range(6):
            await house.consumer(credit=1000)
            house.memory.offer(*(message(each, bytes(60_000)) for each in range(40)))
            await asyncio.sleep(0.05)
        held = [each.held for each in house.door.consumers()]
        assert min(held) >= 3
        assert sum(held) * 60_000 < 1024**2 + 6 * 256 * 1024
        for peer in house.peers:
            peer.leave()
        await until(lambda: not house.door.connections)
        assert house.door.budget.used == 0


async def test_a_group_has_64_consumers(house: Doorway, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on the platform; one more is told so."""
    monkeypatch.setattr(amqp, "_CONSUMERS_A_GROUP", 2)
    peers = [await house.consumer() for _ in range(2)]
    more = await house.connect()
    receiver = more.attach()
    await more.until(lambda: receiver.remote_condition)
    assert receiver.remote_condition.name == "amqp:resource-limit-exceeded"
    assert "has 2 consumers already" in receiver.remote_condition.description
    assert house.refusals[0].code == Code.REQUEST_TOO_MANY
    peers[0].leave()
    await until(lambda: len(house.door.consumers()) == 1)
    receiver.close()
    more.attach("again")
    await until(lambda: len(house.door.consumers()) == 2)


async def test_consumers_are_told(house: Doorway) -> None:
    """Group, application, client, address, what it holds and would take."""
    peer = await house.consumer(credit=3)
    house.memory.offer(message(1))
    await peer.messages(1)
    (told,) = house.door.consumers()
    assert (told.group, told.app, told.client, told.address) == ("invoices", "billing", "client-1", "127.0.0.1")
    assert (told.held, told.credit) == (1, 2)
    assert told.since > 0


async def test_a_client_may_have_several_sessions(house: Doorway) -> None:
    """Qpid JMS has one of its own beside the program's; the link may be in any."""
    peer = await house.connect()
    peer.session = peer.connection.session()
    peer.session.open()
    peer.attach().flow(1)
    house.memory.offer(message(1))
    assert len(await peer.messages(1)) == 1


# -- idle time-out


@pytest.mark.parametrize("idle", [30, 300, 0])
async def test_an_idle_time_out_within_the_rule_is_taken(house: Doorway, idle: float) -> None:
    """30 to 300 s, or none."""
    await house.consumer(idle=idle)


@pytest.mark.parametrize("idle", [29.999, 300.001])
async def test_an_idle_time_out_beyond_the_rule_is_refused(house: Doorway, idle: float) -> None:
    """With the rule and the value."""
    peer = await house.connect(idle=idle)
    name, text = await peer.closed()
    assert name == "amqp:invalid-field"
    assert text == f"idle-time-out is from 30,000 to 300,000 ms, and not {idle * 1000:,.0f}"
    assert text in (await house.reasons())[0]


async def test_the_server_gives_signs_of_life(house: Doorway, monkeypatch: pytest.MonkeyPatch) -> None:
    """In time for what the client has asked for: bytes come while nothing happens."""
    monkeypatch.setattr(amqp, "_LEAST_IDLE", 0.0)
    peer = await house.consumer(idle=0.2)
    heard = peer.heard
    await until(lambda: peer.heard >= heard + 16)
    assert not peer.lost


async def test_a_silent_client_is_closed(house: Doorway, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it held goes to others."""
    monkeypatch.setattr(amqp, "_SILENCE_SECONDS", 0.2)
    peer = await house.consumer(credit=1)
    house.memory.offer(message(1))
    await peer.messages(1)
    peer.settle(credit=False)
    assert "idle" in (await peer.closed())[1]
    assert (await house.reasons())[0].endswith("nothing came for 0.2 s; the connection is closed")


# -- changes


async def test_a_changed_group_is_connected_to_anew(house: Doorway) -> None:
    """Its consumers are closed with a condition after which clients come again; those of other groups stay."""
    other = replace(GROUP, id=8, name="others")
    house.known.named["others"] = other
    stays = await house.consumer(group="others")
    peer = await house.consumer(credit=1)
    house.memory.offer(message(1))
    await peer.messages(1)
    house.known.named[GROUP.name] = replace(GROUP, generation=2)
    house.door.changed(change(group=7))
    assert await peer.closed() == ("amqp:connection:forced", "the consumer group 'invoices' was changed; connect again")
    assert house.memory.again == [(message(1), 1.0)]
    assert [each.group for each in house.door.consumers()] == ["others"]
    assert not stays.lost


async def test_a_change_that_changes_nothing_closes_nothing(house: Doorway) -> None:
    """Of another product, another application, or of everything."""
    peer = await house.consumer()
    for each in (change(group=7), change(app=1), change(app=9), change(), Change(ProductKey("pk"), 5)):
        house.door.changed(each)
    await asyncio.sleep(0.05)
    assert not peer.lost


async def test_who_may_not_go_on_is_told_why(house: Doorway) -> None:
    """An application that was taken from the group, whose secret is new, or that is gone."""
    peer = await house.consumer()
    house.known.set_plan(apps=())
    house.door.changed(change(group=7))
    name, text = await peer.closed()
    assert name == "amqp:connection:forced"
    assert "may not consume the group" in text
    house.known.set_plan()
    peer = await house.consumer()
    house.known.secrets[APP.key] = "new"
    house.door.changed(change(app=1))
    assert "not allowed any more" in (await peer.closed())[1]
    peer = await house.consumer(secret="new")
    house.known.apps.clear()
    house.door.changed(change())
    assert "there is no application" in (await peer.closed())[1]


async def test_a_registry_that_is_away_closes_nothing(house: Doorway, monkeypatch: pytest.MonkeyPatch) -> None:
    """The look is made again until it answers."""
    monkeypatch.setattr(amqp, "_PAUSE_SECONDS", 0.02)
    peer = await house.consumer()
    house.known.named.clear()
    house.known.fault = Unavailable("away")
    house.door.changed(change(group=7))
    await asyncio.sleep(0.1)
    assert not peer.lost
    house.known.fault = None
    assert "no consumer group" in (await peer.closed())[1]


async def test_a_paused_group_closes_its_consumers(house: Doorway) -> None:
    """Those that are there, and those that come; with a condition after which clients come again."""
    peer = await house.consumer()
    house.known.set_plan(paused=True)
    house.door.changed(change(group=7))
    told = ("amqp:connection:forced", "the consumer group 'invoices' is paused; connect again when it goes on")
    assert await peer.closed() == told
    house.memory.offer(message(1))
    peer = await house.connect()
    peer.attach().flow(1)
    assert await peer.closed() == told
    assert not peer.got


async def test_a_group_with_a_webhook_has_no_consumers(house: Doorway) -> None:
    """The record says where its messages go."""
    house.known.set_plan(apps=(), webhook=Webhook(url="https://backend.example.com"))
    peer = await house.connect()
    await peer.closed()
    assert "go to its webhook" in (await house.reasons())[0]


async def test_a_change_during_a_sign_in_is_not_missed(house: Doorway) -> None:
    """Whatever was looked up before it is looked up again."""
    looks = 0
    find = house.known.find_app

    def changed_meanwhile(key: str) -> App | None:
        nonlocal looks
        looks += 1
        if looks == 1:
            loop.call_soon_threadsafe(house.door.changed, change(group=7))
        return find(key)

    loop = asyncio.get_running_loop()
    house.known.find_app = changed_meanwhile  # type: ignore[method-assign] # a registry that is slow
    await house.consumer()
    assert looks == 2


# -- the end


async def test_a_drain_waits_for_outcomes() -> None:
    """No message more is given, what the client accepts meanwhile counts, and then it is told to come again."""
    async with doorway() as house:
        peer = await house.consumer(credit=10)
        house.memory.offer(message(1))
        await peer.messages(1)
        draining = asyncio.create_task(house.door.drain(2))
        await asyncio.sleep(0.05)
        house.memory.offer(message(2))
        peer.settle()
        assert await peer.closed() == ("amqp:connection:forced", "the server stops; connect again")
        await draining
        assert house.memory.accepted == [message(1)]
        assert not house.memory.again


async def test_a_drain_ends_in_time() -> None:
    """What clients still hold then is given back; who does not answer, or comes now, is cut."""
    async with doorway() as house:
        peer = await house.consumer(credit=1)
        house.memory.offer(message(1))
        await peer.messages(1)
        _, silent = await asyncio.open_connection("127.0.0.1", house.port)
        await until(lambda: house.door.strangers)
        begun = asyncio.get_running_loop().time()
        await house.door.drain(0.2)
        assert asyncio.get_running_loop().time() - begun < 1
        assert not house.door.connections
        assert [each for each, _ in house.memory.again] == [message(1)]
        assert await raw(house, SASL) == b""
        silent.close()


async def test_connections_leave_nothing_behind(house: Doorway) -> None:
    """However they end, their objects go with them."""
    for number in range(12):
        peer = await house.consumer(credit=1)
        house.memory.offer(message(number))
        await peer.messages(1)
        if number % 3 == 0:
            peer.leave()
        elif number % 3 == 1:
            peer.connection.close()
        else:
            peer.settle()
            peer.connection.close()
        await peer.closed()
    await until(lambda: not house.door.connections)
    house.peers.clear()
    gc.collect()
    assert not [each for each in gc.get_objects() if isinstance(each, amqp.Connection | link.Link)]
