"""The benchmark's words: what wrk said, what is made of it, and what makes figures worthless. Nothing is measured here."""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as command
from bench import load, peers, report

ROUND = load.Measured(
    good=8000, bad=0, seconds=8.0, p50=1.0, p99=2.5, errors=0, sample="", server_cpu=0.4, load_cpu=2.0
)


def facts(**loads: dict[str, Any]) -> dict[str, Any]:
    machine = dict.fromkeys(("date", "cpu", "cores", "kernel", "python", "openssl", "nginx", "nats-server"), "known")
    return {
        "machine": {**machine, "commit": "abc1234", "changed": False},
        "settings": {"seconds": 8.0, "rounds": 3, "connections": 32, "payload": 200},
        "loads": loads,
    }


def row(name: str, *rounds: load.Measured) -> dict[str, Any]:
    return report.row(name, rounds or (ROUND,), replace(ROUND, good=0, sample=""))


def test_what_wrk_said_is_read_in_ms_and_seconds() -> None:
    """Microseconds of wrk become seconds and ms; an answer that was not right is kept whole, with its spaces."""
    output = 'Running 8s test\nRESULT 100 2 8000000 1500 2500 1 200 {"code":40000,"message":"request too many"}\n'
    measured = load.parse(output, server_cpu=3.0, load_cpu=2.0, busy=6.5)
    assert (measured.good, measured.bad, measured.errors, measured.seconds) == (100, 2, 1, 8.0)
    assert (measured.p50, measured.p99, measured.rate) == (1.5, 2.5, 12.5)
    assert measured.sample == '200 {"code":40000,"message":"request too many"}'
    assert measured.other_cpu == 1.5


def test_a_wrk_that_measured_nothing_ends_the_run_with_its_own_words() -> None:
    """No figure is made up."""
    with pytest.raises(SystemExit, match="unable to connect"):
        load.parse("unable to connect to 127.0.0.1:1 Connection refused\n")


def test_the_median_of_the_rounds_counts() -> None:
    """One disturbed round changes nothing."""
    found = report.row("x", [replace(ROUND, good=good) for good in (8000, 800, 16000)], ROUND)
    assert found["rate"] == 1000


def test_everything_acknowledged_counts_against_what_is_stored() -> None:
    """The warm-up's messages too, else lost ones could hide behind them."""
    assert report.row("x", [ROUND, ROUND], replace(ROUND, good=500))["acknowledged"] == 16500
    found = {**facts(), "acknowledged": 16500, "stored": 16499}
    assert report.faults(found) == ["16,500 messages were acknowledged, but 16,499 are stored"]
    assert report.faults({**found, "stored": 16500}) == []


def test_answers_that_were_not_right_are_a_fault_with_an_example() -> None:
    """Wherever they came: refused, or a broken connection."""
    refused = row("uplinkd", replace(ROUND, bad=3, errors=1, sample='200 {"code":30001}'))
    (fault,) = report.faults(facts(publish={"uplinkd": refused}))
    assert fault == 'publish, uplinkd: 4 answers were not right; one: 200 {"code":30001}'


def test_goals_say_whether_they_are_reached() -> None:
    """Ratios within one run, at the very edge too."""
    publish = {
        "nginx": row("nginx", replace(ROUND, good=80_000)),
        "fastapi": row("fastapi", replace(ROUND, good=8_000)),
        "granian": row("granian", replace(ROUND, good=30_000)),
        "uplinkd": row("uplinkd", replace(ROUND, good=39_999, p99=3.0)),
    }
    found = facts(publish=publish)
    assert [(goal, reached) for goal, _, _, reached in report.goals(found)] == [
        ("publish against nginx", False),
        ("publish against FastAPI", True),
        ("publish against granian", False),
        ("publish, p99 against p50", False),
    ]
    publish["granian"] = row("granian", replace(ROUND, good=20_000))
    publish["uplinkd"] = row("uplinkd", replace(ROUND, good=40_000, p99=2.99))
    assert all(reached for *_, reached in report.goals(found))
    found |= {"cold_start_seconds": [1.0, 9.0, 2.0], "idle_1000_bytes": 50_000_000}
    found |= {"idle": {"connections": 20_000, "uplinkd": {"name": "uplinkd", "bytes": 20_001}}}
    assert [(measured, reached) for _, measured, _, reached in report.goals(found)[4:]] == [
        ("20.0 kB", False),
        ("2.00 s", True),
        ("50.0 MB", False),
    ]


def test_what_storing_adds_to_an_answer_is_taken_within_the_rounds() -> None:
    """At light load, where nothing waits for anything else."""
    alone = {
        "nginx": row("nginx", replace(ROUND, p50=0.1), replace(ROUND, p50=0.5)),
        "uplinkd": row("uplinkd", replace(ROUND, p50=0.4), replace(ROUND, p50=0.9)),
    }
    goal = "one connection: p50 beyond nginx's bare answer"
    assert report.goals(facts(publish_one=alone)) == [(goal, "0.35 ms", "< 1 ms", True)]
    alone["uplinkd"] = row("uplinkd", *[replace(ROUND, p50=1.6)] * 2)
    assert report.goals(facts(publish_one=alone)) == [(goal, "1.30 ms", "< 1 ms", False)]


def test_logins_stand_against_publishes_of_the_same_rounds() -> None:
    """Both are the same server's, whose speed drifts with the machine's."""
    in_turn = {
        "publish": row("publish", ROUND, replace(ROUND, good=4000)),
        "auth": row("/auth", replace(ROUND, good=5600), replace(ROUND, good=2800)),
    }
    assert report.goals(facts(in_turn=in_turn)) == [("/auth against publish", "0.70 ×", "≥ 0.7 ×", True)]


