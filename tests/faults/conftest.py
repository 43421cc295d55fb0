from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.faults.table import Tell, teller


@pytest.fixture
def tell(record_property: Callable[[str, object], None]) -> Tell:
    return teller(record_property)
