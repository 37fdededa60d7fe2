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
from pd.engine.fused import _rotates_halves, fuse_norms, merge_products


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


@pytest.mark.parametrize(
    ("family", "count"),
    # Queries, keys and values, gates and what they are for, of 4 layers. Experts' are one anyway,
    # DeepSeek has other queries and keys; a shared expert counts.
    [
        ("llama", 8),
        ("qwen3", 8),
        ("gemma3_text", 8),
        ("qwen3_moe", 4),
        ("gpt_oss", 4),
        ("deepseek_v3", 4),
    ],
)
def test_products_of_one_input_are_merged(family: str, count: int, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path, family)).eval()
    plain = copy.deepcopy(model)
    products: list[str] = []
    merge_products(model)
    for name, module in model.get_decoder().layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda *_, name=name: products.append(name))
    tokens = torch.arange(40)[None]
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens).logits, plain(tokens).logits, atol=1e-4, rtol=1e-4)
        # What was left of an earlier step is not taken for this one's.
        torch.testing.assert_close(
            model(tokens + 1).logits, plain(tokens + 1).logits, atol=1e-4, rtol=1e-4
        )
    merged = {name for name in products if name.endswith((".linear", "gate_up_proj"))}
    assert len(merged) == count
    assert all(products.count(name) == 2 for name in merged)
    sizes = [sum(each.numel() for each in each.parameters()) for each in (model, plain)]
    assert sizes[0] == sizes[1]


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


@needs_cuda
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-3), (torch.float32, 1e-6)])
@pytest.mark.parametrize("tokens", [1, 3, 700])
def test_norms_of_rows_apart_and_gates(tokens: int, dtype: torch.dtype, tolerance: float) -> None:
    from pd.engine.kernels import gate, norm

    random = torch.Generator("cuda").manual_seed(tokens)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, device="cuda").to(dtype)

    def far(found: torch.Tensor, expected: torch.Tensor) -> float:
        assert found.shape == expected.shape
        return float((found.double() - expected).norm() / expected.norm())

    for dim in (48, 128, 4096, 7168):
        hidden = numbers(1, tokens, dim + 16)[..., :dim]
        weight = numbers(dim)
        expected = torch.rms_norm(hidden.double(), (dim,), weight.double(), 1e-6)
        assert far(norm(hidden, weight, 1e-6), expected) < tolerance
    for heads, dim in ((5, 128), (3, 80)):
        both = numbers(1, tokens, (heads + 2) * dim)
        of_heads = both[..., dim : (heads + 1) * dim].view(1, tokens, heads, dim)
        weight = numbers(dim)
        expected = torch.rms_norm(of_heads.double(), (dim,), weight.double(), 1e-6)
        assert far(norm(of_heads, weight, 1e-6), expected) < tolerance
        assert (
            far(norm(of_heads.transpose(1, 2), weight, 1e-6), expected.transpose(1, 2)) < tolerance
        )
    both = numbers(1, tokens, 2 * 2500)
    gates, ups = both.double().chunk(2, -1)
    assert far(gate(both), torch.nn.functional.silu(gates) * ups) < tolerance
