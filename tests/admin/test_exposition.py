"""The metrics as Prometheus, Grafana and the alert rules have them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
from docs.generate import ROOT
from prometheus_client.parser import text_string_to_metric_families

from uplinkd.admin.exposition import Facts, exposition
from uplinkd.engine import GroupState
from uplinkd.metrics import BOUNDS, Metrics, Reading

DASHBOARD = ROOT / "deploy/grafana/uplinkd.json"
RULES = ROOT / "deploy/prometheus/uplinkd.rules.yml"
NAME = re.compile(r"uplinkd_\w+")

FACTS = Facts(
    devices={"online": 7, "offline": 1},
    messages=100,
    messages_bytes=5000,
    engine_connected=True,
    groups={
        "reports": GroupState(12, 3, 10_000, 40, 2, 0),
        "idle": GroupState(0, 0, None, 0, 0, 0),
    },
    now=25_500,
    version="1.2.3",
)

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def reading() -> Reading:
    metrics = Metrics(1)
    meter = metrics.meter(0)
    meter.count("topic", 30001, 0.0012)
    meter.answered["topic"] += [0.0012, 0.5, 50.0]
    meter.acks += [0.001, 0.002]
    meter.sizes += [10, 20]
    meter.connected("mqtt", 4)
    meter.accepted("mqtt")
    meter.shook_hands("TLSv1.2", "rsa")
    meter.flush()
    reading = metrics.read()
    metrics.close()
    return reading


@pytest.fixture
def samples(reading: Reading) -> Samples:
    """(name, labels) → value."""
    text = exposition(reading, FACTS).decode()
    families = list(text_string_to_metric_families(text))
    assert all(family.documentation and family.type != "unknown" for family in families)
    found: Samples = {}
    for family in families:
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found, f"{key} is there twice"
            found[key] = sample.value
    return found


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[f"uplinkd_{name}", frozenset(labels.items())]


def test_what_was_counted_is_what_prometheus_reads(samples: Samples) -> None:
    """Under the name, labels and unit that it is documented with."""
    assert value(samples, "requests_total", endpoint="topic", code="0") == 3
    assert value(samples, "requests_total", endpoint="topic", code="30001") == 1
    assert value(samples, "connections", door="mqtt") == 4
    assert value(samples, "connections_total", door="mqtt") == 1
    assert value(samples, "tls_handshakes_total", version="TLSv1.2", key_exchange="rsa") == 1
    assert value(samples, "engine_acks_total", result="stored") == 2
    assert value(samples, "payload_bytes_total") == 30
    assert value(samples, "devices", state="online") == 7
    assert (value(samples, "messages_stored"), value(samples, "messages_stored_bytes")) == (100, 5000)
    assert value(samples, "engine_connected") == 1
    assert value(samples, "build_info", version="1.2.3") == 1
    found = [
        value(samples, f"group_{name}", group="reports")
        for name in ("lag", "held", "oldest_seconds", "settled_total", "dead")
    ]
    assert found == [12, 3, 15.5, 40, 2]
    assert value(samples, "group_oldest_seconds", group="idle") == 0


def test_what_an_engine_holds_that_is_away_is_not_told(reading: Reading) -> None:
    """Zero would look like a loss."""
    text = exposition(reading, Facts(version="1.2.3")).decode()
    assert "uplinkd_engine_connected 0.0" in text
    assert "uplinkd_messages_stored" not in text
    assert "uplinkd_group_lag{" not in text


def test_a_histogram_is_cumulative(samples: Samples) -> None:
    """Each bucket includes those below, the last one all; so Prometheus wants it."""
    buckets = [
        value(samples, "request_duration_seconds_bucket", endpoint="topic", le=le)
        for le in [*map(repr, BOUNDS), "+Inf"]
    ]
    assert buckets == sorted(buckets)
    assert value(samples, "request_duration_seconds_bucket", endpoint="topic", le="0.001") == 0
    assert value(samples, "request_duration_seconds_bucket", endpoint="topic", le="0.0015") == 2
    assert value(samples, "request_duration_seconds_bucket", endpoint="topic", le="10.0") == 3
    assert buckets[-1] == value(samples, "request_duration_seconds_count", endpoint="topic") == 4
    assert value(samples, "request_duration_seconds_sum", endpoint="topic") == pytest.approx(50.5024)
    assert value(samples, "engine_ack_duration_seconds_count") == 2


def expressions(node: object) -> Iterator[str]:
    """Every query of a dashboard."""
    if isinstance(node, dict):
        for key, inner in node.items():
            if key in ("expr", "definition") and isinstance(inner, str):
                yield inner
            yield from expressions(inner)
    elif isinstance(node, list):
        for inner in node:
            yield from expressions(inner)


def test_the_dashboard_asks_for_what_there_is(samples: Samples) -> None:
    """A metric that is renamed would leave a panel empty; and each metric is on a panel."""
    emitted = {name for name, _ in samples}
    asked = {name for each in expressions(json.loads(DASHBOARD.read_text())) for name in NAME.findall(each)}
    assert asked <= emitted
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in emitted}
    assert families == {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked}


def test_the_dashboard_can_be_imported() -> None:
    """Its data source is asked for at the import; panels lie beside each other, and none has another's id."""
    dashboard = json.loads(DASHBOARD.read_text())
    assert dashboard["schemaVersion"] >= 39
    assert [each["name"] for each in dashboard["__inputs"]] == ["DS_PROMETHEUS"]
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(panel["datasource"]["uid"] == "${DS_PROMETHEUS}" for panel in panels if panel["type"] != "row")
    taken: set[tuple[int, int]] = set()
    for at in (panel["gridPos"] for panel in panels):
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken
        assert at["x"] + at["w"] <= 24
        taken |= cells


def test_the_alerts_ask_for_what_there_is(samples: Samples) -> None:
    """A metric that is renamed would silence an alert."""
    emitted = {name for name, _ in samples}
    asked = set(NAME.findall(RULES.read_text()))
    assert "uplinkd_engine_connected" in asked
    assert asked <= emitted
