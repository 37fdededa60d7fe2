"""A cluster as the planner sees it: replicas that compute prompts and batches at known speeds, on a
virtual clock in steps of `TICK_S`, and that start a while after they are wanted."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections import deque

from pd.messages import ReplicaLoad
from pd.planner import Observed, Planner
from pd.spec import Role

TICK_S = 0.1
PAGES = 10_000
PAGE_TOKENS = 16


@dataclasses.dataclass(slots=True)
class Traffic:
    per_s: float
    prompt: int
    output: int


@dataclasses.dataclass(slots=True)
class Speeds:
    prefill: float = 20_000.0
    """Tokens a second."""
    step_s: float = 0.01
    """Of a decode step, and..."""
    slope_s: float = 0.0001
    """... for each request in it."""
    batch: int = 64
    start_s: float = 20.0


@dataclasses.dataclass(slots=True)
class _Request:
    prompt: float
    output: float
    came_at: float
    to_compute: float
    to_decode: float


class Replica:
    def __init__(self, role: Role, speeds: Speeds, ready_at: float) -> None:
        self.role = role
        self.speeds = speeds
        self.ready_at = ready_at
        self.draining = False
        self.prompts: deque[_Request] = deque()
        self.decoding: list[_Request] = []
        self.waiting: deque[_Request] = deque()
        self.arrived = 0
        self.to_compute = 0.0
        self.prompt_tokens = self.prompt_s = 0.0
        self.steps = self.step_tokens = self.decode_s = 0.0

    @property
    def num_requests(self) -> int:
        return len(self.prompts) + len(self.decoding) + len(self.waiting)

    def queue(self, request: _Request) -> None:
        request.to_compute = request.prompt
        self.to_compute += request.prompt
        self.prompts.append(request)

    def restart(self) -> list[_Request]:
        """All is lost, counters too; the requests are given back."""
        lost = [*self.prompts, *self.decoding, *self.waiting]
        self.__init__(self.role, self.speeds, self.ready_at)  # type: ignore[misc]
        return lost

    def run(self, seconds: float) -> list[_Request]:
        """Prompts first, then decode steps in what is left. Returns those whose prompts are
        done."""
        left, done = seconds, []
        while self.prompts and left > 0:
            first = self.prompts[0]
            tokens = min(first.to_compute, left * self.speeds.prefill)
            first.to_compute -= tokens
            self.to_compute -= tokens
            left -= tokens / self.speeds.prefill
            self.prompt_tokens += tokens
            self.prompt_s += tokens / self.speeds.prefill
            if first.to_compute <= 1e-6:
                done.append(self.prompts.popleft())
        while self.waiting and len(self.decoding) < self.speeds.batch:
            self.decoding.append(self.waiting.popleft())
        if self.decoding and left > 0:
            size = len(self.decoding)
            steps = left / (self.speeds.step_s + self.speeds.slope_s * size)
            self.steps += steps
            self.step_tokens += steps * size
            self.decode_s += left
            for request in self.decoding:
                request.to_decode -= steps
            self.decoding = [each for each in self.decoding if each.to_decode > 0]
        return done

    def load(self, handovers_in: int) -> ReplicaLoad:
        held = [*self.decoding, *self.waiting]
        used = int(sum((each.prompt + each.output) / PAGE_TOKENS for each in held))
        return ReplicaLoad(
            waiting=len(self.waiting) + max(0, len(self.prompts) - 1),
            running=len(self.decoding) + min(1, len(self.prompts)),
            handovers_in=handovers_in,
            waiting_tokens=int(self.to_compute),
            pages_free=(max(0, PAGES - used),),
            pages_cached=(0,),
            pages_used=(min(used, PAGES),),
            arrived=self.arrived,
            steps=int(self.steps + self.prompt_s / 0.01),
            prompt_step_tokens=int(self.prompt_tokens),
            prompt_step_s=self.prompt_s,
            decode_steps=int(self.steps),
            decode_step_tokens=int(self.step_tokens),
            decode_step_s=self.decode_s,
            decode_s_per_request=self.speeds.slope_s if self.steps else 0.0,
        )


class LoadModel:
    """`run` moves time on; after it, what the planner wanted is in `history`."""

    def __init__(
        self,
        planner: Planner,
        replicas: dict[Role, int],
        speeds: Speeds | None = None,
        seed: int | None = None,
    ) -> None:
        """`seed`: of exponential gaps between arrivals; None: even gaps."""
        self.now = 0.0
        self.planner = planner
        self.speeds = speeds or Speeds()
        self.history: list[tuple[float, dict[Role, int]]] = []
        self.ttft: list[tuple[float, float]] = []
        """(arrival, seconds) of each prompt that was computed."""
        self.refused = 0
        self._random = random.Random(seed) if seed is not None else None
        self._numbers = itertools.count()
        self._next_arrival = 0.0
        self.replicas: dict[str, Replica] = {}
        for role, number in replicas.items():
            for _ in range(number):
                self._add(role, 0.0)

    def _add(self, role: Role, ready_at: float) -> None:
        self.replicas[f"{role}-{next(self._numbers)}"] = Replica(role, self.speeds, ready_at)

    def ready(self, role: Role) -> list[Replica]:
        return [
            each
            for each in self.replicas.values()
            if each.role == role and each.ready_at <= self.now and not each.draining
        ]

    def run(self, traffic: Traffic, seconds: float) -> None:
        self._next_arrival = max(self._next_arrival, self.now)
        end = self.now + seconds
        while self.now < end - 1e-9:
            while traffic.per_s and self._next_arrival < self.now + TICK_S:
                gap = 1.0 if self._random is None else self._random.expovariate(1.0)
                self._arrive(traffic)
                self._next_arrival += gap / traffic.per_s
            for replica in list(self.replicas.values()):
                for request in replica.run(TICK_S):
                    self.ttft.append((request.came_at, self.now + TICK_S - request.came_at))
                    self._decode(request, replica)
            self.now += TICK_S
            if abs(self.now - round(self.now)) < TICK_S / 2:
                self._plan()

    def _arrive(self, traffic: Traffic) -> None:
        request = _Request(traffic.prompt, traffic.output, self.now, traffic.prompt, traffic.output)
        takers = self.ready("both") or self.ready("decode")
        if not takers:
            self.refused += 1
            return
        decode = min(takers, key=lambda each: each.num_requests)
        decode.arrived += 1
        prefill = min(
            self.ready("prefill"),
            key=lambda each: each.to_compute,
            default=decode,
        )
        if prefill is not decode:
            prefill.arrived += 1
        prefill.queue(request)

    def _decode(self, request: _Request, prefill: Replica) -> None:
        if prefill.role != "prefill":
            prefill.waiting.append(request)
        elif takers := self.ready("decode"):
            min(takers, key=lambda each: each.num_requests).waiting.append(request)

    def kill(self, name: str, for_s: float) -> None:
        """Its requests start again elsewhere."""
        replica = self.replicas[name]
        replica.ready_at = self.now + for_s
        for request in replica.restart():
            others = self.ready("prefill") or self.ready("both")
            min(others, key=lambda each: each.num_requests).queue(request)

    def _plan(self) -> None:
        handovers = sum(len(each.prompts) for each in self.replicas.values())
        shares = len(self.ready("decode")) or 1
        seen = {
            name: Observed(
                each.role,
                each.load(handovers // shares if each.role == "decode" else 0),
                each.draining,
            )
            for name, each in self.replicas.items()
            if each.ready_at <= self.now
        }
        self.planner.observe(seen, self.now, self.refused)
        self.refused = 0
        wanted = self.planner.desired(self.now)
        self.history.append((self.now, wanted))
        for role, number in wanted.items():
            mine = {n: each for n, each in self.replicas.items() if each.role == role}
            staying = [n for n, each in mine.items() if not each.draining]
            for _ in range(number - len(staying)):
                self._add(role, self.now + self.speeds.start_s)
            for name in staying[number:]:
                mine[name].draining = True
        gone = [n for n, each in self.replicas.items() if each.draining and not each.num_requests]
        for name in gone:
            del self.replicas[name]

    # -------------------------------------------------------------------------------------- results

    @property
    def wanted(self) -> dict[Role, int]:
        return self.history[-1][1]

    def numbers(self, role: Role, since: float = 0.0) -> list[int]:
        return [wanted[role] for at, wanted in self.history if at > since]

    def changes(self, since: float = 0.0) -> int:
        seen = [wanted for at, wanted in self.history if at > since]
        return sum(a != b for a, b in itertools.pairwise(seen))

    def mean_ttft(self, since: float) -> float:
        times = [seconds for came_at, seconds in self.ttft if came_at > since]
        return sum(times) / len(times)
