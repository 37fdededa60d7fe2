"""Small random models for tests and benchmarks: real architectures, a byte-level tokenizer, no
download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 320,
    "max_position_embeddings": 4096,
}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 20}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gemma3_text": _MIXED,
    "mistral": {"sliding_window": 24},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, **_MIXED},
    "deepseek_v3": {
        **{"q_lora_rank": 48, "kv_lora_rank": 32, "num_key_value_heads": 4, "head_dim": 8},
        **{"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16},
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1},
        **{"n_shared_experts": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1},
    },
}
"""Model type -> what differs from the small shape; windows are short, so that short prompts cross
them."""


def make_tiny_model(folder: Path, family: str, seed: int = 0, **overrides: Any) -> Path:
    """Write a model with random float32 weights and a tokenizer to `folder`; returns it.

    Weights are scaled up from the usual initialisation, so that greedy tokens vary and lie apart.
    `dtype` among the overrides chooses another precision.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = getattr(torch, overrides.pop("dtype", "float32"))
    config = AutoConfig.for_model(
        family,
        **{**_SMALL, **FAMILIES[family], **overrides},
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=257,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sinks" in name:
                parameter.normal_()
            elif parameter.dim() >= 2:
                parameter.mul_(4)
    model.save_pretrained(folder)
    _byte_tokenizer(config.vocab_size).save_pretrained(folder)
    return folder


def _byte_tokenizer(vocab_size: int) -> Any:
    """Tokens 0-255 are bytes, 256 and 257 end and padding; the rest are words that no text encodes
    to."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: number for number, char in enumerate(alphabet)}
    vocabulary |= {"<end>": 256, "<pad>": 257}
    vocabulary |= {f"\u0120t{number}": number for number in range(258, vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken("<end>", special=True), AddedToken("<pad>", special=True)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
