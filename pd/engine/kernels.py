"""What torch has no kernels for: tokens read keys and values where they lie and write their own
there, results over parts of the keys are merged, queries and keys are rotated.

The keys of a block of tokens are cut into parts that are attended to at once, however few tokens
there are. How many, and of which requests, is read on the device, so that a launch is right for any
step of one shape (pd/engine/graphs.py).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from pd.engine.attention import PagedTokens
from pd.engine.pool import PagePool

_MOST_PARTS = 64
_PART_KEYS = 256
"""Fewest in a part: merging one costs more."""
_ROWS = 64
"""Of queries and heads that a program takes."""
_MERGED = 16
"""Queries a program."""
_ROTATED = 1024
"""Pairs of numbers a program."""
_NORMED = 2048
"""Numbers a program, of rows that are shorter."""
_GATE_BLOCK = 1024
"""Products a program."""


def write(
    pool: PagePool, place: int, paged: PagedTokens, key: torch.Tensor, value: torch.Tensor
) -> None:
    """Store what is new, both (tokens, kv_heads, dim), for the layer at `place`."""
    tokens, heads, dim = key.shape
    assert key.stride(2) == value.stride(2) == 1
    page, head, plane = _strides(pool)
    _write[(tokens, heads)](
        key,
        value,
        pool.data,
        paged.slots,
        paged.tokens,
        *(key.stride(0), key.stride(1), value.stride(0), value.stride(1)),
        paged.slots.stride(0),
        *(page, head, plane, place * 2 * plane),
        PAGE=pool.layout.page_tokens,
        DIM=dim,
        BLOCK_D=triton.next_power_of_2(dim),
        IS_HALF=pool.dtype == torch.float16,
        num_warps=1,
    )


def attend(
    pool: PagePool,
    place: int,
    paged: PagedTokens,
    query: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """query (tokens, heads, dim) -> the same; the layer at `place` has been written to. `sinks`: a
    logit for each head that takes its share of the weights."""
    (tokens, heads, dim), layout = query.shape, pool.layout
    assert query.stride(2) == 1
    kv_heads = layout.group.kv_heads
    group = heads // kv_heads
    block_d = max(16, triton.next_power_of_2(dim))
    is_wide = query.dtype == torch.float32 or block_d > 128
    is_decode = paged.block_tokens == 1
    rows = min(max(16, triton.next_power_of_2(group * paged.block_tokens)), _ROWS)
    if is_wide and block_d > 128:
        rows //= 2
    keys = 32 if is_wide else 64 if is_decode else 128
    pieces = triton.cdiv(group * paged.block_tokens, rows)
    parts = _num_parts(tokens, kv_heads, group, rows, is_decode, query.device)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    partial, sums = out, out
    if parts > 1:
        partial = query.new_empty(tokens, heads, parts, dim, dtype=torch.float32)
        sums = query.new_empty(tokens, heads, parts, dtype=torch.float32)
    page, head, plane = _strides(pool)
    _attend[(len(paged.blocks) * pieces, kv_heads, parts)](
        query,
        pool.data,
        paged.slots,
        paged.tokens,
        paged.blocks,
        partial,
        sums,
        sinks,
        scaling,
        softcap or 0.0,
        *(query.stride(0), query.stride(1)),
        paged.slots.stride(0),
        *(page, head, plane, place * 2 * plane),
        PART_TILES=_PART_KEYS // keys,
        GROUP=group,
        WINDOW=layout.group.window if layout.group.kind == "sliding" else 0,
        PAGE=layout.page_tokens,
        DIM=dim,
        PIECES=pieces,
        BLOCK_R=rows,
        BLOCK_D=block_d,
        BLOCK_N=keys,
        HAS_SOFTCAP=softcap is not None,
        IS_WHOLE=parts == 1,
        HAS_SINKS=sinks is not None,
        num_warps=4,
        num_stages=3 if is_decode and not is_wide else 1,
    )
    if parts > 1:
        _merge[(tokens, heads)](
            partial,
            sums,
            sinks,
            out,
            PARTS=parts,
            DIM=dim,
            BLOCK_D=block_d,
            HAS_SINKS=sinks is not None,
            num_warps=4 if parts * block_d > 1024 else 1,
        )
    return out


def _num_parts(
    tokens: int, kv_heads: int, group: int, rows: int, is_decode: bool, device: torch.device
) -> int:
    """So many that all multiprocessors have some programs, a power of two. When decoding, one
    request may have most of the keys."""
    programs = kv_heads * (tokens if is_decode else triton.cdiv(tokens * group, rows))
    wanted = triton.cdiv((4 if is_decode else 2) * _num_processors(device), programs)
    parts: int = triton.next_power_of_2(wanted)
    return min(max(parts, 4 if is_decode else 1), _MOST_PARTS)


@functools.cache
def _num_processors(device: torch.device) -> int:
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def merge(
    out: torch.Tensor, sums: torch.Tensor, other: torch.Tensor, other_sums: torch.Tensor
) -> None:
    """Results over some keys, (heads, queries, dim), and the logarithms of the sums of their
    weights, (heads, queries): `out` and `sums` become those over the keys of both."""
    heads, queries, dim = out.shape
    _merge_two[(triton.cdiv(queries, _MERGED), heads)](
        out,
        sums,
        other,
        other_sums,
        queries,
        *(out.stride(0), out.stride(1), other.stride(0), other.stride(1)),
        *(sums.stride(0), sums.stride(1), other_sums.stride(0), other_sums.stride(1)),
        DIM=dim,
        BLOCK_D=triton.next_power_of_2(dim),
        BLOCK_Q=_MERGED,
        num_warps=4,
    )


def rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """By the angles of each token (tokens, dim): both (heads, tokens, dim) -> (1, heads, tokens,
    dim), so that what belongs to a token lies together."""
    (heads, tokens, dim), kv_heads = query.shape, len(key)
    rotated = query.new_empty(1, tokens, heads + kv_heads, dim)
    block = triton.next_power_of_2(dim // 2)
    at_once = max(1, min(triton.next_power_of_2(heads + kv_heads), _ROTATED // block))
    _rotate[(tokens, triton.cdiv(heads + kv_heads, at_once))](
        query,
        key,
        cos,
        sin,
        rotated,
        *(query.stride(0), query.stride(1), key.stride(0), key.stride(1)),
        *(cos.stride(0), sin.stride(0)),
        HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=dim // 2,
        BLOCK_H=at_once,
        BLOCK_D=block,
        num_warps=4,
    )
    by_head = rotated.transpose(1, 2)
    return by_head[:, :heads], by_head[:, heads:]


def norm(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """hidden (..., dim), each divided by the root of its mean square, times weight (dim)."""
    dim = hidden.shape[-1]
    if hidden.dim() != 4 or len(hidden) != 1 or hidden.stride(-1) != 1:
        hidden = hidden.contiguous()
        outer, inner, strides = hidden.numel() // dim, 1, [dim, 0]
    else:
        (_, outer, inner, _), strides = hidden.shape, list(hidden.stride()[1:3])
    normed = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    block = triton.next_power_of_2(dim)
    rows = max(1, min(_NORMED // block, triton.next_power_of_2(outer * inner)))
    _norm[(triton.cdiv(outer * inner, rows),)](
        hidden,
        weight,
        normed,
        epsilon,
        outer * inner,
        *strides,
        INNER=inner,
        DIM=dim,
        BLOCK_R=rows,
        BLOCK_D=block,
        num_warps=8 if block >= _NORMED else 4,
    )
    return normed


def gate(both: torch.Tensor) -> torch.Tensor:
    """(..., gates and what they are for) -> their products, with SiLU gates."""
    size = both.shape[-1] // 2
    both = both.contiguous()
    product = both.new_empty(*both.shape[:-1], size)
    _gate[(both.numel() // (2 * size), triton.cdiv(size, _GATE_BLOCK))](
        both, product, SIZE=size, BLOCK=_GATE_BLOCK, num_warps=4
    )
    return product


def _strides(pool: PagePool) -> tuple[int, int, int]:
    """In elements, of a page, of its heads, and of a layer's keys and values."""
    return pool.data.stride(0), pool.data.stride(1), pool.data.stride(3)


