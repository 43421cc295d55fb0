"""`uplinkd apikey` and `uplinkd user`: who may use the management API and the console."""

from __future__ import annotations

import click

from uplinkd.cli.common import json_option, local_time, print_json, print_table
from uplinkd.cli.products import opened, registry_options
from uplinkd.core.operators import ApiKey, Role, Scope, User
from uplinkd.settings import Settings

__all__ = ["apikey", "user"]

_scope = click.Choice([scope.value for scope in Scope])
_role = click.Choice([role.value for role in Role])


@click.group()
def apikey() -> None:
    """Make, list and delete keys for the management API."""


@apikey.command("create")
@click.argument("name")
@click.option("--scope", type=_scope, required=True, help="read: look; operate: act on devices; admin: manage access.")
@json_option
@registry_options
def create_key(settings: Settings, name: str, scope: str, as_json: bool) -> None:
    """Make an API key called NAME; it is shown this once, only a hash of it is kept."""
    with opened(settings) as registry:
        made, secret = registry.operators.create_key(name, Scope(scope))
    if as_json:
        print_json({**_key(made), "key": secret})
    else:
        click.echo(f"name   {made.name}\nscope  {made.scope}\nkey    {secret}   (shown this once)")


@apikey.command("list")
@json_option
@registry_options
def list_keys(settings: Settings, as_json: bool) -> None:
    """All API keys, by how they begin."""
    with opened(settings) as registry:
        found = registry.operators.api_keys()
    if as_json:
        print_json([_key(each) for each in found])
    else:
        rows = [
            (each.name, each.scope, f"{each.hint}…", local_time(each.created), local_time(each.last_used))
            for each in found
        ]
        print_table(("NAME", "SCOPE", "BEGINS WITH", "MADE", "LAST USED"), rows)


@apikey.command("delete")
@click.argument("name")
@json_option
@registry_options
def delete_key(settings: Settings, name: str, as_json: bool) -> None:
    """Delete an API key; whatever uses it is refused from now on."""
    with opened(settings) as registry:
        registry.operators.delete_key(name)
    _deleted("API key", name, as_json)


@click.group()
def user() -> None:
    """Make, list, change and delete users of the console."""


@user.command("create")
@click.argument("name")
@click.option("--role", type=_role, required=True, help="viewer: look; operator: act on devices; admin: manage access.")
@json_option
@registry_options
def create_user(settings: Settings, name: str, role: str, as_json: bool) -> None:
    """Make a user called NAME with a one-time password, which they replace at their first sign-in."""
    with opened(settings) as registry:
        made, password = registry.operators.invite(name, Role(role))
    _show(made, password, as_json)


@user.command("list")
@json_option
@registry_options
def list_users(settings: Settings, as_json: bool) -> None:
    """All users."""
    with opened(settings) as registry:
        found = registry.operators.users()
    if as_json:
        print_json([_user(each) for each in found])
    else:
        rows = [(each.name, each.role, local_time(each.last_sign_in), local_time(each.created)) for each in found]
        print_table(("NAME", "ROLE", "LAST SIGN-IN", "MADE"), rows)


@user.command("password")
@click.argument("name")
@json_option
@registry_options
def renew_password(settings: Settings, name: str, as_json: bool) -> None:
    """Give a user a new one-time password, as when it is forgotten; their sessions end."""
    with opened(settings) as registry:
        changed, password = registry.operators.renew_password(name)
    _show(changed, password, as_json)


@user.command("role")
@click.argument("name")
@click.argument("role", type=_role)
@json_option
@registry_options
def set_role(settings: Settings, name: str, role: str, as_json: bool) -> None:
    """Make a user a viewer, operator or admin."""
    with opened(settings) as registry:
        changed = registry.operators.set_role(name, Role(role))
    if as_json:
        print_json(_user(changed))
    else:
        click.echo(f"user {changed.name} is {changed.role} now")


@user.command("delete")
@click.argument("name")
@json_option
@registry_options
def delete_user(settings: Settings, name: str, as_json: bool) -> None:
    """Delete a user; their sessions end."""
    with opened(settings) as registry:
        registry.operators.delete_user(name)
    _deleted("user", name, as_json)


def _key(key: ApiKey) -> dict[str, object]:
    return {
        "name": key.name,
        "scope": key.scope.value,
        "hint": key.hint,
        "createTime": key.created,
        "lastUsed": key.last_used,
    }


def _user(user: User) -> dict[str, object]:
    return {
        "name": user.name,
        "role": user.role.value,
        "oneTime": user.one_time,
        "createTime": user.created,
        "lastSignIn": user.last_sign_in,
    }


def _show(user: User, password: str, as_json: bool) -> None:
    if as_json:
        print_json({**_user(user), "password": password})
    else:
        click.echo(f"name      {user.name}\nrole      {user.role}\npassword  {password}   (one-time, shown this once)")


def _deleted(what: str, name: str, as_json: bool) -> None:
    if as_json:
        print_json({"name": name, "deleted": True})
    else:
        click.echo(f"{what} {name} is deleted")
