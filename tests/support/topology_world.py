"""Replicas of several ranks in one process, and models to compare their tokens with."""

from __future__ import annotations

import asyncio
import functools
import itertools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from node_world import cluster, collect, tokens_of, wait_until
from reference_model import ReferenceModel

from pd.bench.tiny import make_tiny_model
from pd.messages import SamplingParams
from pd.replica_node import ReplicaNode
from pd.spec import ClusterSpec

PAGE = 8
OUTPUT = 10
LENGTHS = (5, 9, 33, 64, 70, 100, 120, 31)
Shape = tuple[int, int, int]
"""(tp, pp, cp)."""


class TinyModels:
    """Made when first asked for."""

    def __init__(self, base: Path) -> None:
        self._base = base

    @functools.cache  # noqa: B019 (they live as long as the tests)
    def __call__(self, family: str) -> tuple[Path, ReferenceModel]:
        folder = make_tiny_model(self._base / family, family)
        return folder, ReferenceModel(folder)


def role(topology: Shape, device: str = "cpu", **more: Any) -> dict[str, Any]:
    """On a GPU, all ranks share it."""
    names = dict(zip(("tp", "pp", "cp"), topology, strict=True))
    common = {"topology": names, "pool": {"pages": 120}, "max_batch_tokens": 40}
    if device == "cuda":
        common |= {"device": device, "resources": {"GPU": 0.1}}
    return common | more


def make_spec(
    folder: Path, prefill: Shape, decode: Shape, device: str = "cpu", **more: Any
) -> ClusterSpec:
    return ClusterSpec.model_validate(
        {
            "model": {"path": str(folder), "dtype": "float32"},
            "page_tokens": PAGE,
            "roles": {"prefill": role(prefill, device), "decode": role(decode, device)},
            "transfer": {"backend": "ipc" if device == "cuda" else "shm", "verify": True},
            "router": {"local_prefill_tokens": 0},
        }
        | more
    )


def prompts_of(vocab_size: int) -> list[list[int]]:
    """The last two go on, from inside a page, from ones before."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, vocab_size, length).tolist() for length in LENGTHS]
    return [*prompts, prompts[5][:90] + prompts[0], prompts[6] + prompts[1]]


async def serve(spec: ClusterSpec, sockets: Path, reference: ReferenceModel) -> None:
    """Cold, all at once; then again, with prefixes cached."""
    params = SamplingParams(max_tokens=OUTPUT, temperature=0.0)
    prompts = prompts_of(reference.vocab_size)
    async with cluster(spec, str(sockets)) as nodes:
        client = nodes[0]
        for chosen in (prompts[:8], prompts):
            answers = await asyncio.gather(*(collect(client, p, params) for p in chosen))
            for prompt, outputs in zip(chosen, answers, strict=True):
                assert outputs[-1].finish_reason == "length", outputs[-1].error
                assert reference.is_greedy(prompt, tokens_of(outputs))
        replicas = [node for node in nodes if isinstance(node, ReplicaNode)]
        await wait_until(lambda: all(node.leader.is_idle for node in replicas))
        for node in replicas:
            node.leader.check_integrity()
            assert not node.failure
            assert node.leader.load().digest_mismatches == 0
        assert replicas[1].leader.load().handovers_failed == 0


def covering(
    factors: Sequence[Sequence[Any]],
    allowed: Callable[[tuple[Any, ...]], bool] = lambda row: True,
    seed: int = 0,
) -> list[tuple[Any, ...]]:
    """Few allowed combinations in which every pair of values of two factors occurs; the same ones
    always."""
    rng = random.Random(seed)
    columns = list(itertools.combinations(range(len(factors)), 2))
    missing = {
        (one, other, a, b) for one, other in columns for a in factors[one] for b in factors[other]
    }

    def pairs(row: tuple[Any, ...]) -> set[tuple[int, int, Any, Any]]:
        return {(one, other, row[one], row[other]) for one, other in columns}

    rows = []
    while missing:
        one, other, a, b = min(missing, key=str)
        candidates: list[tuple[Any, ...]] = []
        while len(candidates) < 60:
            row = [rng.choice(values) for values in factors]
            row[one], row[other] = a, b
            if allowed(tuple(row)):
                candidates.append(tuple(row))
        best = max(candidates, key=lambda row: len(pairs(row) & missing))
        missing -= pairs(best)
        rows.append(best)
    return rows
