"""What people and programs read of consumer groups."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click

from uplinkd.asking import Consumer, HookState
from uplinkd.cli.common import local_time, printable
from uplinkd.cli.messages import message_document
from uplinkd.core.groups import Form, Group, Kind, Plan, Webhook, shown_url
from uplinkd.core.model import App
from uplinkd.engine import DeadLetter
from uplinkd.engine.standing import Standing

__all__ = [
    "columns",
    "consumer_document",
    "consumer_words",
    "count_of",
    "document",
    "figures",
    "hook_document",
    "hook_state_words",
    "hook_words",
    "latest",
    "letter_document",
    "next_steps",
    "nobody",
    "print_lines",
    "standing_lines",
    "takes",
    "target",
    "user_name",
]


def print_lines(*given: tuple[str, str]) -> None:
    for label, text in given:
        click.echo(f"{label:<10}{printable(text)}")


def next_steps(found: Group, apps: Sequence[App], amqp: str) -> list[tuple[str, str]]:
    """How its messages are got."""
    plan = found.plan
    if plan.webhook:
        return []
    if not apps:
        return [
            ("next", f"let an application consume it: uplinkd group change {found.name} --app NAME"),
            ("", f"or post its messages: uplinkd group change {found.name} --webhook URL"),
        ]
    lines = [("AMQP", amqp or "no door is open: serve with --amqp-listen 0.0.0.0:5671")]
    for app in apps:
        lines += [("", f"user name: {user_name(found, app)}")]
    return [
        *lines,
        (
            "",
            "password: base64 of HMAC-SHA1 with the application's secret over authId=…&timestamp=…, as in the user name",
        ),
    ]


def nobody(found: Group, consumers: Sequence[Consumer], hook: HookState | None) -> list[tuple[str, str]]:
    """That nobody takes its messages just now."""
    if found.plan.paused:
        return []
    if found.plan.webhook and hook is None:
        return [("webhook", "nobody posts to it: no server runs, or one that has just started")]
    if found.plan.apps and not consumers:
        return [("consumer", "none is connected")]
    return []


def user_name(found: Group, app: App) -> str:
    return (
        f"CLIENT_ID|authMode=aksign,signMethod=hmacsha1,timestamp=MILLISECONDS,authId={app.key},"
        f"consumerGroupId={found.name}|"
    )


def takes(plan: Plan) -> str:
    what = ", ".join(kind for kind in Kind if kind in plan.kinds)
    of = "all products" if plan.products is None else ", ".join(plan.products) or "no product"
    return f"{what} of {of}{f', topics {plan.topic}' if plan.topic else ''}"


def target(plan: Plan, *, whole: bool = False) -> str:
    if plan.webhook:
        return plan.webhook.url if whole else shown_url(plan.webhook.url)
    return ", ".join(plan.apps) or "nobody yet"


def hook_words(webhook: Webhook) -> str:
    batch = (
        f" of up to {webhook.batch} messages, or what comes in {webhook.linger:g} s"
        if webhook.form is Form.BATCH
        else ""
    )
    return f"{webhook.form}{batch}; {count_of(webhook.lanes, 'request')} at a time, each up to {webhook.timeout:g} s"


def columns(standing: Standing | None) -> tuple[str, str, str, str]:
    if standing is None:
        return "–", "–", "–", "–"
    state = standing.state
    return str(state.lag), _rate(standing), _age(state.oldest), str(state.dead)


def standing_lines(found: Group, standing: Standing) -> list[tuple[str, str]]:
    state = standing.state
    parts = [f"{state.held} held"] + ([f"{state.retrying} offered again"] if state.retrying else [])
    return [
        ("lag", f"{count_of(state.lag, 'message')} ({', '.join(parts)})"),
        ("rate", f"{_rate(standing)} a second"),
        ("oldest", f"{_age(state.oldest)}{f', stored {local_time(state.oldest)}' if state.oldest else ''}"),
        (
            "dead",
            count_of(state.dead, "dead letter") + (f"; uplinkd group dead list {found.name}" if state.dead else ""),
        ),
    ]


def _rate(standing: Standing) -> str:
    return "–" if standing.rate is None else f"{standing.rate:.1f}"


def _age(moment: int | None) -> str:
    if moment is None:
        return "none"
    seconds = max(0, round(time.time() - moment / 1000))
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def consumer_words(each: Consumer) -> str:
    return (
        f"{each.app} from {each.address} since {local_time(each.since)}, client {each.client}: "
        f"holds {each.held}, takes {each.credit} more"
    )


def hook_state_words(hook: HookState) -> str:
    failed, success = count_of(hook.failed, "attempt"), local_time(hook.last_success or None)
    words = f"{hook.accepted} accepted and {failed} failed since the start, last success {success}"
    if hook.fault:
        words += f"; last fault {local_time(hook.last_failure or None)}: {hook.fault}"
    return f"counts as dead, next try {local_time(hook.next_try or None)}; {words}" if hook.open else words


def count_of(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def latest(hooks: list[HookState]) -> HookState | None:
    return max(hooks, key=lambda hook: max(hook.last_success, hook.last_failure), default=None)


def document(found: Group, secret: str = "", *, hide: bool = False) -> dict[str, Any]:
    plan, hook = found.plan, found.plan.webhook
    url = (shown_url(hook.url) if hide else hook.url) if hook else ""
    return {
        "name": found.name,
        "allProducts": plan.products is None,
        "products": list(plan.products or ()),
        "topic": plan.topic,
        "kinds": [kind.value for kind in Kind if kind in plan.kinds],
        "start": found.start,
        "ackWait": plan.ack_wait,
        "tries": plan.tries,
        "apps": list(plan.apps),
        "webhook": {**asdict(hook), "url": url} if hook else None,
        "paused": plan.paused,
        "createTime": found.created,
        **({"secret": secret} if secret else {}),
    }


def figures(standing: Standing | None) -> dict[str, Any] | None:
    return {**asdict(standing.state), "rate": standing.rate} if standing else None


def consumer_document(each: Consumer) -> dict[str, Any]:
    return {name: value for name, value in asdict(each).items() if name != "group"}


def hook_document(hook: HookState | None) -> dict[str, Any] | None:
    if hook is None:
        return None
    return {
        "open": hook.open,
        "accepted": hook.accepted,
        "failed": hook.failed,
        "lastSuccess": hook.last_success,
        "lastFailure": hook.last_failure,
        "fault": hook.fault,
        "nextTry": hook.next_try,
    }


def letter_document(letter: DeadLetter) -> dict[str, Any]:
    return {
        "number": letter.number,
        "time": letter.at,
        "tries": letter.tries,
        "reason": letter.reason,
        "message": message_document(letter.message),
    }
