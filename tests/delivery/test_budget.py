"""What pumps and consumers may hold of messages, each and together."""

from __future__ import annotations

from uplinkd.delivery.budget import Budget

MIB = 1024**2


def test_who_gets_nothing_leaves_the_rest_to_others() -> None:
    """A share asks for 64 large messages at first; for as many as their size allows once some have come."""
    budget = Budget(256 * MIB)
    share = budget.share(32 * MIB, MIB)
    assert share.room(0) == 64
    share.claim(64)
    assert budget.used == 4 * MIB
    for number in range(63, -1, -1):
        share.came(100)
        share.claim(number)
    assert share.room(0) > 5000
    assert budget.used == 6400


def test_all_together_are_bounded_and_nobody_gets_nothing() -> None:
    """However large messages are: the bound, and the least for each beyond it."""
    budget = Budget(8 * MIB)
    shares = [budget.share(4 * MIB, MIB) for _ in range(10)]
    for share in shares:
        for _ in range(500):
            if share.room(0):
                share.came(128 * 1024)
                share.claim(0)
    assert all(share.held for share in shares)
    assert budget.used <= 8 * MIB + 10 * MIB
    for share in shares:
        share.close()
    assert budget.used == 0


def test_one_message_always_comes() -> None:
    """Also one that is larger than all that may be held."""
    share = Budget(1).share(1, 1)
    assert share.room(0) == 1
    share.came(1000)
    assert share.room(0) == 0
    share.went(1000)
    assert share.room(0) == 1
