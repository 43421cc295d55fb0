"""Who is at the operator's door: passwords, sessions, API keys; and how often somebody may try."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import hmac
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

from argon2.exceptions import InvalidHashError, VerificationError
from limits import RateLimitItem, RateLimitItemPerHour, RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from uplinkd.core.errors import Conflict, Rejected
from uplinkd.core.names import make_password
from uplinkd.core.operators import Actor, Role, Scope, User, acting
from uplinkd.flow import network_of
from uplinkd.registry import Operators
from uplinkd.registry.passwords import hash_password, hasher

__all__ = [
    "Attempts",
    "Denied",
    "Principal",
    "TooOften",
    "change_password",
    "check_new_password",
    "check_password",
    "csrf_token",
    "first_password",
    "hash_password",
    "new_token",
    "sign_in",
]

FIRST_USER = "admin"
MINIMUM_LENGTH = 10
_LONGEST = 1024
_AT_ONCE, _MOST_WAITING = 2, 20
_LONGEST_NAME = 64


class Denied(Rejected):
    """Not signed in, or not allowed to."""


class TooOften(Rejected):
    """Too much at once; `seconds` until it may be tried again."""

    def __init__(self, seconds: int, what: str = "too many attempts to sign in") -> None:
        super().__init__(f"{what}; try again in {seconds} s")
        self.seconds = seconds


@dataclass(frozen=True, slots=True)
class Principal:
    """Who has shown who they are. `csrf` belongs to the session, empty for an API key. `identity` tells two of the same name apart,
    of which one was made after the other was deleted or got another scope."""

    actor: Actor
    scope: Scope
    identity: str
    csrf: str = ""
    user: User | None = None


class Attempts:
    """How often sign-ins may fail: 10 a minute and 60 an hour from one address for one user, 60 a minute from one address."""

    def __init__(self) -> None:
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._pair = (RateLimitItemPerMinute(10), RateLimitItemPerHour(60))
        self._address = RateLimitItemPerMinute(60)
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self._waiting = 0

    def check(self, user: str, address: str) -> None:
        """Raise TooOften when the next attempt would be one too many."""
        for item, who in self._counted(user, address):
            if not self._limiter.test(item, *who):
                reset = self._limiter.get_window_stats(item, *who).reset_time
                raise TooOften(max(1, round(reset - time.time())))

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Checking a password takes 64 MiB and a core for a moment: two at a time, a few wait, and others come again."""
        if self._waiting >= _MOST_WAITING:
            raise TooOften(1)
        self._waiting += 1
        try:
            async with self._turns:
                yield
        finally:
            self._waiting -= 1

    def failed(self, user: str, address: str) -> None:
        for item, who in self._counted(user, address):
            self._limiter.hit(item, *who)

    def _counted(self, user: str, address: str) -> Iterator[tuple[RateLimitItem, tuple[str, ...]]]:
        place = network_of(address) or address
        for item in self._pair:
            yield item, (user[:_LONGEST_NAME], place)
        yield self._address, (place,)


def check_password(user: User | None, password: str) -> bool:
    """Whether it is the user's; False for None, after the same work."""
    if len(password) > _LONGEST:
        return False
    try:
        hasher.verify(user.password_hash if user else _nobody(), password)
    except (VerificationError, InvalidHashError):
        return False
    return user is not None


@functools.cache
def _nobody() -> str:
    """An unknown user's hash, so that they cost as much as a wrong password."""
    return hash_password(secrets.token_hex(16))


def sign_in(operators: Operators, attempts: Attempts, name: str, password: str, address: str) -> tuple[User, str]:
    """The user, and the token of a new session; raise Denied or TooOften. The audit does not get a name that is nobody's: people
    type their password there."""
    attempts.check(name, address)
    user = operators.find_user(name)
    acting.set(Actor(user.name if user else "(unknown)", "console", address))
    right, token = check_password(user, password), new_token()
    if not right or user is None or not operators.open_session(user, token):
        attempts.failed(name, address)
        operators.note("session.refused", user.name if user else "", "" if user else "there is no such user")
        raise Denied("the user name or the password is wrong")
    return user, token


def change_password(operators: Operators, attempts: Attempts, user: User, old: str, new: str, address: str) -> None:
    """Raise Rejected when `old` is wrong, or `new` breaks the rule; TooOften, since whoever has found a session guesses no better
    than others. All sessions of the user end."""
    attempts.check(user.name, address)
    if not check_password(user, old):
        attempts.failed(user.name, address)
        operators.note("password.refused", user.name)
        raise Rejected("the present password is wrong")
    check_new_password(new, user.name)
    if old == new:
        raise Rejected("the new password is the present one")
    operators.set_password(user.name, hash_password(new), one_time=False, instead_of=user.password_hash)


def check_new_password(password: str, name: str) -> None:
    """Length is what counts (NIST SP 800-63B, 5.1.1.2)."""
    if not MINIMUM_LENGTH <= len(password) <= _LONGEST:
        raise Rejected(f"a password has at least {MINIMUM_LENGTH} characters; this one has {len(password)}")
    if password.lower() == name.lower() or len(set(password)) < 4:
        raise Rejected("this password is too easily guessed; take one with more different characters")


def first_password(operators: Operators, *, shared: bool = False) -> str | None:
    """A new one-time password of the first user, as long as nobody has signed in with one and chosen their own. In a registry that
    gateways share, the first of them alone makes one: whoever has read it would find it replaced by the next that starts."""
    users = operators.users()
    if not users:
        password = make_password()
        with contextlib.suppress(Conflict):  # another one that starts now was quicker
            operators.create_user(FIRST_USER, Role.ADMIN, hash_password(password), one_time=True)
            return password
        return None
    if not shared and [user.name for user in users] == [FIRST_USER] and users[0].one_time:
        password = make_password()
        operators.set_password(FIRST_USER, hash_password(password), one_time=True)
        return password
    return None


def new_token() -> str:
    return secrets.token_urlsafe(32)


def csrf_token(session: str) -> str:
    """What a form of this session carries; it tells nothing about the session's token."""
    return hmac.digest(session.encode(), b"uplinkd csrf", hashlib.sha256).hex()
