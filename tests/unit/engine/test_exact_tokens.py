"""The engine in one process against `transformers`: every token of every family, however it is
scheduled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from devices import needs_cuda
from reference_model import ReferenceModel

from hicache.index import PageIndex
from hicache.keys import page_hashes, root_hash
from pd.bench.tiny import FAMILIES, make_tiny_model
from pd.engine.model import ModelRunner
from pd.engine.scheduler import Scheduler, Tracked
from pd.messages import Int32Array, SamplingParams
from pd.spec import ModelSpec

PAGE = 8
OUTPUT = 12
LONG_OUTPUT = 50
ROOT = root_hash("test")
LENGTHS = (1, 5, 8, 9, 33, 70, 96, 120)


class Engine:
    """A rank and its scheduler, driven by hand; the index is checked after every step."""

    def __init__(
        self, runner: ModelRunner, pages: int, max_batch_tokens: int, rows: int = 16
    ) -> None:
        num_pages = [pages] * len(runner.groups)
        runner.allocate(num_pages, rows, 1024)
        self.runner = runner
        self.index = PageIndex(runner.groups, num_pages, PAGE)
        self.scheduler = Scheduler(self.index, runner.groups, PAGE, max_batch_tokens, rows)
        self.most_running = 0

    def track(self, prompt: Int32Array, max_tokens: int = OUTPUT) -> Tracked:
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        hashes = page_hashes(prompt, PAGE, ROOT)
        return Tracked(prompt, params, ROOT, hashes, len(self.runner.groups), 0.0)

    def run(self, prompts: Sequence[Int32Array], max_tokens: int = OUTPUT) -> list[Tracked]:
        """All at once, to the end; nothing is held afterwards."""
        sequences = [self.track(prompt, max_tokens) for prompt in prompts]
        for sequence in sequences:
            self.scheduler.add(sequence)
        live = {*sequences}
        while live:
            command = self.scheduler.plan(0.0)
            assert command is not None
            self.most_running = max(self.most_running, len(self.scheduler.running))
            if self.runner.graphs is not None:
                self.runner.graphs.prepare(command)
            for progress in self.scheduler.commit(self.runner.step(command)):
                if progress.sequence.num_output >= max_tokens:
                    self.scheduler.drop(progress.sequence)
                    live.discard(progress.sequence)
            self.index.check_integrity()
        assert not any(self.index.num_used(group) for group in range(len(self.runner.groups)))
        return sequences


def output(sequence: Tracked) -> list[int]:
    tokens: list[int] = sequence.buffer[sequence.prompt_len : sequence.length].tolist()
    return tokens


class Case:
    """One family: its folder, its runner, prompts and their reference tokens."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, torch.device(device)
        self.runner = load(folder, device=device)
        reference = ReferenceModel(folder)
        rng = np.random.default_rng(0)
        self.prompts = [rng.integers(0, reference.vocab_size, n).astype(np.int32) for n in LENGTHS]
        # One prompt again, and one that leaves another in the middle of a page.
        self.prompts += [
            self.prompts[5].copy(),
            np.concatenate((self.prompts[7][:100], self.prompts[1])),
        ]
        self.expected = [reference.generate(prompt, OUTPUT) for prompt in self.prompts]
        self.expected_long = [
            reference.generate(prompt, LONG_OUTPUT) for prompt in self.prompts[:5]
        ]


def load(folder: Path, dtype: Any = "float32", device: str = "cpu", **options: Any) -> ModelRunner:
    spec = ModelSpec(path=str(folder), dtype=dtype, **options)
    return ModelRunner(folder, spec, PAGE, torch.device(device))


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    base = tmp_path_factory.mktemp("tiny")

    def get(family: str) -> Path:
        folder = base / family
        return folder if folder.exists() else make_tiny_model(folder, family)

    return get


@pytest.fixture(
    scope="module",
    params=[
        *((family, "cpu") for family in FAMILIES),
        *(pytest.param((family, "cuda"), marks=needs_cuda) for family in FAMILIES),
    ],
    ids="-".join,
)
def case(request: pytest.FixtureRequest, family_folder: Callable[[str], Path]) -> Case:
    torch.set_num_threads(1)
    family, device = request.param
    return Case(family_folder(family), device)


def test_references_differ(case: Case) -> None:
    """Else a test of equality would show nothing."""
    assert len({tuple(tokens) for tokens in case.expected}) == len(case.expected) - 1
    assert len({token for tokens in case.expected for token in tokens}) > 10


@pytest.mark.parametrize("max_batch_tokens", [7, 32, 512])
def test_cold_then_from_the_cache(case: Case, max_batch_tokens: int) -> None:
    """Budgets that divide prompts and pages, and that do not; one at a time."""
    engine = Engine(case.runner, 400, max_batch_tokens)
    for prompt, expected in list(zip(case.prompts, case.expected, strict=True))[:8]:
        cold, again = engine.run([prompt])[0], engine.run([prompt])[0]
        assert output(cold) == output(again) == expected
        assert cold.cached_tokens == 0
        assert again.cached_tokens == (len(prompt) - 1) // PAGE * PAGE
    assert engine.scheduler.preemptions == 0


