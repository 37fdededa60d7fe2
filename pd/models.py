"""From the spec's `model.path` to a local folder that every rank can load without more conversion.

A folder stays where it is, a hub id is downloaded, a package assembles its file, and a GGUF file is
converted once, to float32 safetensors in a cache folder. Converting is slow (seconds to minutes)
and says so through `progress`; processes that want the same file wait for one of them. A cache
folder is complete or absent: it is written under another name and renamed.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib
import json
import re
import shutil
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_CACHE_VERSION = 1
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")

Progress = Callable[[str], None]


class ModelError(ValueError):
    """The model cannot be found or read; the message says what to do."""


def resolve_model(
    path: str,
    cache_dir: Path | None = None,
    progress: Progress = lambda _: None,
    weights: bool = True,
) -> Path:
    """A folder with config.json, tokenizer and, if `weights`, safetensors. Raises ModelError.

    `weights` False downloads no weights and does not ask for any in a folder: enough for `pd
    check`, and for models that are initialised at random. `cache_dir` is ~/.cache/pagerelay by
    default.
    """
    cache_dir = cache_dir or Path.home() / ".cache" / "pagerelay"
    if path.startswith("package:"):
        path = str(_assemble(path.removeprefix("package:"), progress))
    local = Path(path).expanduser()
    if local.is_dir():
        return _checked_folder(local, weights)
    if local.suffix == ".gguf":
        if not local.is_file():
            raise ModelError(f"model.path: {local}: no such file")
        return _converted(local, cache_dir, progress)
    if path.startswith(("/", ".", "~")) or not _HUB_ID.fullmatch(path):
        raise ModelError(
            f"model.path: {path}: expected a folder, a .gguf file, a hub id or package:NAME"
        )
    return _checked_folder(_download(path, weights, progress), weights)


def _checked_folder(folder: Path, weights: bool) -> Path:
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if weights and not any(folder.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise ModelError(f"model.path: {folder} has no {' and no '.join(missing)}")
    return folder


def _assemble(name: str, progress: Progress) -> Path:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise ModelError(
            f"model.path: package {name} is not installed: pip install {name.replace('_', '-')}"
        ) from error
    if not callable(getattr(module, "assemble", None)):
        raise ModelError(f"model.path: package {name} has no assemble()")
    progress(f"assembling the model from package {name}")
    try:
        return Path(module.assemble())
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.path: package {name} cannot assemble its model: {error}"
        ) from error


def _download(repo: str, weights: bool, progress: Progress) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    progress(f"looking for {repo} on the hub")
    patterns = ["*.json", "*.jinja", "*.txt", "*.model"] + ["*.safetensors"] * weights
    try:
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=patterns))
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"model.path: {repo} is neither a folder here nor in the hub's cache, and the hub "
            "cannot be reached"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"model.path: {repo} cannot be downloaded from the hub: {reason}"
        ) from error


# -------------------------------------------------------------------------------------------- GGUF


def _converted(file: Path, cache_dir: Path, progress: Progress) -> Path:
    target = cache_dir / _digest(file)
    if target.is_dir():
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    with _locked(cache_dir / f"{target.name}.lock", progress):
        if target.is_dir():
            return target
        for abandoned in cache_dir.glob(f"{target.name}.tmp-*"):
            shutil.rmtree(abandoned)  # by a process that was killed while it held the lock
        temporary = Path(tempfile.mkdtemp(prefix=f"{target.name}.tmp-", dir=cache_dir))
        try:
            _convert(file, temporary, progress)
            temporary.chmod(0o755)
            (temporary / "model.safetensors").chmod(0o644)
            temporary.rename(target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return target


def _digest(file: Path) -> str:
    """Names the file's content and this conversion: size, time, first and last MiB, our version."""
    stat = file.stat()
    digest = hashlib.sha256(f"{_CACHE_VERSION} {stat.st_size} {stat.st_mtime_ns}".encode())
    with file.open("rb") as stream:
        digest.update(stream.read(2**20))
        stream.seek(max(0, stat.st_size - 2**20))
        digest.update(stream.read(2**20))
    return digest.hexdigest()[:32]


@contextlib.contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("another process is converting this model; waiting for it")
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _convert(file: Path, folder: Path, progress: Progress) -> None:
    """Write config.json, generation_config.json, model.safetensors (float32) and the tokenizer."""
    progress(f"converting {file.name} once; later starts use {folder.parent}")
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    start = time.monotonic()
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with _one_reader():
            progress("reading the tokenizer")
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            tokenizer.save_pretrained(folder)
            progress(f"reading the weights ({time.monotonic() - start:.0f} s so far)")
            model = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
            )
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise ModelError(f"model.path: {file} cannot be read as GGUF: {error}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    progress(f"writing safetensors ({time.monotonic() - start:.0f} s so far)")
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:  # else tied to one before it, as config.json says
            seen.add(tensor.data_ptr())
            tensors[name] = tensor.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    config["architectures"] = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    progress(f"converted in {time.monotonic() - start:.0f} s")


@contextlib.contextmanager
def _one_reader() -> Iterator[None]:
    """While open, transformers parses a GGUF file's header once, and quickly.

    It parses it once for the tokenizer, once for the config and once for the weights, in 11 s each
    for a vocabulary of 262,144 on one core, as every string becomes two views of a memory map.
    Where this does not fit the installed versions, they do it their way.
    """
    import gguf

    original = gguf.GGUFReader
    gguf.GGUFReader = functools.cache(_fast_reader_class())
    try:
        yield
    finally:
        gguf.GGUFReader = original


def _fast_reader_class() -> Any:
    import gguf

    kinds = gguf.GGUFValueType

    class FastReader(gguf.GGUFReader):  # type: ignore[misc]
        """Reads arrays in one pass; their strings are `bytes`, where the base class has arrays."""

        def _get_field_parts(
            self, orig_offs: int, raw_type: int
        ) -> tuple[int, list[Any], list[int], list[Any]]:
            if kinds(raw_type) != kinds.ARRAY or self.byte_order != "I":
                return super()._get_field_parts(orig_offs, raw_type)  # type: ignore[no-any-return]
            data: npt.NDArray[np.uint8] = np.asarray(self.data)
            view = data.data
            kind, length = struct.unpack_from("<IQ", view, orig_offs)
            start = orig_offs + 12
            dtype = self.gguf_scalar_to_np.get(kinds(kind))
            if dtype is not None:
                size = length * np.dtype(dtype).itemsize
                values = data[start : start + size].view(dtype).reshape(length, 1)
                return 12 + size, list(values), list(range(length)), [kinds.ARRAY, kinds(kind)]
            if kinds(kind) != kinds.STRING:
                return super()._get_field_parts(orig_offs, raw_type)  # type: ignore[no-any-return]
            offset, strings = start, []
            for _ in range(length):
                (size,) = struct.unpack_from("<Q", view, offset)
                strings.append(bytes(view[offset + 8 : offset + 8 + size]))
                offset += 8 + size
            return offset - orig_offs, strings, list(range(length)), [kinds.ARRAY, kinds.STRING]

    return FastReader
