"""What each rank of a replica holds and does: its share, by bytes and by count."""

from __future__ import annotations

import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from devices import DEVICES
from reference_model import ReferenceModel
from transformers import AutoConfig, AutoModelForCausalLM

from pd.bench.tiny import _MIXED, FAMILIES, make_tiny_model
from pd.cost import UnsupportedModelError, load_config
from pd.engine import attention
from pd.engine.batch import LAST_SAMPLED, RowStart, StepCommand
from pd.engine.model import ModelRunner
from pd.engine.pool import PagePool
from pd.engine.ranks import Group, RankError, Ranks, exchange, join_store, make_store
from pd.engine.shards import _even_ends, balanced, check_topology, rank_parts
from pd.messages import SamplingParams
from pd.rank import merge_steps
from pd.spec import ModelSpec
from transfer.layout import LayerGroup, PageLayout
from transfer.topology import Topology

PAGE = 8
SHAPES = [Topology(tp=4), Topology(pp=2), Topology(tp=2, cp=2), Topology(tp=2, pp=2)]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("parts")
    return {family: make_tiny_model(base / family, family) for family in FAMILIES}


def load_ranks(
    folder: Path, topology: Topology, device: str = "cpu", **model: Any
) -> list[ModelRunner]:
    """All ranks of a replica, as threads; on a GPU they share it."""
    torch.set_num_threads(1)
    store = make_store("127.0.0.1", 30)
    spec = ModelSpec(**{"path": str(folder), "dtype": "float32"} | model)
    shape = balanced(topology, load_config(folder))
    where = torch.device(device, 0) if device == "cuda" else torch.device(device)

    def load_one(rank: int) -> ModelRunner:
        met = join_store("127.0.0.1", store.port, 30)
        ranks = Ranks(shape, rank, met, timeout_s=30, device=where)
        return ModelRunner(folder, spec, PAGE, where, ranks)

    with ThreadPoolExecutor(topology.num_ranks) as threads:
        return list(threads.map(load_one, range(topology.num_ranks)))


