"""The sampler against one written down plainly, against statistics, and against itself in other
batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from devices import DEVICES
from reference_sampler import adjusted_logits, choose_token, kept_probabilities

from pd.engine.batch import RowStart, StepCommand
from pd.engine.sampler import Sampler, uniform
from pd.messages import SamplingParams, TokenLogprob

VOCABULARY = 50


@dataclasses.dataclass
class Item:
    """One request at one position."""

    params: SamplingParams
    prompt: list[int] = dataclasses.field(default_factory=lambda: [1, 2, 3])
    output: list[int] = dataclasses.field(default_factory=list)


def params(**options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=100, **{"temperature": 0.0, **options})


def draw(
    items: Sequence[Item], logits: torch.Tensor, rows: Sequence[int] | None = None
) -> tuple[list[int], list[TokenLogprob | None]]:
    """Start every item in its row (by default its number), and sample once."""
    rows = list(range(len(items))) if rows is None else rows
    sampler = Sampler(max(rows) + 1, logits.shape[1], logits.device)
    for row, item in zip(rows, items, strict=True):
        tokens = np.array(item.prompt + item.output, np.int32)
        sampler.start_row(RowStart(row, item.params, tokens, len(item.prompt)))
    return sampler.sample(logits, command_for(items, rows))


def command_for(items: Sequence[Item], rows: Sequence[int]) -> StepCommand:
    lengths = np.array([len(item.prompt) + len(item.output) for item in items], np.int32)
    ones = np.ones(len(items), np.int32)
    return StepCommand([], np.array(rows, np.int32), lengths - 1, ones, ones.astype(bool), ones, [])


def random_logits(seed: int, count: int = 1, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return torch.randn(count, vocabulary, generator=torch.Generator().manual_seed(seed)) * 2


# --------------------------------------------------------------------------------------- the number


def test_uniform_is_flat_and_its_arguments_matter() -> None:
    count = 200_000
    positions = np.arange(count, dtype=np.uint64)
    for seeds in (np.zeros(count, np.uint64), positions * np.uint64(2**40), positions[::-1]):
        numbers = uniform(seeds, positions)
        assert numbers.min() >= 0
        assert numbers.max() < 1
        assert abs(numbers.mean() - 0.5) < 5 / np.sqrt(12 * count)
        bins = np.histogram(numbers, 100, (0, 1))[0]
        assert (
            (bins - count / 100) ** 2 / (count / 100)
        ).sum() < 170  # chi-square, 99: p about 1e-5
        for lag in (1, 2, 7):
            correlation = np.corrcoef(numbers[:-lag], numbers[lag:])[0, 1]
            assert abs(correlation) < 5 / np.sqrt(count)


def test_uniform_of_neighbouring_seeds_is_independent() -> None:
    """Choices of one request have seeds in a row: seed s at i + 1 must not be seed s + 1 at i."""
    seeds, positions = np.meshgrid(np.arange(300, dtype=np.uint64), np.arange(300, dtype=np.uint64))
    numbers = uniform(seeds, positions)
    assert len(np.unique(numbers)) == numbers.size
    for other in (numbers[1:, :-1], numbers[:-1, :-1], numbers[1:, 1:]):
        ours = numbers[:-1, 1:]
        assert abs(np.corrcoef(ours.ravel(), other.ravel())[0, 1]) < 5 / 300
    top = np.array([2**64 - 1], np.uint64)
    assert 0 <= uniform(top, top)[0] < 1


# -------------------------------------------------------------------------------------- one setting


def test_greedy_is_the_first_of_the_likeliest() -> None:
    logits = random_logits(0, 20)
    tokens, logprobs = draw([Item(params()) for _ in range(20)], logits)
    assert tokens == logits.argmax(-1).tolist()
    assert logprobs == [None] * 20
    assert draw([Item(params(top_k=5, top_p=0.5, seed=9))], logits[:1])[0] == tokens[:1]


def chi_square(logits: torch.Tensor, settings: SamplingParams, count: int = 20_000) -> float:
    """Of `count` draws with different seeds, against the reference's probabilities."""
    items = [Item(msgspec.structs.replace(settings, seed=seed)) for seed in range(count // 100)]
    counts = np.zeros(logits.shape[-1])
    for position in range(100):
        for item in items:
            item.prompt = [1] * (position + 1)
        tokens, _ = draw(items, logits.expand(len(items), -1))
        counts += np.bincount(tokens, minlength=logits.shape[-1])
    probs = kept_probabilities(logits[0].double().numpy(), settings)
    expected = probs / probs.sum() * count
    assert not counts[expected == 0].any()
    large = expected > 5
    return float(((counts[large] - expected[large]) ** 2 / expected[large]).sum()) / large.sum()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 1.9},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.6},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=str,
)
def test_frequencies_are_the_probabilities(options: dict[str, Any]) -> None:
    """Chi-square per degree of freedom, about 1; the draws are fixed, so this never flickers."""
    logits = random_logits(3, vocabulary=30)
    assert chi_square(logits, params(**options), 10_000) < 2.2


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("device", DEVICES)
def test_any_settings_choose_the_references_token(device: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = 16
    logits = random_logits(seed, count)
    items = []
    for _ in range(count):
        stops = tuple(map(int, rng.choice(VOCABULARY, 2, replace=False)))
        bias = {int(t): float(rng.normal() * 4) for t in rng.choice(VOCABULARY, 3)}
        settings = params(
            temperature=float(rng.choice((0.0, 0.3, 1.0, 1.7))),
            top_k=int(rng.choice((0, 1, 7, 50, 1000))),
            top_p=float(rng.choice((1.0, 0.9, 0.3, 1e-6))),
            min_p=float(rng.choice((0.0, 0.05, 1.0))),
            presence_penalty=float(rng.choice((0.0, 1.5, -1.0))),
            frequency_penalty=float(rng.choice((0.0, 0.7, -0.4))),
            repetition_penalty=float(rng.choice((1.0, 1.3, 0.8))),
            logit_bias=bias if rng.random() < 0.5 else {},
            seed=int(rng.integers(0, 2**64, dtype=np.uint64)),
            stop_token_ids=stops,
            min_tokens=int(rng.choice((0, 4))),
        )
        prompt = rng.integers(0, VOCABULARY, rng.integers(1, 9)).tolist()
        items.append(
            Item(settings, prompt, rng.integers(0, VOCABULARY, rng.integers(0, 9)).tolist())
        )
    tokens, _ = draw(items, logits.to(device))
    expected = [
        choose_token(row, item.params, item.prompt, item.output)
        for row, item in zip(logits, items, strict=True)
    ]
    assert tokens == expected


def test_top_p_in_a_flat_and_large_vocabulary() -> None:
    """More tokens in the nucleus than the first guess looks at."""
    logits = random_logits(5, 8, vocabulary=5000) * 0.05
    items = [Item(params(temperature=1.0, top_p=0.8, seed=seed)) for seed in range(8)]
    tokens, _ = draw(items, logits)
    pairs = zip(logits, items, strict=True)
    assert tokens == [choose_token(row, item.params, item.prompt, []) for row, item in pairs]


def test_top_k_one_and_tiny_top_p_are_greedy() -> None:
    logits = random_logits(6, 3)
    likeliest = logits.argmax(-1).tolist()
    for options in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        items = [Item(params(temperature=1.5, seed=s, **options)) for s in range(3)]
        assert draw(items, logits)[0] == likeliest


# ------------------------------------------------------------------------- penalties, bias, minimum


def test_penalties_by_hand() -> None:
    """Token 0 is in the prompt, 1 was given out twice, 2 once and is in the prompt, 3 is new."""
    logits = torch.tensor([[2.0, 3.0, -1.0, 1.0]])
    prompt, output = [0, 2], [1, 2, 1]
    cases = {
        "presence": (params(presence_penalty=0.5), [2.0, 2.5, -1.5, 1.0]),
        "frequency": (params(frequency_penalty=0.5), [2.0, 2.0, -1.5, 1.0]),
        "repetition": (params(repetition_penalty=2.0), [1.0, 1.5, -2.0, 1.0]),
        "bias": (params(logit_bias={3: 5.0, 1: -100.0}), [2.0, -97.0, -1.0, 6.0]),
        "all": (
            params(
                presence_penalty=0.5,
                frequency_penalty=0.25,
                repetition_penalty=2.0,
                logit_bias={2: 1.0},
            ),
            [1.0, 1.5 - 0.5 - 0.5, -2.0 - 0.5 - 0.25 + 1.0, 1.0],
        ),
    }
    for name, (settings, expected) in cases.items():
        assert adjusted_logits(logits[0], settings, prompt, output).tolist() == expected, name
        found = draw([Item(settings, prompt, output)], logits)[0]
        assert found == [int(np.argmax(expected))], name
        # What is found is the maximum alone; biases that leave two equal show the other values.
        for token in range(4):
            level = {t: expected[0] - expected[t] for t in range(4)}
            bias = {t: settings.logit_bias.get(t, 0.0) + level[t] for t in range(4)}
            bias[token] += 1e-3
            nudged = msgspec.structs.replace(settings, logit_bias=bias)
            assert draw([Item(nudged, prompt, output)], logits)[0] == [token], (name, token)


def test_penalties_see_what_is_sampled_later() -> None:
    """A row's counts go on from step to step, and a new request in the row starts from its own."""
    logits = torch.tensor([[5.0, 4.9, 4.8, 0.0]])
    settings = params(presence_penalty=1.0)
    sampler = Sampler(1, 4, torch.device("cpu"))
    item = Item(settings, [3])
    for _ in range(2):
        item.output = []
        sampler.start_row(RowStart(0, settings, np.array([3], np.int32), 1))
        for _ in range(3):
            tokens, _ = sampler.sample(logits, command_for([item], [0]))
            item.output += tokens
        assert item.output == [0, 1, 2]
    plain = Item(params(), [3])
    sampler.start_row(RowStart(0, plain.params, np.array([3], np.int32), 1))
    assert sampler.sample(logits, command_for([plain], [0]))[0] == [0]


def test_min_tokens_mask_stop_tokens_and_no_longer() -> None:
    logits = torch.tensor([[9.0, 8.0, 1.0, 0.0]])
    settings = params(min_tokens=2, stop_token_ids=(0, 1))
    for num_output, expected in ((0, 2), (1, 2), (2, 0), (3, 0)):
        item = Item(settings, [3, 3], [2] * num_output)
        assert draw([item], logits)[0] == [expected]
    biased = params(min_tokens=2, stop_token_ids=(0,), logit_bias={0: 100.0})
    assert draw([Item(biased)], logits)[0] == [1]


# ----------------------------------------------------------------------------------------- logprobs


def test_logprobs_are_those_of_the_unmodified_distribution() -> None:
    logits = random_logits(7, 4)
    settings = {"temperature": 0.7, "top_k": 3, "logit_bias": {5: 8.0}, "presence_penalty": 1.0}
    wanted = (0, 1, 7, None)
    items = [Item(params(logprobs=num, seed=3, **settings), output=[4]) for num in wanted]
    tokens, logprobs = draw(items, logits)
    for i, num in enumerate(wanted):
        entry = logprobs[i]
        if num is None:
            assert entry is None
            continue
        assert entry is not None
        expected = torch.log_softmax(logits[i], -1)
        assert entry.logprob == pytest.approx(float(expected[tokens[i]]), abs=1e-6)
        order = expected.argsort(descending=True)[:num]
        assert entry.top_ids == tuple(order.tolist())
        assert entry.top_logprobs == pytest.approx(expected[order].tolist(), abs=1e-6)


# -------------------------------------------------------------------------------------------- batch


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("device", DEVICES)
def test_a_requests_token_does_not_depend_on_the_batch(device: str, seed: int) -> None:
    """Alone, among others, in another order and in other rows; with more tokens in some nuclei, and
    more asked for by top-k, than are looked at first."""
    rng = np.random.default_rng(seed)
    count, vocabulary = 24, 3000
    flatness = torch.from_numpy(rng.choice((0.05, 1.0), (count, 1)).astype(np.float32))
    logits = (random_logits(100 + seed, count, vocabulary) * flatness).to(device)
    items = [
        Item(
            params(
                temperature=float(rng.choice((0.0, 1.0))),
                top_k=int(rng.choice((0, 0, 20, 1500))),
                top_p=float(rng.choice((1.0, 0.8))),
                min_p=float(rng.choice((0.0, 0.01))),
                repetition_penalty=float(rng.choice((1.0, 1.2))),
                logprobs=rng.choice((None, 2)),
                seed=int(rng.integers(2**32)),
            ),
            output=rng.integers(0, vocabulary, 3).tolist(),
        )
        for _ in range(count)
    ]
    together = draw(items, logits)
    alone = [draw([item], logits[i : i + 1]) for i, item in enumerate(items)]
    assert together[0] == [tokens[0] for tokens, _ in alone]
    assert together[1] == [logprobs[0] for _, logprobs in alone]
    order = rng.permutation(count)
    rows = rng.permutation(40)[:count].tolist()
    shuffled = draw([items[i] for i in order], logits[torch.from_numpy(order)], rows)
    assert shuffled[0] == [together[0][i] for i in order]


def test_a_request_that_goes_on_elsewhere_goes_on_unchanged() -> None:
    """The number belongs to the position, not to how often the row was sampled."""
    settings = params(temperature=1.0, seed=11, frequency_penalty=0.5)
    logits = random_logits(8)
    sampler = Sampler(1, VOCABULARY, torch.device("cpu"))
    item = Item(settings)
    sampler.start_row(RowStart(0, settings, np.array(item.prompt, np.int32), len(item.prompt)))
    for _ in range(8):
        item.output += sampler.sample(logits, command_for([item], [0]))[0]
    for done in range(8):
        moved = Item(settings, output=item.output[:done])
        assert draw([moved], logits)[0] == [item.output[done]]
    assert len({*item.output}) > 2
