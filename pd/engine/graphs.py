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
        """`num_pages`: of a request, at most."""
        self.decodes = [Shape(size, size, 1) for size in _sizes(max_requests)]
        self.chunks = [
            Shape(size, min(_REQUESTS, max_requests), _BLOCK_TOKENS)
            for size in _sizes(_MOST_TOKENS)
            if size % _BLOCK_TOKENS == 0
        ]
        self._forward = forward
        self._pools = pools
        self._place = place
        self._num_pages = num_pages
        most = max(map(self._num_numbers, (self.decodes[-1], self.chunks[-1])))
        self._staged = torch.zeros(most, dtype=torch.int32).pin_memory()
        self._inputs = torch.zeros_like(self._staged, device=pools[0].device)
        self._logits: torch.Tensor | None = None
        self._graphs: dict[Shape, torch.cuda.CUDAGraph] = {}
        self._memory: Any = None

    def step(self, command: StepCommand, tables: Sequence[Int32Array]) -> torch.Tensor | None:
        """The logits of the items that sample, (samples, vocabulary), valid until the next step;
        None: the step is to be done without a graph."""
        shape = self._shape_of(command)
        if shape is None or (shape not in self._graphs and not self.capture(shape)):
            return None
        numbers = self._staged[: self._num_numbers(shape)]
        self._write_down(shape, numbers.numpy(), command, tables)
        self._inputs[: len(numbers)].copy_(numbers, non_blocking=True)
        self._graphs[shape].replay()
        assert self._logits is not None
        return self._logits[: int(command.sample.sum())]

    def covers(self, command: StepCommand) -> bool:
        """Such a step has, or may get, a graph."""
        return self._shape_of(command) is not None

    def capture_all(self, max_tokens: int) -> None:
        """For steps of so many tokens. The largest first: others find room in its memory."""
        chunks = self.chunks[: bisect.bisect_left(self.chunks, max_tokens, key=_tokens) + 1]
        for shape in (*reversed(chunks), *reversed(self.decodes)):
            if not self.capture(shape):
                return

    @torch.inference_mode()
    def capture(self, shape: Shape) -> bool:
        """False: this model's steps cannot be captured, and there will be none."""
        numbers = self._staged[: self._num_numbers(shape)]
        self._write_down(shape, numbers.numpy(), _NOTHING, ())
        self._inputs[: len(numbers)].copy_(numbers)
        tokens, of_tokens, blocks, samples, *slots = self._fields(shape, self._inputs)
        paged = [
            attention.PagedTokens(each, of_tokens, blocks, shape.block_tokens) for each in slots
        ]
        plan = attention.plan_paged(self._pools, self._place, paged)
        arguments = tokens, of_tokens[:, 1], samples, plan
        graph = torch.cuda.CUDAGraph()
        try:
            # Once before, for what libraries set up on first use.
            logits = self._forward(*arguments)
            if self._logits is None:
                most = max(self.decodes[-1].requests, self.chunks[-1].requests)
                self._logits = logits.new_empty(most, logits.shape[1])
            torch.cuda.synchronize(self._inputs.device)
            with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
                # Results of all graphs go to one place, as only one of them is in use.
                self._logits[: shape.requests] = self._forward(*arguments)
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            log.warning("steps run without CUDA graphs: %s", reason)
            self.decodes, self.chunks, self._graphs = [], [], {}
            return False
        self._memory = graph.pool()
        self._graphs[shape] = graph
        return True

    def _shape_of(self, command: StepCommand) -> Shape | None:
        tokens, requests = len(command.tokens), len(command.rows)
        shapes = self.decodes if tokens == requests else self.chunks
        number = bisect.bisect_left(shapes, tokens, key=_tokens)
        if number == len(shapes) or requests > shapes[number].requests:
            return None
        return shapes[number]

    def _sections(self, shape: Shape) -> list[tuple[int, int]]:
        """Rows and columns: tokens, request and position of each, blocks, those that sample, and
        for each layer group the pages of padding and of the requests."""
        return [
            (shape.tokens, 1),
            (shape.tokens, 2),
            (shape.num_blocks, 2),
            (shape.requests, 1),
            *[(1 + shape.requests, self._num_pages)] * len(self._pools),
        ]

    def _num_numbers(self, shape: Shape) -> int:
        return sum(_aligned(rows * columns) for rows, columns in self._sections(shape))

    def _fields(self, shape: Shape, numbers: Any) -> list[Any]:
        """Of an array or a tensor."""
        fields, begin = [], 0
        for rows, columns in self._sections(shape):
            field = numbers[begin : begin + rows * columns]
            fields.append(field if columns == 1 else field.reshape(rows, columns))
            begin += _aligned(rows * columns)
        return fields

    def _write_down(
        self,
        shape: Shape,
        numbers: Int32Array,
        command: StepCommand,
        tables: Sequence[Int32Array],
    ) -> None:
        tokens, of_tokens, blocks, samples, *slots = self._fields(shape, numbers)
        count, requests = len(command.tokens), len(command.rows)
        tokens[:count], tokens[count:] = command.tokens, 0
        # Padding is the first request, and has as many tokens as are missing.
        counts = np.append(command.counts, shape.tokens - count)
        ends = np.cumsum(counts)
        request = np.repeat(np.arange(1, requests + 2), counts)
        request[count:] = 0
        of_tokens[:, 0] = request
        first = np.append(command.positions - (ends - counts)[:-1], 0)
        of_tokens[:, 1] = np.repeat(first, counts) + np.arange(shape.tokens)
        of_tokens[count:, 1] = 0
        _cut(counts, ends - counts, shape.block_tokens, blocks)
        last = ends[:-1][command.sample] - 1
        samples[: len(last)], samples[len(last) :] = last, 0
        for group, each in enumerate(slots):
            each[0] = 0
            if requests:
                each[1 : 1 + requests] = tables[group][command.rows]


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
