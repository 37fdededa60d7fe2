"""Storages by name. A backend's library is imported only when it is asked for.

Others register a callable `(name, options) -> Storage` under the entry point group
`pagerelay.storages`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from typing import NamedTuple

from hicache.storage.storage import Storage, StorageConfigurationError, StorageError

ENTRY_POINTS = "pagerelay.storages"


class _Builtin(NamedTuple):
    module: str
    factory: str
    install: str
    """What provides the library that it needs."""


_BUILTIN = {
    "file": _Builtin("hicache.storage.file", "make_file_storage", ""),
    "mooncake": _Builtin(
        "hicache.storage.mooncake",
        "make_mooncake_storage",
        "pip install 'pagerelay[mooncake]', and libibverbs1, libnuma1 and libcurl4: "
        "scripts/system-packages",
    ),
    "nixl": _Builtin("hicache.storage.nixl", "make_nixl_storage", "pip install 'nixl>=1.5,<2'"),
    "memory": _Builtin("hicache.storage.memory", "MemoryStorage", ""),
}
BACKENDS = tuple(_BUILTIN)


def backend_names() -> list[str]:
    """All that `make_storage` knows, those of entry points included."""
    found = importlib.metadata.entry_points(group=ENTRY_POINTS)
    return [*BACKENDS, *sorted({entry.name for entry in found} - set(BACKENDS))]


def make_storage(backend: str, name: str, options: Mapping[str, str] | None = None) -> Storage:
    """One process's end. `name` shows in logs; it need not be unique.

    Raises StorageConfigurationError when the backend is unknown, not installed, or refuses its
    options.
    """
    factory = _factory(backend)
    try:
        return factory(name, dict(options or {}))
    except StorageError:
        raise
    except Exception as error:  # options may be anything, and a factory another's code
        raise StorageConfigurationError(
            f"storage {backend!r} cannot be made: {type(error).__name__}: {error}"
        ) from error


def _factory(backend: str) -> Callable[[str, dict[str, str]], Storage]:
    builtin = _BUILTIN.get(backend)
    if builtin is None:
        found = importlib.metadata.entry_points(group=ENTRY_POINTS, name=backend)
        if not found:
            known = ", ".join(backend_names())
            raise StorageConfigurationError(f"no storage {backend!r}; there are {known}")
        try:
            factory = next(iter(found)).load()
        except Exception as error:  # another's code: say whose, and what it said
            raise StorageConfigurationError(
                f"storage {backend!r} does not load: {error}"
            ) from error
        return factory  # type: ignore[no-any-return]
    try:
        return getattr(importlib.import_module(builtin.module), builtin.factory)  # type: ignore[no-any-return]
    except (ImportError, OSError) as error:
        raise StorageConfigurationError(
            f"storage {backend!r} needs {builtin.install} ({error})"
        ) from error
