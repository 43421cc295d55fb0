"""The pump of a group with a webhook: what it posts, in which order, and what becomes of what is not accepted."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from standardwebhooks import Webhook

from tests.delivery.receiver import HERE, Got, answer, group, message, receiving
from tests.house import until
from tests.ports import free_port
from uplinkd import __version__
from uplinkd.core.groups import Form, Group
from uplinkd.core.model import Message
from uplinkd.delivery import webhook
from uplinkd.delivery.budget import Budget
from uplinkd.delivery.sender import Sender
from uplinkd.delivery.webhook import Pump
from uplinkd.engine.memory import MemoryDeliveries

HASTE = 500.0
"""A second of a pause takes 2 ms."""


@pytest.fixture(autouse=True)
def _no_wait_for_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory, a feed that was closed hears nothing any more."""
    monkeypatch.setattr(webhook, "_ARRIVING_SECONDS", 0.0)
    monkeypatch.setattr(webhook, "_CLOSING_SECONDS", 0.0)


@pytest.fixture
async def sender() -> AsyncGenerator[Sender]:
    sender = Sender(HERE)
    yield sender
    await sender.close()


@asynccontextmanager
async def pumping(
    group: Group, sender: Sender, *, haste: float = HASTE
) -> AsyncGenerator[tuple[Pump, MemoryDeliveries]]:
    deliveries = MemoryDeliveries(haste=haste)
    pump = Pump(group, deliveries, sender, haste=haste)
    task = asyncio.create_task(pump.run())
    await asyncio.sleep(0)
    try:
        yield pump, deliveries
    finally:
        await pump.stop(5)
        await asyncio.wait_for(task, 5)


def ids(messages: list[Message]) -> list[int]:
    return sorted(each.id for each in messages)


def bad(*numbers: int, status: int = 422, text: str = "no such field") -> Callable[[Got], bytes | int]:
    """A backend that does not take these messages, or a batch with one of them."""

    def answers(got: Got) -> bytes | int:
        return answer(status, text) if set(numbers) & set(got.ids) else 200

    return answers


def down_at_first(attempts: int, said: bytes | int = 500) -> Callable[[Got], bytes | int]:
    """A backend that fails so many times, and then takes everything."""
    left = iter(range(attempts))
    return lambda got: said if next(left, None) is not None else 204


@pytest.mark.parametrize("form", list(Form))
async def test_each_form_arrives_signed(form: Form, sender: Sender) -> None:
    """By the library that receivers verify with; the type of its content is the form's."""
    async with receiving() as receiver:
        mine = group(receiver.url + "?key=1", form=form)
        async with pumping(mine, sender) as (pump, deliveries):
            deliveries.offer(message(1), message(2, "lamp-2"))
            await until(lambda: len(deliveries.accepted) == 2)
    assert sorted(receiver.accepted) == [1, 2]
    for got in receiver.got:
        assert Webhook(mine.secret).verify(got.body, got.headers)
        assert got.target == "/hook?key=1"
        assert got.headers["user-agent"] == f"uplinkd/{__version__}"
        assert (
            got.headers["content-type"]
            == {
                Form.BINARY: "application/json",
                Form.STRUCTURED: "application/cloudevents+json",
                Form.BATCH: "application/cloudevents-batch+json",
            }[form]
        )
        assert {"cookie", "accept-encoding", "authorization"}.isdisjoint(got.headers)
    state = pump.state()
    assert (state.accepted, state.failed, state.open, state.fault) == (2, 0, False, "")
    assert state.last_success <= time.time() * 1000


async def test_a_batch_takes_what_is_there_up_to_its_size(sender: Sender) -> None:
    """Without lingering the first goes at once, and what came meanwhile together."""
    async with (
        receiving() as receiver,
        pumping(group(receiver.url, form=Form.BATCH, batch=10, lanes=1), sender) as (_, d),
    ):
        d.offer(*(message(number) for number in range(1, 26)))
        await until(lambda: len(d.accepted) == 25)
    assert receiver.accepted == list(range(1, 26))
    assert max(len(got.ids) for got in receiver.got) == 10
    assert len(receiver.got) <= 5


