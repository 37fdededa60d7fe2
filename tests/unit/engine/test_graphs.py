"""What a step's graph reads."""

from __future__ import annotations

import bisect

import numpy as np
import pytest

from pd.engine.batch import StepCommand
from pd.engine.graphs import Shape, _cut, _sizes, write_down

PAGE, NUM_PAGES, ROWS = 4, 12, 9


def random_step(rng: np.random.Generator, shape: Shape) -> StepCommand:
    requests = int(rng.integers(1, min(shape.requests, ROWS) + 1))
    counts = np.ones(requests, np.int32)
    if shape.block_tokens > 1:
        more = rng.multinomial(
            rng.integers(0, shape.tokens - requests + 1), np.ones(requests) / requests
        )
        counts += more.astype(np.int32)
    counts = np.minimum(counts, PAGE * NUM_PAGES)
    positions = rng.integers(0, PAGE * NUM_PAGES - counts + 1).astype(np.int32)
    return StepCommand(
        [],
        rng.permutation(ROWS)[:requests].astype(np.int32),
        positions,
        counts,
        rng.random(requests) < 0.7,
        rng.integers(1, 100, counts.sum()).astype(np.int32),
        [],
    )


@pytest.mark.parametrize("shape", [Shape(8, 8, 1), Shape(64, 5, 16), Shape(32, 3, 32)], ids=str)
def test_every_token_is_in_one_block_of_its_request(shape: Shape) -> None:
    """And what is padding, in the null page."""
    rng = np.random.default_rng(shape.tokens)
    pages = [NUM_PAGES, NUM_PAGES]
    numbers = np.full(shape.size(pages), 77, np.int32)
    fields = shape.fields(numbers, pages)
    for _ in range(300):
        command = random_step(rng, shape)
        tables = [rng.integers(1, 1000, (ROWS, NUM_PAGES)).astype(np.int32) for _ in pages]
        write_down(shape, fields, command, tables, PAGE)
        tokens, of_tokens, blocks, samples, *slots = fields
        expected = [
            (number, int(start) + k)
            for number, (start, count) in enumerate(
                zip(command.positions, command.counts, strict=True)
            )
            for k in range(count)
        ]
        assert tokens[: len(expected)].tolist() == command.tokens.tolist()
        for token, (number, position) in enumerate(expected):
            request, at = of_tokens[token]
            assert at == position
            for table, each in zip(tables, slots, strict=True):
                assert each[request, at // PAGE] == table[command.rows[number], position // PAGE]
        for token in range(len(expected), shape.tokens):
            request, at = of_tokens[token]
            assert all(each[request, at // PAGE] == 0 for each in slots)
        covered = []
        for first, count in blocks.tolist():
            assert 0 <= count <= shape.block_tokens
            assert len({request for request, _ in of_tokens[first : first + count].tolist()}) <= 1
            covered += range(first, first + count)
        assert sorted(covered) == list(range(shape.tokens))
        last = np.cumsum(command.counts)[command.sample] - 1
        assert samples[: len(last)].tolist() == last.tolist()


def test_sizes_of_captured_batches() -> None:
    """None is padded by more than a third or seven."""
    for most in (1, 2, 3, 7, 8, 64, 100, 256, 1000):
        sizes = _sizes(most)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == most
        for count in range(1, most + 1):
            size = sizes[bisect.bisect_left(sizes, count)]
            assert size - count <= max(7, count / 3)
    assert len(_sizes(256)) < 20


def test_runs_of_tokens_are_cut_into_blocks() -> None:
    blocks = np.full((8, 2), -1, np.int32)
    _cut(np.array([3, 9, 0, 4]), np.array([0, 3, 12, 12]), 4, blocks)
    assert blocks.tolist() == [[0, 3], [3, 4], [7, 4], [11, 1], [12, 4], [0, 0], [0, 0], [0, 0]]
