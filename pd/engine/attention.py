"""Attention over pages: the function that `transformers` models call, and the step's index tensors.

Everything that depends on the step alone (which pool rows to write, which to gather, masks) is
computed once in `plan_attention`; per layer there remain one scatter, one gather and one SDPA call
for all decoding requests of similar length, and one for each prefill chunk. A pool is seen as a
matrix of rows: a "token row" is the `dim` numbers of one (page, head, layer, k|v, token), a "page
row" those of all its tokens.

This backend (torch SDPA over gathered pages) is the reference everywhere and the one on the CPU.
"""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from pd.engine.batch import StepCommand
from pd.engine.pool import PagePool
from pd.messages import Int32Array

IMPLEMENTATION = "pagerelay"

_BUCKET_RATIO = 2
"""Decoding requests share a padded gather while the longest has at most so many times the
shortest's pages."""


@dataclasses.dataclass(slots=True)
class _Gather:
    """Queries `first..last` of the packed step and the pages they read, for one layer group."""

    first: int
    last: int
    decode: bool
    """One query per request, padded to the longest; else one request's chunk."""
    page_rows: torch.Tensor | None
    """(2, batch, kv_heads, pages): page rows of layer place 0. None: the chunk's own keys are all
    there is."""
    mask: torch.Tensor | None
    """Decode: (batch, 1, 1, keys); chunk: (queries, keys); True where attended. None: plain
    causal."""


@dataclasses.dataclass(slots=True)
class _GroupPlan:
    pool: PagePool
    token_rows: torch.Tensor
    """(2, tokens, kv_heads): token rows of layer place 0 that the step's keys and values are
    written to."""
    gathers: list[_Gather]


@dataclasses.dataclass(slots=True)
class AttentionPlan:
    groups: list[_GroupPlan]
    place: dict[int, tuple[int, int]]
    """Model layer -> (layer group, place in the page)."""


_active = threading.local()


class use_plan:
    """Makes `plan` the one that attention layers of this thread work on."""

    def __init__(self, plan: AttentionPlan) -> None:
        self._plan = plan

    def __enter__(self) -> None:
        _active.plan = self._plan

    def __exit__(self, *exc: object) -> None:
        _active.plan = None


