"""The metrics as Prometheus reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from uplinkd.engine import GroupState
from uplinkd.metrics import BOUNDS, Latency, Reading

__all__ = ["CONTENT_TYPE", "Facts", "exposition"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Of what `exposition` gives."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What no process counts, and is asked elsewhere when metrics are read."""

    devices: Mapping[str, int] = field(default_factory=dict)
    """State (see core.model.State) → how many."""
    messages: int = 0
    """Stored messages that the engine holds now."""
    messages_bytes: int = 0
    """The room that they take, bytes."""
    engine_connected: bool = False
    groups: Mapping[str, GroupState] = field(default_factory=dict)
    """How consumer groups stand, by name; none while the engine does not say."""
    now: int = 0
    """When that was asked, ms."""
    version: str = ""


def exposition(reading: Reading, facts: Facts) -> bytes:
    """All metrics in Prometheus' text format 0.0.4, as CONTENT_TYPE says."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(reading, facts))
    return generate_latest(registry)


class _Collector(Collector):
    """Gives what was read, once."""

    def __init__(self, reading: Reading, facts: Facts) -> None:
        self._reading = reading
        self._facts = facts

    def collect(self) -> Iterator[Metric]:
        yield from _of_devices(self._reading)
        yield from _of_connections(self._reading)
        yield from _of_the_engine(self._reading, self._facts)
        yield from _of_the_groups(self._facts)
        yield from _of_the_server(self._reading, self._facts)


def _of_devices(reading: Reading) -> Iterator[Metric]:
    requests = [((endpoint, str(code)), count) for (endpoint, code), count in reading.requests.items()]
    yield _counter("requests", "Requests answered, by business code; 0 is success.", ("endpoint", "code"), requests)
    limited = [((limit,), count) for limit, count in reading.limited.items()]
    yield _counter(
        "limited", "Requests that flow control refused, or over MQTT slowed down, by the setting.", ("limit",), limited
    )
    durations = HistogramMetricFamily(
        "uplinkd_request_duration_seconds",
        "Time from a complete request to its written answer.",
        labels=["endpoint"],
    )
    for endpoint, latency in reading.latency.items():
        durations.add_metric([endpoint], _buckets(latency), latency.sum)
    yield durations
    yield _counter("payload_bytes", "Payload bytes of messages that were stored.", (), [((), reading.bytes_in)])


def _of_connections(reading: Reading) -> Iterator[Metric]:
    # Two names that differ in _total alone, of which OpenMetrics would make one: a gauge, and a counter under its full name.
    opened = GaugeMetricFamily("uplinkd_connections", "Connections open now.", labels=["door"])
    for door, count in reading.connections.items():
        opened.add_metric([door], count)
    yield opened
    accepted = [((door,), count) for door, count in reading.accepted.items()]
    yield _counter("connections", "Connections made; over TLS, with a completed handshake.", ("door",), accepted)
    yield _counter(
        "tls_handshakes",
        "TLS handshakes completed; key exchange rsa is the static one of old firmware.",
        ("version", "key_exchange"),
        reading.handshakes.items(),
    )
    failures = [((reason,), count) for reason, count in reading.handshake_failures.items()]
    yield _counter("tls_handshake_failures", "TLS handshakes that failed, and why.", ("reason",), failures)
    yield GaugeMetricFamily("uplinkd_mqtt_sessions", "MQTT sessions that stand now.", value=reading.sessions)


def _of_the_engine(reading: Reading, facts: Facts) -> Iterator[Metric]:
    acks = [(("stored",), reading.stored), (("not_stored",), reading.not_stored)]
    yield _counter("engine_acks", "Messages that the engine has stored, or refused or not answered.", ("result",), acks)
    latency = reading.engine_latency
    yield HistogramMetricFamily(
        "uplinkd_engine_ack_duration_seconds",
        "Time from a publish to the engine's acknowledgement.",
        buckets=_buckets(latency),
        sum_value=latency.sum,
    )
    yield GaugeMetricFamily(
        "uplinkd_engine_waiting", "Publishes without an acknowledgement now.", value=reading.engine_waiting
    )
    yield GaugeMetricFamily("uplinkd_engine_lag_seconds", "Age of the oldest of them.", value=reading.engine_lag)
    yield GaugeMetricFamily("uplinkd_engine_connected", "1 while the engine answers.", value=facts.engine_connected)
    if not facts.engine_connected:
        return  # how many messages it holds is not known, and not none
    yield GaugeMetricFamily("uplinkd_messages_stored", "Messages that the engine holds now.", value=facts.messages)
    yield GaugeMetricFamily("uplinkd_messages_stored_bytes", "Room that they take.", value=facts.messages_bytes)


def _of_the_groups(facts: Facts) -> Iterator[Metric]:
    def gauge(name: str, what: str, value: Callable[[GroupState], float]) -> Metric:
        family = GaugeMetricFamily(f"uplinkd_group_{name}", what, labels=["group"])
        for group, state in facts.groups.items():
            family.add_metric([group], value(state))
        return family

    def oldest(state: GroupState) -> float:
        return 0.0 if state.oldest is None else max(0.0, (facts.now - state.oldest) / 1000)

    yield gauge("lag", "Messages that a consumer group has not accepted yet.", lambda state: state.lag)
    yield gauge("held", "Those of them that a consumer holds.", lambda state: state.held)
    yield gauge("oldest_seconds", "Age of the oldest of them.", oldest)
    yield gauge("dead", "Dead letters of a consumer group.", lambda state: state.dead)
    settled = [((group,), max(0, state.settled)) for group, state in facts.groups.items()]
    yield _counter("group_settled", "Deliveries that came to an end since the position was set.", ("group",), settled)


def _of_the_server(reading: Reading, facts: Facts) -> Iterator[Metric]:
    devices = GaugeMetricFamily("uplinkd_devices", "Devices in the registry, by state.", labels=["state"])
    for state, count in facts.devices.items():
        devices.add_metric([state], count)
    yield devices
    yield _counter("worker_restarts", "Workers that died and were started again.", (), [((), reading.worker_restarts)])
    yield _counter(
        "engine_restarts", "Times that nats-server died and was started again.", (), [((), reading.engine_restarts)]
    )
    yield GaugeMetricFamily("uplinkd_start_time_seconds", "Start of the server, Unix time.", value=reading.started)
    yield InfoMetricFamily("uplinkd_build", "The version that runs.", value={"version": facts.version})


def _counter(name: str, what: str, labels: tuple[str, ...], samples: Iterable[tuple[tuple[str, ...], int]]) -> Metric:
    family = CounterMetricFamily(f"uplinkd_{name}", what, labels=labels)
    for values, count in samples:
        family.add_metric(values, count)
    return family


def _buckets(latency: Latency) -> list[tuple[str, float]]:
    """(upper bound, how many up to it), as a histogram of Prometheus has them: each includes those below."""
    below, buckets = 0, []
    for bound, count in zip([*map(repr, BOUNDS), "+Inf"], latency.counts, strict=True):
        below += count
        buckets.append((bound, float(below)))
    return buckets
