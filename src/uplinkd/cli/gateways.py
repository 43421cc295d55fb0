"""`uplinkd gateways`: which of them live."""

from __future__ import annotations

import asyncio
import time

import click

from uplinkd.cli.common import json_option, local_time, print_json, print_table, settings_options
from uplinkd.engine.embedded import Access, access_for
from uplinkd.peers import Gateway, Peer, gateways_of
from uplinkd.settings import Settings

__all__ = ["gateways"]

_LISTEN_SECONDS = 2.2


@click.command()
@json_option
@settings_options()
def gateways(settings: Settings, as_json: bool) -> None:
    """The gateways that live, on the NATS servers of this one, with their workers and connections. It listens for two seconds."""
    with access_for(settings, start=False) as access:
        found = asyncio.run(_heard(access))
    if as_json:
        print_json([each.document() for each in found])
    else:
        rows = [
            (each.name, each.version, str(each.workers), str(each.connections), local_time(each.since))
            for each in found
        ]
        print_table(("GATEWAY", "VERSION", "WORKERS", "CONNECTIONS", "SINCE"), rows)


async def _heard(access: Access) -> list[Gateway]:
    from uplinkd.engine.groups import open_desk
    from uplinkd.peers import ALIVE, beat_of

    desk = await open_desk(access)
    peers: dict[str, Peer] = {}

    def heard(peer: Peer) -> None:
        peers[peer.instance] = peer

    end = desk.bus.listen(ALIVE, lambda told: heard(beat_of(told, time.monotonic())))
    await asyncio.sleep(_LISTEN_SECONDS)
    end()
    await desk.close()
    return gateways_of(peer for peer in peers.values() if peer.connections >= 0)
