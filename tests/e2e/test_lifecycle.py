"""What the owner does to devices, as messages."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from tests.house import cli, cli_json, serving, until


def told(data: Path, product: str) -> list[tuple[str, dict[str, Any]]]:
    """(topic, content) of the lifecycle messages that are stored, oldest first."""
    found = cli_json("messages", "list", "--product", product, "--limit", "1000", data=data)
    return [
        (each["topic"], json.loads(base64.b64decode(each["payload"])))
        for each in found
        if each["origin"] == "lifecycle"
    ]


@pytest.mark.slow
async def test_what_the_owner_does_to_devices_is_told_once_and_in_order(tmp_path: Path) -> None:
    """Made before the server ran, disabled, enabled and deleted while it runs: each is a message, and none holds the secret."""
    data = tmp_path / "data"
    product = cli_json("product", "create", "lifecycle", data=data)["productKey"]
    secret = cli_json("device", "create", product, "lamp-1", data=data)["deviceSecret"]
    with serving(data, "--workers", "1") as server:
        for act in ("disable", "enable", "delete"):
            cli("device", act, product, "lamp-1", data=data)
        await until(lambda: len(told(data, product)) >= 4)
        found = told(data, product)
        assert [topic for topic, _ in found] == [f"/{product}/lamp-1/thing/lifecycle"] * 4
        assert [content["action"] for _, content in found] == ["create", "disable", "enable", "delete"]
        for _, content in found:
            assert content == {
                "action": content["action"],
                "productKey": product,
                "deviceName": "lamp-1",
                "messageCreateTime": content["messageCreateTime"],
            }
            assert secret not in json.dumps(content)
        server.stop()
    with serving(data, "--workers", "1"):
        assert len(told(data, product)) == 4


@pytest.mark.slow
async def test_an_imported_fleet_and_a_deleted_product_are_told_device_by_device(tmp_path: Path) -> None:
    """A row of a file is a device that was made, a product that goes takes each of its devices with it."""
    data = tmp_path / "data"
    fleet = tmp_path / "fleet.csv"
    fleet.write_text("ProductKey,DeviceName,DeviceSecret\n" + "".join(f"a1fleet,lamp-{n:03},\n" for n in range(300)))
    with serving(data, "--workers", "1"):
        cli("device", "import", str(fleet), data=data)
        cli("product", "delete", "a1fleet", "--with-devices", data=data)
        await until(lambda: len(told(data, "a1fleet")) >= 600)
        found = told(data, "a1fleet")
        assert {content["action"] for _, content in found[:300]} == {"create"}
        assert {content["action"] for _, content in found[300:]} == {"delete"}
        assert len({content["deviceName"] for _, content in found[:300]}) == 300
