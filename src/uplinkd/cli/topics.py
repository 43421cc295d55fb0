"""`uplinkd topic`: the topic classes of a product, which say what its devices may publish and subscribe to."""

from __future__ import annotations

import click

from uplinkd.cli.common import json_option, print_json, print_table
from uplinkd.cli.products import opened, registry_options
from uplinkd.core.model import Right, TopicClass
from uplinkd.settings import Settings

__all__ = ["topic"]


@click.group()
def topic() -> None:
    """List, add and remove the topic classes of a product."""


@topic.command("list")
@click.argument("pk")
@json_option
@registry_options
def list_classes(settings: Settings, pk: str, as_json: bool) -> None:
    """The topic classes of the product PK."""
    with opened(settings) as registry:
        found = registry.topic_classes(pk)
    if as_json:
        print_json([_document(pk, each) for each in found])
    else:
        print_table(("TOPIC CLASS", "RIGHT"), [(_pattern(pk, each), each.right) for each in found])


@topic.command()
@click.argument("pk")
@click.argument("levels")
@click.option(
    "--right", type=click.Choice([right.value for right in Right]), required=True, help="What devices may do there."
)
@json_option
@registry_options
def add(settings: Settings, pk: str, levels: str, right: str, as_json: bool) -> None:
    """Add the class /PK/${deviceName}/LEVELS; + and # only with the right to subscribe."""
    with opened(settings) as registry:
        added = registry.add_topic_class(pk, levels, Right(right))
    if as_json:
        print_json(_document(pk, added))
    else:
        click.echo(f"devices of {pk} may {_what(added.right)} {_pattern(pk, added)}")


@topic.command()
@click.argument("pk")
@click.argument("levels")
@json_option
@registry_options
def remove(settings: Settings, pk: str, levels: str, as_json: bool) -> None:
    """Remove the class /PK/${deviceName}/LEVELS."""
    with opened(settings) as registry:
        registry.remove_topic_class(pk, levels)
    if as_json:
        print_json({"productKey": pk, "levels": levels.removeprefix("/"), "removed": True})
    else:
        click.echo(f"the topic class {levels} of {pk} is removed")


def _pattern(pk: str, topic_class: TopicClass) -> str:
    return f"/{pk}/${{deviceName}}/{topic_class.levels}"


def _what(right: Right) -> str:
    return {Right.PUBLISH: "publish to", Right.SUBSCRIBE: "subscribe to", Right.BOTH: "publish and subscribe to"}[right]


def _document(pk: str, topic_class: TopicClass) -> dict[str, object]:
    return {"topicClass": _pattern(pk, topic_class), "levels": topic_class.levels, "right": topic_class.right.value}
