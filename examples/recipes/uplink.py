"""What devices report, pulled from uplinkd in batches; a batch is acknowledged once it has been written.

Needs `uplinkd app create NAME --product PK`, and what that prints in the environment: NATS_URL, APP_KEY, APP_SECRET.
"""

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

import nats
import nats.errors
import nats.js.errors
from nats.aio.msg import Msg

AT_ONCE = 500
BEFORE_PRODUCT = {"sys": 1, "ota": 3, "shadow": 2, "ext": 2, "as": 3}  # levels of a topic; none in /PRODUCT/DEVICE/…
log = logging.getLogger("uplink")


@dataclass(frozen=True)
class Report:
    message_id: int  # what its device was told; the same when it comes again
    stored_at: datetime  # UTC
    topic: str
    product_key: str
    device_name: str
    origin: str  # https, mqtt; status: the device came or went; lifecycle: it was made, deleted, enabled, disabled
    payload: bytes


def run(write: Callable[[list[Report]], None]) -> None:
    """Call `write` with batch after batch; when it raises, with the same batch again."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    asyncio.run(_pull(write, os.environ["NATS_URL"], os.environ["APP_KEY"], os.environ["APP_SECRET"]))


async def _pull(write: Callable[[list[Report]], None], url: str, key: str, secret: str) -> None:
    nc = await nats.connect(url, user=key, password=secret, inbox_prefix=f"_INBOX.{key}", max_reconnect_attempts=-1)
    uplink = await nc.jetstream().pull_subscribe_bind(key, stream="UPLINKD")
    log.info("connected to %s", url)
    bases: list[tuple[float, int]] = []
    while True:
        try:
            if not bases:  # others when the stream was made anew
                bases = bases_of((await uplink.consumer_info()).config.metadata or {})
            batch = await uplink.fetch(AT_ONCE)
        except nats.errors.TimeoutError:
            continue  # nothing new
        except nats.js.errors.Error as fault:  # as when the server ends
            log.warning("%s", fault)
            bases = []
            await asyncio.sleep(1)
            continue
        while True:
            try:
                await asyncio.to_thread(write, [report_of(message, bases) for message in batch])
                break
            except Exception as fault:
                log.warning("%d messages are not written yet: %s", len(batch), fault)
                await asyncio.sleep(5)
                for message in batch:
                    await message.in_progress()  # else all come again from NATS after 30 s
        for message in batch:
            await message.ack()


def bases_of(metadata: dict[str, str]) -> list[tuple[float, int]]:
    """What makes a messageId of a number in the stream, each up to a number: one, and more where the server was restored from a
    backup."""
    parts = (part.split(":") for part in metadata.get("uplinkd.restored", "").split())
    return [*((int(last), int(base)) for last, base in parts), (float("inf"), int(metadata["uplinkd.base"]))]


def report_of(message: Msg, bases: list[tuple[float, int]]) -> Report:
    topic = message.subject[1:].replace("//", "\0").replace(".", "/").replace("\0", ".")
    levels = topic.split("/")[1:]
    product_key, device_name = levels[BEFORE_PRODUCT.get(levels[0], 0) :][:2]
    origin = (message.headers or {}).get("Uplinkd-Origin", "https")
    told = message.metadata
    number = told.sequence.stream
    base = next(base for last, base in bases if number <= last)
    return Report(base + number, told.timestamp, topic, product_key, device_name, origin, message.data)
