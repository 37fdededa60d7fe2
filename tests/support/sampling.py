"""What of a test's many seeds runs each time; all of them run in `make test-long`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def a_fifth_of(parts: Sequence[int]) -> list[Any]:
    return [
        part if number % 5 == 0 else pytest.param(part, marks=pytest.mark.long)
        for number, part in enumerate(parts)
    ]
