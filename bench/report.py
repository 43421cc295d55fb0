"""What was measured, for people and for programs."""

from __future__ import annotations

import datetime as dt
import os
import platform
import re
import shutil
import ssl
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.growth import FLAT, flat_faults
from bench.load import Measured
from bench.plot import number
from bench.registry import ACTS
from uplinkd.engine.embedded import find_binary
from uplinkd.settings import Settings

__all__ = ["faults", "goals", "machine", "render", "row", "table"]

LOADS = {
    "publish": "publish",
    "publish_one": "publish, one connection",
    "auth": "/auth",
    "in_turn": "uplinkd: publish and /auth in turn",
    "auth_new_connection": "TLS handshake, /auth, close",
    "visit": "TLS handshake, /auth, one publish, close",
    "brokers_http": "a message over HTTP",
    "brokers_mqtt": "a message over MQTT",
}
_AGAINST = (
    ("nginx", "nginx", 0.5),
    ("fastapi", "FastAPI", 4),
    ("aiohttp", "aiohttp", 3),
    ("granian", "granian", 2),
)
"""How many times as fast as these a publish is to be."""
# A core that is used more than this is what limits a row.
_FULL = 0.93


def row(name: str, rounds: Sequence[Measured], warm_up: Measured) -> dict[str, Any]:
    """The medians over the rounds, the answers that were not right, and each round with its raw figures."""
    median = statistics.median
    return {
        "name": name,
        "rate": median(each.rate for each in rounds),
        "p50": median(each.p50 for each in rounds),
        "p99": median(each.p99 for each in rounds),
        "server_us": median(each.server_cpu / max(each.good, 1) * 1e6 for each in rounds),
        "load_core": median(each.load_cpu / each.seconds for each in rounds),
        "other_cores": median(each.other_cpu / each.seconds for each in rounds),
        "acknowledged": sum(each.good for each in (warm_up, *rounds)),
        "bad": sum(each.bad + each.errors for each in (warm_up, *rounds)),
        "sample": next((each.sample for each in (warm_up, *rounds) if each.sample), ""),
        "warm_up": asdict(warm_up),
        "rounds": [asdict(each) for each in rounds],
    }


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns, the first to the left and the others to the right."""
    widths = [max(len(line[column]) for line in (headings, *rows)) for column in range(len(headings))]
    lines = []
    for line in (headings, *rows):
        first, *others = (
            cell.ljust(width) if not place else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        lines.append("  ".join([first, *others]).rstrip())
    return "\n".join(lines)


def within_rounds(ours: Mapping[str, Any], base: Mapping[str, Any]) -> float:
    """How many times as fast: the median of the ratios within each round, since a machine's speed drifts."""
    pairs = zip(ours["rounds"], base["rounds"], strict=True)
    return float(statistics.median(_rate(one) / max(_rate(other), 1e-9) for one, other in pairs))


def short_visits(ours: Mapping[str, Any], base: Mapping[str, Any]) -> float:
    """How many times as fast, by the rate or by the servers' CPU time, whichever is less: a handshake costs the load's core more than
    the server, and a load that holds the faster one back flatters the other."""
    by_rate = within_rounds(ours, base)
    return min(by_rate, float(base["server_us"] / ours["server_us"])) if ours["server_us"] else by_rate


def _rate(measured: Mapping[str, Any]) -> float:
    return float(measured["good"] / measured["seconds"])


