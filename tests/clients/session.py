"""A session of paho-mqtt that waits for what happens instead of calling back."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from tests.clients.fleet import Login
from tests.house import Server

__all__ = ["TRANSPORTS", "Message", "Session", "Transport"]

Transport = Literal["tls", "plain", "websockets"]
TRANSPORTS: tuple[Transport, ...] = ("tls", "plain", "websockets")

# paho tells MQTT 5's reason codes in place of those that CONNACK has in MQTT 3.
_CONNACK = {0: 0, 132: 1, 133: 2, 136: 3, 134: 4, 135: 5}


@dataclass(frozen=True)
class Message:
    """A message as it came down."""

    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = False


class Session:
    """One MQTT session; `connect` opens it, and it never opens again by itself."""

    def __init__(
        self,
        server: Server,
        login: Login,
        transport: Transport = "tls",
        *,
        protocol: MQTTProtocolVersion = MQTTProtocolVersion.MQTTv311,
        clean: bool = True,
        keepalive: int = 60,
        manual_ack: bool = False,
        will: str = "",
    ) -> None:
        port = {"tls": server.mqtt_port, "plain": server.mqtt_plain_port, "websockets": server.port}[transport]
        self._setup(login, transport, server.ca, protocol, clean, manual_ack)
        self._address = ("localhost" if transport != "plain" else "127.0.0.1", port, keepalive)
        if will:
            self._client.will_set(will, b"the will", qos=1)

    def _setup(
        self, login: Login, transport: Transport, ca: Path, protocol: MQTTProtocolVersion, clean: bool, manual_ack: bool
    ) -> None:
        self._client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=login.client_id,
            clean_session=clean,
            protocol=protocol,
            transport="websockets" if transport == "websockets" else "tcp",
            reconnect_on_failure=False,
            manual_ack=manual_ack,
        )
        self._client.username_pw_set(login.username, login.password)
        if transport != "plain":
            self._client.tls_set(ca_certs=str(ca))
        self._client.ws_set_options(path="/mqtt")
        self._client.connect_timeout = 10
        self._client.on_connect = self._on_connect
        self._client.on_disconnect = self._on_disconnect
        self._client.on_message = self._on_message
        self._client.on_subscribe = self._on_subscribe
        self._client.on_unsubscribe = self._on_unsubscribe
        self._answers: queue.Queue[int] = queue.Queue()
        self._granted: queue.Queue[list[int]] = queue.Queue()
        self._messages: queue.Queue[Message] = queue.Queue()
        self._closed = threading.Event()
        self.present = False
        self.port = 0

    def connect(self, within: float = 10) -> int:
        """The return code of CONNACK; -1 where the connection ends without one. `present` says what CONNACK says of the session."""
        self._closed.clear()
        self._client.connect(*self._address)
        own = self._client.socket()
        self.port = own.getsockname()[1] if isinstance(own, socket.socket) else 0
        self._client.loop_start()
        end = time.monotonic() + within
        while time.monotonic() < end:
            with contextlib.suppress(queue.Empty):
                return self._answers.get(timeout=0.05)
            if self._closed.is_set() and self._answers.empty():
                return -1
        raise AssertionError(f"no CONNACK within {within} s")

    def opened(self) -> Session:
        """Connected, or the test fails."""
        assert self.connect() == 0
        return self

    def subscribe(self, topic_filter: str, qos: int = 1) -> int:
        """The return code of SUBACK: the granted QoS, or 0x80."""
        return self.subscribe_all((topic_filter, qos))[0]

    def subscribe_all(self, *filters: tuple[str, int]) -> list[int]:
        code, _ = self._client.subscribe(list(filters))
        assert code == MQTTErrorCode.MQTT_ERR_SUCCESS, code
        return self._answered()

    def unsubscribe(self, topic_filter: str) -> None:
        self._client.unsubscribe(topic_filter)
        assert self._answered() == []

    def _answered(self, within: float = 10) -> list[int]:
        """The next SUBACK or UNSUBACK."""
        try:
            return self._granted.get(timeout=within)
        except queue.Empty:
            raise AssertionError(f"no SUBACK or UNSUBACK within {within} s") from None

    def publish(self, topic: str, payload: bytes, qos: int = 1, *, retain: bool = False, within: float = 5) -> bool:
        """Whether it was acknowledged (with QoS 0: sent) before the time was over or the connection ended."""
        return self.acknowledged(self.start_publish(topic, payload, qos, retain=retain), within)

    def start_publish(self, topic: str, payload: bytes, qos: int = 1, *, retain: bool = False) -> Any:
        return self._client.publish(topic, payload, qos, retain)

    def acknowledged(self, started: Any, within: float = 5) -> bool:
        end = time.monotonic() + within
        while time.monotonic() < end:
            if started.rc == MQTTErrorCode.MQTT_ERR_SUCCESS and started.is_published():
                return True
            if self._closed.wait(0.01):
                return False
        return False

    def next(self, within: float = 5) -> Message:
        """The next message that came down."""
        try:
            return self._messages.get(timeout=within)
        except queue.Empty:
            raise AssertionError(f"no message within {within} s") from None

    def nothing(self, within: float) -> bool:
        """Whether nothing comes down meanwhile; prefer to wait for a message that was sent later."""
        with contextlib.suppress(queue.Empty):
            return self._messages.get(timeout=within) is None
        return True

    def ended(self, within: float = 5) -> bool:
        """Whether the server ends the connection within the time."""
        return self._closed.wait(within)

    @property
    def open(self) -> bool:
        return not self._closed.is_set()

    def disconnect(self) -> None:
        """Say goodbye with DISCONNECT."""
        self._client.disconnect()
        self._client.loop_stop()

    def break_off(self) -> None:
        """Close the connection without a word, as a device that loses its power."""
        own = self._client.socket()
        assert isinstance(own, socket.socket)
        own.shutdown(socket.SHUT_RDWR)
        self._closed.wait(5)
        self._client.loop_stop()

    close = disconnect

    def _on_connect(self, _: Client, __: Any, flags: ConnectFlags, code: ReasonCode, ___: Properties | None) -> None:
        self.present = flags.session_present
        self._answers.put(_CONNACK.get(code.value, code.value))

    def _on_disconnect(self, *_: Client | Any | DisconnectFlags | ReasonCode | Properties | None) -> None:
        self._closed.set()

    def _on_message(self, _: Client, __: Any, message: MQTTMessage) -> None:
        self._messages.put(Message(message.topic, bytes(message.payload), message.qos, message.retain))

    def _on_subscribe(self, _: Client, __: Any, ___: int, codes: list[ReasonCode], ____: Properties | None) -> None:
        self._granted.put([code.value for code in codes])

    def _on_unsubscribe(self, *_: Any) -> None:
        self._granted.put([])
