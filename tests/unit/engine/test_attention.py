"""Attention over gathered pages against its formula in float64, in each way that it is done."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from devices import DEVICES, needs_cuda

from pd.engine.attention import (
    PagedTokens,
    _attend,
    _attend_in_blocks,
    _Gather,
    _has_blocks,
)
from pd.engine.graphs import _cut
from pd.engine.pool import PagePool
from pd.messages import Int32Array
from transfer.layout import LayerGroup, PageLayout

HEADS, KV_HEADS, DIM = 8, 2, 64


def formula(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attended: torch.Tensor
) -> torch.Tensor:
    repeats = query.shape[1] // key.shape[1]
    key, value = (each.double().repeat_interleave(repeats, 1) for each in (key, value))
    scores = query.double() @ key.transpose(-1, -2) * DIM**-0.5
    return scores.masked_fill(~attended, -torch.inf).softmax(-1) @ value


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    ("count", "num_keys", "window"),
    [
        *((7, 7, 0), (1100, 1100, 0), (2048, 2048, 0)),  # a prompt's first chunk
        *((7, 300, 0), (1, 40, 0), (600, 1500, 0)),  # chunks after others
        *((20, 64, 20), (500, 600, 100)),  # with a window
    ],
)
def test_chunks(
    count: int, num_keys: int, window: int, dtype: torch.dtype, tolerance: float, device: str
) -> None:
    torch.manual_seed(count)
    query = torch.randn(1, count, HEADS, DIM, dtype=dtype, device=device).transpose(1, 2)
    key, value = torch.randn(2, 1, KV_HEADS, num_keys, DIM, dtype=dtype, device=device)
    distance = torch.arange(num_keys - count, num_keys)[:, None] - torch.arange(num_keys)
    attended = (distance >= 0).to(device)
    if window:
        attended &= (distance < window).to(device)
    gather = _Gather(0, count, False, None, attended if window else None, num_keys)
    with torch.inference_mode():
        found = _attend(query, key, value, gather, DIM**-0.5, None, None)
    expected = formula(query, key, value, attended)
    assert (found.double() - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float32, 1e-5)])
@pytest.mark.parametrize("lengths", [(1,), (300,), (64, 64), (33, 40, 64)])
def test_decoding(
    lengths: tuple[int, ...], dtype: torch.dtype, tolerance: float, device: str
) -> None:
    """A KV head's queries take the place of the positions."""
    torch.manual_seed(len(lengths))
    longest, batch = max(lengths), len(lengths)
    query = torch.randn(batch, KV_HEADS, HEADS // KV_HEADS, DIM, dtype=dtype, device=device)
    key, value = torch.randn(2, batch, KV_HEADS, longest, DIM, dtype=dtype, device=device)
    attended = torch.arange(longest) < torch.tensor(lengths)[:, None]
    attended = attended[:, None, None, :].to(device)
    mask = attended if len(set(lengths)) > 1 else None
    gather = _Gather(0, batch, True, None, mask, longest)
    with torch.inference_mode():
        found = _attend(query, key, value, gather, DIM**-0.5, None, None)
    expected = formula(query, key, value, attended)
    assert (found.double() - expected).norm() / expected.norm() < tolerance


@needs_cuda
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "page_tokens"),
    [(8, 2, 64, 16), (32, 8, 128, 64), (4, 4, 16, 8), (5, 1, 80, 16), (16, 1, 256, 8)],
)
@pytest.mark.parametrize(
    ("chunks", "block_tokens"),
    [
        *(([(0, 1)], 1), ([(2999, 1)], 1), ([(0, 1), (63, 1), (64, 1), (899, 1), (32, 1)], 1)),
        *(([(0, 1)], 16), ([(0, 40)], 16), ([(2000, 33), (5, 1), (0, 16), (70, 3)], 16)),
        ([(100, 1500), (0, 700)], 32),  # not in parts
    ],
)
@pytest.mark.parametrize(("window", "softcap", "has_sinks"), [(0, None, False), (100, 5.0, True)])
def test_tokens_in_pages(
    heads: int,
    kv_heads: int,
    dim: int,
    page_tokens: int,
    chunks: list[tuple[int, int]],
    block_tokens: int,
    window: int,
    softcap: float | None,
    has_sinks: bool,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    """Each request's new tokens are stored, and attend to those before them, in scattered pages of
    the second layer; nothing else of the pool changes."""
    from pd.engine import kernels

    device, layers, place = torch.device("cuda"), 3, 1
    random = torch.Generator(device).manual_seed(len(chunks) + dim)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, device=device).to(dtype)

    def there(array: Int32Array) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    kind: Literal["full", "sliding"] = "sliding" if window else "full"
    layout = PageLayout(
        LayerGroup(kind, tuple(range(layers)), kv_heads, dim, window), page_tokens, dtype.itemsize
    )
    width = max(sum(chunk) for chunk in chunks) // page_tokens + 1
    pool = PagePool(layout, 1 + width * len(chunks), dtype, device)
    pool.data.copy_(numbers(*pool.data.shape))
    expected_pool = pool.data.clone()
    slots = 1 + torch.randperm(width * len(chunks), generator=random, device=device)
    counts = np.array([count for _, count in chunks])
    firsts = np.cumsum(counts) - counts
    of_tokens = [(i, start + k) for i, (start, count) in enumerate(chunks) for k in range(count)]
    blocks = np.zeros((len(of_tokens) + 3, 2), np.int32)
    _cut(counts, firsts, block_tokens, blocks)
    paged = PagedTokens(
        slots.view(len(chunks), width).int(),
        there(np.array(of_tokens, np.int32)),
        there(blocks),
        block_tokens,
    )
    query = numbers(heads, len(of_tokens), dim).transpose(0, 1)
    key, value = numbers(2, len(of_tokens), kv_heads, dim)
    sinks = numbers(heads) if has_sinks else None
    kernels.write(pool, place, paged, key, value)
    found = kernels.attend(pool, place, paged, query, dim**-0.5, softcap, sinks)
    for number, (request, position) in enumerate(of_tokens):
        page = paged.slots[request, position // page_tokens].long()
        both = torch.stack((key[number], value[number]), 1)
        expected_pool[page, :, place, :, position % page_tokens] = both
    assert torch.equal(pool.data, expected_pool)
    for number in range(0, len(of_tokens), 1 + len(of_tokens) // 60):
        request, position = of_tokens[number]
        stored = pool.data[paged.slots[request].long(), :, place].double()
        keys_values = stored.permute(2, 1, 0, 3, 4).flatten(2, 3)[:, :, : position + 1]
        keys, values = keys_values.repeat_interleave(heads // kv_heads, 1)
        scores = (keys @ query[number].double()[..., None])[..., 0] * dim**-0.5
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if window:
            scores[:, : max(0, position + 1 - window)] = -torch.inf
        if sinks is not None:
            scores = torch.cat((scores, sinks.double()[:, None]), 1)
        weights = scores.softmax(-1)[:, : position + 1]
        expected = (weights[:, None] @ values)[:, 0]
        assert (found[number].double() - expected).norm() / expected.norm() < tolerance


@needs_cuda
@pytest.mark.parametrize(("start", "count"), [(8192, 2048), (20000, 3000), (24576, 8192)])
@pytest.mark.parametrize("page_tokens", [16, 64])
def test_a_large_chunk_after_many_keys(start: int, count: int, page_tokens: int) -> None:
    torch.manual_seed(start)
    device, dtype, place = torch.device("cuda"), torch.bfloat16, 1
    layout = PageLayout(LayerGroup("full", (0, 1), KV_HEADS, DIM), page_tokens, 2)
    num_pages = -(-(start + count) // page_tokens)
    pool = PagePool(layout, 1 + num_pages, dtype, device)
    pool.data.normal_()
    slots = 1 + torch.randperm(num_pages)
    pages = pool.data[slots, :, place].permute(2, 1, 0, 3, 4).flatten(2, 3)
    key, value = pages[:, None, :, : start + count]  # (1, kv_heads, keys, dim)
    query = torch.randn(1, count, HEADS, DIM, dtype=dtype, device=device).transpose(1, 2)
    gather = _Gather(0, count, False, pool.page_rows(slots.numpy()[None]), None, start + count)
    assert _has_blocks(gather, pool, query)
    own = [each[:, :, start:] for each in (key, value)]
    with torch.inference_mode():
        found = _attend_in_blocks(pool, gather, place, query, own, DIM**-0.5)
    for some in (slice(0, 20), slice(count // 2, count // 2 + 20), slice(count - 20, count)):
        attended = torch.arange(start + count) <= torch.arange(start, start + count)[some, None]
        expected = formula(query[:, :, some], key, value, attended.to(device))
        assert (found[:, :, some].double() - expected).norm() / expected.norm() < 1e-2