@triton.jit(do_not_specialize=["slots_row"])
def _write(
    key,
    value,
    pool,
    slots,
    tokens,
    key_token,
    key_head,
    value_token,
    value_head,
    slots_row,
    page_stride,
    head_stride,
    plane_stride,
    layer,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_HALF: tl.constexpr,
):
    token, head = tl.program_id(0), tl.program_id(1)
    dims = tl.arange(0, BLOCK_D)
    request, position = tl.load(tokens + 2 * token), tl.load(tokens + 2 * token + 1)
    slot = tl.load(slots + request * slots_row + position // PAGE).to(tl.int64)
    to = pool + slot * page_stride + head * head_stride + layer + (position % PAGE) * DIM + dims
    for plane in tl.static_range(2):
        if plane == 0:
            found = tl.load(key + token * key_token + head * key_head + dims, dims < DIM)
        else:
            found = tl.load(value + token * value_token + head * value_head + dims, dims < DIM)
        if IS_HALF:
            # An overflow would outlive its request: a masked key times infinity is not nothing.
            found = found.to(tl.float32)
            found = tl.where(found == found, found, 0.0)
            found = tl.minimum(tl.maximum(found, -65504.0), 65504.0)
        tl.store(to + plane * plane_stride, found.to(pool.dtype.element_ty), dims < DIM)


@triton.jit(do_not_specialize=["slots_row"])
def _attend(
    query,
    pool,
    slots,
    tokens,
    blocks,
    partial,
    sums,
    sinks,
    scaling,
    softcap,
    query_token,
    query_head,
    slots_row,
    page_stride,
    head_stride,
    plane_stride,
    layer,
    PART_TILES: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    block, kv_head, part = tl.program_id(0) // PIECES, tl.program_id(1), tl.program_id(2)
    first_token, count = tl.load(blocks + 2 * block), tl.load(blocks + 2 * block + 1)
    # A row is a token and a query head.
    first_row = tl.program_id(0) % PIECES * BLOCK_R
    if first_row >= count * GROUP:
        return
    rows, dims = first_row + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    is_row = rows < count * GROUP
    token = (first_token + rows // GROUP).to(tl.int64)
    head = kv_head * GROUP + rows % GROUP
    request = tl.load(tokens + 2 * first_token)
    position = tl.load(tokens + 2 * token + 1, is_row, 0)
    last = tl.max(position, 0)
    # Before the window lie pages that were given back.
    first_key = 0
    if WINDOW:
        first_key = tl.maximum(tl.min(tl.where(is_row, position, last), 0) - WINDOW + 1, 0)
    first_tile = first_key // BLOCK_N
    last_tile = last // BLOCK_N + 1
    parts = tl.num_programs(2)
    each = tl.maximum(tl.cdiv(last_tile - first_tile, parts), PART_TILES)
    begin = first_tile + part * each
    until = tl.minimum(begin + each, last_tile)
    into = (token * tl.num_programs(1) * GROUP + head) * parts + part
    if not IS_WHOLE and begin >= until:
        tl.store(sums + into, tl.full([BLOCK_R], float("-inf"), tl.float32), is_row)
        return
    in_rows = is_row[:, None] & (dims < DIM)[None, :]
    at = token[:, None] * query_token + head[:, None] * query_head + dims[None, :]
    asked = tl.load(query + at, in_rows, 0.0)
    most = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    result = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    base = pool + kv_head * head_stride + layer
    for tile in range(begin, until):
        keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        is_there = (keys >= first_key) & (keys <= last)
        slot = tl.load(slots + request * slots_row + keys // PAGE, is_there, 0)
        lies = slot.to(tl.int64) * page_stride + (keys % PAGE) * DIM
        there = base + lies[:, None] + dims[None, :]
        inside = is_there[:, None] & (dims < DIM)[None, :]
        key = tl.load(there, inside, 0.0).to(asked.dtype)
        scores = tl.dot(asked, tl.trans(key), input_precision="ieee") * scaling
        if HAS_SOFTCAP:
            scores = softcap * (1 - 2 / (tl.exp(2 * scores / softcap) + 1))
        is_attended = keys[None, :] <= position[:, None]
        if WINDOW:
            is_attended &= keys[None, :] > position[:, None] - WINDOW
        scores = tl.where(is_attended, scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        # A row may attend to nothing so far.
        level = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(scores - level[:, None])
        kept = tl.exp(most - level)
        total = total * kept + tl.sum(weights, 1)
        value = tl.load(there + plane_stride, inside, 0.0).to(asked.dtype)
        result = result * kept[:, None]
        result += tl.dot(weights.to(asked.dtype), value, input_precision="ieee")
        most = higher
    if IS_WHOLE and HAS_SINKS:
        total += tl.exp(tl.load(sinks + head, is_row, 0.0).to(tl.float32) - most)
    if not IS_WHOLE:
        tl.store(sums + into, most + tl.log(total), is_row)
    found = result / tl.where(total > 0, total, 1.0)[:, None]
    to = partial + into[:, None] * DIM + dims[None, :]
    tl.store(to, found.to(partial.dtype.element_ty), in_rows)


@triton.jit
def _merge(
    partial,
    sums,
    sinks,
    out,
    PARTS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    head = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + head
    parts, dims = tl.arange(0, PARTS), tl.arange(0, BLOCK_D)
    found = tl.load(sums + row * PARTS + parts)
    most = tl.max(found, 0)
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32)
        most = tl.maximum(most, sink)
    weights = tl.exp(found - most)
    total = tl.sum(weights, 0)
    if HAS_SINKS:
        total += tl.exp(sink - most)
    values = tl.load(
        partial + (row * PARTS + parts[:, None]) * DIM + dims[None, :],
        (found > float("-inf"))[:, None] & (dims < DIM)[None, :],
        0.0,
    )
    result = tl.sum(values * weights[:, None], 0) / total
    tl.store(out + row * DIM + dims, result.to(out.dtype.element_ty), dims < DIM)


@triton.jit
def _merge_two(
    out,
    sums,
    other,
    other_sums,
    queries,
    out_head,
    out_query,
    other_head,
    other_query,
    sums_head,
    sums_query,
    other_sums_head,
    other_sums_query,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    query = tl.program_id(0).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    dims = tl.arange(0, BLOCK_D)
    inside = query < queries
    ours = tl.load(sums + head * sums_head + query * sums_query, inside, 0.0)
    theirs = tl.load(other_sums + head * other_sums_head + query * other_sums_query, inside, 0.0)
    most = tl.maximum(ours, theirs)
    together = most + tl.log(tl.exp(ours - most) + tl.exp(theirs - most))
    all_inside = inside[:, None] & (dims < DIM)[None, :]
    to = out + head * out_head + query[:, None] * out_query + dims[None, :]
    at = other + head * other_head + query[:, None] * other_query + dims[None, :]
    result = tl.load(to, all_inside, 0.0).to(tl.float32) * tl.exp(ours - together)[:, None]
    result += tl.load(at, all_inside, 0.0).to(tl.float32) * tl.exp(theirs - together)[:, None]
    tl.store(to, result.to(out.dtype.element_ty), all_inside)
    tl.store(sums + head * sums_head + query * sums_query, together, inside)


@triton.jit
def _rotate(
    query,
    key,
    cos,
    sin,
    rotated,
    query_head,
    query_token,
    key_head,
    key_token,
    cos_token,
    sin_token,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    dims = tl.arange(0, BLOCK_D)[None, :]
    inside = dims < HALF
    of_query = inside & (head < HEADS)
    of_key = inside & (head >= HEADS) & (head < HEADS + KV_HEADS)
    asked = query + head * query_head + token * query_token + dims
    kept = key + (head - HEADS) * key_head + token * key_token + dims
    first = tl.load(asked, of_query, 0.0).to(tl.float32) + tl.load(kept, of_key, 0.0).to(tl.float32)
    second = tl.load(asked + HALF, of_query, 0.0).to(tl.float32)
    second += tl.load(kept + HALF, of_key, 0.0).to(tl.float32)
    cosines, sines = cos + token * cos_token + dims, sin + token * sin_token + dims
    low = first * tl.load(cosines, inside, 0.0) - second * tl.load(sines, inside, 0.0)
    high = second * tl.load(cosines + HALF, inside, 0.0) + first * tl.load(
        sines + HALF, inside, 0.0
    )
    to = rotated + (token * (HEADS + KV_HEADS) + head) * (2 * HALF) + dims
    tl.store(to, low.to(rotated.dtype.element_ty), of_query | of_key)
    tl.store(to + HALF, high.to(rotated.dtype.element_ty), of_query | of_key)


@triton.jit(do_not_specialize=["rows"])
def _norm(
    hidden,
    weight,
    normed,
    epsilon,
    rows,
    outer_stride,
    inner_stride,
    INNER: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    dims = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (dims < DIM)[None, :]
    at = row // INNER * outer_stride + row % INNER * inner_stride
    found = tl.load(hidden + at[:, None] + dims[None, :], inside, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(found * found, 1) / DIM + epsilon)
    weights = tl.load(weight + dims, dims < DIM, 0.0).to(tl.float32)
    result = found * scale[:, None] * weights[None, :]
    tl.store(
        normed + row[:, None] * DIM + dims[None, :], result.to(normed.dtype.element_ty), inside
    )


@triton.jit
def _gate(both, product, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    number = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = number < SIZE
    gates = tl.load(both + row * (2 * SIZE) + number, inside, 0.0).to(tl.float32)
    ups = tl.load(both + row * (2 * SIZE) + SIZE + number, inside, 0.0).to(tl.float32)
    result = gates / (1 + tl.exp(-gates)) * ups
    tl.store(product + row * SIZE + number, result.to(product.dtype.element_ty), inside)
