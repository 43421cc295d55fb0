"""A device with the platform's own SDK, aliyun-iot-linkkit; driven by JSON lines as device.mjs is. Runs in its own environment."""

import base64
import json
import sys
import threading
from pathlib import Path
from typing import Any

from linkkit.linkkit import LinkKit

_one_at_a_time = threading.Lock()  # the SDK calls back from threads of its own


def tell(event: str, **more: Any) -> None:
    with _one_at_a_time:
        print(json.dumps({"event": event, **more}), flush=True)


def connect(
    port: int, product: str, device: str, secret: str, ca: str, clean: bool = True, protocol: str = "MQTTv311"
) -> Any:
    kit = LinkKit("localhost", product, device, secret)
    # The SDK's way to servers that are not the platform's: its own CA's text (where there is TLS), endpoint and port.
    kit.config_mqtt(
        port=port,
        protocol=protocol,
        secure="TLS" if ca else "",
        cadata=Path(ca).read_text() if ca else None,
        endpoint="localhost",
        clean_session=clean,
    )
    kit.on_connect = lambda session, code, _: tell("connect", session=session, code=code)
    kit.on_disconnect = lambda code, _: tell("disconnect", code=code)
    kit.on_topic_message = lambda topic, payload, qos, _: tell(
        "message", topic=topic, payload=base64.b64encode(payload).decode(), qos=qos
    )
    kit.on_subscribe_topic = lambda mid, granted, _: tell("subscribed", mid=mid, granted=list(granted))
    kit.on_publish_topic = lambda mid, _: tell("published", mid=mid)
    kit.on_thing_prop_changed = lambda params, _: tell("property_set", params=params)
    kit.on_thing_prop_post = lambda request, code, *_: tell("property_reply", request=request, code=code)
    kit.on_thing_enable = lambda _: tell("enabled")
    kit.thing_setup()
    kit.connect_async()
    return kit


def main() -> None:
    kit: Any = None
    for line in sys.stdin:
        told = json.loads(line)
        match told.pop("command"):
            case "connect":
                kit = connect(**told)
            case "subscribe":
                tell("asked", result=kit.subscribe_topic(told["filter"], told.get("qos", 1)))
            case "publish":
                tell("asked", result=kit.publish_topic(told["topic"], told["payload"], told.get("qos", 1)))
            case "post_property":
                tell("asked", result=kit.thing_post_property(told["params"]))
            case "end":
                kit.disconnect()
                tell("ended")


main()