async def test_a_batch_is_no_larger_than_a_mebibyte(sender: Sender) -> None:
    """Whatever its number allows; one message always goes."""
    payload = b'"' + b"x" * 300_000 + b'"'
    async with receiving() as receiver, pumping(group(receiver.url, form=Form.BATCH, lanes=1), sender) as (_, d):
        d.offer(*(message(number, payload=payload) for number in range(7)), message(7, payload=b"\xff" * 2**21))
        await until(lambda: len(d.accepted) == 8)
    assert receiver.accepted == list(range(8))
    assert max(len(got.ids) for got in receiver.got) == 3


async def test_the_first_of_a_batch_waits_for_others(sender: Sender) -> None:
    """For its time at most, and no longer than until the batch is full."""
    async with receiving() as receiver:
        mine = group(receiver.url, form=Form.BATCH, batch=4, lanes=1, linger=60.0)
        async with pumping(mine, sender) as (_, deliveries):
            for number in range(1, 4):
                deliveries.offer(message(number))
                await asyncio.sleep(0.002)
            assert not receiver.got
            await until(lambda: len(deliveries.accepted) == 3)
            assert [got.ids for got in receiver.got] == [[1, 2, 3]]
        async with pumping(mine, sender, haste=1.0) as (_, deliveries):
            deliveries.offer(*(message(number) for number in range(4, 9)))
            await until(lambda: len(deliveries.accepted) == 4)
            assert receiver.got[-1].ids == [4, 5, 6, 7]
    assert ids([each for each, _ in deliveries.again]) == [8]


async def test_each_device_is_in_order_whatever_fails(sender: Sender) -> None:
    """Over several lanes, while the backend answers 503, 422, 429 or nothing; each message is accepted just once."""
    said: list[bytes | int] = [503, answer(422), answer(429), b"", answer(302), 200, 200, 200, 204, answer(409)]
    count = 0

    async def answers(got: Got) -> bytes | int:
        nonlocal count
        count += 1
        await asyncio.sleep(0.0005)
        return said[count * 7 % len(said)]

    for form in (Form.BINARY, Form.BATCH):
        async with receiving(answers) as receiver:
            mine = group(receiver.url, tries=1000, lanes=4, form=form, batch=5)
            async with pumping(mine, sender, haste=20_000) as (_, deliveries):
                deliveries.offer(*(message(number, f"lamp-{number % 10}") for number in range(100)))
                await until(lambda d=deliveries: len(d.accepted) == 100)  # type: ignore[misc]
        assert not deliveries.buried
        assert sorted(receiver.accepted) == list(range(100))
        for device in range(10):
            mine_only = [number for number in receiver.accepted if number % 10 == device]
            assert mine_only == sorted(mine_only)
        assert receiver.most_under_way <= 4


@pytest.mark.parametrize("form", list(Form))
@pytest.mark.parametrize("said", [500, 502, 401, 404, 301, b"nonsense\r\n\r\n"], ids=str)
async def test_a_backend_that_is_away_for_a_while_costs_nothing(form: Form, said: bytes | int, sender: Sender) -> None:
    """It fails many more times than a message is tried: everything is delivered afterwards, in order, and nothing buried."""
    async with receiving(down_at_first(30, said)) as receiver:
        async with pumping(group(receiver.url, form=form, tries=2, lanes=2), sender, haste=20_000) as (
            pump,
            deliveries,
        ):
            deliveries.offer(*(message(number, f"lamp-{number % 3}") for number in range(30)))
            await until(lambda: len(deliveries.accepted) == 30)
        assert not deliveries.buried
        for device in range(3):
            mine = [number for number in receiver.accepted if number % 3 == device]
            assert mine == sorted(mine)
    state = pump.state()
    assert (state.failed, state.open) == (30, False)
    assert str(said) in state.fault or said == b"nonsense\r\n\r\n"


