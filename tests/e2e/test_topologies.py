"""Replicas of several ranks, whose shapes differ, served from end to end in one process, no Ray:
tokens are those of `transformers`, and everything is given back. More in tests/matrix."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from devices import DEVICES
from node_world import DEADLINE_S, cluster, collect, tokens_of
from topology_world import PAGE, Shape, TinyModels, make_spec, role, serve

from pd.messages import SamplingParams
from pd.replica_node import ReplicaNode

SAMPLE = [
    ("qwen3", (2, 1, 1), (1, 1, 1)),
    ("gemma3_text", (1, 1, 3), (2, 2, 1)),
    ("gpt_oss", (1, 2, 2), (4, 1, 1)),
    ("deepseek_v3", (2, 1, 2), (1, 2, 1)),
    ("qwen3_moe", (4, 1, 1), (1, 1, 2)),
    ("llama", (1, 2, 1), (1, 1, 3)),
]
"""(family, prefill, decode), topologies as (tp, pp, cp)."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    return TinyModels(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("family", "prefill", "decode"), SAMPLE)
def test_tokens_are_exact_in_any_shape(
    family: str, prefill: Shape, decode: Shape, device: str, tmp_path: Path, tiny: TinyModels
) -> None:
    folder, reference = tiny(family)
    spec = make_spec(folder, prefill, decode, device)
    asyncio.run(asyncio.wait_for(serve(spec, tmp_path, reference), DEADLINE_S))


def test_two_ranks_hold_what_one_cannot(tmp_path: Path, tiny: TinyModels) -> None:
    """A prompt of 1.8 times one rank's pool, with context parallelism of two on both sides; one
    rank would refuse it."""
    folder, reference = tiny("qwen3")
    pages = 30
    prompt = np.random.default_rng(0).integers(0, 256, int(1.8 * (pages - 1) * PAGE)).tolist()
    params = SamplingParams(max_tokens=8, temperature=0.0)

    async def run(cp: int) -> tuple[int, list[int]]:
        wide: Any = role((1, 1, cp), pool={"pages": pages})
        spec = make_spec(folder, (1, 1, 1), (1, 1, 1), roles={"prefill": wide, "decode": wide})
        sockets = tmp_path / str(cp)
        sockets.mkdir()
        async with cluster(spec, str(sockets)) as nodes:
            longest = min(
                node.max_context for node in nodes[0]._members.values() if node.is_replica
            )
            if longest < len(prompt) + 8:
                return longest, []
            outputs = await collect(nodes[0], prompt, params)
            assert all(not n.failure for n in nodes if isinstance(n, ReplicaNode))
            return longest, tokens_of(outputs)

    assert asyncio.run(asyncio.wait_for(run(1), DEADLINE_S)) == ((pages - 1) * PAGE, [])
    longest, tokens = asyncio.run(asyncio.wait_for(run(2), DEADLINE_S))
    assert longest == 2 * (pages - 1) * PAGE
    assert tokens == reference.generate(prompt, 8)
