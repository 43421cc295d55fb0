"""The numbers that all processes share."""

from __future__ import annotations

import itertools
import os
import time
from bisect import bisect_left
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uplinkd.core.errors import Code
from uplinkd.metrics import BOUNDS, ENDPOINTS, TIMED, Latency, Metrics, spare


@pytest.fixture
def metrics() -> Iterator[Metrics]:
    made = Metrics(2)
    yield made
    made.close()


def test_a_reading_adds_up_all_processes(metrics: Metrics) -> None:
    """Whichever worker a device meets, it is counted once."""
    for row in (0, 1):
        meter = metrics.meter(row)
        meter.count("topic", Code.PARAM_ERROR, 0.002)
        meter.accepted("mqtt")
        meter.connected("mqtt", 3 + row)
        meter.shook_hands("TLSv1.2", "rsa")
        meter.shook_hands("TLSv9", "ecdhe")
        meter.handshake_failed("no_shared_cipher")
        meter.not_stored()
        meter.stand(2)
        meter.engine(5, 0.25 + row)
    reading = metrics.read()
    assert reading.requests["topic", 10001] == 2
    assert reading.latency["topic"].count == 2
    assert reading.latency["topic"].sum == pytest.approx(0.004)
    assert (reading.accepted["mqtt"], reading.connections["mqtt"], reading.connections["https"]) == (2, 7, 0)
    assert reading.handshakes["TLSv1.2", "rsa"] == reading.handshakes["other", "ecdhe"] == 2
    assert reading.handshake_failures["no_shared_cipher"] == 2
    assert (reading.not_stored, reading.sessions, reading.engine_waiting) == (2, 4, 10)
    assert reading.engine_lag == 1.25, "the oldest of all"
    assert abs(reading.started - time.time()) < 60


def test_every_endpoint_and_code_has_a_number(metrics: Metrics) -> None:
    """No request is counted under another's name, and none is missing from a reading."""
    meter = metrics.meter(0)
    pairs = [(endpoint, int(code)) for endpoint in ENDPOINTS for code in Code]
    for times, (endpoint, code) in enumerate(pairs, 1):
        for _ in range(times):
            meter.count(endpoint, code)
    assert metrics.read().requests == {pair: times for times, pair in enumerate(pairs, 1)}


def test_what_the_hot_path_noted_is_counted_by_a_flush(metrics: Metrics) -> None:
    """Once, and under its name."""
    meter = metrics.meter(1)
    meter.answered["auth"].append(0.0001)
    meter.answered["mqtt_publish"] += [0.004, 0.00011]
    meter.acks.append(11.0)
    meter.sizes.append(300)
    assert metrics.read().stored == 0
    for _ in range(2):
        meter.flush()
        reading = metrics.read()
        assert reading.requests["auth", 0] == 1
        assert reading.requests["mqtt_publish", 0] == 2
        assert reading.latency["auth"].counts[0] == 1, "a bound belongs to its bucket"
        assert reading.latency["mqtt_publish"].counts[bisect_left(BOUNDS, 0.004)] == 1
        assert reading.latency["mqtt_publish"].sum == pytest.approx(0.00411)
        assert (reading.stored, reading.bytes_in) == (1, 300)
        assert reading.engine_latency.counts[-1] == 1, "longer than all bounds"


@given(st.lists(st.one_of(st.floats(0, 20), st.sampled_from(BOUNDS)), max_size=50))
def test_a_flush_puts_each_time_into_the_bucket_that_a_search_finds(seconds: list[float]) -> None:
    """The quick way counts as the plain one does."""
    quick, plain = Metrics(1), Metrics(1)
    meter, other = quick.meter(0), plain.meter(0)
    meter.answered["topic"] += seconds
    meter.flush()
    for each in seconds:
        other.count("topic", 0, each)
    one, two = quick.read(), plain.read()
    quick.close()
    plain.close()
    assert one.requests == two.requests
    assert one.latency["topic"].counts == two.latency["topic"].counts
    assert one.latency["topic"].sum == pytest.approx(two.latency["topic"].sum, abs=1e-6)


def test_a_worker_that_is_started_again_goes_on_counting(metrics: Metrics) -> None:
    """What was counted stays; what was open has gone with it."""
    meter = metrics.meter(0)
    meter.count("auth")
    meter.connected("https", 9)
    meter.stand(4)
    meter.engine(1, 3.0)
    metrics.died(0)
    reading = metrics.read()
    assert (reading.connections["https"], reading.sessions, reading.engine_waiting, reading.engine_lag) == (0, 0, 0, 0)
    metrics.meter(0).count("auth")
    metrics.engine_restarted()
    reading = metrics.read()
    assert (reading.requests["auth", 0], reading.worker_restarts, reading.engine_restarts) == (2, 1, 1)


def test_another_process_is_read(metrics: Metrics) -> None:
    """What a child writes after the fork is seen by its parent."""
    child = os.fork()
    if not child:
        meter = metrics.meter(1)
        meter.acks += [0.001] * 7
        meter.flush()
        os._exit(0)
    os.waitpid(child, 0)
    assert metrics.read().stored == 7


def test_a_quantile_lies_in_its_bucket() -> None:
    """Evenly spread between the bounds, so that it moves when the times do."""
    meter_of = Metrics(1)
    meter = meter_of.meter(0)
    meter.answered["topic"] += [0.0012] * 98 + [0.9, 0.9]
    meter.flush()
    latency = meter_of.read().latency["topic"]
    meter_of.close()
    assert 0.001 < latency.quantile(0.5) <= 0.0015
    assert 0.68 < latency.quantile(0.99) <= 1.0
    assert latency.quantile(1.0) == 1.0
    assert Latency().quantile(0.99) == 0.0
    assert Latency((0,) * len(BOUNDS) + (1,), 30.0).quantile(0.5) == 10.0


def test_a_window_is_the_difference_of_two_readings(metrics: Metrics) -> None:
    """So a console shows the last minute, and not the average since the start."""
    meter = metrics.meter(0)
    meter.answered["topic"] += [5.0] * 100
    meter.flush()
    earlier = metrics.read().latency["topic"]
    meter.answered["topic"] += [0.0003] * 10
    meter.flush()
    window = metrics.read().latency["topic"] - earlier
    assert window.count == 10
    assert window.sum == pytest.approx(0.003)
    assert window.quantile(0.99) < 0.0004


def test_bounds_are_about_half_as_much_again() -> None:
    """From a tenth of a millisecond to ten seconds, so that a quantile is wrong by less than half."""
    assert (BOUNDS[0], BOUNDS[-1]) == (0.0001, 10.0)
    assert all(1.4 < upper / lower < 1.6 for lower, upper in itertools.pairwise(BOUNDS))


def test_a_meter_of_its_own_takes_everything() -> None:
    """A door without a supervisor counts as well, for nobody."""
    meter = spare()
    for endpoint in TIMED:
        meter.answered[endpoint].append(0.1)
    meter.flush()
    assert not any(meter.answered.values())


def test_a_reading_is_cheap() -> None:
    """Less than a millisecond of the supervisor's time, with sixteen workers; here with room for a busy machine."""
    metrics = Metrics(16)
    best = min(_seconds(metrics) for _ in range(20))
    metrics.close()
    assert best < 0.005


def _seconds(metrics: Metrics) -> float:
    began = time.perf_counter()
    metrics.read()
    return time.perf_counter() - began