@pytest.mark.parametrize("form", list(Form))
@pytest.mark.parametrize("lanes", [1, 4])
async def test_a_refused_message_is_buried_after_its_tries_and_no_other(form: Form, lanes: int, sender: Sender) -> None:
    """With what the backend said, in one line; those of other devices do not wait for it, those of its own do."""
    text = "no such\x1b[31m\r\nfield " + "x" * 300
    async with receiving(bad(5, text=text)) as receiver:
        mine = group(receiver.url, form=form, lanes=lanes, batch=7)
        async with pumping(mine, sender) as (pump, deliveries):
            deliveries.offer(*(message(number, f"lamp-{number % 4}") for number in range(40)))
            await until(lambda: len(deliveries.accepted) == 39)
    ((buried, reason),) = deliveries.buried
    assert buried.id == 5
    assert reason.startswith("it answered 422 Unprocessable Entity, 3 times: no such [31m field xxx")
    assert len(reason) < 300
    assert [number for number in receiver.accepted if number % 4 == 1] == [1, *range(9, 40, 4)]
    alone = [index for index, got in enumerate(receiver.got) if got.ids == [5]]
    assert len(alone) == 3
    if lanes == 1:
        assert alone[1] - alone[0] > 1, "others went on meanwhile"
    assert pump.state().accepted == 39


@pytest.mark.parametrize("form", list(Form))
@pytest.mark.parametrize("lanes", [1, 4])
async def test_a_message_that_breaks_the_backend_is_buried(form: Form, lanes: int, sender: Sender) -> None:
    """It answers 500 for this one alone: others get through, so it is not the backend that is away."""
    async with (
        receiving(bad(5, status=500, text="KeyError")) as receiver,
        pumping(group(receiver.url, form=form, lanes=lanes), sender) as (_, deliveries),
    ):
        deliveries.offer(*(message(number, f"lamp-{number % 4}") for number in range(40)))
        await until(lambda: len(deliveries.accepted) == 39)
    ((buried, reason),) = deliveries.buried
    assert buried.id == 5
    assert reason == "it answered 500 Internal Server Error, 3 times: KeyError"
    assert [number for number in receiver.accepted if number % 4 == 1] == [1, *range(9, 40, 4)]


async def test_a_message_that_breaks_the_backend_is_found_out_by_its_own_device_alone(sender: Sender) -> None:
    """Where no other device has anything to say, the next message of its own shows whose fault it is."""
    async with receiving(bad(1, 2, status=500)) as receiver, pumping(group(receiver.url), sender) as (_, deliveries):
        deliveries.offer(*(message(number) for number in range(1, 7)))
        await until(lambda: len(deliveries.accepted) == 4)
        await until(lambda: len(deliveries.buried) == 2)
    assert [each.id for each, _ in deliveries.buried] == [1, 2]
    assert receiver.accepted == [3, 4, 5, 6]


async def test_a_single_message_is_never_buried_for_500(sender: Sender) -> None:
    """Nothing else shows that the backend is there: it is tried for as long as it takes."""
    async with receiving(down_at_first(50)) as receiver, pumping(group(receiver.url), sender, haste=50_000) as (_, d):
        d.offer(message(1))
        await until(lambda: d.accepted)
    assert len(receiver.got) == 51
    assert len({got.headers["webhook-id"] for got in receiver.got}) == 1
    assert not d.buried


async def test_a_refused_message_stays_while_the_engine_is_away(sender: Sender) -> None:
    """It is buried when that is back."""
    async with receiving(bad(1)) as receiver, pumping(group(receiver.url, tries=1), sender) as (_, deliveries):
        deliveries.connected = False
        deliveries.offer(message(1), message(2))
        await until(lambda: len(receiver.got) > 2)
        deliveries.connected = True
        await until(lambda: deliveries.accepted)
        assert [each.id for each, _ in deliveries.buried] == [1]