def goals(facts: Mapping[str, Any]) -> list[tuple[str, str, str, bool]]:
    """(goal, measured, wanted, reached) of everything that was measured."""
    found = []
    publish = facts["loads"].get("publish", {})
    if ours := publish.get("uplinkd"):
        for peer, name, wanted in _AGAINST:
            if base := publish.get(peer):
                ratio = within_rounds(ours, base)
                found.append((f"publish against {name}", f"{ratio:.2f} ×", f"≥ {wanted:g} ×", ratio >= wanted))
        spread = statistics.median(each["p99"] / each["p50"] for each in ours["rounds"])
        found.append(("publish, p99 against p50", f"{spread:.1f} ×", "< 3 ×", spread < 3))
    alone = facts["loads"].get("publish_one", {})
    if "uplinkd" in alone and "nginx" in alone:
        pairs = zip(alone["uplinkd"]["rounds"], alone["nginx"]["rounds"], strict=True)
        beyond = statistics.median(ours["p50"] - bare["p50"] for ours, bare in pairs)
        found.append(("one connection: p50 beyond nginx's bare answer", f"{beyond:.2f} ms", "< 1 ms", beyond < 1))
    if both := facts["loads"].get("in_turn"):
        ratio = within_rounds(both["auth"], both["publish"])
        found.append(("/auth against publish", f"{ratio:.2f} ×", "≥ 0.7 ×", ratio >= 0.7))
    visit = facts["loads"].get("visit", {})
    if "uplinkd" in visit and "nginx" in visit:
        ratio = short_visits(visit["uplinkd"], visit["nginx"])
        found.append(("short visits against nginx", f"{ratio:.2f} ×", "≥ 0.6 ×", ratio >= 0.6))
    if at_rest := facts.get("idle"):
        size, count = at_rest["uplinkd"]["bytes"] / 1000, at_rest["connections"]
        found.append((f"{count:,} idle TLS connections, each", f"{size:.1f} kB", "≤ 20 kB", size <= 20))
    if colds := facts.get("cold_start_seconds"):
        cold = statistics.median(colds)
        found.append(("cold start to first answer", f"{cold:.2f} s", "< 3 s", cold < 3))
    if "idle_1000_bytes" in facts:
        memory = facts["idle_1000_bytes"] / 1e6
        found.append(("1,000 idle TLS connections", f"{memory:.1f} MB", "< 50 MB", memory < 50))
    if "stored" in facts:
        found.append(
            (
                "acknowledged, and stored",
                f"{facts['acknowledged']:,} / {facts['stored']:,}",
                "all",
                facts["stored"] >= facts["acknowledged"],
            )
        )
    if figures := facts.get("mqtt"):
        found += _mqtt_goals(figures)
    if beside := facts.get("console"):
        ratio = beside["ratio"]
        found.append(("HTTPS publish, console open and tailing", f"{ratio:.3f} ×", "≥ 0.95 ×", ratio >= 0.95))
    if beside := facts.get("beside delivery"):
        ratio = beside["ratio"]
        found.append(("HTTPS publish beside a group that is posted", f"{ratio:.3f} ×", "≥ 0.85 ×", ratio >= 0.85))
    if refused := facts.get("refusals"):
        ratio = max(each["ratio"] for each in refused.values())
        found.append(("CPU of a refused request against a served one", f"{ratio:.2f} ×", "< 1 ×", ratio < 1))
    if grown := facts.get("growth"):
        name, steepest = max(flat_faults(grown), key=lambda each: each[1])
        found.append(
            (f"steepest of what should be flat: {name}", f"x^{steepest:.2f}", f"≤ x^{FLAT:g}", steepest <= FLAT)
        )
    if visited := facts.get("pages"):
        slowest = max(each["median"] for each in visited.values())
        found.append(("the slowest page beside a large fleet", f"{slowest:.0f} ms", "< 200 ms", slowest < 200))
    return found


def _mqtt_goals(figures: Mapping[str, Any]) -> list[tuple[str, str, str, bool]]:
    connects, beside = figures["connects, TLS"]["rate"], figures["beside"]["ratio"]
    return [
        ("MQTT connects a second, TLS", f"{connects:,.0f}", "≥ 1,000", connects >= 1000),
        ("HTTPS publish beside MQTT", f"{beside:.3f} ×", "≥ 0.95 ×", beside >= 0.95),
    ]


def _mqtt_rows(figures: Mapping[str, Any], sessions: int) -> list[tuple[str, str, str]]:
    """(what, figure, server's CPU for one)."""
    rows = [
        (f"MQTT: {what}, a second", f"{figures[what]['rate']:,.0f}", f"{figures[what]['cpu_micros']:.0f} µs")
        for what in figures
        if "rate" in figures[what]
    ]
    for what in ("idle, TLS", "idle, plain"):
        rows.append(
            (f"MQTT: {sessions:,} sessions {what}, memory of one", f"{figures[what]['bytes'] / 1000:.1f} kB", "")
        )
    heard, beside = figures["heard"], figures["beside"]
    rows.append(
        ("MQTT: from HTTPS publish to subscriber, p50 / p99", f"{heard['p50']:.2f} / {heard['p99']:.2f} ms", "")
    )
    rows.append(("… and to the answer of the publish", f"{heard['answer_p50']:.2f} / {heard['answer_p99']:.2f} ms", ""))
    rows.append(
        ("HTTPS publish without MQTT / beside 1,000 sessions", f"{beside['without']:,.0f} / {beside['with']:,.0f}", "")
    )
    return rows


