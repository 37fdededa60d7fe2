"""Layer groups, page sizes and pool sizes against numbers worked out by hand."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from pd.cost import (
    UnsupportedModelError,
    describe,
    estimate_cost,
    format_bytes,
    host_warnings,
    layer_groups,
    load_config,
    max_context,
    page_layouts,
    plan_pools,
    weights_bytes,
)
from pd.spec import PoolSpec, RoleSpec, SpecError, parse_spec
from transfer.layout import LayerGroup, PageLayout

TINY: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


def full(layers: tuple[int, ...], kv_heads: int = 2, head_dim: int = 16) -> LayerGroup:
    return LayerGroup("full", layers, kv_heads, head_dim)


def sliding(
    layers: tuple[int, ...], window: int, kv_heads: int = 2, head_dim: int = 16
) -> LayerGroup:
    return LayerGroup("sliding", layers, kv_heads, head_dim, window)


GROUPS = {
    "llama": (LlamaConfig(num_hidden_layers=3, **TINY), (full((0, 1, 2)),)),
    "llama, as many KV heads as heads": (
        LlamaConfig(num_hidden_layers=1, hidden_size=64, num_attention_heads=4),
        (full((0,), kv_heads=4),),
    ),
    "qwen2 without a window": (Qwen2Config(num_hidden_layers=2, **TINY), (full((0, 1)),)),
    "qwen2 with one above max_window_layers": (
        Qwen2Config(
            num_hidden_layers=4,
            use_sliding_window=True,
            sliding_window=8,
            max_window_layers=1,
            **TINY,
        ),
        (full((0,)), sliding((1, 2, 3), 8)),
    ),
    "qwen3, head_dim of its own": (
        Qwen3Config(num_hidden_layers=2, head_dim=32, **TINY),
        (full((0, 1), head_dim=32),),
    ),
    "qwen3_moe": (Qwen3MoeConfig(num_hidden_layers=2, **TINY), (full((0, 1)),)),
    "qwen3_moe with a window": (
        Qwen3MoeConfig(num_hidden_layers=2, use_sliding_window=True, sliding_window=8, **TINY),
        (sliding((0, 1), 8),),
    ),
    "gemma3: every sixth layer is full": (
        Gemma3TextConfig(num_hidden_layers=7, head_dim=32, sliding_window=12, **TINY),
        (full((5,), head_dim=32), sliding((0, 1, 2, 3, 4, 6), 12, head_dim=32)),
    ),
    "mistral: all layers slide": (
        MistralConfig(num_hidden_layers=2, sliding_window=8, **TINY),
        (sliding((0, 1), 8),),
    ),
    "mistral without a window": (
        MistralConfig(num_hidden_layers=2, sliding_window=None, **TINY),
        (full((0, 1)),),
    ),
    "gpt_oss: every other layer slides": (
        GptOssConfig(num_hidden_layers=4, head_dim=16, sliding_window=8, **TINY),
        (full((1, 3)), sliding((0, 2), 8)),
    ),
}


@pytest.mark.parametrize("name", GROUPS)
def test_layer_groups(name: str) -> None:
    config, expected = GROUPS[name]
    assert layer_groups(config) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"use_bidirectional_attention": True}, "bidirectional"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer 1 is 'linear_attention'"),
        ({"layer_types": ["sliding_attention"] * 2}, "window of None"),
        ({"attention_chunk_size": 128}, "'chunked_attention'"),
        ({"layer_types": ["full_attention"]}, "1 layer_types for 2"),
        ({"head_dim": 16, "v_head_dim": 32}, "values of 32"),
    ],
)
def test_unsupported(change: dict[str, Any], message: str) -> None:
    config = LlamaConfig(num_hidden_layers=2, **TINY)
    for name, value in change.items():
        object.__setattr__(config, name, value)
    with pytest.raises(UnsupportedModelError, match=message):
        layer_groups(config)


def test_page_bytes_of_gemma_3_270m() -> None:
    config = Gemma3TextConfig(
        num_hidden_layers=18,
        hidden_size=640,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
    )
    layouts = page_layouts(layer_groups(config), 16, "float32")
    # 1 head * layers * (k, v) * 16 tokens * 256 * 4 bytes
    assert [layout.page_bytes for layout in layouts] == [3 * 32768, 15 * 32768]
    assert [layout.token_bytes for layout in layouts] == [6144, 30720]
    role = RoleSpec(pool=PoolSpec(pages=1024), max_running=4, max_batch_tokens=128)
    # 2 * 4 requests * (512 / 16 + 2) + 128 / 16 + 1 = 281
    assert plan_pools(layouts, role) == [1024, 281]
    assert max_context(layouts, [1024, 281], role) == 1023 * 16
    assert max_context(layouts, [1024, 281], role, limit=4096) == 4096


def layouts_of(*groups: LayerGroup, page_tokens: int = 4) -> tuple[PageLayout, ...]:
    return page_layouts(groups, page_tokens, "float32")


def test_few_pages_are_for_every_group() -> None:
    layouts = layouts_of(full((0,)), sliding((1,), 8))
    role = RoleSpec(pool=PoolSpec(pages=10), max_running=64)
    assert plan_pools(layouts, role) == [10, 10]
    assert max_context(layouts, [10, 10], role) == 36


def test_pages_where_all_layers_slide() -> None:
    layouts = layouts_of(sliding((0, 1), 8))
    role = RoleSpec(pool=PoolSpec(pages=1000), max_running=1, max_batch_tokens=8)
    assert plan_pools(layouts, role) == [1000]
    # A window of 2 pages, a chunk of 2 pages, 2 more, and the reserved one: no limit from 7 pages
    # on.
    assert max_context(layouts, [7], role) is None
    assert max_context(layouts, [7], role, limit=100) == 100
    assert max_context(layouts, [6], role, limit=100) == 20


def test_memory_is_used_up() -> None:
    layouts = layouts_of(full((0,)), sliding((1,), 8))
    page = layouts[0].page_bytes
    assert page == 2 * 2 * 4 * 16 * 4
    # The sliding pool is full at 2 * 1 * (2 + 2) + 1 + 1 = 10 pages; 100 - 10 are left.
    pool = PoolSpec(memory=100 * page + page - 1)
    role = RoleSpec(pool=pool, max_running=1, max_batch_tokens=4)
    assert plan_pools(layouts, role) == [90, 10]
    half = RoleSpec(pool=PoolSpec(memory_fraction=0.5), max_running=1, max_batch_tokens=4)
    assert plan_pools(layouts, half, 200 * page) == [90, 10]


def test_too_little_memory() -> None:
    layouts = layouts_of(full((0,)))
    role = RoleSpec(pool=PoolSpec(memory=100))
    with pytest.raises(SpecError, match=r"pool\.memory: found 100 B, expected at least 2 KiB"):
        plan_pools(layouts, role)
    role = RoleSpec(pool=PoolSpec(memory_fraction=0.5))
    with pytest.raises(SpecError, match=r"pool\.memory_fraction: found 0 B"):
        plan_pools(layouts, role, -5)


@given(
    windows=st.lists(st.one_of(st.none(), st.integers(1, 40)), min_size=1, max_size=3),
    page_tokens=st.integers(1, 16),
    max_running=st.integers(1, 8),
    max_batch_tokens=st.integers(1, 64),
    memory=st.integers(1, 10**6),
)
def test_pools_fit_and_no_larger_ones_would(
    windows: list[int | None],
    page_tokens: int,
    max_running: int,
    max_batch_tokens: int,
    memory: int,
) -> None:
    groups = [
        full((i,), 1, 1) if window is None else sliding((i,), window, 1, 1)
        for i, window in enumerate(windows)
    ]
    layouts = layouts_of(*groups, page_tokens=page_tokens)
    shape = {"max_running": max_running, "max_batch_tokens": max_batch_tokens}
    role = RoleSpec(pool=PoolSpec(memory=memory), **shape)

    def size(pages: list[int]) -> int:
        return sum(layout.page_bytes * n for layout, n in zip(layouts, pages, strict=True))

    try:
        pages = plan_pools(layouts, role)
    except SpecError:
        assert size([2] * len(layouts)) > memory
        return
    assert size(pages) <= memory
    larger = RoleSpec(pool=PoolSpec(pages=max(pages) + 1), **shape)
    assert size(plan_pools(layouts, larger)) > memory
    assert longest_by_simulation(layouts, pages, max_batch_tokens) >= (
        max_context(layouts, pages, role, limit=300) or 0
    )


def longest_by_simulation(
    layouts: tuple[PageLayout, ...], pages: list[int], max_batch_tokens: int, limit: int = 300
) -> int:
    """Tokens that one request can prefill in whole chunks, freeing what falls out of the window."""
    done = 0
    while done < limit:
        end = min(done + max_batch_tokens, limit)
        for layout, num_pages in zip(layouts, pages, strict=True):
            room = num_pages - 1
            first = layout.group.first_needed_page(done, layout.page_tokens)
            fits = (first + room) * layout.page_tokens
            end = min(end, fits)
        if end <= done:
            return done
        done = end
    return done


SPEC = """
model: {path: org/model, dtype: bfloat16, max_context: %s}
page_tokens: 4
roles:
  prefill: {pool: {pages: 65}, replicas: {min: 1, max: 3}}
  decode: {pool: {%s}, device: %s}
