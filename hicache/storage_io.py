"""What the storage tier and the process around it say to each other, and the operations under way.

Pure: times come in as arguments. The process hands each effect to a `Storage` and answers each
operation with exactly one `StorageResult`, by its timeout or soon after, and one `PagesFreed` more
when `pages_in_use` was set. It does so later, never from within `emit`.

An operation holds a reference on each of its slots until it has ended and its pages are free again.
One that is overdue is given up: whoever waits for it hears that it failed, but its references stay
until its end is known, and its bytes count as in flight. So a storage that hangs stops being used,
and holds no more memory than the bounds on bytes in flight.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Iterable, Sequence

from hicache.index import PageIndex
from hicache.load_cost import LoadCost, Rate
from hicache.storage.storage import ObjectPart, Outcome, StorageResult


@dataclasses.dataclass(frozen=True, slots=True)
class _Move:
    op_id: int
    group: int
    keys: tuple[str, ...]
    slots: tuple[int, ...]
    part: ObjectPart
    timeout_s: float


class Put(_Move):
    """Store `part` of the pages in `slots` of a layer group as `keys`."""

    __slots__ = ()


class Get(_Move):
    """Read `keys` into `part` of the pages in `slots` of a layer group."""

    __slots__ = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Exists:
    op_id: int
    keys: tuple[str, ...]
    timeout_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class CancelOp:
    """The rest of it is not wanted; its end is still waited for."""

    op_id: int


Effect = Put | Get | Exists | CancelOp


@dataclasses.dataclass(frozen=True, slots=True)
class PagesFreed:
    operation_id: int


@dataclasses.dataclass(frozen=True, slots=True)
class StorageLimits:
    """What the storage tier may use, and how long it waits."""

    batch_pages: int = 32
    """Pages that are written or read together."""
    max_put_bytes: int = 256 << 20
    """In flight; as with reads, one batch always may be, however large."""
    max_get_bytes: int = 512 << 20
    put_timeout_s: float = 30.0
    get_timeout_s: float = 10.0
    exists_timeout_s: float = 2.0
    grace_s: float = 5.0
    """After its timeout an operation without an end is given up."""
    max_queued_pages: int = 16_384
    """That wait to be written."""
    max_queued_hashes: int = 1 << 19
    """Of them and of all pages before them in their chains; one chain always may be queued."""
    put_attempts: int = 4
    put_pause_s: float = 0.5
    """After a failed put; twice as long after each further one."""
    max_hints: int = 1 << 18
    """Pages that are remembered as stored."""
    max_absent: int = 1 << 16
    absent_s: float = 30.0
    """For so long a page that was not there is not asked for again."""
    max_prefetch_pages: int = 4096
    """Of one prefetch."""
    prefetch_timeout_s: float = 60.0
    pool_share: float = 0.5
    """Of each pool, for all prefetches under way."""
    probe_pages: int = 32
    probe_s: float = 10.0
    """A storage that is thought too slow is measured again with so many pages, so often; one that
    is not known yet, with each request until it is."""
    failures_to_open: int = 5
    breaker_pause_s: float = 1.0
    breaker_max_pause_s: float = 60.0


def bytes_of(page_bytes: Sequence[int], pages: Iterable[int]) -> int:
    """Of pages, given as bits of the groups that count; `page_bytes` by group."""
    return sum(size for groups in pages for g, size in enumerate(page_bytes) if groups >> g & 1)


class OpKind(enum.Enum):
    PUT = "put"
    GET = "get"
    EXISTS = "exists"


class BreakerState(enum.StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    TRIAL = "trial"


class Breaker:
    """Stops operations on a storage that fails: after so many failures in a row of one kind nothing
    is begun for a pause, then one trial, of one batch. Each trial that fails doubles the pause."""

    def __init__(self, failures: int, pause_s: float, max_pause_s: float) -> None:
        self.state = BreakerState.CLOSED
        self.times_opened = 0
        self._limit = failures
        self._pause_s = self._next_pause_s = pause_s
        self._max_pause_s = max_pause_s
        self._failures = dict.fromkeys(OpKind, 0)
        self._until = 0.0
        self._trial: set[int] = set()

    def can_start(self, now: float) -> bool:
        if self.state is BreakerState.OPEN:
            return now >= self._until
        return self.state is BreakerState.CLOSED

    def started(self, op_id: int) -> None:
        """Asked before by `can_start`, once for a batch."""
        if self.state is not BreakerState.CLOSED:
            self.state = BreakerState.TRIAL
            self._trial.add(op_id)

    def succeeded(self, op_id: int, kind: OpKind) -> None:
        """Says nothing of other kinds: a storage may answer questions and fail to read."""
        if self.state is not BreakerState.CLOSED:
            if op_id not in self._trial:
                return
            self.state = BreakerState.CLOSED
            self._trial.clear()
        self._failures[kind] = 0
        if not any(self._failures.values()):
            self._next_pause_s = self._pause_s

    def failed(self, op_id: int, kind: OpKind, now: float) -> None:
        if self.state is BreakerState.CLOSED:
            self._failures[kind] += 1
            if self._failures[kind] >= self._limit:
                self._open(now)
        elif op_id in self._trial:
            self._open(now)

    def told_nothing(self, op_id: int, now: float) -> None:
        """It was cancelled or refused: there will be another trial."""
        if op_id in self._trial:
            self._trial.discard(op_id)
            if not self._trial:
                self.state = BreakerState.OPEN
                self._until = now + self._pause_s

    def _open(self, now: float) -> None:
        self.state = BreakerState.OPEN
        self.times_opened += 1
        self._trial.clear()
        self._until = now + self._next_pause_s
        self._next_pause_s = min(2 * self._next_pause_s, self._max_pause_s)


Then = Callable[[tuple[Outcome, ...], float], None]
"""Called once, with an outcome for each key, and the time."""


@dataclasses.dataclass(slots=True)
class _Operation:
    kind: OpKind
    num_keys: int
    num_bytes: int
    group: int
    slots: tuple[int, ...]
    """References are held on them."""
    started: float
    deadline: float
    then: Then | None
    """None: it has been told."""
    is_cancelled: bool = False
    has_ended: bool = False
    """Its pages are still in use."""


class Operations:
    """Those under way. Holds a reference on each slot of each."""

    def __init__(
        self, index: PageIndex, emit: Callable[[Effect], None], limits: StorageLimits
    ) -> None:
        self._index = index
        self._emit = emit
        self._limits = limits
        self._operations: dict[int, _Operation] = {}
        self._last_id = 0
        self._max_bytes = {OpKind.PUT: limits.max_put_bytes, OpKind.GET: limits.max_get_bytes}
        self.bytes_in_flight = {OpKind.PUT: 0, OpKind.GET: 0}
        self.bytes_moved = {OpKind.PUT: 0, OpKind.GET: 0}
        self.outcomes = dict.fromkeys(Outcome, 0)
        """Keys by outcome, of all operations."""
        self.num_given_up = 0
        self.is_detached = False
        self.breaker = Breaker(
            limits.failures_to_open, limits.breaker_pause_s, limits.breaker_max_pause_s
        )
        self.cost = LoadCost(limits.probe_s)
        self.writes = Rate()

    def __len__(self) -> int:
        return len(self._operations)

    @property
    def num_in_use(self) -> int:
        """Those that have ended and whose pages are still in use."""
        return sum(operation.has_ended for operation in self._operations.values())

    def reading_since(self) -> float:
        """When the oldest get under way was begun; infinite: there is none."""
        gets = (op.started for op in self._operations.values() if op.kind is OpKind.GET)
        return min(gets, default=math.inf)

    def can_start(self, now: float) -> bool:
        """Whether the next batch may begin."""
        return not self.is_detached and self.breaker.can_start(now)

    def has_room(self, kind: OpKind, num_bytes: int) -> bool:
        in_flight = self.bytes_in_flight[kind]
        return not in_flight or in_flight + num_bytes <= self._max_bytes[kind]

    def move(
        self,
        kind: OpKind,
        group: int,
        keys: Sequence[str],
        slots: Sequence[int],
        part: ObjectPart,
        now: float,
        then: Then,
    ) -> int:
        """Begin a put or a get; returns its id."""
        is_put = kind is OpKind.PUT
        timeout_s = self._limits.put_timeout_s if is_put else self._limits.get_timeout_s
        num_bytes = part.object_bytes * len(keys)
        op_id = self._start(kind, len(keys), num_bytes, group, slots, timeout_s, now, then)
        effect = Put if is_put else Get
        self._emit(effect(op_id, group, tuple(keys), tuple(slots), part, timeout_s))
        return op_id

    def exists(self, keys: Sequence[str], now: float, then: Then) -> int:
        timeout_s = self._limits.exists_timeout_s
        op_id = self._start(OpKind.EXISTS, len(keys), 0, 0, (), timeout_s, now, then)
        self._emit(Exists(op_id, tuple(keys), timeout_s))
        return op_id

    def _start(
        self,
        kind: OpKind,
        num_keys: int,
        num_bytes: int,
        group: int,
        slots: Sequence[int],
        timeout_s: float,
        now: float,
        then: Then,
    ) -> int:
        self._last_id += 1
        self._index.retain(group, slots)
        if kind is not OpKind.EXISTS:
            self.bytes_in_flight[kind] += num_bytes
        deadline = now + timeout_s + self._limits.grace_s
        self._operations[self._last_id] = _Operation(
            kind, num_keys, num_bytes, group, tuple(slots), now, deadline, then
        )
        self.breaker.started(self._last_id)
        return self._last_id

    def cancel(self, op_id: int) -> None:
        operation = self._operations.get(op_id)
        if operation is not None and not operation.is_cancelled and not operation.has_ended:
            operation.is_cancelled = True
            self._emit(CancelOp(op_id))

    def cancel_all(self) -> None:
        for op_id in self._operations:
            self.cancel(op_id)

    def tick(self, now: float) -> None:
        """Give up what is overdue."""
        for op_id, operation in list(self._operations.items()):
            if operation.then is not None and now >= operation.deadline:
                self.num_given_up += 1
                if operation.kind is OpKind.GET:
                    self.cost.add_failed_read(operation.num_bytes, operation.started, now)
                self.breaker.failed(op_id, operation.kind, now)
                self.cancel(op_id)
                self._tell(operation, (Outcome.FAILED,) * operation.num_keys, now)

    def handle(self, event: StorageResult | PagesFreed, now: float) -> None:
        operation = self._operations.get(event.operation_id)
        if operation is None:
            return
        if isinstance(event, PagesFreed):
            if operation.has_ended:
                self._free(event.operation_id)
            return
        if operation.has_ended:
            return
        operation.has_ended = True
        if operation.then is not None:
            self._measure(event, operation, now)
        outcomes = event.outcomes
        if len(outcomes) != operation.num_keys:
            outcomes = (Outcome.FAILED,) * operation.num_keys
        self._tell(operation, outcomes, now)
        if not event.pages_in_use:
            self._free(event.operation_id)

    def _measure(self, event: StorageResult, operation: _Operation, now: float) -> None:
        for outcome in event.outcomes:
            self.outcomes[outcome] += 1
        told = set(event.outcomes) - {Outcome.FAILED, Outcome.REFUSED}
        if operation.kind is OpKind.EXISTS:
            if told:  # for how long it fails says nothing about how long it takes
                self.cost.add_trip(event.seconds)
        else:
            self.bytes_moved[operation.kind] += event.bytes_moved
        if operation.kind is OpKind.GET and not told:
            self.cost.add_failed_read(operation.num_bytes, operation.started, now)
        elif operation.kind is OpKind.GET:
            self.cost.add_read(event.bytes_moved, operation.started, now, self.cost.latency_s)
        elif operation.kind is OpKind.PUT:
            self.writes.add(event.bytes_moved, operation.started, now)
        if told:
            self.breaker.succeeded(event.operation_id, operation.kind)
        elif operation.is_cancelled or Outcome.FAILED not in event.outcomes:
            self.breaker.told_nothing(event.operation_id, now)
        else:
            self.breaker.failed(event.operation_id, operation.kind, now)

    def _tell(self, operation: _Operation, outcomes: tuple[Outcome, ...], now: float) -> None:
        then, operation.then = operation.then, None
        if then is not None:
            then(outcomes, now)

    def _free(self, op_id: int) -> None:
        operation = self._operations.pop(op_id)
        self._index.release(operation.group, operation.slots)
        if operation.kind is not OpKind.EXISTS:
            self.bytes_in_flight[operation.kind] -= operation.num_bytes

    def slots_in_use(self, group: int) -> list[int]:
        """On each of which this holds a reference, as often as it does."""
        return [
            slot
            for operation in self._operations.values()
            if operation.group == group
            for slot in operation.slots
        ]

    def check_integrity(self) -> None:
        for kind, in_flight in self.bytes_in_flight.items():
            expected = sum(op.num_bytes for op in self._operations.values() if op.kind is kind)
            assert in_flight == expected, f"{kind}: {in_flight} bytes in flight, not {expected}"
        for op_id, operation in self._operations.items():
            assert not operation.has_ended or operation.then is None, f"{op_id} was not told"
