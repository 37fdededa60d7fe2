"""Steps of few tokens as CUDA graphs: one launch instead of a thousand.

A graph is for one shape: decode steps of up to n requests, or steps of up to n tokens of a few
requests. What differs between steps of a shape (tokens, positions, pages) is numbers that are
copied to where the graph reads them. The rest of a shape is padding: tokens of a request without
pages, which write to the null page, and whose results nobody looks at.
"""

from __future__ import annotations

import bisect
import dataclasses
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from pd.engine import attention
from pd.engine.batch import StepCommand
from pd.engine.pool import PagePool
from pd.messages import Int32Array

log = logging.getLogger("pagerelay")

Forward = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, attention.AttentionPlan], torch.Tensor
]
"""(tokens, positions, those that sample, what to attend to) -> logits, (samples, vocabulary)."""

_MOST_TOKENS = 1024
"""Of a step that is not for decoding alone: computing more takes longer than launching it."""
_REQUESTS = 16
"""In such a step."""
_BLOCK_TOKENS = 32
_MOST_PAIRS = 1 << 24
"""Tokens times the position of the last one: with more, torch's kernels should gain what launching
costs (1,024 tokens after 16,384). Estimated, from 0.5 ms a layer after 8,192 tokens on an H200."""
_capturing = threading.Lock()
"""There is one capture at a time in a process."""

_NONE = np.zeros(0, np.int32)
_NOTHING = StepCommand([], _NONE, _NONE, _NONE, np.zeros(0, np.bool_), _NONE, [])


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """Of a step: so many tokens and requests at most; in blocks of one token for decoding."""

    tokens: int
    requests: int
    block_tokens: int

    @property
    def num_blocks(self) -> int:
        if self.block_tokens == 1:
            return self.tokens
        return self.tokens // self.block_tokens + self.requests + 1

    def _sections(self, num_pages: Sequence[int]) -> list[tuple[int, int]]:
        """Rows and columns: tokens, request and position of each, blocks, those that sample, and
        for each layer group the pages of padding and of the requests, `num_pages` each."""
        return [
            *((self.tokens, 1), (self.tokens, 2), (self.num_blocks, 2), (self.requests, 1)),
            *((1 + self.requests, each) for each in num_pages),
        ]

    def size(self, num_pages: Sequence[int]) -> int:
        return sum(_aligned(rows * columns) for rows, columns in self._sections(num_pages))

    def fields(self, numbers: Any, num_pages: Sequence[int]) -> list[Any]:
        """Of an array or a tensor."""
        fields, begin = [], 0
        for rows, columns in self._sections(num_pages):
            field = numbers[begin : begin + rows * columns]
            fields.append(field if columns == 1 else field.reshape(rows, columns))
            begin += _aligned(rows * columns)
        return fields


@dataclasses.dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    staged: torch.Tensor
    """Pinned; copied to where the graph reads."""
    fields: list[Int32Array]
    """Of `staged`."""


