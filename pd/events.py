"""What goes into a leader and what comes out: `handle(event, now) -> list[Effect]`. Plain data."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from pd.engine.batch import StepCommand, StepResult
from pd.messages import AnyMessage, Int32Array
from pd.spec import MemberRole
from transfer.topology import RankCoord, Topology
from transfer.transport import PagePart


def on_rank(
    slots: Int32Array, topology: Topology, coord: RankCoord
) -> tuple[slice | npt.NDArray[np.bool_], Int32Array]:
    """(which of a replica's slots a rank has, as a mask or slice; their pages in its pool)."""
    if topology.cp == 1:
        return slice(None), slots
    own = slots % topology.cp == coord.cp
    return own, slots[own] // topology.cp


# ------------------------------------------------------------------------------------------- events


@dataclasses.dataclass(frozen=True, slots=True)
class Received:
    sender: str
    message: AnyMessage


@dataclasses.dataclass(frozen=True, slots=True)
class StepDone:
    result: StepResult


@dataclasses.dataclass(frozen=True, slots=True)
class Written:
    """A write's end: no byte of it follows. `error` None means that every byte has landed."""

    write_id: int
    error: str | None
    bytes_moved: int
    descriptors: int
    seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class Digested:
    """Answer to `Digest`: one number per page."""

    digest_id: int
    digests: npt.NDArray[np.uint64]


@dataclasses.dataclass(frozen=True, slots=True)
class PagesCopied:
    """Answer to `CopyPages`: it has ended. `error` None means that every page was copied."""

    copy_id: int
    error: str | None
    bytes_moved: int
    seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class PeerUp:
    name: str
    role: MemberRole | None = None
    """None: an API process."""
    topology: Topology = Topology()  # noqa: RUF009 (frozen)


@dataclasses.dataclass(frozen=True, slots=True)
class PeerDown:
    """The process is known to have ended: no write of its can be in flight."""

    name: str
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class PeerDraining:
    """It is to be asked for nothing new, but where it is named."""

    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; sent several times a second."""


@dataclasses.dataclass(frozen=True, slots=True)
class LookAhead:
    """The moment has come that `Leader.look_ahead_at` named."""


Event = (
    Received
    | StepDone
    | Written
    | Digested
    | PagesCopied
    | PeerUp
    | PeerDown
    | PeerDraining
    | Tick
    | LookAhead
)

# ------------------------------------------------------------------------------------------ effects


@dataclasses.dataclass(frozen=True, slots=True)
class Send:
    to: str
    message: AnyMessage


@dataclasses.dataclass(frozen=True, slots=True)
class RunStep:
    command: StepCommand


@dataclasses.dataclass(frozen=True, slots=True)
class Write:
    """Write pages of one layer group, or the same part of each, from one of our ranks to one of
    `peer`'s; answered by `Written`. Pages are those of the two ranks' pools, unlike everywhere else
    here, where they are slots of the replica (hicache/index.py)."""

    write_id: int
    peer: str
    group: int
    source_pages: Int32Array
    target_pages: Int32Array
    part: PagePart | None
    """None: whole pages."""
    handover: int
    """Tells handovers apart, so that they can take turns."""
    source_rank: int
    target_rank: int


@dataclasses.dataclass(frozen=True, slots=True)
class CancelWrite:
    """It need not land any more; its `Written` still comes, perhaps sooner."""

    write_id: int


@dataclasses.dataclass(frozen=True, slots=True)
class BreakLink:
    """Writes to `peer` have no end: disconnect it, which ends them, and connect it again."""

    peer: str


@dataclasses.dataclass(frozen=True, slots=True)
class Digest:
    """Compute one number per page of a layer group from its bytes; answered by `Digested`."""

    digest_id: int
    group: int
    pages: Int32Array


@dataclasses.dataclass(frozen=True, slots=True)
class CopyPages:
    """Copy whole pages between the device tier and the node's host tier; answered by
    `PagesCopied`."""

    copy_id: int
    device_pages: tuple[Int32Array, ...]
    """By layer group."""
    host_pages: tuple[Int32Array, ...]
    to_host: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Warn:
    """A line for the log."""

    text: str


Effect = Send | RunStep | Write | CancelWrite | BreakLink | Digest | CopyPages | Warn