def test_a_prompt_that_goes_on_from_an_answer(case: Case) -> None:
    """Pages of generated tokens are found again, and a prompt may leave the cached one anywhere."""
    engine = Engine(case.runner, 400, 64)
    first = engine.run([case.prompts[7]])[0]
    turn = np.concatenate((first.buffer, case.prompts[4]))
    reference = ReferenceModel(case.folder).generate(turn, OUTPUT)
    second = engine.run([turn])[0]
    assert output(second) == reference
    assert second.cached_tokens == (len(first.buffer) - 1) // PAGE * PAGE
    shared = engine.run([case.prompts[9]])[0]
    assert output(shared) == case.expected[9]
    assert shared.cached_tokens == 96


@pytest.mark.parametrize("max_batch_tokens", [7, 33, 512])
def test_all_at_once(case: Case, max_batch_tokens: int) -> None:
    engine = Engine(case.runner, 400, max_batch_tokens)
    for _ in range(2):
        assert [output(s) for s in engine.run(case.prompts)] == case.expected
    if max_batch_tokens > 7:
        assert engine.most_running >= 8


def test_without_graphs(case: Case) -> None:
    """Large steps have none."""
    if case.device.type != "cuda":
        pytest.skip("there are none on a CPU")
    engine = Engine(case.runner, 400, 33)
    case.runner.graphs = None
    assert [output(s) for s in engine.run(case.prompts)] == case.expected


@pytest.mark.parametrize("max_batch_tokens", [7, 33])
def test_preempted(case: Case, max_batch_tokens: int) -> None:
    """A pool in which many are admitted, and few can finish."""
    engine = Engine(case.runner, 18, max_batch_tokens)
    short = [0, 1, 2, 3, 4] * 3
    got = [output(s) for s in engine.run([case.prompts[i] for i in short], LONG_OUTPUT)]
    assert got == [case.expected_long[i] for i in short]
    assert engine.scheduler.preemptions > 0


def test_page_bytes_depend_on_the_tokens_alone(case: Case) -> None:
    """Two replicas have the same bytes for a page, in the order
    [kv_head][layer][k|v][token][dim]."""
    prompt = case.prompts[7]
    runners = [case.runner, load(case.folder, device=case.device.type)]
    engines = [Engine(runners[0], 400, 512), Engine(runners[1], 300, 512)]
    engines[1].run([case.prompts[3]])  # so that slots differ
    pages: list[list[torch.Tensor]] = []
    for engine in engines:
        sequence = engine.track(prompt, max_tokens=1)
        engine.scheduler.add(sequence)
        command = engine.scheduler.plan(0.0)
        assert command is not None
        engine.scheduler.commit(engine.runner.step(command))
        first = [g.first_needed_page(len(prompt), PAGE) for g in engine.runner.groups]
        pages.append(
            [
                pool.data[table[begin : len(prompt) // PAGE]].cpu()
                for pool, table, begin in zip(
                    engine.runner.pools, sequence.tables, first, strict=True
                )
            ]
        )
        assert not any(slot == 0 for table in sequence.tables for slot in table)
    for group, ours, theirs in zip(case.runner.groups, *pages, strict=True):
        shape = (group.kv_heads, len(group.layers), group.planes, PAGE, group.head_dim)
        assert ours.shape == (len(ours), *shape)
        assert len(ours) >= 3
        assert ours.abs().amax(dim=(2, 3, 4, 5)).min() > 0
        assert ours.numpy().tobytes() == theirs.numpy().tobytes()
    _compare_with_transformers_cache(case, prompt, pages[0])


def _compare_with_transformers_cache(
    case: Case, prompt: Int32Array, pages: list[torch.Tensor]
) -> None:
    """The last full page of each layer, head by head, against the cache of transformers' own
    model."""
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(case.folder, dtype=torch.float32).eval()
    cache = DynamicCache()  # without a config: no layer of it forgets
    with torch.inference_mode():
        model(torch.tensor([prompt.tolist()]), past_key_values=cache, use_cache=True)
    begin = (len(prompt) // PAGE - 1) * PAGE
    for group, content in zip(case.runner.groups, pages, strict=True):
        for place, layer in enumerate(group.layers):
            planes = [cache.layers[layer].keys, cache.layers[layer].values]
            if group.kind == "latent":
                planes = [torch.cat(planes, -1)]
            for number, expected in enumerate(planes):
                found = content[-1, :, place, number]  # (kv_heads, tokens, dim)
                torch.testing.assert_close(
                    found, expected[0, :, begin : begin + PAGE], atol=1e-4, rtol=1e-4
                )


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "gpt_oss"])
def test_bfloat16_pages(family: str, family_folder: Callable[[str], Path]) -> None:
    """Weights and pages in bfloat16: half the bytes, and the same tokens in any batch of one
    kind."""
    runner = load(family_folder(family), "bfloat16", compute_dtype="float32")
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 320, n).astype(np.int32) for n in (5, 40, 70)]
    engine = Engine(runner, 200, 64)
    assert {pool.data.dtype for pool in runner.pools} == {torch.bfloat16}
    assert all(layout.element_bytes == 2 for layout in runner.layouts)
    cold = [output(engine.run([prompt])[0]) for prompt in prompts]
    assert all(len(tokens) == OUTPUT for tokens in cold)
    assert [output(s) for s in engine.run(prompts)] == cold
