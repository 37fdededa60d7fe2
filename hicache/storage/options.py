"""A backend's options, which come as text: read by name, and what is wrong is named."""

from __future__ import annotations

import re

from hicache.storage.storage import StorageConfigurationError

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_BYTES = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]?)i?B?")


class Options:
    """Each option is read once; `end` refuses those that nobody has read."""

    def __init__(self, backend: str, options: dict[str, str]) -> None:
        self._backend = backend
        self._left = dict(options)

    def text(self, name: str, default: str | None = None) -> str:
        """None: it must be given."""
        value = self._left.pop(name, default)
        if value is None:
            raise StorageConfigurationError(f"{self._backend} storage needs option {name!r}")
        return value

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        """The first is the default."""
        value = self.text(name, choices[0])
        if value not in choices:
            raise StorageConfigurationError(
                f"{self._backend} storage, {name}: expected {' or '.join(choices)}, got {value!r}"
            )
        return value

    def number(self, name: str, default: int, at_least: int = 0) -> int:
        value = self.text(name, str(default))
        if not value.isdecimal() or int(value) < at_least:
            raise StorageConfigurationError(
                f"{self._backend} storage, {name}: expected a number of at least {at_least}, "
                f"got {value!r}"
            )
        return int(value)

    def bytes(self, name: str, default: int | None = None) -> int:
        """As 4096, 64M, 1.5G or 2TiB; the units are powers of 1,024. None: it must be given."""
        value = self.text(name, None if default is None else str(default))
        found = _BYTES.fullmatch(value.strip())
        if found is None:
            raise StorageConfigurationError(
                f"{self._backend} storage, {name}: expected a size such as 500G, got {value!r}"
            )
        return int(float(found[1]) * _UNITS[found[2]])

    def end(self) -> None:
        if self._left:
            raise StorageConfigurationError(
                f"{self._backend} storage has no options {sorted(self._left)}"
            )