def plan_attention(
    command: StepCommand,
    pools: list[PagePool],
    tables: list[Int32Array],
    place: dict[int, tuple[int, int]],
) -> AttentionPlan:
    """Index tensors of one step. `tables[g][row, i]` is the slot of page i, or 0 where there is
    none."""
    counts, starts, rows = command.counts, command.positions, command.rows
    item_of_token = np.repeat(np.arange(len(rows)), counts)
    first_token = np.concatenate(([0], np.cumsum(counts)[:-1]))
    position = starts[item_of_token] + np.arange(len(item_of_token)) - first_token[item_of_token]
    groups = []
    for pool, table in zip(pools, tables, strict=True):
        page_tokens = pool.layout.page_tokens
        pages = table[rows[item_of_token], position // page_tokens]
        token_rows = pool.token_rows(pages, position % page_tokens)
        gathers = _plan_decodes(command, pool, table)
        for i in np.flatnonzero(counts > 1):
            begin = int(first_token[i])
            gathers.append(_plan_chunk(pool, table[rows[i]], int(starts[i]), int(counts[i]), begin))
        groups.append(_GroupPlan(pool, token_rows, gathers))
    return AttentionPlan(groups, place)


def _plan_decodes(command: StepCommand, pool: PagePool, table: Int32Array) -> list[_Gather]:
    """Requests with one token, in runs of similar length (the command has them first, shortest
    first)."""
    num_decodes = int((command.counts == 1).sum())
    position = command.positions[:num_decodes]
    page_tokens, group = pool.layout.page_tokens, pool.layout.group
    first_page = np.zeros(num_decodes, np.int64)
    if group.kind == "sliding":
        first_page = np.maximum(0, position - group.window + 1) // page_tokens
    num_pages = position // page_tokens + 1 - first_page
    gathers, begin = [], 0
    while begin < num_decodes:
        end = begin + 1
        limit = max(4, int(num_pages[begin])) * _BUCKET_RATIO
        while end < num_decodes and num_pages[end] <= limit:
            end += 1
        longest = int(num_pages[begin:end].max())
        index = first_page[begin:end, None] + np.arange(longest)
        inside = np.arange(longest) < num_pages[begin:end, None]
        slots = np.where(
            inside, table[command.rows[begin:end, None], np.minimum(index, table.shape[1] - 1)], 0
        )
        key = (first_page[begin:end, None] * page_tokens) + np.arange(longest * page_tokens)
        query = position[begin:end, None]
        attended = key <= query
        if group.kind == "sliding":
            attended &= key > query - group.window
        mask = torch.from_numpy(attended)[:, None, None, :].to(pool.device)
        gathers.append(_Gather(begin, end, True, pool.page_rows(slots), mask))
        begin = end
    return gathers


def _plan_chunk(
    pool: PagePool, row_table: Int32Array, start: int, count: int, begin: int
) -> _Gather:
    page_tokens, group = pool.layout.page_tokens, pool.layout.group
    if start == 0 and (group.kind == "full" or count <= group.window):
        return _Gather(begin, begin + count, False, None, None)
    first_page = group.first_needed_page(start, page_tokens)
    last_page = (start + count - 1) // page_tokens
    slots = row_table[None, first_page : last_page + 1]
    query = torch.arange(start, start + count, device=pool.device)[:, None]
    key = torch.arange(first_page * page_tokens, (last_page + 1) * page_tokens, device=pool.device)
    mask = key <= query
    if group.kind == "sliding":
        mask &= key > query - group.window
    return _Gather(begin, begin + count, False, pool.page_rows(slots), mask)


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    s_aux: torch.Tensor | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The `transformers` attention interface. query (1, heads, tokens, dim), key and value (1,
    kv_heads, tokens, dim) -> (1, tokens, heads, dim). `s_aux` are gpt-oss's sink logits, one per
    head."""
    plan: AttentionPlan = _active.plan
    group_number, place = plan.place[module.layer_idx]  # type: ignore[index]
    group = plan.groups[group_number]
    pool = group.pool
    keys_values = torch.stack((key[0], value[0])).transpose(1, 2)  # (2, tokens, kv_heads, dim)
    stored = keys_values.to(pool.dtype)
    if pool.dtype == torch.float16:
        # An overflow would outlive its request: a masked key times infinity is not nothing.
        stored = torch.nan_to_num(stored)
    pool.write(group.token_rows, place, stored)
    out = torch.empty_like(query).transpose(1, 2)  # (1, tokens, heads, dim)
    for gather in group.gathers:
        queries = query[0, :, gather.first : gather.last]  # (heads, n, dim)
        if gather.page_rows is not None:
            keys, values = pool.gather(gather.page_rows, place, query.dtype)
        else:
            chunk = stored[:, gather.first : gather.last].to(query.dtype).transpose(1, 2)
            keys, values = chunk[0][None], chunk[1][None]
        kv_heads = keys.shape[1]
        if gather.decode:
            # A KV head's group of query heads takes the place of the query positions.
            heads = queries.transpose(0, 1).reshape(
                gather.last - gather.first, kv_heads, -1, queries.shape[-1]
            )
            result = _attend(heads, keys, values, gather.mask, scaling, s_aux, softcap)
            out[0, gather.first : gather.last] = result.flatten(1, 2)
        else:
            result = _attend(queries[None], keys, values, gather.mask, scaling, s_aux, softcap)
            out[0, gather.first : gather.last] = result[0].transpose(0, 1)
    return out, None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    sinks: torch.Tensor | None,
    softcap: float | None,
) -> torch.Tensor:
    """(batch, heads, n, dim) against (batch, kv_heads, keys, dim). For decode, heads is kv_heads
    and n the group; sinks are then laid out (kv_heads, group), else (heads, 1)."""
    grouped = query.shape[1] != key.shape[1]
    if sinks is None and softcap is None:
        return functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=grouped,
        )
    if grouped:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(-1, -2) * (scaling or query.shape[-1] ** -0.5)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        sink = sinks.view(1, query.shape[1], -1, 1).to(scores.dtype)
        scores = torch.cat((scores, sink.expand(scores.shape[0], -1, scores.shape[2], -1)), -1)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype)
    return weights[..., : key.shape[2]] @ value
