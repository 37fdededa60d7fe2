"""Transports by name. A backend's library is imported only when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping

from transfer.transport import ConfigurationError, Transport

BACKENDS = ("nixl", "loopback")


def make_transport(backend: str, name: str, options: Mapping[str, str] | None = None) -> Transport:
    """One process's end. `name` shows in logs; it need not be unique.

    Raises ConfigurationError when the backend is unknown, not installed, or refuses its options.
    """
    settings = dict(options or {})
    match backend:
        case "loopback":
            from transfer.loopback import LoopbackTransport

            return LoopbackTransport(name, settings)
        case "nixl":
            try:
                from transfer.nixl import NixlTransport
            except ImportError as error:
                raise ConfigurationError(
                    f"transport 'nixl' needs the nixl library: pip install 'nixl>=1.5,<2' ({error})"
                ) from error
            return NixlTransport(name, settings)
        case _:
            raise ConfigurationError(f"no transport {backend!r}; there are {', '.join(BACKENDS)}")
