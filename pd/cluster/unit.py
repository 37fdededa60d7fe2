"""What a controller supervises: units, each of one or more processes."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

from ray.util.placement_group import PlacementGroup

from pd.cluster.actor import ProcessId, Report
from pd.node import Member
from pd.spec import MemberRole, Role


class StartError(RuntimeError):
    """A process did not come up; the message says what and why."""


@dataclasses.dataclass(slots=True, eq=False)
class Process:
    name: str
    rank: int = 0
    actor: Any = None
    meeting: Any = None
    """Reference to where a replica's ranks find each other; the first rank's."""
    starting: Any = None
    """Reference to what its `start` returns."""
    member: Member | None = None
    process_id: ProcessId | None = None
    ended: Any = None
    """Reference that fails when the process dies."""
    report: Any = None
    """Reference, while it is asked for one."""
    report_asked: float = 0.0
    last_report: Report | None = None

    def where(self) -> str:
        """For people: which rank of its replica; empty where there is no other."""
        rank = self.member.facts.get("rank") if self.member else None
        return f"rank {rank}" if rank else ""


class Phase(enum.Enum):
    ABSENT = "absent"
    PLACING = "placing"
    """Waits for resources."""
    STARTING = "starting"
    RUNNING = "running"


@dataclasses.dataclass(slots=True, eq=False)
class Unit:
    """What lives and dies together: a replica with all its ranks, a keeper, an API server.

    ABSENT -> PLACING -> STARTING -> RUNNING -> ABSENT; from each back to ABSENT when it fails. One
    that changes its role goes back to STARTING.
    """

    name: str
    role: MemberRole | None
    """None: an API server."""
    nodes: tuple[str, ...] = ()
    """Ray's ids of those that it is on, once it is placed; a keeper belongs to one."""
    version: str = ""
    """Of what its processes are started with (pd/rollout.py)."""
    phase: Phase = Phase.ABSENT
    group: PlacementGroup | None = None
    """Only of a replica."""
    processes: list[Process] = dataclasses.field(default_factory=list)
    """By rank."""
    began: float = 0.0
    """Placing or starting."""
    problem: StartError | None = None
    """Why a rank could not meet the others: another one's reason is better."""
    problem_until: float = 0.0
    retry_at: float = 0.0
    failures: int = 0
    """In a row."""
    since: float = 0.0
    """It has been running, or missing."""
    was_running: bool = False
    draining_since: float | None = None
    becomes: Role | None = None
    """What it serves as when it is drained."""
    resting: Any = None
    """Reference that is ready when nothing is under way there any more, before that."""
    idle_reports: int = 0
    """In a row, since it drains."""

    @property
    def is_replica(self) -> bool:
        return self.role not in (None, "cache")

    @property
    def is_draining(self) -> bool:
        return self.draining_since is not None

    @property
    def is_running(self) -> bool:
        return self.phase is Phase.RUNNING

    @property
    def members(self) -> list[Member]:
        """By rank."""
        found = (process.member for process in self.processes)
        return [member for member in found if member is not None]
