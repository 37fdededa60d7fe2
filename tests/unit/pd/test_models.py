"""`resolve_model`: folders, packages, hub ids, and GGUF files, converted once and exactly."""

from __future__ import annotations

import concurrent.futures
import sys
import types
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import pd.models
from pd.models import ModelError, resolve_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def test_folder(folder: Path) -> None:
    assert resolve_model(str(folder)) == folder


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_incomplete_folder(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(ModelError, match=rf"has no \*?{missing.removeprefix('model')}"):
        resolve_model(str(folder))


def test_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert resolve_model(str(folder), weights=False) == folder


@pytest.mark.parametrize("path", ["/no/such/folder", "./no-such", "a/b/c", "no such", "x.gguf"])
def test_no_such_model(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"model\.path: "):
        resolve_model(path)


def test_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(repo: str, allow_patterns: list[str]) -> str:
        asked[repo] = allow_patterns
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("org/model-1.5") == folder
    assert "*.safetensors" in asked["org/model-1.5"]
    assert resolve_model("org/other", weights=False) == folder
    assert "*.safetensors" not in asked["org/other"]


def test_hub_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repo: str, allow_patterns: list[str]) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ModelError, match=r"org/model is neither a folder .* cannot be reached"):
        resolve_model("org/model")


def test_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("some_model_package")
    monkeypatch.setitem(sys.modules, "some_model_package", module)
    with pytest.raises(ModelError, match=r"has no assemble\(\)"):
        resolve_model("package:some_model_package")
    module.assemble = lambda: folder  # type: ignore[attr-defined]
    assert resolve_model("package:some_model_package") == folder


def test_package_not_installed() -> None:
    with pytest.raises(ModelError, match="pip install no-such-model-package"):
        resolve_model("package:no_such_model_package")


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 3 of two layers, with tied embeddings and a vocabulary of 300 pieces."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    hidden, heads, head_dim, mlp, layers = 32, 2, 16, 64, 2
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    kinds = [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.UNKNOWN] + [gguf.TokenType.BYTE] * 256
    words = ["▁", "a", "b", "c", "ab", "▁a", "▁ab", "bc"] + [chr(200 + i) for i in range(32)]
    pieces += words
    kinds += [gguf.TokenType.NORMAL] * len(words)
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(mlp)
    writer.add_head_count(heads)
    writer.add_head_count_kv(1)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_sliding_window(8)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([-float(i) for i in range(len(pieces))])
    writer.add_token_types([int(kind) for kind in kinds])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    random = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, random.standard_normal(shape).astype(np.float32) * 0.1)

    add("token_embd.weight", len(pieces), hidden)
    add("output_norm.weight", hidden)
    for i in range(layers):
        for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            add(f"blk.{i}.{name}.weight", hidden)
        for name in ("attn_q_norm", "attn_k_norm"):
            add(f"blk.{i}.{name}.weight", head_dim)
        add(f"blk.{i}.attn_q.weight", heads * head_dim, hidden)
        add(f"blk.{i}.attn_k.weight", head_dim, hidden)
        add(f"blk.{i}.attn_v.weight", head_dim, hidden)
        add(f"blk.{i}.attn_output.weight", hidden, heads * head_dim)
        add(f"blk.{i}.ffn_gate.weight", mlp, hidden)
        add(f"blk.{i}.ffn_up.weight", mlp, hidden)
        add(f"blk.{i}.ffn_down.weight", hidden, mlp)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_equals_the_direct_load(gguf_file: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    folder = resolve_model(str(gguf_file), tmp_path, lines.append)
    assert any("converted in" in line for line in lines)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".lock"]

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    direct = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32
    )
    weights, expected = model.state_dict(), direct.state_dict()
    assert weights.keys() == expected.keys()
    for name in weights:
        assert torch.equal(weights[name], expected[name]), name
    assert model.config.layer_types == direct.config.layer_types
    assert model.config.tie_word_embeddings
    assert "quantization_config" not in AutoConfig.from_pretrained(folder).to_dict()
    prompt = torch.tensor([[2, 262, 263, 264]])
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(prompt, **options), direct.generate(prompt, **options))

    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected_tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    for text in ("abc ab c", "", " a\n", "é"):
        assert tokenizer(text).input_ids == expected_tokenizer(text).input_ids

    again: list[str] = []
    assert resolve_model(str(gguf_file), tmp_path, again.append) == folder
    assert again == []


def test_fast_reader_equals_the_plain_one(gguf_file: Path) -> None:
    fast, plain = pd.models._fast_reader_class()(gguf_file), gguf.GGUFReader(gguf_file)
    assert list(fast.fields) == list(plain.fields)
    for name, field in plain.fields.items():
        other = fast.fields[name]
        assert other.types == field.types
        assert len(other.data) == len(field.data)
        for ours, theirs in zip(other.data, field.data, strict=True):
            assert list(other.parts[ours]) == list(field.parts[theirs])
    assert [tensor.name for tensor in fast.tensors] == [tensor.name for tensor in plain.tensors]
    assert all(
        np.array_equal(a.data, b.data) for a, b in zip(fast.tensors, plain.tensors, strict=True)
    )


def test_not_gguf(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"not gguf" * 100)
    with pytest.raises(ModelError, match="cannot be read as GGUF"):
        resolve_model(str(file), tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_converted_once_by_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    conversions: list[Path] = []

    def convert(file: Path, folder: Path, progress: Any) -> None:
        conversions.append(folder)
        (folder / "model.safetensors").write_bytes(b"")

    monkeypatch.setattr(pd.models, "_convert", convert)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(resolve_model, str(file), tmp_path / "cache") for _ in range(8)]
        results = {call.result() for call in calls}
    assert len(results) == 1
    assert len(conversions) == 1


def test_what_a_killed_conversion_left_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")

    def fail(file: Path, folder: Path, progress: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pd.models, "_convert", fail)
    cache = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        resolve_model(str(file), cache)
    assert [path for path in cache.iterdir() if path.is_dir()] == []
    digest = pd.models._digest(file)
    (cache / f"{digest}.tmp-abandoned").mkdir()
    monkeypatch.setattr(
        pd.models, "_convert", lambda file, folder, progress: (folder / "model.safetensors").touch()
    )
    assert resolve_model(str(file), cache) == cache / digest
    assert [path for path in cache.iterdir() if path.is_dir()] == [cache / digest]
