"""Transports by name. A backend's library is imported only when it is asked for.

Others register a callable `(name, options) -> Transport` under the entry point group
`pagerelay.transports`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from typing import NamedTuple

from transfer.transport import ConfigurationError, Transport

ENTRY_POINTS = "pagerelay.transports"


class _Builtin(NamedTuple):
    module: str
    factory: str
    install: str
    """What provides the library that it needs."""


_BUILTIN = {
    "nixl": _Builtin("transfer.nixl", "NixlTransport", "pip install 'nixl>=1.5,<2'"),
    "mooncake": _Builtin(
        "transfer.mooncake",
        "MooncakeTransport",
        "pip install 'pagerelay[mooncake]', and libibverbs1, libnuma1 and libcurl4: "
        "scripts/system-packages",
    ),
    "shm": _Builtin("transfer.shm", "ShmTransport", ""),
    "ipc": _Builtin("transfer.ipc", "IpcTransport", "an NVIDIA driver"),
    "loopback": _Builtin("transfer.loopback", "LoopbackTransport", ""),
}
BACKENDS = tuple(_BUILTIN)


def backend_names() -> list[str]:
    """All that `make_transport` knows, those of entry points included."""
    found = importlib.metadata.entry_points(group=ENTRY_POINTS)
    return [*BACKENDS, *sorted({entry.name for entry in found} - set(BACKENDS))]


def make_transport(backend: str, name: str, options: Mapping[str, str] | None = None) -> Transport:
    """One process's end. `name` shows in logs; it need not be unique.

    Raises ConfigurationError when the backend is unknown, not installed, or refuses its options.
    """
    return _factory(backend)(name, dict(options or {}))


def _factory(backend: str) -> Callable[[str, dict[str, str]], Transport]:
    builtin = _BUILTIN.get(backend)
    if builtin is None:
        found = importlib.metadata.entry_points(group=ENTRY_POINTS, name=backend)
        if not found:
            known = ", ".join(backend_names())
            raise ConfigurationError(f"no transport {backend!r}; there are {known}")
        try:
            factory = next(iter(found)).load()
        except Exception as error:  # another's code: say whose, and what it said
            raise ConfigurationError(f"transport {backend!r} does not load: {error}") from error
        return factory  # type: ignore[no-any-return]
    try:
        return getattr(importlib.import_module(builtin.module), builtin.factory)  # type: ignore[no-any-return]
    except (ImportError, OSError) as error:
        raise ConfigurationError(
            f"transport {backend!r} needs {builtin.install} ({error})"
        ) from error
