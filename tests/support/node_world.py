"""Nodes in one process, no Ray: replicas, a keeper where the spec has a host tier, and a client."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import torch
import zmq
from transformers import AutoModelForCausalLM

from pd.api.client import EngineClient
from pd.cache_node import CacheNode
from pd.messages import AnyMessage, Output, SamplingParams
from pd.node import Member, Node, NodeConfig
from pd.rank import endpoint
from pd.rank_node import RankNode
from pd.replica_node import ReplicaNode
from pd.router import make_router
from pd.spec import ClusterSpec, MemberRole, replica_role

DEADLINE_S = 60


class ClientNode(Node):
    """The engine client without HTTP."""

    client: EngineClient

    async def prepare(self) -> Member:
        router = make_router(self.spec, self.name)
        self.client = EngineClient(self.send, router, self.spec.page_tokens)
        return Member(self.name, None, self.incarnation, "")

    def received(self, sender: str, message: AnyMessage) -> None:
        self.client.on_message(sender, message)

    def member_joined(self, member: Member) -> None:
        if member.role == "cache":
            self.client.keepers[member.name] = {}
        elif member.role is not None:
            facts = member.fingerprint, member.cohort, member.max_context
            self.client.on_peer_up(member.name, member.role, *facts)

    def member_draining(self, member: Member) -> None:
        self.client.on_peer_draining(member.name)

    def member_left(self, member: Member, reason: str) -> None:
        if self.client.keepers.pop(member.name, None) is None:
            self.client.on_peer_down(member.name, reason)


def reference(folder: Path, prompt: list[int], count: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
    )
    return out[0, len(prompt) :].tolist()


@asynccontextmanager
async def cluster(
    spec: ClusterSpec,
    sockets: str,
    replicas: tuple[str, ...] = ("prefill-0", "decode-0"),
    ranks: dict[str, list[RankNode]] | None = None,
) -> AsyncIterator[list[Node]]:
    """[client, prefill-0, decode-0], or other replicas, and, where the spec has a host tier,
    cache-0. `ranks` gets each replica's, all but the first."""
    curve = None if sockets else zmq.curve_keypair()
    roles: dict[str, MemberRole | None] = {"api-0": None}
    for name in replicas:
        roles[name] = replica_role(name.partition("-")[0])
    if spec.cache.host is not None:
        roles["cache-0"] = "cache"
    nodes: list[Node] = []
    ranks = {} if ranks is None else ranks
    role_specs = dict(spec.roles.items())
    for name, role in roles.items():
        kind = ClientNode if role is None else CacheNode if role == "cache" else ReplicaNode
        config = NodeConfig(name, role, spec, spec.model.path, sockets, curve, "127.0.0.1")
        node = kind(config)
        nodes.append(node)
        if isinstance(node, ReplicaNode):
            count = role_specs[replica_role(role)].topology.num_ranks
            if count > 1:
                node.make_meeting()
            ranks[name] = [
                RankNode(
                    dataclasses.replace(config, name=endpoint(name, rank), rank=rank, replica=name)
                )
                for rank in range(1, count)
            ]
            for each in ranks[name]:
                each.meeting = node.meeting
    ranks_of: dict[str, list[Member]] = {}
    async with contextlib.AsyncExitStack() as stack:
        members = []
        for node in nodes:
            together = [node, *ranks.get(node.name, [])]
            for each in together:
                stack.push_async_callback(_stop, each)
            starting = asyncio.gather(*(each.start() for each in together))
            first, *others = await asyncio.wait_for(starting, DEADLINE_S)
            members.append(first)
            for each, member in zip(ranks.get(node.name, []), others, strict=True):
                each.set_members([first, member])
            ranks_of[node.name] = others
        for node in reversed(nodes):
            node.set_members([*ranks_of[node.name], *members])
        yield nodes


async def _stop(node: Node) -> None:
    await asyncio.wait_for(node.stop(), DEADLINE_S)


async def wait_until(condition: Callable[[], bool]) -> None:
    # A leader has no event for "idle".
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def collect(client: ClientNode, prompt: list[int], params: SamplingParams) -> list[Output]:
    stream = client.client.submit(prompt, params, timeout_s=DEADLINE_S)
    return [output async for output in stream]


def tokens_of(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]
