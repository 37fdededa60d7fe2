"""Two replicas and a client in one process, no Ray: every network and transport, on the CPU and a
GPU."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
import zmq
from node_world import DEADLINE_S, cluster, collect, reference, tokens_of, wait_until
from real_cluster import require

from pd import messages
from pd.bench.tiny import make_tiny_model
from pd.messages import Heartbeat, SamplingParams
from pd.replica_node import ReplicaNode
from pd.spec import ClusterSpec

PROMPT_LENGTHS = (5, 33, 64, 100)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), "gemma3_text")


def make_spec(folder: Path, backend: str, device: str, verify: bool = False) -> ClusterSpec:
    role = {"device": device, "pool": {"pages": 200}, "max_batch_tokens": 16}
    return ClusterSpec.model_validate(
        {
            "model": {"path": str(folder), "dtype": "float32"},
            "page_tokens": 8,
            "roles": {"prefill": role, "decode": role},
            "transfer": {"backend": backend, "verify": verify},
            "router": {"local_prefill_tokens": 0},
        }
    )


@pytest.mark.parametrize(
    ("network", "backend", "device"),
    [
        ("ipc", "nixl", "cpu"),
        ("tcp", "nixl", "cpu"),
        ("ipc", "loopback", "cpu"),
        ("ipc", "shm", "cpu"),
        ("ipc", "mooncake", "cpu"),
        *(
            pytest.param(
                *("ipc", backend, "cuda"),
                marks=pytest.mark.skipif(
                    not torch.cuda.is_available(), reason="needs a CUDA device"
                ),
            )
            for backend in ("nixl", "ipc")
        ),
    ],
)
def test_tokens_are_exact_and_everything_is_given_back(
    model_folder: Path, tmp_path: Path, network: str, backend: str, device: str
) -> None:
    require(backend)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, length).tolist() for length in PROMPT_LENGTHS]
    params = SamplingParams(max_tokens=10, temperature=0.0)

    async def run() -> None:
        spec = make_spec(model_folder, backend, device, verify=network == "ipc")
        async with cluster(spec, str(tmp_path) if network == "ipc" else "") as nodes:
            client, prefill, decode = nodes
            for _ in range(2):
                answers = await asyncio.gather(*(collect(client, p, params) for p in prompts))
                for prompt, outputs in zip(prompts, answers, strict=True):
                    assert outputs[-1].finish_reason == "length", outputs[-1].error
                    assert tokens_of(outputs) == reference(model_folder, prompt, 10)
            await wait_until(lambda: prefill.leader.is_idle and decode.leader.is_idle)
            prefill.leader.check_integrity()
            decode.leader.check_integrity()
            assert prefill.leader.load().kv_bytes > 0
            assert decode.leader.load().handovers_failed == 0
            assert prefill.dropped_messages == decode.dropped_messages == 0

    asyncio.run(run())


@pytest.mark.parametrize(
    ("backend", "api_hears_first"),
    [("nixl", False), ("shm", False), ("mooncake", False), ("shm", True)],
)
def test_a_replica_restarted_under_its_name_serves_the_next_request(
    model_folder: Path, tmp_path: Path, backend: str, api_hears_first: bool
) -> None:
    """The controller tells the API last. Were it first, a request could come while the decode
    leader takes the new process for the old one: then it is prefilled where it is decoded."""
    require(backend)
    prompts = [np.random.default_rng(seed).integers(0, 256, 70).tolist() for seed in (1, 2)]
    params = SamplingParams(max_tokens=5, temperature=0.0)

    async def run() -> None:
        spec = make_spec(model_folder, backend, "cpu")
        async with cluster(spec, str(tmp_path)) as (client, old, decode):
            outputs = await collect(client, prompts[0], params)
            assert tokens_of(outputs) == reference(model_folder, prompts[0], 5)
            await asyncio.wait_for(old.stop(), DEADLINE_S)
            new = ReplicaNode(old.config)
            member = await asyncio.wait_for(new.start(), DEADLINE_S)
            try:
                before = client._members["prefill-0"]
                assert member.incarnation != before.incarnation
                members = [member, client._members["decode-0"], decode._members["api-0"]]
                if api_hears_first:
                    client.set_members(members)
                for node in (new, decode):
                    node.set_members(members)
                if not api_hears_first:
                    await wait_until(lambda: not decode._untold.total())
                    client.set_members(members)
                outputs = await collect(client, prompts[1], params)
                assert tokens_of(outputs) == reference(model_folder, prompts[1], 5)
                if not api_hears_first:
                    assert new.leader.load().kv_bytes > 0
                    assert decode.leader.load().handovers_failed == 0
                await wait_until(lambda: new.leader.is_idle and decode.leader.is_idle)
            finally:
                await asyncio.wait_for(new.stop(), DEADLINE_S)

    asyncio.run(run())


def test_stray_and_foreign_messages_are_counted_and_dropped(
    model_folder: Path, tmp_path: Path
) -> None:
    async def run() -> None:
        spec = make_spec(model_folder, "loopback", "cpu")
        async with cluster(spec, str(tmp_path)) as (client, _, decode):
            context = zmq.Context()
            stray = context.socket(zmq.PUSH)
            stray.connect(next(m.address for m in client._members.values() if m.name == "decode-0"))
            to = decode.incarnation
            good = messages.encode(Heartbeat(), "api-0", client.incarnation, to)
            stray.send_multipart([b"garbage"])
            stray.send_multipart([b"garbage", b"garbage"])
            stray.send_multipart([good[0], b"\x00"])
            stray.send_multipart(
                [
                    good[0].replace(b"PRLY" + bytes([messages.PROTOCOL_VERSION]), b"PRLY\x63"),
                    good[1],
                ]
            )
            for header in (
                ("api-0", client.incarnation ^ 1, to),
                ("api-0", client.incarnation, to ^ 1),
                ("nobody", 7, to),
            ):
                stray.send_multipart(messages.encode(Heartbeat(), *header))
            await wait_until(lambda: decode.dropped_messages == 7)
            outputs = await collect(client, [1, 2, 3], SamplingParams(max_tokens=2))
            assert outputs[-1].finish_reason == "length"
            stray.close(0)
            context.term()

    asyncio.run(run())


def test_a_wrong_curve_key_is_not_heard(model_folder: Path) -> None:
    async def run() -> None:
        spec = make_spec(model_folder, "loopback", "cpu")
        async with cluster(spec, "") as (client, _, decode):
            address = next(m.address for m in client._members.values() if m.name == "decode-0")
            context = zmq.Context()
            public, secret = zmq.curve_keypair()
            assert decode.config.curve is not None
            stray = context.socket(zmq.PUSH)
            stray.curve_publickey, stray.curve_secretkey = public, secret
            stray.curve_serverkey = decode.config.curve[0]
            stray.connect(address)
            stray.send_multipart([b"garbage"])
            await asyncio.sleep(0.5)
            assert decode.dropped_messages == 0
            stray.close(0)
            context.term()

    asyncio.run(run())
