"""Norms are replaced by torch's own where these give the same, and only there."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pd.bench.tiny import make_tiny_model
from pd.engine.norms import fuse_norms


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
