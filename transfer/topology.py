"""Parallel shape of a replica, and a rank's place in it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Topology:
    tp: int = 1
    pp: int = 1
    cp: int = 1

    @property
    def num_ranks(self) -> int:
        return self.tp * self.pp * self.cp