class StepGraphs:
    """Used by one thread."""

    def __init__(
        self,
        forward: Forward,
        pools: Sequence[PagePool],
        place: dict[int, tuple[int, int]],
        max_requests: int,
        num_pages: int,
    ) -> None:
        """`num_pages`: of a request, at most. Nothing is captured yet."""
        self._decodes = [Shape(size, size, 1) for size in _sizes(max_requests)]
        self._chunks = [
            Shape(size, min(_REQUESTS, max_requests), _BLOCK_TOKENS)
            for size in _sizes(_MOST_TOKENS)
            if size % _BLOCK_TOKENS == 0
        ]
        self._forward = forward
        self._pools = pools
        self._place = place
        self._num_pages = [num_pages] * len(pools)
        self._page_tokens = pools[0].layout.page_tokens
        largest = self._decodes[-1], self._chunks[-1]
        self._max_samples = max(shape.requests for shape in largest)
        most = max(shape.size(self._num_pages) for shape in largest)
        self._staged = torch.zeros(most, dtype=torch.int32).pin_memory()
        self._inputs = torch.zeros_like(self._staged, device=pools[0].device)
        self._logits: torch.Tensor | None = None
        self._captured: dict[Shape, _Captured] = {}
        self._stream = torch.cuda.Stream(pools[0].device)  # type: ignore[no-untyped-call]
        self._memory: Any = None

    def step(self, command: StepCommand, tables: Sequence[Int32Array]) -> torch.Tensor | None:
        """The logits of the items that sample, (samples, vocabulary), valid until the next step;
        None: there is no graph for it."""
        shape = self._shape_of(command)
        captured = self._captured.get(shape) if shape is not None else None
        if shape is None or captured is None:
            return None
        write_down(shape, captured.fields, command, tables, self._page_tokens)
        self._inputs[: len(captured.staged)].copy_(captured.staged, non_blocking=True)
        captured.graph.replay()
        assert self._logits is not None
        return self._logits[: int(command.sample.sum())]

    def covers(self, command: StepCommand) -> bool:
        """There is a graph for it."""
        return self._shape_of(command) in self._captured

    def prepare(self, command: StepCommand) -> None:
        """Capture what it needs, if that is not there."""
        shape = self._shape_of(command)
        if shape is not None and shape not in self._captured:
            self._capture(shape)

    def capture_all(self, max_tokens: int) -> bool:
        """For steps of up to so many tokens, as far as this model's steps can be captured; False:
        none can. Not while anything else works on the device."""
        chunks = self._chunks[: bisect.bisect_left(self._chunks, max_tokens, key=_tokens) + 1]
        # The largest first: others find room in its memory.
        for shape in (*reversed(chunks), *reversed(self._decodes)):
            if not self._capture(shape):
                break
        return bool(self._captured)

    @torch.inference_mode()
    def _capture(self, shape: Shape) -> bool:
        staged = self._staged[: shape.size(self._num_pages)]
        fields = shape.fields(staged.numpy(), self._num_pages)
        write_down(shape, fields, _NOTHING, (), self._page_tokens)
        self._inputs[: len(staged)].copy_(staged)
        tokens, of_tokens, blocks, samples, *slots = shape.fields(self._inputs, self._num_pages)
        paged = [
            attention.PagedTokens(each, of_tokens, blocks, shape.block_tokens) for each in slots
        ]
        plan = attention.plan_paged(self._pools, self._place, paged)
        arguments = tokens, of_tokens[:, 1], samples, plan
        graph = torch.cuda.CUDAGraph()
        mode = {"pool": self._memory, "capture_error_mode": "thread_local"}
        try:
            # Once before, for what libraries set up on first use.
            logits = self._forward(*arguments)
            if self._logits is None:
                self._logits = logits.new_empty(self._max_samples, logits.shape[1])
            # The outer context is left even if ending a capture fails.
            with (
                _capturing,
                torch.cuda.stream(self._stream),
                torch.cuda.graph(graph, stream=self._stream, **mode),
            ):
                # Results of all graphs go to one place, as only one of them is in use.
                self._logits[: shape.requests] = self._forward(*arguments)
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            log.warning("steps of %d tokens run without a CUDA graph: %s", shape.tokens, reason)
            return False
        self._memory = graph.pool()
        self._captured[shape] = _Captured(graph, staged, fields)
        return True

    def _shape_of(self, command: StepCommand) -> Shape | None:
        tokens, requests = len(command.tokens), len(command.rows)
        if tokens == requests:
            shapes = self._decodes
        elif tokens * int(command.positions.max()) > _MOST_PAIRS:
            return None
        else:
            shapes = self._chunks
        number = bisect.bisect_left(shapes, tokens, key=_tokens)
        if number == len(shapes) or requests > shapes[number].requests:
            return None
        return shapes[number]


def write_down(
    shape: Shape,
    fields: Sequence[Int32Array],
    command: StepCommand,
    tables: Sequence[Int32Array],
    page_tokens: int,
) -> None:
    """What a graph reads of a step, into `Shape.fields`."""
    tokens, of_tokens, blocks, samples, *slots = fields
    count, requests = len(command.tokens), len(command.rows)
    tokens[:count], tokens[count:] = command.tokens, 0
    # Padding is the first request, and has as many tokens as are missing.
    counts = np.append(command.counts, shape.tokens - count)
    ends = np.cumsum(counts)
    of_tokens[:count, 0] = np.repeat(np.arange(1, requests + 1), command.counts)
    of_tokens[:count, 1] = command.token_positions()
    of_tokens[count:] = 0
    _cut(counts, ends - counts, shape.block_tokens, blocks)
    last = ends[:-1][command.sample] - 1
    samples[: len(last)], samples[len(last) :] = last, 0
    # Nothing reads pages beyond a request's last token.
    num_pages = int(of_tokens[:, 1].max()) // page_tokens + 1
    for group, each in enumerate(slots):
        each[0] = 0
        if requests:
            each[1 : 1 + requests, :num_pages] = tables[group][command.rows, :num_pages]


def _cut(counts: Any, firsts: Any, most: int, blocks: Int32Array) -> None:
    """Runs of tokens into blocks of at most so many; what is left of `blocks` has none."""
    each = -(-counts // most)
    item = np.repeat(np.arange(len(counts)), each)
    done = (np.arange(len(item)) - np.repeat(np.cumsum(each) - each, each)) * most
    blocks[: len(item), 0] = firsts[item] + done
    blocks[: len(item), 1] = np.minimum(counts[item] - done, most)
    blocks[len(item) :] = 0


def _aligned(count: int) -> int:
    """So that all fields begin where kernels are compiled for: at 16 bytes."""
    return -(-count // 4) * 4


def _tokens(shape: Shape) -> int:
    return shape.tokens


def _sizes(most: int) -> list[int]:
    """Up to `most`, apart by an eighth to a quarter."""
    sizes, size = [1, 2, 4], 8
    while sizes[-1] < most:
        sizes.append(size)
        size += max(8, 1 << size.bit_length() - 3)
    return [each for each in sizes[:-1] if each < most] + [most]
