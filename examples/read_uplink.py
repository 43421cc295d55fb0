import asyncio
import os

import nats


async def main(url: str, key: str, secret: str) -> None:
    nc = await nats.connect(url, user=key, password=secret, inbox_prefix=f"_INBOX.{key}", max_reconnect_attempts=-1)
    uplink = await nc.jetstream().pull_subscribe_bind(key, stream="UPLINKD")
    while True:
        try:
            for message in await uplink.fetch(100):
                print(message.subject, message.data.decode(errors="replace"), flush=True)
                await message.ack()  # what is not acknowledged within 30 s comes again
        except nats.errors.TimeoutError:
            pass  # nothing new


asyncio.run(main(os.environ["NATS_URL"], os.environ["APP_KEY"], os.environ["APP_SECRET"]))
