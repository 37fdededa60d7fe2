"""Attention over pages: the function that `transformers` models call, and the step's index tensors.

Everything that depends on the step alone (which pool rows to write, which to gather, masks) is
computed once in `plan_attention`; per layer there remain one scatter, one gather and one SDPA call
for all decoding requests of similar length, and one for each prefill chunk. A pool is seen as a
matrix of rows: a "token row" is the `dim` numbers of one (page, head, layer, k|v, token), a "page
row" those of all its tokens.

With context parallelism a rank computes the tokens of its own pages and keeps their KV. Queries are
gathered from all ranks; each attends to its own pages, with a mask on positions in the sequence;
and the partial results go back to the ranks of the queries, which merge them by log-sum-exp.

Latent attention (MLA) is absorbed: queries are taken into the latent space, and results out of it,
by the two halves of `kv_b_proj`, so that the one latent of a token is key and value to all heads.

This backend (torch SDPA over gathered pages) is the reference everywhere and the one on the CPU. On
a GPU decoding requests read their pages where they are (pd/engine/kernels.py), unless ranks share a
context or keep latents.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from pd.engine.batch import StepCommand
from pd.engine.pool import PagePool
from pd.engine.ranks import Group
from pd.messages import Int32Array

IMPLEMENTATION = "pagerelay"

_BUCKET_RATIO = 2
"""Decoding requests share a padded gather while the longest has at most so many times the
shortest's pages."""
_PAGED_DIM = 256
"""Of a head at most: of more, a tile of keys would not fit where kernels need it."""
_CUDNN_TOKENS = 1024
_BLOCK_TOKENS = 8192
"""Keys before a chunk that are attended to at once, where that pays."""
_MAX_SCORES = 1 << 24
"""Numbers of a score matrix that are in memory at once, where partial results are calculated."""


@dataclasses.dataclass(slots=True)
class _Gather:
    """Queries `first..last` of the packed step and the pages they read, for one layer group."""

    first: int
    last: int
    decode: bool
    """One query per request, padded to the longest; else one request's chunk."""
    page_rows: torch.Tensor | None
    """(planes, batch, kv_heads, pages): page rows of layer place 0. None: the chunk's own keys are
    all there is."""
    mask: torch.Tensor | None
    """Decode: (batch, 1, 1, keys); chunk: (queries, keys); True where attended. None: the last
    query attends to all keys, and in a chunk those before it causally."""
    num_keys: int | None = None
    """Without a mask: what follows them in the last page is not attended to."""
    _bias: torch.Tensor | None = None
    _blocks: list[torch.Tensor] | None = None

    @property
    def is_causal(self) -> bool:
        return self.mask is None and not self.decode

    def bias(self, query: torch.Tensor, num_keys: int) -> torch.Tensor:
        """The mask as torch wants it added to scores; made once for all layers."""
        if self._bias is None:
            mask = self.mask
            if mask is None:
                mask = _causal(query.shape[2], num_keys, query.device)
            self._bias = query.new_zeros(mask.shape).masked_fill_(~mask, -torch.inf)
        return self._bias

    def blocks(self, pages: int) -> list[torch.Tensor]:
        """Page rows, so many pages each but for the last; made once for all layers."""
        if self._blocks is None:
            assert self.page_rows is not None
            self._blocks = [each.contiguous() for each in torch.split(self.page_rows, pages, -1)]
        return self._blocks


@dataclasses.dataclass(frozen=True, slots=True)
class PagedTokens:
    """Tokens whose keys and values kernels find in pages. All int32, on the device; what they hold
    may differ from step to step."""

    slots: torch.Tensor
    """(requests, pages): the pool's pages."""
    tokens: torch.Tensor
    """(tokens, 2): each token's request, by its place in `slots`, and position in the sequence."""
    blocks: torch.Tensor
    """(blocks, 2): tokens of one request, next to each other: the first's number, how many."""
    block_tokens: int
    """In a block, at most."""


@dataclasses.dataclass(slots=True)
class _GroupPlan:
    pool: PagePool
    token_rows: torch.Tensor | None
    """(planes, own tokens * kv_heads): token rows of layer place 0 that the step's keys and values
    are written to. None: there are only those of `paged`, which knows them."""
    gathers: list[_Gather]
    paged: PagedTokens | None = None
    """The step's first tokens, which are in no gather."""