def parameter_bytes(model: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize("topology", SHAPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_rank_holds_its_share_and_no_more(
    family: str, topology: Topology, folders: dict[str, Path]
) -> None:
    folder = folders[family]
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total = parameter_bytes(whole)
    parts = rank_parts(topology, load_config(folder))
    runners = load_ranks(folder, topology)
    held = [parameter_bytes(runner.model) for runner in runners]
    computed = [4 * parts.parameters[runner.ranks.coord.pp] for runner in runners]
    assert held == computed
    replicated = sum(
        parameter.nbytes
        for name, parameter in whole.named_parameters()
        if any(part in name for part in ("norm", "router", "gate.weight", "kv_a_proj", "q_a_proj"))
        or name.endswith("o_proj.bias")
        or "down_proj_bias" in name
    )
    if topology.pp == 1:
        kv_heads = runners[0].groups[0].kv_heads
        by_head = sum(
            parameter.nbytes
            for name, parameter in whole.named_parameters()
            if ".k_proj." in name or ".v_proj." in name
        )
        share = (total - replicated - by_head) / topology.tp + replicated
        share += by_head / min(topology.tp, kv_heads)
        assert max(held) == pytest.approx(share, rel=0.05)
    for runner in runners:
        runner.allocate([9] * len(runner.groups), 4, 64)
        kv_bytes = sum(pool.data.nbytes for pool in runner.pools)
        if runner.groups[0].kind != "latent":
            layers = len(runner.ranks.topology.stage_layers(4, runner.ranks.coord.pp))
            heads = max(1, runner.groups[0].kv_heads // topology.tp)
            assert kv_bytes == 9 * layers * heads * 2 * PAGE * 16 * 4


OTHERS: dict[str, dict[str, Any]] = {
    "glm4": {},  # gates and ups in one tensor
    "granite": {"embedding_multiplier": 3.0},  # it changes what comes before the layers
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},  # w1, w2, w3
    "gemma2": {**_MIXED, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 5.0},
    "qwen2": {},  # biases
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("topology", [Topology(tp=2), Topology(pp=2), Topology(cp=2)], ids=str)
@pytest.mark.parametrize("family", OTHERS)
def test_logits_of_families_that_need_care(
    family: str, topology: Topology, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, family, OTHERS[family])
    folder = make_tiny_model(tmp_path / family, family)
    runners = load_ranks(folder, topology, device)
    prompt = np.random.default_rng(0).integers(0, 320, 30).astype(np.int32)
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=20)
    pages = [
        (0, page, (1 + page // topology.cp) * topology.cp + page % topology.cp) for page in range(4)
    ]
    command = StepCommand(
        [RowStart(0, params, prompt, len(prompt))],
        np.zeros(1, np.int32),
        np.zeros(1, np.int32),
        np.array([len(prompt)], np.int32),
        np.ones(1, np.bool_),
        prompt,
        [np.array(pages, np.int32)] * len(runners[0].groups),
    )
    for runner in runners:
        runner.allocate([9] * len(runner.groups), 4, 64)
    with ThreadPoolExecutor(len(runners)) as threads:
        results = list(threads.map(lambda runner: runner.step(command), runners))
    (logprob,) = merge_steps(results).logprobs
    assert logprob is not None
    expected = ReferenceModel(folder).logits(prompt.tolist())[-1].log_softmax(-1)
    found = torch.tensor(logprob.top_logprobs)
    torch.testing.assert_close(found, expected[list(logprob.top_ids)], atol=1e-4, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_begins_with_what_was_sampled(device: str, folders: dict[str, Path]) -> None:
    """It gives the tokens that a step gives which is told."""
    prompt = np.random.default_rng(0).integers(0, 320, 13).astype(np.int32)
    params = SamplingParams(
        max_tokens=9, temperature=1.3, top_p=0.9, repetition_penalty=1.2, seed=5, logprobs=1
    )
    one = np.ones(1, np.int32)

    def sampled(is_told: bool) -> list[int]:
        (runner,) = load_ranks(folders["qwen3"], Topology(), device)
        runner.allocate([9] * len(runner.groups), 4, 64)
        start = [RowStart(0, params, prompt, len(prompt))]
        pages = np.array([(0, page, 1 + page) for page in range(4)], np.int32)
        tokens, found = prompt, []
        for number in range(9):
            position = len(prompt) + number - 1 if number else 0
            command = StepCommand(
                start, 0 * one, position * one, len(tokens) * one, one > 0, tokens, [pages]
            )
            found += runner.step(command).tokens
            tokens = np.array([found[-1] if is_told else LAST_SAMPLED], np.int32)
            start, pages = [], np.zeros((0, 3), np.int32)
        return found

    told = sampled(True)
    assert len({*told}) > 3
    assert sampled(False) == told


def test_random_weights_do_not_depend_on_the_shape(folders: dict[str, Path]) -> None:
    one = load_ranks(folders["qwen3_moe"], Topology(), load="random")[0].model
    runners = load_ranks(folders["qwen3_moe"], Topology(tp=2), load="random")
    two = [runner.model for runner in runners]
    name = "model.layers.1.mlp.experts.gate_up_proj"  # (experts, gates then ups, hidden)
    whole = one.get_parameter(name)
    half = whole.shape[1] // 4
    for rank, model in enumerate(two):
        own = [*range(rank * half, (rank + 1) * half)]
        both = own + [2 * half + row for row in own]
        assert torch.equal(model.get_parameter(name), whole[:, both])


def test_stages_have_equal_numbers_of_parameters() -> None:
    assert _even_ends([1, 1, 1, 1], 2) == (2, 4)
    assert _even_ends([5, 1, 1, 1, 1, 5], 3) == (1, 5, 6)
    assert _even_ends([1, 1, 9], 3) == (1, 2, 3)
    sizes = np.random.default_rng(0).integers(1, 50, 9).tolist()
    ends = _even_ends(sizes, 3)
    largest = max(map(sum, (sizes[: ends[0]], sizes[ends[0] : ends[1]], sizes[ends[1] :])))
    for one in range(1, 8):
        for other in range(one + 1, 9):
            cut = (sizes[:one], sizes[one:other], sizes[other:])
            assert largest <= max(map(sum, cut))


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        (Topology(tp=3), "tp is 3, expected a divisor of its num_attention_heads, 4"),
        (Topology(pp=5), "pp is 5, expected at most its 4 layers"),
    ],
)
def test_what_cannot_be_split_is_refused(topology: Topology, message: str) -> None:
    config = AutoConfig.for_model(
        "qwen3", num_attention_heads=4, num_hidden_layers=4, num_key_value_heads=2
    )
    with pytest.raises(UnsupportedModelError, match=message):
        check_topology(config, topology)


def test_heads_that_cannot_be_dealt_out_are_refused() -> None:
    config = AutoConfig.for_model("qwen3", num_attention_heads=12, num_key_value_heads=6)
    with pytest.raises(UnsupportedModelError, match="tp is 4, expected a divisor or a multiple"):
        check_topology(config, Topology(tp=4))


@pytest.mark.parametrize(
    ("cp", "length"),
    [(2, 16384), (3, 16384), *(pytest.param(cp, 65536, marks=pytest.mark.long) for cp in (3, 8))],
)
def test_causal_work_is_alike_on_all_ranks(cp: int, length: int) -> None:
    """Pairs of query and key that each rank calculates for one prompt, in chunks, and the tokens
    that it takes through the layers."""
    page, chunk = 64, 4096
    layout = PageLayout(LayerGroup("full", (0,), 1, 1), page, 4)
    pages = length // page
    table = np.arange(pages, dtype=np.int32)[None]
    pairs, tokens = np.zeros(cp), np.zeros(cp)
    for rank in range(cp):
        group = Group("cp", cp, rank, None, False)
        pool = PagePool(layout, -(-pages // cp), torch.float32, torch.device("cpu"))
        for start in range(0, length, chunk):
            numbers = np.array([start, chunk], np.int32)
            command = StepCommand(
                [],
                np.zeros(1, np.int32),
                numbers[:1],
                numbers[1:],
                np.zeros(1, np.bool_),
                np.zeros(chunk, np.int32),
                [],
            )
            plan = attention.plan_attention(command, [pool], [table], {0: (0, 0)}, group)
            tokens[rank] += (plan.own >= 0).sum()
            (gather,) = plan.groups[0].gathers
            assert gather.mask is not None
            pairs[rank] += int(gather.mask.sum())
    assert pairs.sum() == math.comb(length + 1, 2)
    assert tokens.sum() == length
    assert np.ptp(pairs) / pairs.mean() < 0.02
    assert np.ptp(tokens) / tokens.mean() < 0.02


def test_a_neighbour_that_sends_nothing_is_waited_for_no_longer_than_told() -> None:
    store = make_store("127.0.0.1", 20)

    def run(rank: int) -> str:
        ranks = Ranks(Topology(pp=2), rank, join_store("127.0.0.1", store.port, 20), timeout_s=20)
        ranks.limit(0.5)
        if rank == 0:
            over.wait(10)
            return ""
        with pytest.raises(RankError, match="receive from 0 of pp, rank 1"):
            ranks.pp.receive(torch.zeros(3), 0)
        over.set()
        return "ended"

    over = threading.Event()
    with ThreadPoolExecutor(2) as threads:
        begin = time.monotonic()
        assert list(threads.map(run, range(2))) == ["", "ended"]
        assert time.monotonic() - begin < 9


def test_ranks_that_do_not_come_are_waited_for_no_longer_than_told() -> None:
    store = make_store("127.0.0.1", 1)
    with pytest.raises(RankError, match="tp, rank 0"):
        Ranks(Topology(tp=2), 0, store, timeout_s=1)
    with pytest.raises(RankError, match="rank 0 waits for the others' pages"):
        exchange(store, "pages", 0, 2, b"")


def test_a_rank_that_leaves_ends_the_others_collectives() -> None:
    store = make_store("127.0.0.1", 20)

    def run(rank: int) -> str:
        ranks = Ranks(Topology(tp=3), rank, join_store("127.0.0.1", store.port, 20), timeout_s=20)
        if rank == 1:
            ranks.abort()
            return ""
        with pytest.raises(RankError) as caught:
            ranks.tp.all_reduce(torch.ones(3))
        return str(caught.value)

    with ThreadPoolExecutor(3) as threads:
        errors = list(threads.map(run, range(3)))
    assert [bool(error) for error in errors] == [True, False, True]
    assert errors[2].startswith("all_reduce of tp, rank 2: ")
