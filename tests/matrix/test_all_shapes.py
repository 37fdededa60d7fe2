"""The large sweep: model families and topologies of both roles, so that all pairs occur."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

import pytest
from node_world import DEADLINE_S
from topology_world import TinyModels, covering, make_spec, serve

FACTORS = (
    ("qwen3", "qwen3_moe", "llama", "gemma3_text", "gpt_oss", "deepseek_v3"),
    (1, 2, 4),
    (1, 2),
    (1, 2, 3),
    (1, 2, 4),
    (1, 2),
    (1, 2, 3),
)
"""Family; tp, pp and cp of prefill; those of decode."""


Row = tuple[str, int, int, int, int, int, int]


def at_most_12_ranks(row: Row) -> bool:
    """In each replica; more say nothing that fewer do not."""
    return max(math.prod(row[1:4]), math.prod(row[4:7])) <= 12


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    return TinyModels(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize(
    "row", covering(FACTORS, at_most_12_ranks), ids=lambda row: "-".join(map(str, row))
)
def test_tokens_are_exact(row: Row, tmp_path: Path, tiny: TinyModels) -> None:
    family, *shapes = row
    folder, reference = tiny(family)
    spec = make_spec(folder, tuple(shapes[:3]), tuple(shapes[3:]))
    asyncio.run(asyncio.wait_for(serve(spec, tmp_path, reference), 4 * DEADLINE_S))
