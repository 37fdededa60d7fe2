"""Sizes of pages by hand, and by counting their elements."""

import hypothesis.strategies as st
import numpy as np
import plan_model as model
import pytest
from hypothesis import given, settings

from transfer.layout import LayerGroup, PageLayout

repeatable = settings(derandomize=True, database=None, deadline=None, max_examples=200)


def test_a_page_of_an_8b_model() -> None:
    layout = PageLayout(LayerGroup("full", tuple(range(36)), 8, 128), 64, 2)
    assert layout.shape == (8, 36, 2, 64, 128)
    assert layout.run_bytes == 32 << 10
    assert layout.page_bytes == 9 << 20
    assert layout.token_bytes == 144 << 10


def test_a_latent_has_one_head_and_one_plane() -> None:
    layout = PageLayout(LayerGroup("latent", tuple(range(61)), 1, 576), 64, 2)
    assert layout.shape == (1, 61, 1, 64, 576)
    assert layout.run_bytes == 64 * 576 * 2
    assert layout.page_bytes == 61 * layout.run_bytes


@given(
    st.sampled_from(("full", "sliding", "latent")),
    st.integers(0, 5),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from((1, 2, 4)),
)
@settings(repeatable)
def test_bytes_are_those_of_the_elements_and_each_run_is_contiguous(
    kind: str, num_layers: int, kv_heads: int, head_dim: int, page_tokens: int, element_bytes: int
) -> None:
    group = LayerGroup(kind, tuple(range(num_layers)), kv_heads, head_dim)
    layout = PageLayout(group, page_tokens, element_bytes)
    everything = model.Holder(0, 0, 0, 0, 1, tuple(range(kv_heads)), group.layers)
    codes = model.page_codes(layout, everything, 0)
    assert len(codes) == len(set(codes.tolist())) == layout.page_bytes
    assert int(np.prod(layout.shape)) * element_bytes == layout.page_bytes
    assert layout.token_bytes * page_tokens == layout.page_bytes
    for head in range(kv_heads):
        for place, layer in enumerate(group.layers):
            one = model.Holder(0, 0, 0, 0, 1, (head,), (layer,))
            start = (head * num_layers + place) * layout.run_bytes
            run = codes[start : start + layout.run_bytes]
            np.testing.assert_array_equal(run, model.page_codes(layout, one, 0))


@given(st.integers(1, 20), st.integers(0, 60), st.integers(1, 5))
@settings(repeatable)
def test_the_first_page_needed_is_that_of_the_windows_first_token(
    window: int, position: int, page_tokens: int
) -> None:
    group = LayerGroup("sliding", (0,), 1, 1, window)
    attended = [key for key in range(position + 1) if position - key < window]
    assert group.first_needed_page(position, page_tokens) == attended[0] // page_tokens


@pytest.mark.parametrize("kind", ["full", "latent"])
def test_all_pages_are_needed_without_a_window(kind: str) -> None:
    assert LayerGroup(kind, (0,), 1, 1).first_needed_page(1000, 16) == 0
