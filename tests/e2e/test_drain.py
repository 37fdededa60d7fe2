"""A draining replica, with nodes in one process and no Ray: its requests go on elsewhere with its
pages."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import numpy as np
import pytest
from node_world import DEADLINE_S, cluster, collect, reference, tokens_of, wait_until
from real_cluster import require

from pd.bench.tiny import make_tiny_model
from pd.messages import SamplingParams
from pd.node import Member, Node
from pd.rank_node import RankNode
from pd.replica_node import ReplicaNode
from pd.spec import ClusterSpec, Role

PAGE = 8
PROMPT_LENGTHS = (5, 33, 64, 100)
NUM_TOKENS = 60


def spec_for(folder: Path, backend: str, shape: dict[str, int], role: str) -> ClusterSpec:
    replica = {"pool": {"pages": 200}, "max_batch_tokens": 64, "topology": shape}
    roles = {role: replica} if role == "both" else {"prefill": replica, "decode": replica}
    return ClusterSpec.model_validate(
        {
            "model": {"path": str(folder), "dtype": "float32"},
            "page_tokens": PAGE,
            "roles": roles,
            "transfer": {"backend": backend, "verify": True},
            "router": {"local_prefill_tokens": 0},
        }
    )


def drain(nodes: list[Node], name: str) -> None:
    """As the controller does: replicas hear of it first."""
    members = [
        msgspec.structs.replace(node.member, draining=node.name == name)
        for node in nodes
        if node.member is not None
    ]
    announce(nodes, members)


def announce(nodes: list[Node], members: list[Member]) -> None:
    for node in reversed(nodes):
        ranks = [m for m in node._members.values() if m.role == "rank"]
        node.set_members([*ranks, *members])


async def turn(nodes: list[Node], node: Node, ranks: list[RankNode], role: Role) -> None:
    """As the controller does with one that is idle."""
    assert isinstance(node, ReplicaNode)
    await asyncio.wait_for(node.rest(), DEADLINE_S)
    others = [each for each in nodes if each is not node]
    announce(others, [each.member for each in others if each.member is not None])
    member = node.turn(role, node.spec)
    for rank in ranks:
        rank.turn(role, node.spec, member)
    announce(nodes, [each.member for each in nodes if each.member is not None])


@pytest.mark.parametrize(
    ("backend", "family", "shape", "role"),
    [
        ("nixl", "gemma3_text", {}, "decode"),
        ("shm", "qwen3", {"tp": 2}, "decode"),
        ("shm", "qwen3", {"cp": 2}, "both"),
    ],
)
def test_running_requests_move_with_their_pages(
    tmp_path: Path, backend: str, family: str, shape: dict[str, int], role: str
) -> None:
    require(backend)
    folder = make_tiny_model(tmp_path / "model", family)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, length).tolist() for length in PROMPT_LENGTHS]
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)
    (tmp_path / "s").mkdir()

    async def run() -> None:
        names = (f"{role}-0", f"{role}-1", *(("prefill-0",) if role == "decode" else ()))
        spec = spec_for(folder, backend, shape, role)
        async with cluster(spec, str(tmp_path / "s"), names) as nodes:
            client, one, other = nodes[:3]
            answers = [asyncio.create_task(collect(client, p, params)) for p in prompts]
            streams = client.client._streams
            await wait_until(
                lambda: len(streams) == 4 and all(s.num_tokens > 4 for s in streams.values())
            )
            begun = {s.placement.decode for s in streams.values()}
            assert begun == {one.name, other.name}
            moving = [s for s in streams.values() if s.placement.decode == one.name]
            drain(nodes, one.name)
            for prompt, answer in zip(prompts, answers, strict=True):
                outputs = await asyncio.wait_for(answer, DEADLINE_S)
                assert outputs[-1].finish_reason == "length", outputs[-1].error
                assert tokens_of(outputs) == reference(folder, prompt, NUM_TOKENS)
            assert client.client.counters.moves == len(moving) > 0
            assert client.client.counters.replays == 0
            after = tokens_of(await collect(client, prompts[0], params))
            assert after == reference(folder, prompts[0], NUM_TOKENS)
            await wait_until(lambda: one.leader.is_idle and other.leader.is_idle)
            ours, theirs = one.leader.load(), other.leader.load()
            assert ours.kv_pages > 0
            assert ours.prefill_tokens <= len(PROMPT_LENGTHS) * PAGE + sum(PROMPT_LENGTHS) * (
                role == "both"
            )
            assert theirs.handovers_failed == 0
            for node in (one, other):
                node.leader.check_integrity()

    asyncio.run(run())


@pytest.mark.parametrize(("backend", "shape"), [("nixl", {}), ("shm", {"tp": 2})])
def test_an_idle_replica_changes_its_role(
    tmp_path: Path, backend: str, shape: dict[str, int]
) -> None:
    """There and back; what it has cached stays."""
    require(backend)
    folder = make_tiny_model(tmp_path / "model", "qwen3")
    rng = np.random.default_rng(0)
    params = SamplingParams(max_tokens=12, temperature=0.0)
    (tmp_path / "s").mkdir()

    async def run() -> None:
        ranks: dict[str, list[RankNode]] = {}
        names = ("decode-0", "decode-1", "prefill-0")
        spec = spec_for(folder, backend, shape, "decode")
        async with cluster(spec, str(tmp_path / "s"), names, ranks) as nodes:
            client, one, _, prefill = nodes
            roles = {"decode-0": "decode", "decode-1": "decode", "prefill-0": "prefill"}
            prompts: list[list[int]] = []
            for turned, role in ((None, ""), (one, "prefill"), (prefill, "decode"), (one, "both")):
                if turned is not None:
                    await wait_until(lambda: all(n.leader.is_idle for n in nodes[1:]))
                    await turn(nodes, turned, ranks[turned.name], role)
                    roles[turned.name] = role
                prompts += [rng.integers(0, 256, length).tolist() for length in PROMPT_LENGTHS]
                answers = await asyncio.gather(*(collect(client, p, params) for p in prompts))
                for prompt, outputs in zip(prompts, answers, strict=True):
                    assert outputs[-1].finish_reason == "length", outputs[-1].error
                    assert tokens_of(outputs) == reference(folder, prompt, 12)
                seen = {outputs[-1].stats.decode_replica for outputs in answers}
                assert seen <= {name for name, role in roles.items() if role != "prefill"}
                assert {each.name: each.role for each in client.client.router.replicas()} == roles
            assert sum(node.leader.load().cached_tokens for node in nodes[1:]) > 0
            for node in nodes[1:]:
                node.leader.check_integrity()

    asyncio.run(run())
