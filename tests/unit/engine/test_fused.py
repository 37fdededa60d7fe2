"""Operators are replaced where others give the same, and only there."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from devices import needs_cuda
from transformers import AutoModelForCausalLM
from transformers.models.glm4 import modeling_glm4
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.qwen3 import modeling_qwen3

from pd.bench.tiny import make_tiny_model
from pd.engine.fused import _rotates_halves, fuse_norms


@pytest.mark.parametrize(
    ("family", "count"),
    # Two a layer and one at the end; two more for queries and keys; Gemma's add one to weights.
    [("llama", 9), ("qwen3", 17), ("gpt_oss", 9), ("deepseek_v3", 17), ("gemma3_text", 0)],
)
def test_norms_that_are_torchs_are_replaced(family: str, count: int, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path, family)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    plain = copy.deepcopy(model)
    assert fuse_norms(model) == count
    tokens = torch.arange(40)[None]
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens).logits, plain(tokens).logits, atol=1e-4, rtol=1e-4)


def test_functions_that_rotate_halves_are_found() -> None:
    assert _rotates_halves(modeling_qwen3.apply_rotary_pos_emb)
    assert not _rotates_halves(modeling_glm4.apply_rotary_pos_emb)  # pairs of neighbours
    assert not _rotates_halves(modeling_gpt_oss.apply_rotary_pos_emb)  # half as many angles


@needs_cuda
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 8, 128), (5, 1, 80), (64, 8, 64)])
@pytest.mark.parametrize("tokens", [1, 700])
def test_rotation(
    heads: int, kv_heads: int, dim: int, tokens: int, dtype: torch.dtype, tolerance: float
) -> None:
    from pd.engine.kernels import rotate

    random = torch.Generator("cuda").manual_seed(tokens)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, device="cuda").to(dtype)

    query, key = (numbers(1, tokens, count, dim).transpose(1, 2) for count in (heads, kv_heads))
    cos, sin = numbers(2, 1, tokens, dim)
    exact = (each.double() for each in (query, key, cos, sin))
    expected = modeling_qwen3.apply_rotary_pos_emb(*exact)
    for ours, theirs in zip(rotate(query[0], key[0], cos[0], sin[0]), expected, strict=True):
        assert ours.shape == theirs.shape
        assert (ours.double() - theirs).norm() / theirs.norm() < tolerance