def test_a_broker_beside_that_fails_spoils_nothing_but_its_row() -> None:
    """It is said; what goes wrong with uplinkd in the same load is a fault still."""
    broken = replace(ROUND, good=0, bad=0, errors=1, sample="connection refused")
    loads = {"uplinkd": row("uplinkd", ROUND), "nchan": row("nchan", broken)}
    found = facts(brokers_http=loads)
    assert report.faults(found) == []
    text = report.render(found)
    assert "nchan: 1 answers were not right, so its row is worth nothing; one: connection refused" in text
    (line,) = (line for line in text.splitlines() if line.startswith("nchan  "))
    assert line.split()[5:7] == ["–", "–"]
    assert report.faults(facts(brokers_http={"uplinkd": row("uplinkd", broken)}))


def test_a_load_that_held_nginx_back_does_not_flatter_what_stands_beside_it() -> None:
    """Short visits cost the load's core more than nginx: then the servers' CPU decides."""
    visit = {"nginx": row("nginx", ROUND), "uplinkd": row("uplinkd", replace(ROUND, good=6000, server_cpu=0.6))}
    assert report.goals(facts(visit=visit)) == [("short visits against nginx", "0.50 ×", "≥ 0.6 ×", False)]
    visit["uplinkd"] = row("uplinkd", replace(ROUND, good=6000, server_cpu=0.3))
    assert report.goals(facts(visit=visit)) == [("short visits against nginx", "0.75 ×", "≥ 0.6 ×", True)]


def test_deliveries_stand_with_their_lag_at_each_rate() -> None:
    """A row for each rate of publishing, one for the backlog; what delivery costs devices is a goal."""
    rates = {"5000": {"delivered": 4997.2, "p50": 3.46, "p99": 8.31, "left": 0}}
    found = facts() | {
        "delivery": {"webhook": {"rates": rates, "backlog": {"rate": 21_890.4, "cpu_micros": 23.2}}},
        "beside delivery": {"without": 16_952, "with": 15_339, "ratio": 0.84, "cpu_without": 38.4, "cpu_with": 61.3},
    }
    lines = [line.split() for line in report.render(found).splitlines()]
    assert ["webhook", "5,000", "4,997", "3.5", "8.3", "0"] in lines
    assert ["webhook,", "a", "backlog", "21,890", "23"] in lines
    assert [(measured, reached) for _, measured, _, reached in report.goals(found)] == [("0.840 ×", False)]


def test_refusals_stand_beside_what_is_served() -> None:
    """The dearer one decides whether the goal is reached."""
    each = {"served": 40.0, "refused": 20.0, "ratio": 0.5, "rate": 30_000.4}
    found = facts() | {"refusals": {"publish": each, "wrong sign": {**each, "ratio": 1.01}}}
    lines = [line.split() for line in report.render(found).splitlines()]
    assert ["publish", "40.0", "20.0", "0.50", "30,000"] in lines
    assert [(measured, reached) for _, measured, _, reached in report.goals(found)] == [("1.01 ×", False)]


def test_what_waiting_for_the_disk_costs_stands_by_connections() -> None:
    """Beside the server as shipped, whose rate it is a part of."""
    each = {"shipped": 20_000.0, "always": 5_000.0, "ratio": 0.25, "p50": 11.04, "p99": 20.0}
    lines = [line.split() for line in report.render(facts() | {"sync": {"64": each}}).splitlines()]
    assert ["64", "20,000", "5,000", "0.25", "11.0", "20.0"] in lines


def test_a_server_that_was_left_out_gives_no_ratio() -> None:
    """`--only uplinkd` compares with nothing."""
    text = report.render(facts(publish={"uplinkd": row("uplinkd")}))
    (line,) = (line for line in text.splitlines() if line.startswith("uplinkd"))
    assert line.split() == ["uplinkd", "1,000", "1.00", "2.50", "2.5", "–", "1.00", "×", "50", "25%", "0"]
    assert "against nginx" not in text


def test_columns_stand_below_each_other() -> None:
    """Words to the left, figures to the right."""
    assert report.table(("server", "rate"), [("a", "10"), ("longer", "9")]) == (
        "server  rate\na         10\nlonger     9"
    )


def test_a_full_load_core_and_a_busy_machine_are_said() -> None:
    """A figure that the load or other processes limited is not taken for the server's."""
    text = report.render(facts(publish={"nginx": row("nginx", replace(ROUND, load_cpu=7.8, other_cpu=2.0))}))
    assert "publish, nginx: the load's core was full (98%): at least this" in text
    assert "other processes used up to 25% of a core" in text
    assert "core was full" not in report.render(facts(publish={"nginx": row("nginx")}))


def test_what_is_missing_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """With how to install it, each package once."""
    monkeypatch.setattr(sys, "argv", ["bench"])
    monkeypatch.setattr(shutil, "which", lambda tool, path: None if tool in ("wrk", "nginx") else tool)
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert stop.value.code == "make bench needs wrk, nginx; on Debian: apt-get install nginx-light wrk"


def test_a_server_that_does_not_start_ends_the_run_with_its_last_words(tmp_path: Path) -> None:
    """At once, not after the longest wait."""
    with (
        pytest.raises(SystemExit, match=re.escape("--nonsense")),
        peers.start_uplinkd(tmp_path, tmp_path / "data", "--nonsense"),
    ):
        pass
