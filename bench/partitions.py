"""How many messages a second one publisher stores on three NATS servers with three replicas, by the number of streams.

    python -m bench.partitions [MESSAGES]

The servers are those of examples/cluster.py, all on this machine. Rounds with one stream and with three alternate, each on a
store of its own.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from examples.cluster import NODES, Cluster

from uplinkd.engine import open_publisher
from uplinkd.engine.embedded import Access
from uplinkd.settings import Settings

_ROUNDS, _DEVICES, _UNDER_WAY = 3, 2000, 2000
_PAYLOAD = b"x" * 200


def main(count: int) -> None:
    rates: dict[int, list[float]] = {1: [], 3: []}
    for _ in range(_ROUNDS):
        for partitions, found in rates.items():
            with tempfile.TemporaryDirectory(prefix="uplinkd-") as folder:
                found.append(measured(Path(folder), partitions, count))
                print(f"{partitions} stream{'s' if partitions > 1 else ' '}  {found[-1]:8,.0f} messages/s", flush=True)
    print(
        f"median: one {median(rates[1]):,.0f}, three {median(rates[3]):,.0f}, {median(rates[3]) / median(rates[1]):.2f} times"
    )


def measured(folder: Path, partitions: int, count: int) -> float:
    cluster = Cluster(folder)
    try:
        for number in NODES:
            cluster.start_nats(number)
        settings = Settings(
            data=folder, nats_url=cluster.nats_url, replicas=3, partitions=partitions, publish_timeout=2
        )
        return asyncio.run(stored(settings, count))
    finally:
        cluster.stop()


async def stored(settings: Settings, count: int) -> float:
    """Messages a second, by one process with as many under way as a busy worker has."""
    publisher = open_publisher(settings, Access.of(settings))
    await publisher.start()
    while not publisher.connected:
        await asyncio.sleep(0.05)
    await asyncio.sleep(1)
    subjects = [f"/.a1bench.device{number:04}.user.update".encode() for number in range(_DEVICES)]
    ended, faults = 0, set[str]()

    def done(_message_id: int, fault: str) -> None:
        nonlocal ended
        ended += 1
        if fault:
            faults.add(fault)

    begun = time.perf_counter()
    for number in range(count):
        publisher.publish(subjects[number % _DEVICES], _PAYLOAD, done)
        while number - ended > _UNDER_WAY:
            await asyncio.sleep(0)
    while ended < count:
        await asyncio.sleep(0)
    took = time.perf_counter() - begun
    await publisher.stop()
    if faults:
        raise SystemExit(f"not all was stored: {', '.join(sorted(faults))}")
    return count / took


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 60_000)