def _delivery_rows(way: str, measured: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows = [
        (
            way,
            f"{int(rate):,}",
            f"{each['delivered']:,.0f}",
            f"{each['p50']:.1f}",
            f"{each['p99']:.1f}",
            f"{each['left']:,}",
            "",
        )
        for rate, each in measured["rates"].items()
    ]
    backlog = measured["backlog"]
    return [*rows, (f"{way}, a backlog", "", f"{backlog['rate']:,.0f}", "", "", "", f"{backlog['cpu_micros']:.0f}")]


def _beside_rows(beside: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        ("HTTPS publish without / with a group that is posted", f"{beside['without']:,.0f} / {beside['with']:,.0f}"),
        ("the median of the ratios", f"{beside['ratio']:.3f} ×"),
        ("server µs a publish, its delivery included", f"{beside['cpu_without']:.1f} / {beside['cpu_with']:.1f}"),
    ]


def _growth_rows(grown: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    return [
        (
            f"{axis}: {name}",
            ", ".join(f"{number(size)}: {micros:.1f}" for size, micros in curve["points"]),
            "–" if curve["exponent"] is None else f"{curve['exponent']:.2f}",
        )
        for axis, curves in grown.items()
        for name, curve in curves.items()
    ]


def _profile_rows(profile: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    worker = profile["worker"]
    costs = {f"worker: {part}": share * worker for part, share in profile["parts"].items()}
    costs |= {"nats-server": profile["engine"], "other processes": profile["rest"]}
    total = worker + profile["engine"] + profile["rest"]
    rows = [(what, f"{micros:.1f}", f"{micros / total:.0%}") for what, micros in costs.items()]
    return [*rows, ("in all", f"{total:.1f}", "100%")]


def _sync_row(connections: str, each: Mapping[str, Any]) -> tuple[str, ...]:
    rates = (f"{each[name]:,.0f}" for name in ("shipped", "always"))
    return connections, *rates, f"{each['ratio']:.2f}", f"{each['p50']:.1f}", f"{each['p99']:.1f}"


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _refusal_row(what: str, each: Mapping[str, Any]) -> tuple[str, ...]:
    served, refused, ratio = f"{each['served']:.1f}", f"{each['refused']:.1f}", f"{each['ratio']:.2f}"
    return what, served, refused, ratio, f"{each['rate']:,.0f}"


def faults(facts: Mapping[str, Any]) -> list[str]:
    """What makes the figures worthless: answers that were not right, messages that were acknowledged and are not there."""
    found = [
        f"{LOADS[load]}, {each['name']}: {each['bad']:,} answers were not right; one: {each['sample'] or 'none came'}"
        for load, peers in facts["loads"].items()
        for key, each in peers.items()
        if each["bad"] and not _beside(load, key)
    ]
    if facts.get("stored", 0) < facts.get("acknowledged", 0):
        found.append(f"{facts['acknowledged']:,} messages were acknowledged, but {facts['stored']:,} are stored")
    return found


def _beside(load: str, key: str) -> bool:
    """Whether a row is of a broker that stands beside uplinkd: what goes wrong there is said, and spoils nothing else."""
    return load.startswith("brokers") and not key.startswith("uplinkd")


def render(facts: Mapping[str, Any]) -> str:
    """All figures as text. Ratios stand where the same load was put on the peer in the same run."""
    about, settings = facts["machine"], facts["settings"]
    changed = " with changes" if about["changed"] else ""
    lines = [
        f"{about['cpu']}, {about['cores']} cores; Linux {about['kernel']}; Python {about['python']}; {about['openssl']}",
        f"{about['nginx']}; {about['nats-server']}; commit {about['commit']}{changed}; {about['date']}",
        f"loopback, TLS, {settings['payload']}-byte payload, {settings['connections']} connections, median of "
        f"{settings['rounds']} rounds of {settings['seconds']:g} s; server on one core, load on the other",
    ]
    headings = (
        "requests/s",
        "p50 ms",
        "p99 ms",
        "p99/p50",
        "× nginx",
        "uplinkd is",
        "server µs",
        "load core",
        "not right",
    )
    for load, peers in facts["loads"].items():
        lines += ["", table((LOADS[load], *headings), [_cells(each, peers) for each in peers.values()])]
    if figures := facts.get("mqtt"):
        lines += ["", table(("MQTT", "", "server CPU"), _mqtt_rows(figures, settings["sessions"]))]
    if at_rest := facts.get("idle"):
        resting = [
            (each["name"], f"{each['bytes'] / 1000:.1f} kB") for each in at_rest.values() if isinstance(each, dict)
        ]
        lines += ["", table((f"{at_rest['connections']:,} TLS connections at rest", "each"), resting)]
    if beside := facts.get("console"):
        figures_of_console = [
            ("HTTPS publish, console closed / open and tailing", f"{beside['without']:,.0f} / {beside['with']:,.0f}"),
            ("server µs a publish", f"{beside['cpu_without']:.1f} / {beside['cpu_with']:.1f}"),
            ("events that the windows got meanwhile", f"{beside['events']:,}"),
        ]
        lines += ["", table(("console", ""), figures_of_console)]
    if ways := facts.get("delivery"):
        columns = ("delivery", "published/s", "delivered/s", "p50 ms", "p99 ms", "left", "deliverer µs")
        lines += ["", table(columns, [row for way, each in ways.items() for row in _delivery_rows(way, each)])]
    if beside := facts.get("beside delivery"):
        lines += ["", table(("devices beside delivery", ""), _beside_rows(beside))]
    if refused := facts.get("refusals"):
        kinds = ("flow control", "served, µs", "refused, µs", "ratio", "refused/s")
        lines += ["", table(kinds, [_refusal_row(what, one) for what, one in refused.items()])]
    if synced := facts.get("sync"):
        parts = ("sync_interval, connections", "100ms, /s", "always, /s", "ratio", "p50 ms", "p99 ms")
        lines += ["", table(parts, [_sync_row(count, one) for count, one in synced.items()])]
    if moved := facts.get("registry"):
        rows = [
            (words, *(_figure(moved[each].get(act)) for each in ("sqlite", "postgresql")))
            for act, words in ACTS.items()
        ]
        lines += ["", table((f"{moved['devices']:,} devices", "SQLite", "PostgreSQL"), rows)]
    for what, profile in facts.get("profile", {}).items():
        heading = (f"where {what} spends its time ({profile['samples']:,} samples)", "µs of CPU", "share")
        lines += ["", table(heading, _profile_rows(profile))]
    if grown := facts.get("growth"):
        lines += ["", table(("growth", "µs of CPU for one, by size", "exponent"), _growth_rows(grown))]
    if visited := facts.get("pages"):
        rows = [(path, f"{each['median']:.0f} ms", f"{each['worst']:.0f} ms") for path, each in visited.items()]
        lines += ["", table(("pages beside a large fleet", "median", "worst"), rows)]
    if reached := goals(facts):
        cells = [(name, measured, wanted, "reached" if good else "MISSED") for name, measured, wanted, good in reached]
        lines += ["", table(("goal", "measured", "wanted", ""), cells)]
    if notes := _notes(facts):
        lines += ["", *notes]
    return "\n".join(lines)


def _cells(each: Mapping[str, Any], peers: Mapping[str, Any]) -> tuple[str, ...]:
    def ratio(one: Mapping[str, Any], other: Mapping[str, Any] | None) -> str:
        return f"{within_rounds(one, other):.2f} ×" if other and other["rate"] else "–"

    ours = peers.get("uplinkd")

    return (
        each["name"],
        f"{each['rate']:,.0f}",
        f"{each['p50']:.2f}",
        f"{each['p99']:.2f}",
        f"{each['p99'] / each['p50']:.1f}" if each["p50"] else "–",
        ratio(each, peers.get("nginx")),
        ratio(ours, each) if ours else "–",
        f"{each['server_us']:.0f}",
        f"{each['load_core']:.0%}",
        str(each["bad"]),
    )


def _notes(facts: Mapping[str, Any]) -> list[str]:
    """What a reader must know to judge the figures."""
    notes = [
        f"{each['name']}: {each['bad']:,} answers were not right, so its row is worth nothing; one: {each['sample'] or 'none came'}"
        for load, peers in facts["loads"].items()
        for key, each in peers.items()
        if each["bad"] and _beside(load, key)
    ]
    publish = facts["loads"].get("publish", {})
    for load, peers in facts["loads"].items():
        notes += [
            f"{LOADS[load]}, {each['name']}: the load's core was full ({each['load_core']:.0%}): at least this"
            for each in peers.values()
            if each["load_core"] > _FULL
        ]
    if "nginx" in publish and "uplinkd" in publish and publish["uplinkd"]["server_us"]:
        ratio = publish["nginx"]["server_us"] / publish["uplinkd"]["server_us"]
        notes.append(
            f"publish against nginx by CPU time of the server for each request, whatever the load does: {ratio:.2f} ×"
        )
    rows = [each for peers in facts["loads"].values() for each in peers.values()]
    if (others := max((each["other_cores"] for each in rows), default=0.0)) > 0.05:
        notes.append(f"other processes used up to {others:.0%} of a core meanwhile: repeat on an idle machine")
    return notes


def machine() -> dict[str, Any]:
    """Where and with what it was measured."""
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    root = str(Path(__file__).parent.parent)
    return {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "cpu": cpu[1] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "openssl": ssl.OPENSSL_VERSION,
        "nginx": _first_line(shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin") or "nginx", "-v"),
        "nats-server": _first_line(str(find_binary(Settings())), "--version"),
        "wrk": _first_line("wrk", "-v"),
        "commit": _first_line("git", "-C", root, "rev-parse", "--short", "HEAD"),
        "changed": bool(_first_line("git", "-C", root, "status", "--porcelain")),
    }


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return next(iter((done.stdout + done.stderr).splitlines()), "")
