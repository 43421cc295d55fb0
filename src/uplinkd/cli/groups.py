"""`uplinkd group`: consumer groups, how far each is, and what they did not accept."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, TypeVar, cast

import click

from uplinkd.asking import Live
from uplinkd.cli.apps import doors_of
from uplinkd.cli.common import (
    KEY_FLAGS,
    duration,
    json_option,
    local_time,
    print_json,
    print_table,
    printable,
    progress_line,
    server_elsewhere,
    settings_options,
    warn,
)
from uplinkd.cli.group_desk import desk_of, standings_of
from uplinkd.cli.group_words import (
    columns,
    consumer_document,
    consumer_words,
    count_of,
    document,
    figures,
    hook_document,
    hook_state_words,
    hook_words,
    latest,
    letter_document,
    next_steps,
    nobody,
    print_lines,
    standing_lines,
    takes,
    target,
    user_name,
)
from uplinkd.cli.messages import may_be_there, payload_text
from uplinkd.cli.products import opened
from uplinkd.core.errors import NotFound, Rejected, Unavailable
from uplinkd.core.groups import Form, Group, Kind, Plan, Webhook
from uplinkd.core.model import ProductKey
from uplinkd.core.webhooks import check_target
from uplinkd.engine import DeadLetter
from uplinkd.engine.standing import Standing
from uplinkd.registry import Management, Registry
from uplinkd.settings import Settings

__all__ = ["group"]

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

_options = settings_options(
    "database_url",
    "secret_key",
    "amqp_listen",
    "mqtt_listen",
    "nats_listen",
    "nats_url",
    "webhook_networks",
    "nats_server",
    remote=KEY_FLAGS,
)
_KINDS = click.Choice([kind.value for kind in Kind])
_FORMS = click.Choice([form.value for form in Form])


# -- options


def _moment(_context: click.Context, _option: click.Parameter, text: str | None) -> int | None:
    """ms since 1970 of `now`, of an age such as 2h, or of a time such as 2026-11-27T08:00."""
    if text is None:
        return None
    now = round(time.time() * 1000)
    if text == "now":
        return now
    with contextlib.suppress(click.BadParameter):
        return max(0, now - round(duration(text) * 1000))
    try:
        return max(0, round(datetime.fromisoformat(text).timestamp() * 1000))  # without a zone it is local time
    except (ValueError, OverflowError, OSError) as error:
        raise click.BadParameter(
            f"{text!r}: it is now, an age such as 90s, 2h or 7d, or a time such as 2026-11-27T08:00"
        ) from error


def _seconds(_context: click.Context, _option: click.Parameter, text: str | None) -> float | None:
    return None if text is None else duration(text)


def _plan_options(command: F) -> F:
    """What `create` and `change` share; all of it may be left out."""
    for option in (
        click.option("--timeout", callback=_seconds, metavar="S", help="An attempt of the webhook may take this long  [10s]."),
        click.option("--lanes", type=int, metavar="N", help="Requests at a time; a device's are one by one  [4]."),
        click.option("--linger", callback=_seconds, metavar="S", help="How long the first message of a batch waits for others  [0s]."),
        click.option("--batch", type=int, metavar="N", help="Most messages in one request of the form batch  [100]."),
        click.option("--form", type=_FORMS, help="How the webhook gets messages, as CloudEvents  [binary]."),
        click.option("--webhook", metavar="URL", help="Post the messages there."),
        click.option("--app", "apps", multiple=True, metavar="NAME", help="An application that may consume it over AMQP; repeatable."),
        click.option("--tries", type=int, metavar="N", help="How often a message is offered before it is a dead letter  [16]."),
        click.option("--ack-wait", callback=_seconds, metavar="S", help="What is not accepted for this long comes again  [30s]."),
        click.option("--kind", "kinds", multiple=True, type=_KINDS, help="Kind of messages; repeatable  [uplink]."),
        click.option("--topic", metavar="FILTER", help="Only what devices report on topics that this MQTT filter matches; '' for all."),
        click.option("--all-products", is_flag=True, help="Messages of all products, also of future ones."),
        click.option("--product", "products", multiple=True, metavar="PK", help="Messages of this product; repeatable."),
    ):  # fmt: skip
        command = option(command)
    return command


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wishes:
    """What was typed; None or empty for what was not."""

    products: tuple[str, ...]
    all_products: bool
    topic: str | None
    kinds: tuple[str, ...]
    ack_wait: float | None
    tries: int | None
    apps: tuple[str, ...]
    webhook: str | None
    form: str | None
    batch: int | None
    linger: float | None
    lanes: int | None
    timeout: float | None

    def applied(self, plan: Plan) -> Plan:
        """`plan` with what was typed."""
        if self.products and self.all_products:
            raise click.UsageError("--product names products, --all-products takes them all: one of them is wanted")
        given: dict[str, Any] = {}
        if self.products or self.all_products:
            given["products"] = None if self.all_products else tuple(map(ProductKey, dict.fromkeys(self.products)))
        if self.kinds:
            given["kinds"] = frozenset(map(Kind, self.kinds))
        if self.apps:
            given["apps"] = tuple(dict.fromkeys(self.apps))
        given |= {name: value for name in ("topic", "ack_wait", "tries") if (value := getattr(self, name)) is not None}
        return replace(plan, **given, webhook=self._hook(plan.webhook))

    def _hook(self, before: Webhook | None) -> Webhook | None:
        given = {
            name: value
            for name in ("form", "batch", "linger", "lanes", "timeout")
            if (value := getattr(self, name)) is not None
        }
        if self.webhook is not None:
            given["url"] = self.webhook
        if not given:
            return before
        if "form" in given:
            given["form"] = Form(given["form"])
        if before:
            return replace(before, **given)
        if self.webhook is None:
            raise click.UsageError(
                f"--{next(iter(given))} is of a webhook, and there is none: give its URL with --webhook"
            )
        return Webhook(**given)


# -- commands


@click.group()
def group() -> None:
    """Consumer groups: which messages your backends take, how far they are, and what they did not accept."""


@group.command()
@click.argument("name")
@_plan_options
@click.option(
    "--from",
    "start",
    callback=_moment,
    metavar="WHEN",
    help="The first message: now, an age such as 2h, or a time such as 2026-11-27T08:00  [now].",
)
@json_option
@_options
def create(settings: Settings, name: str, start: int | None, as_json: bool, **typed: Any) -> None:
    """Make a consumer group called NAME. The secret of its webhook is shown this once."""
    wishes = _Wishes(**typed)
    if not wishes.products and not wishes.all_products:
        raise click.UsageError("which messages? Name products with --product PK (repeatable), or take --all-products")
    with opened(settings) as registry:
        made = registry.groups.create(name, wishes.applied(Plan(products=())), start=start)
        _warn_of_target(settings, made)
        _show(settings, registry, made, as_json, secret=made.secret)


@group.command("list")
@json_option
@_options
def list_groups(settings: Settings, as_json: bool) -> None:
    """All groups and how far they are; the rate is measured for a second."""
    with opened(settings) as registry:
        found = registry.groups.all()
    standings = standings_of(settings, found)
    if as_json:
        print_json(
            [
                {**document(each, hide=True), "state": figures(standing)}
                for each, standing in zip(found, standings, strict=True)
            ]
        )
        return
    rows = []
    for each, standing in zip(found, standings, strict=True):
        name = f"{each.name} (paused)" if each.plan.paused else each.name
        rows.append((name, takes(each.plan), target(each.plan), *columns(standing)))
    print_table(("NAME", "TAKES", "TO", "LAG", "RATE", "OLDEST", "DEAD"), rows)


@group.command()
@click.argument("name")
@json_option
@_options
def show(settings: Settings, name: str, as_json: bool) -> None:
    """One group: what it takes, how far it is, who consumes it; never its secret."""
    with opened(settings) as registry:
        _show(settings, registry, registry.groups.get(name), as_json, look=True)


@group.command()
@click.argument("name")
@_plan_options
@click.option("--no-apps", is_flag=True, help="No application may consume it any more.")
@click.option("--no-webhook", is_flag=True, help="Post its messages nowhere any more.")
@click.option("--pause/--resume", default=None, help="Deliver nothing for now; messages are kept as ever, and wait.")
@json_option
@_options
def change(
    settings: Settings,
    name: str,
    no_apps: bool,
    no_webhook: bool,
    pause: bool | None,
    as_json: bool,
    **typed: Any,
) -> None:
    """Change the group NAME: only what is given, and never its position. --product, --kind and --app replace all that there were."""
    wishes = _Wishes(**typed)
    if wishes.apps and no_apps:
        raise click.UsageError("--app lets an application consume it, --no-apps none: one of them is wanted")
    if wishes.webhook is not None and no_webhook:
        raise click.UsageError(
            "--webhook says where its messages are posted, --no-webhook nowhere: one of them is wanted"
        )
    with opened(settings) as registry:
        before = registry.groups.get(name)
        plan = before.plan
        if no_apps:
            plan = replace(plan, apps=())
        if no_webhook:
            plan = replace(plan, webhook=None)
        plan = wishes.applied(plan)
        if pause is not None:
            plan = replace(plan, paused=pause)
        if plan == before.plan:
            raise Rejected(
                f"consumer group {name!r} is like that already; `uplinkd group change --help` says what can be changed"
            )
        changed = registry.groups.change(name, plan, version=before.version)
        _warn_of_target(settings, changed)
        secret = changed.secret if not before.plan.webhook else ""
        _show(settings, registry, changed, as_json, secret=secret)


@group.command()
@click.argument("name")
@click.option(
    "--to",
    "start",
    required=True,
    callback=_moment,
    metavar="WHEN",
    help="The next message: now, an age such as 2h, or a time such as 2026-11-27T08:00.",
)
@json_option
@_options
def reset(settings: Settings, name: str, start: int, as_json: bool) -> None:
    """Set the position of the group NAME: it gets what was stored since then, also again what it had."""
    with opened(settings) as registry:
        moved = registry.groups.reset(name, start)
    if as_json:
        print_json(document(moved))
    else:
        click.echo(f"consumer group {name} goes on with what was stored from {local_time(moved.start)} on")


@group.command("renew-secret")
@click.argument("name")
@json_option
@_options
def renew_secret(settings: Settings, name: str, as_json: bool) -> None:
    """Give the webhook of the group NAME a new secret, shown this once; the old one signs nothing from now on."""
    with opened(settings) as registry:
        renewed = registry.groups.renew_secret(name)
        _show(settings, registry, renewed, as_json, secret=renewed.secret)


@group.command("test")
@click.argument("name")
@json_option
@_options
def try_hook(settings: Settings, name: str, as_json: bool) -> None:
    """Post a sample event to the webhook of the group NAME, and tell what became of it."""
    with opened(settings) as registry:
        found = registry.groups.get(name)
        if found.plan.webhook is None:
            raise Rejected(f"consumer group {name!r} has no webhook to try")
        if not server_elsewhere():  # which notes it itself
            cast("Registry", registry).operators.note("group.test", name)
    with desk_of(settings, serving=True) as desk:
        trial = desk.try_hook(found)
    if as_json:
        print_json(trial.document())
    elif trial.fault:
        text = f": {trial.text}" if trial.text else ""
        click.echo(f"not accepted, after {trial.seconds:.2f} s: {printable(trial.fault + text)}")
    else:
        click.echo(f"accepted with HTTP {trial.status}, in {trial.seconds:.2f} s")
    if trial.fault:
        sys.exit(1)


@group.command()
@click.argument("name")
@json_option
@_options
def delete(settings: Settings, name: str, as_json: bool) -> None:
    """Delete a group with its position and its dead letters; the messages stay."""
    with opened(settings) as registry:
        registry.groups.delete(name)
    if as_json:
        print_json({"name": name, "deleted": True})
    else:
        click.echo(f"consumer group {name} is deleted")


@group.group()
def dead() -> None:
    """Dead letters: messages that a group did not accept however often they were offered. They are kept for 30 days."""


@dead.command("list")
@click.argument("name")
@click.option("--after", type=click.IntRange(min=0), default=0, metavar="NUMBER", help="Those beyond this one.")
@click.option(
    "--limit", type=click.IntRange(1, 10_000), default=20, show_default=True, help="At most this many, the oldest."
)
@json_option
@_options
def list_dead(settings: Settings, name: str, after: int, limit: int, as_json: bool) -> None:
    """The dead letters of the group NAME, the oldest first."""
    with opened(settings) as registry:
        found_group = registry.groups.get(name)
    found: list[DeadLetter] = []
    if may_be_there(settings):
        with desk_of(settings) as desk:
            found = desk.dead(found_group, after=after, limit=limit)
    if as_json:
        print_json([letter_document(each) for each in found])
        return
    rows = [
        (
            each.number,
            local_time(each.at),
            each.tries,
            each.message.topic,
            payload_text(each.message.payload)[:60],
            each.reason,
        )
        for each in found
    ]
    print_table(("NUMBER", "GIVEN UP", "TRIES", "TOPIC", "PAYLOAD", "WHY"), rows)
    if len(found) == limit:
        warn(f"there may be more: --after {found[-1].number}")


@dead.command("show")
@click.argument("name")
@click.argument("number", type=click.IntRange(1, 2**63 - 1))
@json_option
@_options
def show_dead(settings: Settings, name: str, number: int, as_json: bool) -> None:
    """One dead letter with its payload and why it was given up."""
    with opened(settings) as registry:
        found_group = registry.groups.get(name)
    found = None
    if may_be_there(settings):
        with desk_of(settings) as desk:
            found = desk.dead_letter(found_group, number)
    if found is None:
        raise NotFound(
            f"consumer group {name!r} has no dead letter {number}; `uplinkd group dead list {name}` shows them"
        )
    if as_json:
        print_json(letter_document(found))
        return
    message = found.message
    print_lines(
        ("number", str(found.number)),
        ("given up", f"{local_time(found.at)}, after {count_of(found.tries, 'try', 'tries')}"),
        ("why", found.reason or "not said"),
        ("messageId", str(message.id)),
        ("stored", local_time(message.generate_time)),
        ("topic", message.topic),
        ("payload", payload_text(message.payload)),
    )


@dead.command("retry")
@click.argument("name")
@click.argument("numbers", nargs=-1, type=click.IntRange(1, 2**63 - 1))
@click.option("--all", "everything", is_flag=True, help="All that there are.")
@json_option
@_options
def retry_dead(settings: Settings, name: str, numbers: tuple[int, ...], everything: bool, as_json: bool) -> None:
    """Offer the dead letters NUMBERS of the group NAME to its consumers again, with all their tries."""
    _check_numbers(numbers, everything)
    with opened(settings) as registry:
        found = registry.groups.get(name)
        count = 0
        if may_be_there(settings):
            _note(registry, "group.retry", name, numbers)
            with desk_of(settings) as desk, progress_line("retrying", "dead letters") as progress:
                count = desk.retry(found, None if everything else numbers, progress)
    _done(name, count, "offered again", as_json, numbers)


@dead.command("purge")
@click.argument("name")
@click.argument("numbers", nargs=-1, type=click.IntRange(1, 2**63 - 1))
@click.option("--all", "everything", is_flag=True, help="All that there are.")
@click.option("--yes", is_flag=True, help="Do not ask before all are thrown away.")
@json_option
@_options
def purge_dead(
    settings: Settings, name: str, numbers: tuple[int, ...], everything: bool, yes: bool, as_json: bool
) -> None:
    """Throw the dead letters NUMBERS of the group NAME away."""
    _check_numbers(numbers, everything)
    with opened(settings) as registry:
        found = registry.groups.get(name)
        if everything and not yes:
            if not sys.stdin.isatty():
                raise click.UsageError(f"all dead letters of {name} would be gone: say so with --yes")
            click.confirm(f"Throw all dead letters of {name} away?", abort=True, err=True)
        count = 0
        if may_be_there(settings):
            _note(registry, "group.purge", name, numbers)
            with desk_of(settings) as desk:
                count = desk.purge(found, None if everything else numbers)
    _done(name, count, "gone", as_json, numbers)


def _check_numbers(numbers: tuple[int, ...], everything: bool) -> None:
    if bool(numbers) == everything:
        raise click.UsageError("which dead letters? Give their numbers, or --all")


def _note(registry: Management, action: str, name: str, numbers: Sequence[int]) -> None:
    """A server elsewhere notes it itself."""
    if not server_elsewhere():
        detail = (
            f"dead letters {' '.join(map(str, numbers[:10]))}{' …' if len(numbers) > 10 else ''}" if numbers else "all"
        )
        cast("Registry", registry).operators.note(action, name, detail)


def _warn_of_target(settings: Settings, group: Group) -> None:
    """A server elsewhere has refused what it will never reach; the one here may have other settings than this command."""
    if group.plan.webhook and not server_elsewhere():
        try:
            check_target(group.plan.webhook.url, settings.webhook_networks)
        except Rejected as fault:
            warn(f"if the server has the same settings as this command, it will not be reached: {fault}")


def _done(name: str, count: int, what: str, as_json: bool, numbers: Sequence[int]) -> None:
    missing = len(set(numbers)) - count
    if numbers and not count:
        raise NotFound(
            f"consumer group {name!r} has no dead letter {', '.join(map(str, numbers[:10]))}{' …' if len(numbers) > 10 else ''}; "
            f"`uplinkd group dead list {name}` shows them"
        )
    if missing > 0:
        warn(f"{missing} of these numbers {'is' if missing == 1 else 'are'} no dead letter of {name}")
    if as_json:
        print_json({"name": name, "count": count})
    else:
        click.echo(f"{count_of(count, 'dead letter')} of {name} {'is' if count == 1 else 'are'} {what}")


def _show(
    settings: Settings,
    registry: Management,
    found: Group,
    as_json: bool,
    *,
    secret: str = "",
    look: bool = False,
) -> None:
    standing: Standing | None = None
    live: Live | None = None
    if look and may_be_there(settings):
        try:
            with desk_of(settings) as desk:
                standing, live = desk.look(found)
        except Unavailable as fault:
            warn(f"how far it is is not known: {fault}")
    apps = [app for app in registry.apps() if app.name in found.plan.apps] if found.plan.apps else []
    amqp = doors_of(settings).amqp if apps else ""
    consumers = [each for each in live.consumers if each.group == found.name] if live else []
    hook = latest([each for each in live.hooks if each.group == found.name]) if live else None
    if as_json:
        state = figures(standing)
        if state is not None:
            state |= {"consumers": [consumer_document(each) for each in consumers], "webhook": hook_document(hook)}
        print_json(
            {
                **document(found, secret),
                "amqp": {"url": amqp, "userNames": {app.name: user_name(found, app) for app in apps}} if apps else None,
                **({"state": state} if look else {}),
            }
        )
        return
    plan = found.plan
    lines = [
        ("name", found.name + (" (paused)" if plan.paused else "")),
        ("takes", takes(plan)),
        ("to", target(plan, whole=True)),
    ]
    if plan.webhook:
        lines.append(("", hook_words(plan.webhook)))
    if secret:
        lines.append(("secret", f"{secret}   (signs what is posted; shown this once)"))
    lines += [
        ("from", f"what was stored since {local_time(found.start)}"),
        ("offered", f"{count_of(plan.tries, 'time')} at most; again after {plan.ack_wait:g} s without an answer"),
    ]
    if standing:
        lines += standing_lines(found, standing)
    if live:
        lines += [("consumer", consumer_words(each)) for each in consumers]
        lines += nobody(found, consumers, hook)
    if hook:
        lines.append(("webhook", hook_state_words(hook)))
    lines += next_steps(found, apps, amqp)
    print_lines(*lines)
