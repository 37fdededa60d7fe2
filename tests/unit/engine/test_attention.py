"""Attention over gathered pages against its formula in float64, in each way that it is done."""

from __future__ import annotations

import pytest
import torch
from devices import DEVICES

from pd.engine.attention import _attend, _Gather

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