"""


def test_cost() -> None:
    config = LlamaConfig(num_hidden_layers=3, max_position_embeddings=512, **TINY)
    spec = parse_spec(SPEC % ("null", "memory: 24KiB", "cpu"), "cluster.yaml")
    cost = estimate_cost(spec, config, 1000, {"cpu": None})
    # 2 heads * 3 layers * (k, v) * 16 * 2 bytes = 384 a token, 1,536 a page: 16 in 24 KiB
    assert cost.token_bytes == 384
    assert [role.pages for role in cost.roles] == [(65,), (16,)]
    assert [role.kv_bytes for role in cost.roles] == [65 * 1536, 24576]
    assert [role.max_context for role in cost.roles] == [256, 60]
    assert cost.max_context == 60
    described = json.loads(json.dumps(describe(cost)))
    assert described["roles"][0]["replicas"] == {"min": 1, "max": 3}
    assert described["groups"][0]["page_bytes"] == 1536


def test_cost_when_the_workers_memory_is_unknown() -> None:
    config = LlamaConfig(num_hidden_layers=3, max_position_embeddings=512, **TINY)
    spec = parse_spec(SPEC % ("null", "memory_fraction: 0.5", "cuda"), "cluster.yaml")
    cost = estimate_cost(spec, config, 1000, {"cpu": 10**6})
    assert cost.roles[1].pages is None
    assert cost.max_context is None


def test_a_stage_without_layers_of_the_group_that_is_sized() -> None:
    """Its pools could grow for ever; other stages decide."""
    groups = (LayerGroup("full", (), 1, 4), LayerGroup("sliding", (0, 1), 1, 4, window=8))
    layouts = page_layouts(groups, 4, "float32")
    role = RoleSpec(pool=PoolSpec(memory=10**9), max_running=2, max_batch_tokens=16)
    full, sliding = plan_pools(layouts, role)
    assert full > 2**28
    assert sliding < 100


def test_cost_takes_the_weights_off() -> None:
    config = LlamaConfig(num_hidden_layers=3, **TINY)
    spec = parse_spec(SPEC % ("null", "memory_fraction: 0.5", "cpu"), "cluster.yaml")
    cost = estimate_cost(spec, config, 1000, {"cpu": 2 * 10 * 1536 + 1000})
    assert cost.roles[1].pages == (10,)


@pytest.mark.parametrize(
    ("context", "pool", "message"),
    [
        ("1000", "pages: 1000", r"model\.max_context: found 1000, expected at most 512"),
        ("300", "pages: 1000", r"found 300, but roles\.prefill\.pool holds .* 256 tokens"),
        ("100", "pages: 3", r"found 100, but roles\.decode\.pool holds .* 8 tokens"),
        ("null", "memory: 1KiB", r"roles\.decode\.pool\.memory: found 1 KiB, expected at least 3"),
    ],
)
def test_impossible(context: str, pool: str, message: str) -> None:
    config = LlamaConfig(num_hidden_layers=3, max_position_embeddings=512, **TINY)
    spec = parse_spec(SPEC % (context, pool, "cpu"), "cluster.yaml")
    with pytest.raises(SpecError, match=message):
        estimate_cost(spec, config, None, {})


def test_weights_bytes(tmp_path: Path) -> None:
    assert weights_bytes(tmp_path, "float32") is None
    header = json.dumps(
        {
            "__metadata__": {"format": "pt"},
            "a": {"dtype": "F32", "shape": [3, 5], "data_offsets": [0, 60]},
            "b": {"dtype": "F32", "shape": [], "data_offsets": [60, 64]},
        }
    ).encode()
    (tmp_path / "model.safetensors").write_bytes(
        struct.pack("<Q", len(header)) + header + bytes(64)
    )
    assert weights_bytes(tmp_path, "bfloat16") == 32


def test_load_config(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"config\.json"):
        load_config(tmp_path)
    GptOssConfig(num_hidden_layers=2, **TINY).save_pretrained(tmp_path)
    assert load_config(tmp_path).num_hidden_layers == 2


def test_format_bytes() -> None:
    assert [format_bytes(n) for n in (5, 1536, 3 * 2**30)] == ["5 B", "1.5 KiB", "3 GiB"]


# -------------------------------------------------------------------------------------- host tier


GEMMA_270M = (
    PageLayout(full((5, 11, 17), 1, 256), 16, 2),
    PageLayout(sliding(tuple(n for n in range(18) if n % 6 != 5), 512, 1, 256), 16, 2),
)


def test_a_host_tier_with_hardly_a_window_is_warned_of() -> None:
    (warning,) = host_warnings(GEMMA_270M, 20 << 20)
    assert warning.startswith("cache.host.memory: 20 MiB hold 46 pages of 16 tokens with sliding ")
    assert "fewer than two windows (66)" in warning
    least = (67 * 15 * 16 + 4 * 67 * 3 * 16) * 1024
    assert warning.endswith(f"expected at least {format_bytes(least)}")
    assert host_warnings(GEMMA_270M, least) == ()
    assert host_warnings(GEMMA_270M, 60 << 20) == ()


def test_where_a_window_is_all_there_is_a_host_tier_is_not_warned_of() -> None:
    for layouts in (GEMMA_270M[:1], GEMMA_270M[1:]):
        assert host_warnings(layouts, 10 << 20) == ()


def test_a_host_tier_too_small_for_anything_is_refused() -> None:
    spec = parse_spec("model: {path: x}\nroles: {both: {}}\ncache: {host: {memory: 1KiB}}", "x")
    config = Gemma3TextConfig(num_hidden_layers=6, **TINY)
    with pytest.raises(SpecError, match=r"cache\.host\.memory: found 1 KiB"):
        estimate_cost(spec, config, None, {})


def test_warnings_are_part_of_the_cost() -> None:
    spec = parse_spec("model: {path: x}\nroles: {both: {}}\ncache: {host: {memory: 4MiB}}", "x")
    config = Gemma3TextConfig(num_hidden_layers=6, sliding_window=512, **TINY)
    cost = estimate_cost(spec, config, None, {})
    assert len(describe(cost)["warnings"]) == 1
