"""Which replicas serve a request, and whether it is admitted at all.

Pure: no clock, no socket. One API process owns one router; it sees only what leaders report and
what it placed itself, so two API processes may choose alike between two reports. The router never
waits: a request is placed now, refused because its queue is full (`Overloaded`), or cannot be
served (`NoReplica`).
"""

from __future__ import annotations

from dataclasses import dataclass

from pd.messages import ReplicaLoad
from pd.spec import Role

RETRY_AFTER_S = 1
"""Of a refused request, in whole seconds, as HTTP's Retry-After wants them."""


class NoReplica(Exception):
    """No replica of a role that the request needs is up."""

    def __init__(self, role: Role) -> None:
        super().__init__(f"no {role} replica is up")
        self.role = role


class Overloaded(Exception):
    """Too many requests are admitted and unfinished; nothing was done for this one."""

    def __init__(self, in_flight: int, max_queue: int, retry_after_s: int) -> None:
        super().__init__(
            f"{in_flight} requests are queued or running, of at most {max_queue}; try again in "
            f"{retry_after_s} s"
        )
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Placement:
    decode: str
    prefill: str
    """Empty: the decode replica prefills."""


@dataclass(slots=True)
class ReplicaState:
    """One replica as the router sees it: its last report, and what was placed on it since."""

    name: str
    role: Role
    load: ReplicaLoad = ReplicaLoad()  # noqa: RUF009 (frozen)
    placed_requests: int = 0
    placed_tokens: int = 0

    def num_requests(self) -> int:
        load = self.load
        return load.waiting + load.running + load.handovers_in + self.placed_requests

    def num_waiting_tokens(self) -> int:
        return self.load.waiting_tokens + self.placed_tokens


class Router:
    def __init__(self, max_queue: int) -> None:
        self.max_queue = max_queue
        self.in_flight = 0
        self._replicas: dict[str, ReplicaState] = {}

    def update(self, replica: str, role: Role, load: ReplicaLoad | None) -> None:
        """A replica is up; `load` is its report, None when it has not sent one yet."""
        known = self._replicas.get(replica)
        if load is not None or known is None or known.role != role:
            self._replicas[replica] = ReplicaState(replica, role, load or ReplicaLoad())

    def remove(self, replica: str) -> None:
        """Nothing is placed on `replica` until the next `update`; unknown names are ignored."""
        self._replicas.pop(replica, None)

    def replicas(self) -> list[ReplicaState]:
        """By name; live objects, for reading."""
        return sorted(self._replicas.values(), key=lambda replica: replica.name)

    def role_of(self, replica: str) -> Role | None:
        """None: that replica is not up."""
        known = self._replicas.get(replica)
        return known.role if known else None

    def check_room(self, num_requests: int) -> None:
        """Raise Overloaded where `admit` would, so that no work is done for what it will refuse."""
        if self.in_flight + num_requests > self.max_queue:
            raise Overloaded(self.in_flight, self.max_queue, RETRY_AFTER_S)

    def admit(self, num_requests: int) -> None:
        """Count `num_requests` as in flight until `release`, or raise Overloaded and count none."""
        self.check_room(num_requests)
        self.in_flight += num_requests

    def release(self) -> None:
        """One admitted request has ended."""
        assert self.in_flight > 0
        self.in_flight -= 1

    def place(self, num_prompt_tokens: int, beside: Placement | None = None) -> Placement:
        """The least loaded decode replica, and the prefill replica with the fewest waiting tokens.

        `beside` is chosen again while both its replicas are up: the same prompt's pages are cached
        there. Without a prefill replica the decode replica prefills. Raises NoReplica.
        """
        if beside is not None and all(
            name in self._replicas for name in (beside.decode, beside.prefill) if name
        ):
            placement = beside
        else:
            placement = self._plan_placement()
        self._replicas[placement.decode].placed_requests += 1
        prefilling = self._replicas[placement.prefill or placement.decode]
        prefilling.placed_tokens += num_prompt_tokens
        if placement.prefill:
            prefilling.placed_requests += 1
        return placement

    def _plan_placement(self) -> Placement:
        replicas = self.replicas()
        decoding = [replica for replica in replicas if replica.role != "prefill"]
        if not decoding:
            raise NoReplica("decode")
        decode = min(decoding, key=lambda r: (r.num_requests(), r.num_waiting_tokens()))
        prefilling = [replica for replica in replicas if replica.role == "prefill"]
        if decode.role == "both" or not prefilling:
            return Placement(decode.name, "")
        prefill = min(prefilling, key=lambda r: (r.num_waiting_tokens(), r.num_requests()))
        return Placement(decode.name, prefill.name)