@dataclasses.dataclass(slots=True)
class AttentionPlan:
    groups: list[_GroupPlan]
    place: dict[int, tuple[int, int]]
    """Model layer -> (layer group, place in the page)."""
    own: npt.NDArray[np.int64]
    """The step's tokens that this rank computes, by number in the packed step; -1 for padding, as
    all context-parallel ranks compute equally many."""
    order: torch.Tensor
    """(tokens,): where the step's tokens are among those of all ranks, end to end."""
    cp: Group


_active = threading.local()


class use_plan:
    """Makes `plan` the one that attention layers of this thread work on."""

    def __init__(self, plan: AttentionPlan) -> None:
        self._plan = plan

    def __enter__(self) -> None:
        _active.plan = self._plan

    def __exit__(self, *exc: object) -> None:
        _active.plan = None


def is_active() -> bool:
    """This thread is in a step."""
    return getattr(_active, "plan", None) is not None


def plan_attention(
    command: StepCommand,
    pools: list[PagePool],
    tables: list[Int32Array],
    place: dict[int, tuple[int, int]],
    cp: Group,
) -> AttentionPlan:
    """Index tensors of one step. `tables[g][row, i]` is the slot of page i, or 0 where there is
    none: slot // cp.size is a page of the pool of context-parallel rank slot % cp.size."""
    counts, starts, rows = command.counts, command.positions, command.rows
    item_of_token = np.repeat(np.arange(len(rows)), counts)
    first_token = np.concatenate(([0], np.cumsum(counts)[:-1]))
    position = command.token_positions()
    page_tokens = pools[0].layout.page_tokens
    own, order = _deal_out(position // page_tokens, cp)
    position, item_of_token = position[own], item_of_token[own]
    groups = []
    for pool, table in zip(pools, tables, strict=True):
        slots = table[rows[item_of_token], position // page_tokens]
        # Padding goes to the null page.
        pages = np.where(own < 0, 0, slots // cp.size)
        token_rows = pool.token_rows(pages, position % page_tokens)
        paged, gathers = None, []
        if can_page(pool) and cp.size == 1:
            paged = _page_decodes(command, pool, table)
        else:
            gathers = _plan_decodes(command, pool, table, cp)
        for i in np.flatnonzero(counts > 1):
            chunk = (int(starts[i]), int(counts[i]), int(first_token[i]))
            gathers.append(_plan_chunk(pool, table[rows[i]], *chunk, cp))
        groups.append(_GroupPlan(pool, token_rows, gathers, paged))
    return AttentionPlan(groups, place, own, torch.from_numpy(order).to(pools[0].device), cp)


@functools.cache
def has_kernels(device: torch.device) -> bool:
    """Those of pd/engine/kernels.py run there."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and importlib.util.find_spec("triton") is not None
    )


def can_page(pool: PagePool) -> bool:
    """Kernels read its pages where they are."""
    group = pool.layout.group
    return has_kernels(pool.device) and group.kind != "latent" and group.head_dim <= _PAGED_DIM


def plan_paged(
    pools: Sequence[PagePool], place: dict[int, tuple[int, int]], paged: Sequence[PagedTokens]
) -> AttentionPlan:
    """Of a step all of whose tokens are in pages, by layer group."""
    groups = [_GroupPlan(pool, None, [], each) for pool, each in zip(pools, paged, strict=True)]
    nobody = Group("cp", 1, 0, None, False)
    return AttentionPlan(groups, place, np.zeros(0, np.int64), torch.zeros(0), nobody)


def _page_decodes(command: StepCommand, pool: PagePool, table: Int32Array) -> PagedTokens | None:
    count = int((command.counts == 1).sum())
    if not count:
        return None
    positions = command.positions[:count]
    longest = int(positions.max()) // pool.layout.page_tokens + 1
    numbers = np.empty((count, 4 + longest), np.int32)
    numbers[:, 0] = numbers[:, 2] = np.arange(count)
    numbers[:, 1], numbers[:, 3] = positions, 1
    numbers[:, 4:] = table[command.rows[:count], :longest]
    there = torch.from_numpy(numbers).to(pool.device)
    tokens, blocks = there[:, :2].contiguous(), there[:, 2:4].contiguous()
    return PagedTokens(there[:, 4:], tokens, blocks, 1)


def _deal_out(
    pages: npt.NDArray[np.integer], cp: Group
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(own, order) of an AttentionPlan, from the page numbers of the step's tokens."""
    if cp.size == 1:
        every = np.arange(len(pages))
        return every, every
    shares = [np.flatnonzero(pages % cp.size == rank) for rank in range(cp.size)]
    each = max(map(len, shares))
    own = np.full(each, -1, np.int64)
    own[: len(shares[cp.rank])] = shares[cp.rank]
    order = np.empty(len(pages), np.int64)
    for rank, share in enumerate(shares):
        order[share] = rank * each + np.arange(len(share))
    return own, order


def _own_pages(
    first_page: npt.NDArray[np.int64], last_page: npt.NDArray[np.int64], cp: Group
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Of the pages first_page..last_page of a sequence, those of this rank: the first one's number,
    and how many; every cp.size-th from there."""
    first = first_page + (cp.rank - first_page) % cp.size
    return first, np.maximum(0, (last_page - first) // cp.size + 1)


def _plan_decodes(
    command: StepCommand, pool: PagePool, table: Int32Array, cp: Group
) -> list[_Gather]:
    """Requests with one token, in runs of similar length (the command has them first, shortest
    first)."""
    num_decodes = int((command.counts == 1).sum())
    position = command.positions[:num_decodes].astype(np.int64)
    page_tokens, group = pool.layout.page_tokens, pool.layout.group
    first_page = np.zeros(num_decodes, np.int64)
    if group.kind == "sliding":
        first_page = np.maximum(0, position - group.window + 1) // page_tokens
    first_page, num_pages = _own_pages(first_page, position // page_tokens, cp)
    gathers, begin = [], 0
    while begin < num_decodes:
        end = begin + 1
        limit = max(4, int(num_pages[begin])) * _BUCKET_RATIO
        while end < num_decodes and num_pages[end] <= limit:
            end += 1
        longest = int(num_pages[begin:end].max())
        pages = first_page[begin:end, None] + np.arange(longest) * cp.size
        inside = np.arange(longest) < num_pages[begin:end, None]
        row_pages = np.minimum(pages, table.shape[1] - 1)
        slots = np.where(inside, table[command.rows[begin:end, None], row_pages] // cp.size, 0)
        key = (pages[..., None] * page_tokens + np.arange(page_tokens)).reshape(end - begin, -1)
        if cp.size == 1 and group.kind != "sliding" and position[begin] == position[end - 1]:
            num_keys = int(position[begin]) + 1
            gathers.append(_Gather(begin, end, True, pool.page_rows(slots), None, num_keys))
            begin = end
            continue
        query = position[begin:end, None]
        attended = key <= query
        if group.kind == "sliding":
            attended &= key > query - group.window
        mask = torch.from_numpy(attended)[:, None, None, :].to(pool.device)
        gathers.append(_Gather(begin, end, True, pool.page_rows(slots), mask))
        begin = end
    return gathers


def _plan_chunk(
    pool: PagePool, row_table: Int32Array, start: int, count: int, begin: int, cp: Group
) -> _Gather:
    page_tokens, group = pool.layout.page_tokens, pool.layout.group
    if cp.size == 1 and start == 0 and (group.kind != "sliding" or count <= group.window):
        return _Gather(begin, begin + count, False, None, None)
    ends = np.array(
        [group.first_needed_page(start, page_tokens), (start + count - 1) // page_tokens]
    )
    first_page, num_pages = _own_pages(ends[:1], ends[1:], cp)
    pages = first_page + np.arange(num_pages[0]) * cp.size
    slots = row_table[None, pages] // cp.size
    if cp.size == 1 and group.kind != "sliding":
        return _Gather(begin, begin + count, False, pool.page_rows(slots), None, start + count)
    query = torch.arange(start, start + count, device=pool.device)[:, None]
    positions = (pages[:, None] * page_tokens + np.arange(page_tokens)).reshape(-1)
    key = torch.from_numpy(positions).to(pool.device)
    mask = key <= query
    if group.kind == "sliding":
        mask &= key > query - group.window
    return _Gather(begin, begin + count, False, pool.page_rows(slots), mask)


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    s_aux: torch.Tensor | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The `transformers` attention interface. query (1, heads, tokens, dim), key and value (1,
    kv_heads, tokens, dim) -> (1, tokens, heads, dim). `s_aux` are gpt-oss's sink logits, one per
    head. Without `value`, key is latent (`keep_latent`)."""
    plan: AttentionPlan = _active.plan
    group_number, place = plan.place[module.layer_idx]  # type: ignore[index]
    group = plan.groups[group_number]
    pool = group.pool
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    value_dim, expand = query.shape[-1], None
    if value is None:
        query, value_dim, expand = _absorb(module, query)
    if group.token_rows is None:
        assert value is not None
        _write_paged(group, place, key, value)
        return _attend_paged(group, place, query, scaling, s_aux, softcap)[None], None
    new = (key,) if value is None else (key, value)
    stored = [each[0].transpose(0, 1).to(pool.dtype) for each in new]  # (tokens, kv_heads, dim)
    if pool.dtype == torch.float16:
        # An overflow would outlive its request: a masked key times infinity is not nothing.
        stored = [torch.nan_to_num(each) for each in stored]
    pool.write(group.token_rows, place, stored)
    if plan.cp.size > 1:
        result = _attend_everywhere(
            plan, group, place, query[0], value_dim, scaling, s_aux, softcap
        )
        return (result if expand is None else expand(result))[None], None
    parts = []  # the queries are those of the step, in order
    if group.paged is not None:
        parts.append(_attend_paged(group, place, query, scaling, s_aux, softcap))
    for gather in group.gathers:
        queries = query[0, :, gather.first : gather.last]  # (heads, n, dim)
        if s_aux is None and softcap is None and _has_blocks(gather, pool, query):
            own = [
                each[gather.first : gather.last].transpose(0, 1)[None].to(query.dtype)
                for each in stored
            ]
            attended = _attend_in_blocks(pool, gather, place, queries[None], own, scaling)
            parts.append(_ungrouped(attended, gather))
            continue
        if gather.page_rows is not None:
            keys, values = _keys_values(pool, gather.page_rows, place, query.dtype, value_dim)
            keys, values = keys[:, :, : gather.num_keys], values[:, :, : gather.num_keys]
        else:
            chunk = [each[gather.first : gather.last].to(query.dtype) for each in stored]
            keys, values = (each.transpose(0, 1)[None] for each in (chunk[0], chunk[-1]))
            values = values[..., :value_dim]
        asked = _grouped(queries, gather, keys)
        attended = _attend(asked, keys, values, gather, scaling, s_aux, softcap)
        parts.append(_ungrouped(attended, gather))
    out = parts[0] if len(parts) == 1 else torch.cat(parts)  # (tokens, heads, dim)
    return (out if expand is None else expand(out))[None], None


def _write_paged(group: _GroupPlan, place: int, key: torch.Tensor, value: torch.Tensor) -> None:
    from pd.engine import kernels

    assert group.paged is not None
    new = (each[0].transpose(0, 1) for each in (key, value))
    kernels.write(group.pool, place, group.paged, *new)


def _attend_paged(
    group: _GroupPlan,
    place: int,
    query: torch.Tensor,
    scaling: float,
    sinks: torch.Tensor | None,
    softcap: float | None,
) -> torch.Tensor:
    """(tokens, heads, dim)."""
    from pd.engine import kernels

    assert group.paged is not None
    asked = query[0, :, : len(group.paged.tokens)].transpose(0, 1)
    return kernels.attend(group.pool, place, group.paged, asked, scaling, softcap, sinks)


def keep_latent(attention: nn.Module) -> None:
    """Have an MLA layer hand on the latents of its tokens, not the keys and values of all heads."""

    def expand_kv(latent: torch.Tensor, rotary: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.cat((latent, rotary), -1), None

    attention.expand_kv = expand_kv  # type: ignore[assignment]


def _absorb(module: Any, query: torch.Tensor) -> tuple[torch.Tensor, int, Any]:
    """(queries in the latent space, dimensions of a result there, the way out)."""
    plain, rank = module.qk_nope_head_dim, module.kv_lora_rank
    weights = module.kv_b_proj.weight.view(query.shape[1], -1, rank)  # (heads, plain + v, rank)
    latent = query[..., :plain] @ weights[:, :plain]

    def expand(result: torch.Tensor) -> torch.Tensor:
        return torch.einsum("nhr,hvr->nhv", result, weights[:, plain:])

    return torch.cat((latent, query[..., plain:]), -1), rank, expand


def _keys_values(
    pool: PagePool, page_rows: torch.Tensor, place: int, dtype: torch.dtype, value_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(batch, kv_heads, keys, dim); a latent is both."""
    planes = pool.gather(page_rows, place, dtype)
    return planes[0], planes[-1][..., :value_dim]


def _grouped(queries: torch.Tensor, gather: _Gather, keys: torch.Tensor) -> torch.Tensor:
    """(heads, n, dim) -> (batch, heads, queries, dim). For decode a KV head's group of query heads
    takes the place of the query positions."""
    if not gather.decode:
        return queries[None]
    by_request = queries.transpose(0, 1)
    return by_request.reshape(len(by_request), keys.shape[1], -1, queries.shape[-1])


def _ungrouped(result: torch.Tensor, gather: _Gather) -> torch.Tensor:
    """-> (n, heads, ...)."""
    return result.flatten(1, 2) if gather.decode else result[0].transpose(0, 1)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gather: _Gather,
    scaling: float,
    sinks: torch.Tensor | None,
    softcap: float | None,
) -> torch.Tensor:
    """(batch, heads, n, dim) against (batch, kv_heads, keys, dim). For decode, heads is kv_heads
    and n the group; sinks are then laid out (kv_heads, group), else (heads, 1)."""
    count, num_keys = query.shape[2], key.shape[2]
    if sinks is None and softcap is None:
        if query.is_cuda:
            return _attend_on_gpu(query, key, value, gather, scaling)
        is_causal = gather.is_causal and count == num_keys
        needs_mask = gather.mask is not None or (gather.is_causal and not is_causal)
        return functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=gather.bias(query, num_keys) if needs_mask else None,
            is_causal=is_causal,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    scores, value = _scores(query, key, value, scaling, softcap)
    attended = _causal(count, num_keys, query.device) if gather.is_causal else gather.mask
    if attended is not None:
        scores = scores.masked_fill(~attended, float("-inf"))
    if sinks is not None:
        sink = sinks.view(1, query.shape[1], -1, 1).to(scores.dtype)
        scores = torch.cat((scores, sink.expand(scores.shape[0], -1, scores.shape[2], -1)), -1)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype)
    return weights[..., : key.shape[2]] @ value


def _causal(num_queries: int, num_keys: int, device: torch.device) -> torch.Tensor:
    ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return ones.tril(num_keys - num_queries)


def _attend_on_gpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gather: _Gather,
    scaling: float,
) -> torch.Tensor:
    """Kernels by name, as torch would take cuDNN's for nearly all, which plans each new shape on
    the host (H200: 64 ms): hardly a prompt has the length of another. It is worth that for large
    chunks without others before them, in few lengths (8,192 tokens: 0.9 ms, flash 1.7)."""
    count, num_keys = query.shape[2], key.shape[2]
    grouped = query.shape[1] != key.shape[1]
    if gather.mask is None:
        if gather.is_causal and _CUDNN_TOKENS <= count == num_keys and _has_cudnn(query, value):
            return _cudnn(query, key, value, scaling, is_causal=True)[0]
        # Asked whether it may be causal, torch says no for more keys than queries, as its own mask
        # would begin with the first key; this kernel's ends with the last.
        params = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, False, grouped)
        if torch.backends.cuda.can_use_flash_attention(params):
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            out: torch.Tensor = flash(
                query, key, value, 0.0, gather.is_causal, False, scale=scaling
            )[0]
            return out
    bias = gather.bias(query, num_keys) if gather.is_causal or gather.mask is not None else None
    if grouped:  # else every score would be written down
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scaling)


def _has_cudnn(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Where it was measured."""
    return (
        query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] == value.shape[-1]
        and query.shape[-1] in (64, 128)
        and torch.cuda.get_device_capability(query.device) == (9, 0)
    )


def _cudnn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(results, logarithms of the sums of their weights). Causal, as many keys as queries; in
    multiples of _CUDNN_TOKENS, what is added comes last."""
    count = query.shape[2]
    if lacking := -count % _CUDNN_TOKENS:
        query = functional.pad(query, (0, 0, 0, lacking))
        if is_causal:
            key, value = (functional.pad(each, (0, 0, 0, lacking)) for each in (key, value))
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    found = attend(query, key, value, None, True, 0.0, is_causal, False, scale=scaling)
    return found[0][:, :, :count], found[1].view(*query.shape[:3])[:, :, :count]


def _has_blocks(gather: _Gather, pool: PagePool, query: torch.Tensor) -> bool:
    """A large chunk after many keys: parts by cuDNN, all of one shape, are faster than flash for
    all (H200, 8,192 queries, 32,768 keys: 5.8 and 11.2 ms)."""
    count = gather.last - gather.first
    return (
        gather.num_keys is not None
        and gather.is_causal
        and count >= 2 * _CUDNN_TOKENS
        and gather.num_keys - count >= _BLOCK_TOKENS
        and _BLOCK_TOKENS % pool.layout.page_tokens == 0
        and has_kernels(query.device)
        and pool.layout.group.kind != "latent"
        and _has_cudnn(query, query)
    )


def _attend_in_blocks(
    pool: PagePool,
    gather: _Gather,
    place: int,
    query: torch.Tensor,
    own: list[torch.Tensor],
    scaling: float,
) -> torch.Tensor:
    """query and the chunk's own keys and values (1, heads, n, dim) -> (1, heads, n, dim)."""
    from pd.engine.kernels import merge

    assert gather.num_keys is not None
    found = _cudnn(query, own[0], own[1], scaling, is_causal=True)
    out, sums = found[0].float(), found[1]  # else each block would round them
    left = gather.num_keys - query.shape[2]
    for rows in gather.blocks(_BLOCK_TOKENS // pool.layout.page_tokens):
        keys, values = _keys_values(pool, rows, place, query.dtype, query.shape[-1])
        if left >= _BLOCK_TOKENS:
            found = _cudnn(query, keys, values, scaling, is_causal=False)
        elif left > 0:
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            keys, values = keys[:, :, :left], values[:, :, :left]
            found = flash(query, keys, values, 0.0, False, False, scale=scaling)
        else:
            break
        merge(out[0], sums[0], found[0][0], found[1][0])
        left -= _BLOCK_TOKENS
    return out.to(query.dtype)


def _scores(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores, values), KV heads repeated for the query heads that share them."""
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(-1, -2) * scaling
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap, value


# --------------------------------------------------------------------------------- context parallel


def _attend_everywhere(
    plan: AttentionPlan,
    group: _GroupPlan,
    place: int,
    query: torch.Tensor,
    value_dim: int,
    scaling: float,
    sinks: torch.Tensor | None,
    softcap: float | None,
) -> torch.Tensor:
    """query (heads, own tokens, dim) -> (own tokens, heads, value_dim), over all ranks' pages."""
    cp, (heads, count, _) = plan.cp, query.shape
    everybody = cp.all_gather(query.transpose(0, 1)).flatten(0, 1)  # (cp * count, heads, dim)
    queries = everybody[plan.order].transpose(0, 1)  # (heads, tokens, dim)
    # With each result goes the logarithm of the sum of its weights.
    partial = torch.zeros(
        cp.size * count, heads, value_dim + 1, dtype=torch.float32, device=query.device
    )
    for gather in group.gathers:
        assert gather.page_rows is not None
        assert gather.mask is not None
        keys, values = _keys_values(group.pool, gather.page_rows, place, query.dtype, value_dim)
        asked = _grouped(queries[:, gather.first : gather.last], gather, keys)
        mask = (
            gather.mask.expand(len(asked), 1, -1, -1) if gather.decode else gather.mask[None, None]
        )
        found = _attend_partly(asked, keys, values, mask, scaling, softcap)
        partial[plan.order[gather.first : gather.last]] = _ungrouped(found, gather)
    parts = cp.all_to_all(partial.view(cp.size, count, heads, -1))
    sums = parts[..., -1]  # (cp, own tokens, heads)
    if sinks is not None:
        sums = torch.cat((sums, sinks.float().expand(1, count, heads)))
    weights = torch.softmax(sums, 0)[: cp.size, ..., None]
    return (parts[..., :-1] * weights).sum(0).to(query.dtype)


def _attend_partly(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """As `_attend`, but float32 and with one more number for each result: the logarithm of the sum
    of its weights, minus infinity without a key."""
    batch, heads, count, _ = query.shape
    if key.shape[2] == 0:
        nothing = query.new_zeros(batch, heads, count, value.shape[-1] + 1, dtype=torch.float32)
        nothing[..., -1] = -torch.inf
        return nothing
    at_once = max(1, _MAX_SCORES // (batch * heads * key.shape[2]))
    parts = []
    for first in range(0, count, at_once):
        some = query[:, :, first : first + at_once]
        of_some = mask if mask.shape[2] == 1 else mask[:, :, first : first + at_once]
        scores, values = _scores(some, key, value, scaling, softcap)
        scores = scores.float().masked_fill(~of_some, -torch.inf)
        sums = scores.logsumexp(-1, keepdim=True)
        weights = (scores - sums.clamp(min=torch.finfo(torch.float32).min)).exp()
        parts.append(torch.cat((weights @ values.float(), sums), -1))
    return torch.cat(parts, 2)
