"""Nodes in one process, no Ray: a router hears what replicas hold, and goes by it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import numpy as np
import pytest
from node_world import cluster, collect, tokens_of, wait_until
from real_cluster import require

from hicache.events import block_hash
from pd.bench.tiny import make_tiny_model
from pd.messages import SamplingParams
from pd.spec import ClusterSpec

PAGE_TOKENS = 8
NAMES = ("both-0", "both-1", "both-2")


def make_spec(folder: Path, policy: str) -> ClusterSpec:
    role = {"device": "cpu", "pool": {"pages": 500}, "max_batch_tokens": 64, "replicas": 3}
    return ClusterSpec.model_validate(
        {
            "model": {"path": str(folder), "dtype": "float32"},
            "page_tokens": PAGE_TOKENS,
            "roles": {"both": role},
            "transfer": {"backend": "shm"},
            "router": {"policy": policy},
            "cache": {"events": {"publish": "tcp://127.0.0.1:*"}},
        }
    )


@pytest.mark.parametrize("policy", ["cost", "prefix"])
def test_a_second_turn_goes_where_the_first_one_was(tmp_path: Path, policy: str) -> None:
    require("shm")
    folder = make_tiny_model(tmp_path / "model", "qwen3")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, 400).tolist() for _ in range(6)]
    params = SamplingParams(max_tokens=12, temperature=0.0)

    async def run() -> None:
        async with cluster(make_spec(folder, policy), str(tmp_path), NAMES) as (client, *replicas):
            router = client.client.router
            first = []
            for prompt in prompts:
                outputs = await collect(client, prompt, params)
                assert outputs[-1].finish_reason == "length", outputs[-1].error
                first.append(outputs)
            homes = [outputs[-1].stats.decode_replica for outputs in first]
            assert set(homes) == set(NAMES)  # what is equal takes turns
            held = [{page[:8] for page in node.leader.index._runs} for node in replicas]
            await wait_until(lambda: len(router.pages) == len(set().union(*held)))
            for row, node in enumerate(replicas):
                (state,) = (each for each in router.replicas() if each.name == node.name)
                for page in node.leader.index._runs:
                    assert state.row in router.pages.holders(page), row
            assert router.pages.num_resyncs == 0

            for prompt, outputs, home in reversed(list(zip(prompts, first, homes, strict=True))):
                await wait_until(lambda: not any(s.placed_requests for s in router.replicas()))
                turn = [*prompt, *tokens_of(outputs), 5, 6, 7]
                (*_, last) = await collect(client, turn, params)
                assert last.stats.decode_replica == home
                # The last token of the first turn was never computed.
                full = (len(turn) - 4) // PAGE_TOKENS * PAGE_TOKENS
                assert last.stats.cached_tokens_decode == full
            for node in replicas:
                await wait_until(lambda node=node: node.leader.is_idle)
                node.leader.check_integrity()
                assert node.dropped_messages == 0
                # Subscribers of KV events are told the same.
                payloads = [payload for _, payload in node._events._publisher.log.replay(0)]
                events = [
                    event for data in payloads if data for event in msgspec.msgpack.decode(data)[1]
                ]
                published = {page for _, pages, *_ in events for page in pages}
                assert published == {block_hash(page) for page in node.leader.index._runs}

    asyncio.run(run())