async def test_a_device_with_too_much_behind_a_refused_message_waits_no_longer(
    sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tries are cut short, and that is in the reason: what a pump holds is bounded, and nobody else may come to wait for it."""
    monkeypatch.setattr(webhook, "_MOST_BEHIND", 10)
    async with (
        receiving(bad(0)) as receiver,
        pumping(group(receiver.url, tries=16), sender, haste=1.0) as (_, deliveries),
    ):
        deliveries.offer(*(message(number) for number in range(30)))
        await until(lambda: len(deliveries.accepted) == 29)
    ((_, reason),) = deliveries.buried
    assert reason == (
        "it answered 422 Unprocessable Entity, 2 times (too many messages of its device wait for a further try; there are 16): "
        "no such field"
    )


async def test_many_devices_with_refused_messages_hold_no_other_up(
    sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them has few behind its refused one, and together they would fill all that a pump holds."""
    monkeypatch.setattr(webhook, "_MOST_ASIDE", 30)
    async with (
        receiving(bad(*range(0, 200, 10))) as receiver,
        pumping(group(receiver.url, tries=16), sender, haste=1.0) as (_, deliveries),
    ):
        deliveries.offer(*(message(number, f"bad-{number // 10}") for number in range(200)))
        deliveries.offer(*(message(number, "good") for number in range(200, 220)))
        await until(lambda: {*range(200, 220)} <= set(receiver.accepted), 5)
        await asyncio.sleep(0.05)
        state = sorted(receiver.accepted)
    assert state == sorted(set(state))


async def test_large_messages_behind_a_refused_one_hold_no_other_up(
    sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a pump may hold in bytes is not all theirs either, for the hour that sixteen tries take."""
    monkeypatch.setattr(webhook, "_MOST_HELD_BYTES", 400_000)
    async with (
        receiving(bad(0)) as receiver,
        pumping(group(receiver.url, tries=16, lanes=1), sender, haste=1.0) as (_, deliveries),
    ):
        deliveries.offer(*(message(number, "bad", payload=b'"%b"' % (b"x" * 40_000)) for number in range(20)))
        deliveries.offer(message(20, "good"))
        await until(lambda: 20 in receiver.accepted, 5)


async def test_pumps_together_hold_a_bounded_number_of_bytes(sender: Sender) -> None:
    """Those that come when the others have everything get a little all the same; what is given back is free again."""
    budget = Budget(2 * 1024**2)
    async with receiving(lambda got: 500) as receiver:
        pumps = []
        for number in range(4):
            deliveries = MemoryDeliveries(haste=HASTE)
            mine = group(receiver.url, name=f"g{number}", form=Form.BATCH, lanes=1)
            pump = Pump(mine, deliveries, sender, haste=HASTE, budget=budget)
            task = asyncio.create_task(pump.run())
            deliveries.offer(*(message(each, payload=bytes(60_000)) for each in range(100)))
            await until(lambda: receiver.got)
            await asyncio.sleep(0.05)
            pumps.append((pump, task, deliveries))
        for pump, task, _ in pumps:
            await pump.stop(0.1)
            await task
    held = [len(deliveries.again) for *_, deliveries in pumps]
    assert min(held) >= 10
    assert sum(held) * 60_000 < 2 * 1024**2 + 4 * 1024**2
    assert budget.used == 0


@pytest.mark.parametrize("status", [429, 503, 422])
async def test_a_target_that_wants_a_rest_gets_it(status: int, sender: Sender) -> None:
    """Retry-After holds for every lane; for a message that is refused, for that one."""
    left = iter([answer(status, "", "Retry-After: 100")])
    async with (
        receiving(lambda got: next(left, 200)) as receiver,
        pumping(group(receiver.url, lanes=4), sender) as (_, deliveries),
    ):
        deliveries.offer(message(1))
        await until(lambda: receiver.got)
        await asyncio.sleep(0.02)
        deliveries.offer(*(message(number, f"lamp-{number}") for number in range(2, 10)))
        await until(lambda: len(deliveries.accepted) == 9)
    first, *others = receiver.got
    if status == 422:
        others = [got for got in others if got.ids == [1]]
    assert all((got.at - first.at) * HASTE >= 75 for got in others)  # jitter


async def test_the_circuit_opens_and_closes(sender: Sender, caplog: pytest.LogCaptureFixture) -> None:
    """After five failures in a row one attempt at a time goes; one line says so, and one that it is over, without query or payload."""
    down = asyncio.Event()
    caplog.set_level(logging.INFO)

    async def answers(got: Got) -> bytes | int:
        await asyncio.sleep(0.001)
        return answer(503, "payload of a device") if not down.is_set() else 200

    async with receiving(answers) as receiver:
        mine = group(receiver.url + "?secret", lanes=8)
        async with pumping(mine, sender) as (pump, deliveries):
            deliveries.offer(*(message(number, f"lamp-{number}") for number in range(32)))
            await until(lambda: pump.state().open)
            state = pump.state()
            assert state.fault == "it answered 503 Service Unavailable: payload of a device"
            assert state.next_try > 0
            assert state.last_failure > 0
            await until(lambda: receiver.under_way == 0)
            receiver.most_under_way, before = 0, len(receiver.got)
            await until(lambda: len(receiver.got) >= before + 5)
            assert receiver.most_under_way == 1
            assert len({got.ids[0] for got in receiver.got[before:]}) > 1, "lanes take turns"
            down.set()
            await until(lambda: len(deliveries.accepted) == 32)
            assert not pump.state().open
            assert pump.state().next_try == 0
    assert [record.getMessage() for record in caplog.records] == [
        f"webhook of consumer group backend: {receiver.url} takes no messages: it answered 503 Service Unavailable; they wait, "
        "and it is tried again",
        f"webhook of consumer group backend: {receiver.url} takes messages again",
    ]


async def test_a_dead_target_holds_no_other_group_up(sender: Sender) -> None:
    """One of them does not answer at all: the other gets everything meanwhile."""

    async def silence(got: Got) -> bytes:
        await asyncio.sleep(60)
        return b""

    async with receiving(silence) as dead, receiving() as alive:
        dying = pumping(group(dead.url, name="dead", timeout=0.3), sender)
        living = pumping(group(alive.url, name="alive"), sender)
        async with dying as (dead_pump, stuck), living as (_, fine):
            stuck.offer(*(message(number, f"lamp-{number}") for number in range(20)))
            fine.offer(*(message(number, f"lamp-{number}") for number in range(200)))
            await until(lambda: len(fine.accepted) == 200)
            assert not stuck.accepted
            await until(lambda: dead_pump.state().failed)
            assert dead_pump.state().fault == "it did not answer within 0.3 s"


async def test_nobody_at_the_port_is_a_fault_of_the_target(sender: Sender) -> None:
    """The messages are there when somebody listens again."""
    port = free_port()
    async with pumping(group(f"http://127.0.0.1:{port}/hook"), sender) as (pump, deliveries):
        deliveries.offer(message(1))
        await until(lambda: pump.state().failed > 2)
        assert pump.state().fault.startswith("no connection to it: Connection refused")
        async with receiving(port=port):
            await until(lambda: deliveries.accepted)


async def test_stop_ends_what_is_under_way_and_gives_the_rest_back(sender: Sender) -> None:
    """What the backend took is accepted; what it did not get is offered to others, in order."""
    go = asyncio.Event()

    async def answers(got: Got) -> int:
        await go.wait()
        return 200

    async with receiving(answers) as receiver, pumping(group(receiver.url, lanes=1), sender) as (pump, deliveries):
        deliveries.offer(*(message(number, f"lamp-{number}") for number in range(6)))
        await until(lambda: receiver.got)
        stopping = asyncio.create_task(pump.stop(5))
        await asyncio.sleep(0.01)
        go.set()
        await stopping
        deliveries.offer(message(7))
    assert ids(deliveries.accepted) == receiver.accepted == [0]
    assert [each.id for each, _ in deliveries.again] == [1, 2, 3, 4, 5]


async def test_stop_waits_no_longer_than_it_may(sender: Sender) -> None:
    """What is not answered by then is offered again as well, and so is what was put aside."""

    async def answers(got: Got) -> bytes | int:
        if got.ids != [1]:
            await asyncio.sleep(60)
        return answer(422)

    async with (
        receiving(answers) as receiver,
        pumping(group(receiver.url, lanes=1), sender, haste=1) as (pump, deliveries),
    ):
        deliveries.offer(message(1), message(2), message(3, "lamp-2"))
        await until(lambda: len(receiver.got) == 2)
        await pump.stop(0.01)
        assert not deliveries.accepted
        assert [each.id for each, _ in deliveries.again] == [1, 2, 3]


async def test_a_cancelled_pump_gives_everything_back(sender: Sender) -> None:
    """Also where nobody had the time to stop it."""
    async with receiving(lambda got: 500) as receiver:
        deliveries = MemoryDeliveries()
        pump = Pump(group(receiver.url), deliveries, sender)
        task = asyncio.create_task(pump.run())
        deliveries.offer(message(1), message(2))
        await until(lambda: receiver.got)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [each.id for each, _ in deliveries.again] == [1, 2]
        await pump.stop(0)


async def test_held_messages_are_renewed(sender: Sender) -> None:
    """In half the time in which they would be offered to others: those under way, in a queue, and put aside."""
    async with receiving(bad(1)) as receiver:
        mine = group(receiver.url, tries=1000, ack_wait=1.0)
        async with pumping(mine, sender) as (_, deliveries):
            deliveries.offer(message(1), message(2))
            await until(lambda: deliveries.working >= 20)
            assert not deliveries.accepted


async def test_a_pump_holds_a_bounded_number(sender: Sender) -> None:
    """While the target is away: the others stay where they are stored."""
    async with receiving(lambda got: 500) as receiver, pumping(group(receiver.url, lanes=2), sender) as (_, deliveries):
        deliveries.offer(*(message(number) for number in range(1000)))
        await until(lambda: len(receiver.got) > 5)
    assert len(deliveries.again) == 32


async def test_a_pump_holds_a_bounded_number_of_bytes(sender: Sender, monkeypatch: pytest.MonkeyPatch) -> None:
    """However large each of them is."""
    monkeypatch.setattr(webhook, "_MOST_HELD_BYTES", 100_000)
    monkeypatch.setattr(webhook, "_MOST_WANTED", 4)
    async with (
        receiving(lambda got: 500) as receiver,
        pumping(group(receiver.url, form=Form.BATCH, lanes=1), sender) as (_, deliveries),
    ):
        deliveries.offer(*(message(number, payload=b"x" * 50_000) for number in range(100)))
        await until(lambda: len(receiver.got) > 5)
    assert len(deliveries.again) <= 8


@pytest.mark.parametrize("form", list(Form))
async def test_a_sample_event_is_sent_on_demand(form: Form, sender: Sender) -> None:
    """Of a type of its own, once, and the answer told."""
    async with receiving(lambda got: answer(404, "no such page")) as receiver:
        mine = group(receiver.url, form=form)
        tried = await webhook.try_delivery(mine, sender)
    (got,) = receiver.got
    assert (tried.status, tried.fault, tried.text) == (404, "it answered 404 Not Found", "no such page")
    assert tried.seconds > 0
    assert Webhook(mine.secret).verify(got.body, got.headers)
    assert "io.uplinkd.test" in (got.headers.get("ce-type", ""), *_types(got))


def _types(got: Got) -> list[Any]:
    document = json.loads(got.body)
    return [each.get("type") for each in (document if isinstance(document, list) else [document])]
