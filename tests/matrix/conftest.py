"""One Ray head for each module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from real_cluster import RayHead, short_folder


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with short_folder() as folder:
        head = RayHead(folder)
        try:
            head.wait_ready()
            yield head
        finally:
            head.stop()
