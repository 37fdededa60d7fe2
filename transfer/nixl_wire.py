"""What NIXL's parts have in common, and what `Staging` needs of NIXL: messages, and reads from the
rings of the endpoints that write to us.

An endpoint's agent may also be that of a peer that we write to. Its connection is then shared: who
tears it down calls `readmit`, so that reads start afresh. Reads that were under way fail.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import nixl._api
import nixl._bindings
import numpy as np
import numpy.typing as npt

from transfer.transport import Int32Array, PeerError, Region

# NIXL installs its own handler on standard output and announces every agent there.
logging.getLogger("nixl").setLevel(logging.WARNING)

NIXL_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    *(
        value
        for name, value in vars(nixl._bindings).items()
        if name.startswith("nixl") and isinstance(value, type) and issubclass(value, Exception)
    ),
)


def memory_type(region: Region) -> str:
    return "DRAM" if region.device is None else "VRAM"


def run_rows(
    region: Region, offset: int, length: int, count: int = 1, stride: int = 0
) -> npt.NDArray[np.uint64]:
    """(address, bytes, device) of each run of each page."""
    pages = np.arange(region.num_pages, dtype=np.uint64)[:, None] * np.uint64(region.page_bytes)
    runs = np.arange(count, dtype=np.uint64) * np.uint64(stride)
    rows = np.empty((region.num_pages * count, 3), dtype=np.uint64)
    rows[:, 0] = (pages + runs).ravel() + np.uint64(region.address + offset)
    rows[:, 1] = length
    rows[:, 2] = region.device or 0
    return rows


@dataclasses.dataclass(frozen=True, slots=True)
class _Source:
    metadata: bytes
    ring: Region
    units: Any
    """Prepared descriptors."""


class NixlWire:
    def __init__(self, agent: Any, inbound: Region, is_peer: Callable[[str], bool]) -> None:
        """`is_peer`: whether an agent is to stay known when we no longer read from it."""
        self._agent = agent
        self._is_peer = is_peer
        self._units = self._prepare("NIXL_INIT_AGENT", inbound)
        self._sources: dict[str, _Source] = {}
        """By agent."""

    def send(self, agent: str, message: bytes) -> None:
        try:
            self._agent.send_notif(agent, message)
        except NIXL_ERRORS as error:
            raise PeerError(f"NIXL cannot notify {agent}: {error}") from error

    def admit(self, metadata: bytes, ring: Region) -> str:
        try:
            agent: str = self._agent.add_remote_agent(metadata).decode()
            self._release_units(agent)
            self._sources[agent] = _Source(metadata, ring, self._prepare(agent, ring))
        except NIXL_ERRORS as error:
            raise PeerError(f"NIXL cannot reach a source's ring: {error}") from error
        return agent

    def readmit(self, agent: str) -> None:
        """Its connection was torn down. If we read from it, make a new one."""
        source = self._sources.get(agent)
        if source is not None:
            # If it is out of reach, reads are refused, and its owner will greet us again.
            with contextlib.suppress(PeerError):
                self.admit(source.metadata, source.ring)

    def forget(self, agent: str) -> None:
        self._release_units(agent)
        if not self._is_peer(agent):
            # While a read is under way it cannot be removed, and stays.
            with contextlib.suppress(*NIXL_ERRORS):
                self._agent.remove_remote_agent(agent)

    def start_read(self, agent: str, remote_units: Int32Array, units: Int32Array) -> Any:
        source = self._sources.get(agent)
        if source is None:
            raise PeerError(f"{agent} is out of reach")
        try:
            handle = self._agent.make_prepped_xfer(
                "READ", self._units, units, source.units, remote_units
            )
            self._agent.transfer(handle)
        except NIXL_ERRORS as error:
            raise PeerError(f"NIXL cannot read from {agent}: {error}") from error
        return handle

    def is_read(self, handle: Any) -> bool:
        try:
            state = self._agent.check_xfer_state(handle)
        except NIXL_ERRORS as error:
            raise PeerError(f"NIXL cannot read: {error}") from error
        if state == "ERR":
            raise PeerError("NIXL's read failed")
        return bool(state == "DONE")

    def release(self, handle: Any) -> bool:
        try:
            handle.release()
        except NIXL_ERRORS:
            return False
        return True

    def close(self) -> None:
        for agent in list(self._sources):
            self._release_units(agent)
        with contextlib.suppress(*NIXL_ERRORS):
            self._units.release()

    def _prepare(self, agent: str, ring: Region) -> Any:
        rows = run_rows(ring, 0, ring.page_bytes)
        return self._agent.prep_xfer_dlist(agent, rows, memory_type(ring))

    def _release_units(self, agent: str) -> None:
        source = self._sources.pop(agent, None)
        if source is not None:
            with contextlib.suppress(*NIXL_ERRORS):
                source.units.release()
