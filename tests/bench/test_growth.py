"""How a cost grows: exponents, round numbers, pictures. Nothing is measured here."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from bench import brokers, growth, plot


def test_the_exponent_is_that_of_the_curve() -> None:
    """Of a power exactly; of points that scatter, the line between them. A size of 0 has no logarithm and does not count."""
    assert plot.exponent([(x, 3 * x**0.5) for x in (1, 10, 1000)]) == pytest.approx(0.5)
    assert plot.exponent([(x, 40.0) for x in (0, 10, 1000)]) == pytest.approx(0.0)
    assert plot.exponent([(1, 10), (10, 12), (100, 10)]) == pytest.approx(0.0)
    assert plot.exponent([(0, 1), (5, 2)]) is None


def test_ticks_are_round_and_hold_all_points() -> None:
    """Decades of a wide range, finer ones of a narrow range."""
    assert plot.ticks(100, 1_000_000) == [100, 1_000, 10_000, 100_000, 1_000_000]
    assert plot.ticks(31, 74) == [20, 50, 100]
    assert plot.ticks(1, 10_000_000) == [10.0**decade for decade in range(8)]


def test_numbers_are_short() -> None:
    """As people say them."""
    assert [plot.number(each) for each in (0.5, 50, 1_000, 131_072, 10_000_000)] == [
        "0.5",
        "50",
        "1 k",
        "131 k",
        "10 M",
    ]


def test_a_plot_is_valid_and_stands_within_its_frame() -> None:
    """Every point of every curve, one at 0 too, in light and in dark; words are escaped."""
    curves = {"publish": [(0, 30.0), (200, 31.0), (131_072, 400.0)], "a < b": [(200, 90.0)]}
    picture = plot.plot("Size of a report", "bytes", "µs", curves)
    root = ET.fromstring(picture)
    circles = [each for each in root if each.tag.endswith("circle") and each.get("r") == "3.5"]
    assert len(circles) == 4
    assert all(70 <= float(each.attrib["cx"]) <= 616 and 78 <= float(each.attrib["cy"]) <= 344 for each in circles)
    texts = ["".join(each.itertext()) for each in root.iter() if each.tag.endswith("text")]
    assert {"Size of a report", "bytes", "µs", "0"} <= set(texts)
    assert any(text.startswith("publish (x^") for text in texts)
    assert "prefers-color-scheme: dark" in picture


def test_a_flat_curve_has_an_axis_too() -> None:
    """One value at every size is still a plot."""
    ET.fromstring(plot.plot("Workers", "workers", "µs", {"publish": [(1, 10.0), (2, 10.0)]}))


def test_only_what_should_be_flat_is_held_against_that() -> None:
    """A larger payload costs more, and may."""
    curve = {"points": [], "exponent": 0.4}
    grown = {"devices": {"publish": curve, "/auth": {**curve, "exponent": 0.01}}, "payload": {"publish": curve}}
    grown["stored"] = {"publish": {**curve, "exponent": None}}
    assert list(growth.flat_faults(grown)) == [("publish with devices", 0.4), ("/auth with devices", 0.01)]


def test_devices_whose_first_login_is_measured_are_nobody_elses() -> None:
    """Enough of them, spread over the registry, none that reports."""
    for count in (1_000, 10_000):
        found = list(growth.never_asked(count, 500))
        assert len(set(found)) == len(found) >= 500
        assert not {number for number in found if number % (count // 64) == 0}


def test_percentiles_are_of_what_was_measured() -> None:
    """The 99th of 100 values is the last but none."""
    values = [float(each) for each in range(100, 0, -1)]
    assert (brokers.percentile(values, 0.5), brokers.percentile(values, 0.99)) == (51.0, 100.0)
    assert brokers.percentile([], 0.5) == 0.0
