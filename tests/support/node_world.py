"""Nodes in one process, no Ray: replicas, a keeper where the spec has a host tier, and a client."""

from __future__ import annotations

import asyncio
import contextlib
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
from pd.replica_node import ReplicaNode
from pd.router import Router
from pd.spec import ClusterSpec, MemberRole

DEADLINE_S = 60


class ClientNode(Node):
    """The engine client without HTTP."""

    client: EngineClient

    async def prepare(self) -> Member:
        self.client = EngineClient(self.send, Router(100), self.spec.page_tokens)
        self.client.set_fingerprint("test")
        return Member(self.name, None, self.incarnation, "")

    def received(self, sender: str, message: AnyMessage) -> None:
        self.client.on_message(sender, message)

    def member_joined(self, member: Member) -> None:
        if member.role == "cache":
            self.client.keepers[member.name] = {}
        elif member.role is not None:
            self.client.on_peer_up(member.name, member.role)

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
async def cluster(spec: ClusterSpec, sockets: str) -> AsyncIterator[list[Node]]:
    """[client, prefill-0, decode-0] and, where the spec has a host tier, cache-0."""
    curve = None if sockets else zmq.curve_keypair()
    roles: dict[str, MemberRole | None] = {
        "api-0": None,
        "prefill-0": "prefill",
        "decode-0": "decode",
    }
    if spec.cache.host is not None:
        roles["cache-0"] = "cache"
    nodes: list[Node] = []
    for name, role in roles.items():
        kind = ClientNode if role is None else CacheNode if role == "cache" else ReplicaNode
        nodes.append(
            kind(NodeConfig(name, role, spec, spec.model.path, sockets, curve, "127.0.0.1"))
        )
    async with contextlib.AsyncExitStack() as stack:
        members = []
        for node in nodes:
            stack.push_async_callback(_stop, node)
            members.append(await asyncio.wait_for(node.start(), DEADLINE_S))
        for node in reversed(nodes):
            node.set_members(members)
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
