"""Who looks after uplinkd: users and API keys, what each may do, and the record of what they did."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import StrEnum

__all__ = ["Actor", "ApiKey", "AuditEntry", "Role", "Scope", "User", "acting"]


class Scope(StrEnum):
    """What may be done, each including the one before: look (never at secrets), act on devices, manage access."""

    READ = "read"
    OPERATE = "operate"
    ADMIN = "admin"

    def covers(self, needed: Scope) -> bool:
        return _ORDER[self] >= _ORDER[needed]


_ORDER = {scope: number for number, scope in enumerate(Scope)}


class Role(StrEnum):
    """What a user is; each role has one scope."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"

    @property
    def scope(self) -> Scope:
        return {Role.VIEWER: Scope.READ, Role.OPERATOR: Scope.OPERATE, Role.ADMIN: Scope.ADMIN}[self]


@dataclass(frozen=True, slots=True)
class User:
    """A person who signs in to the console. `one_time`: the password was made by uplinkd and must be replaced at the first
    sign-in. `last_sign_in` is ms, None before it."""

    id: int
    name: str
    role: Role
    password_hash: str = field(repr=False)
    one_time: bool
    created: int
    last_sign_in: int | None


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A program's key for the management API. Of the key itself only a hash is kept; `hint` is how it begins, to tell keys
    apart. `last_used` is ms, to within a minute, None before it."""

    id: int
    name: str
    scope: Scope
    hint: str
    created: int
    last_used: int | None


@dataclass(frozen=True, slots=True)
class Actor:
    """Who acts: a user or key by `name`, by which `way` (console, api, cli, server), from which `address`."""

    name: str
    way: str
    address: str = ""


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One thing that was done at `at` (ms): `action` such as `device.disable`, to `target`; `detail` never holds a secret."""

    id: int
    at: int
    actor: Actor
    action: str
    target: str
    detail: str


acting: ContextVar[Actor] = ContextVar("acting", default=Actor("uplinkd", "server"))  # noqa: B039 - frozen
"""On whose behalf the registry is changed now; whoever opens a door to operators sets it."""
