"""What goes into a leader and what comes out: `handle(event, now) -> list[Effect]`. Plain data."""

from __future__ import annotations

import dataclasses

from pd.engine.batch import StepCommand, StepResult
from pd.messages import AnyMessage, Int32Array

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
    """A write's end; `error` None means that every byte has landed."""

    write_id: int
    error: str | None
    bytes_moved: int
    descriptors: int
    seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class PeerUp:
    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class PeerDown:
    """The process is known to have ended: no write of its can be in flight."""

    name: str
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; sent several times a second."""


Event = Received | StepDone | Written | PeerUp | PeerDown | Tick

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
    """Write pages of one layer group to `peer`; answered by `Written`."""

    write_id: int
    peer: str
    group: int
    source_pages: Int32Array
    target_pages: Int32Array


Effect = Send | RunStep | Write
