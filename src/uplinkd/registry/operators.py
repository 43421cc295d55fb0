"""Users, their sessions, API keys, and the answers that a repeated creation gets again; in the registry's database.

Tokens, keys and idempotency keys are looked up by their SHA-256: they are random and long, so a plain hash of them cannot be
searched. Passwords are people's: their argon2 hash comes from whoever checks it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.engine import Connection

from uplinkd.core import names
from uplinkd.core.errors import Conflict, NotFound, Stale
from uplinkd.core.operators import ApiKey, AuditEntry, Role, Scope, User
from uplinkd.registry import Answer, audit
from uplinkd.registry.schema import answers, api_keys, sessions, users
from uplinkd.registry.vault import Vault

__all__ = ["SqlOperators"]

_HINT = 10
_ANSWER_MILLISECONDS = 24 * 3_600_000
_ADMINS = select(func.count()).select_from(users).where(users.c.role == Role.ADMIN.value)

Transactions = Callable[[], AbstractContextManager[Connection]]


class SqlOperators:
    """`registry.Operators` over the transactions of a SqlRegistry."""

    def __init__(self, reading: Transactions, writing: Transactions, vault: Vault) -> None:
        self._reading = reading
        self._writing = writing
        self._vault = vault

    # users

    def users(self) -> list[User]:
        with self._reading() as connection:
            return [_user(row) for row in connection.execute(select(users).order_by(users.c.id))]

    def find_user(self, name: str) -> User | None:
        with self._reading() as connection:
            row = connection.execute(select(users).where(users.c.name == name)).first()
        return _user(row) if row else None

    def create_user(self, name: str, role: Role, password_hash: str, *, one_time: bool) -> User:
        names.check_user_name(name)
        with self._writing() as connection:
            if connection.execute(select(users.c.id).where(users.c.name == name)).first():
                raise Conflict(f"there is a user {name!r} already")
            facts = {"name": name, "role": role.value, "password_hash": password_hash, "one_time": one_time}
            connection.execute(insert(users), {**facts, "created": _now()})
            audit.note(connection, "user.create", name, f"role {role}")
            return _user_named(connection, name)

    def invite(self, name: str, role: Role) -> tuple[User, str]:
        password = names.make_password()
        return self.create_user(name, role, _hash_password(password), one_time=True), password

    def renew_password(self, name: str) -> tuple[User, str]:
        password = names.make_password()
        return self.set_password(name, _hash_password(password), one_time=True), password

    def set_role(self, name: str, role: Role) -> User:
        with self._writing() as connection:
            user = _user_named(connection, name)
            connection.execute(update(users).where(users.c.id == user.id).values(role=role.value))
            _keep_an_admin(connection)
            audit.note(connection, "user.role", name, f"{user.role} → {role}")
            return _user_named(connection, name)

    def set_password(self, name: str, password_hash: str, *, one_time: bool, instead_of: str | None = None) -> User:
        with self._writing() as connection:
            user = _user_named(connection, name)
            if instead_of not in (None, user.password_hash):
                raise Stale(f"the password of {name!r} was changed meanwhile")
            values = {"password_hash": password_hash, "one_time": one_time}
            connection.execute(update(users).where(users.c.id == user.id).values(values))
            connection.execute(delete(sessions).where(sessions.c.user_id == user.id))
            audit.note(connection, "user.password", name, "one-time" if one_time else "")
            return _user_named(connection, name)

    def delete_user(self, name: str) -> None:
        with self._writing() as connection:
            user = _user_named(connection, name)
            connection.execute(delete(users).where(users.c.id == user.id))
            _keep_an_admin(connection)
            audit.note(connection, "user.delete", name)

    # sessions

    def open_session(self, user: User, token: str) -> bool:
        now = _now()
        same = (users.c.id == user.id) & (users.c.password_hash == user.password_hash)
        with self._writing() as connection:
            if not connection.execute(update(users).where(same).values(last_sign_in=now)).rowcount:
                return False
            connection.execute(insert(sessions).values(token_hash=_hash(token), user_id=user.id, created=now, used=now))
            audit.note(connection, "session.begin", user.name)
            return True

    def session(self, token: str, *, idle: int, longest: int) -> User | None:
        now = _now()
        with self._reading() as connection:
            row = connection.execute(
                select(users)
                .join(sessions)
                .where(
                    sessions.c.token_hash == _hash(token),
                    sessions.c.used >= now - idle,
                    sessions.c.created >= now - longest,
                )
            ).first()
        return _user(row) if row else None

    def session_used(self, token: str, *, longest: int) -> None:
        now = _now()
        with self._writing() as connection:
            connection.execute(update(sessions).where(sessions.c.token_hash == _hash(token)).values(used=now))
            connection.execute(delete(sessions).where(sessions.c.created < now - longest))

    def close_session(self, token: str) -> None:
        with self._writing() as connection:
            connection.execute(delete(sessions).where(sessions.c.token_hash == _hash(token)))
            audit.note(connection, "session.end", "")

    # API keys

    def create_key(self, name: str, scope: Scope) -> tuple[ApiKey, str]:
        names.check_app_name(name)
        key = names.make_api_key()
        with self._writing() as connection:
            if connection.execute(select(api_keys.c.id).where(api_keys.c.name == name)).first():
                raise Conflict(f"there is an API key named {name!r} already; names are unique")
            facts = {"name": name, "scope": scope.value, "key_hash": _hash(key), "hint": key[:_HINT]}
            connection.execute(insert(api_keys), {**facts, "created": _now()})
            audit.note(connection, "key.create", name, f"scope {scope}")
            row = connection.execute(select(api_keys).where(api_keys.c.name == name)).one()
        return _key(row), key

    def api_keys(self) -> list[ApiKey]:
        with self._reading() as connection:
            return [_key(row) for row in connection.execute(select(api_keys).order_by(api_keys.c.id))]

    def find_key(self, key: str) -> ApiKey | None:
        with self._reading() as connection:
            row = connection.execute(select(api_keys).where(api_keys.c.key_hash == _hash(key))).first()
        return _key(row) if row else None

    def key_used(self, key_id: int) -> None:
        with self._writing() as connection:
            connection.execute(update(api_keys).where(api_keys.c.id == key_id).values(last_used=_now()))

    def delete_key(self, name: str) -> None:
        with self._writing() as connection:
            if not connection.execute(delete(api_keys).where(api_keys.c.name == name)).rowcount:
                raise NotFound(f"there is no API key {name!r}; `uplinkd apikey list` shows them")
            audit.note(connection, "key.delete", name)

    # what was done

    def note(self, action: str, target: str, detail: str = "") -> None:
        with self._writing() as connection:
            audit.note(connection, action, target, detail)

    def audit(
        self, *, actor: str = "", action: str = "", target: str = "", before: int | None = None, limit: int
    ) -> list[AuditEntry]:
        with self._reading() as connection:
            return audit.page(connection, actor=actor, action=action, target=target, before=before, limit=limit)

    # repeated creations

    def begin_answer(self, key: str, request: str) -> Answer | None:
        now = _now()
        with self._writing() as connection:
            connection.execute(delete(answers).where(answers.c.created < now - _ANSWER_MILLISECONDS))
            row = connection.execute(select(answers).where(answers.c.key_hash == _hash(key))).first()
            if row is None:
                facts = {"key_hash": _hash(key), "request_hash": _hash(request), "created": now}
                connection.execute(insert(answers).values(facts))
                return None
        if row.request_hash != _hash(request):
            raise Conflict("this Idempotency-Key came with another request before; use a new one for each creation")
        body = self._vault.open(row.answer, owner=_answer_owner(key)) if row.answer is not None else None
        return Answer(body)

    def keep_answer(self, key: str, body: bytes) -> None:
        with self._writing() as connection:
            sealed = self._vault.seal(body, owner=_answer_owner(key))
            connection.execute(update(answers).where(answers.c.key_hash == _hash(key)).values(answer=sealed))

    def forget_answer(self, key: str) -> None:
        with self._writing() as connection:
            connection.execute(delete(answers).where(answers.c.key_hash == _hash(key)))


def _now() -> int:
    return time.time_ns() // 1_000_000


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


def _answer_owner(key: str) -> str:
    return f"answer/{_hash(key).hex()}"


def _user(row: Any) -> User:
    return User(row.id, row.name, Role(row.role), row.password_hash, row.one_time, row.created, row.last_sign_in)


def _key(row: Any) -> ApiKey:
    return ApiKey(row.id, row.name, Scope(row.scope), row.hint, row.created, row.last_used)


def _user_named(connection: Connection, name: str) -> User:
    row = connection.execute(select(users).where(users.c.name == name)).first()
    if row is None:
        raise NotFound(f"there is no user {name!r}; `uplinkd user list` shows them")
    return _user(row)


def _keep_an_admin(connection: Connection) -> None:
    if not connection.execute(_ADMINS).scalar_one():
        raise Conflict("nobody would be left who may manage access; make another user an admin first")


def _hash_password(password: str) -> str:
    from uplinkd.registry.passwords import hash_password  # argon2 is not for the processes of gateways

    return hash_password(password)
