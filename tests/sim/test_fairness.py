"""Two tenants and two classes on a cluster: who waits, and for how long."""

from __future__ import annotations

import random
from typing import Any

import pytest
from cluster_sim import GROUPS, SimReplica, Simulation, reference

CLASSES = (0, 1)


class Timed(Simulation):
    """Notes when requests came and had their first and their last token."""

    def __init__(self, seed: int, replicas: list[SimReplica]) -> None:
        super().__init__(seed, replicas)
        self.came: dict[str, float] = {}
        self.first: dict[str, float] = {}

    def ask(self, when: float, request_id: str, size: int, **whose: Any) -> None:
        prompt = [self.random.randrange(97) for _ in range(size)]
        self.came[request_id] = when
        prefill = "prefill-0" if "prefill-0" in self.replicas else ""
        self.at(
            when,
            lambda: self.generate(request_id, prompt, 6, "decode-0", prefill, **whose),
        )

    def _take_outputs(self, message: Any) -> None:
        super()._take_outputs(message)
        for output in message.outputs:
            self.first.setdefault(output.request_id, self.now)

    def waits(self, name: str) -> list[float]:
        return [self.first[r] - when for r, when in self.came.items() if r.startswith(name)]


def make(with_prefill: bool) -> list[SimReplica]:
    names = ["prefill-0", "decode-0"] if with_prefill else ["decode-0"]
    return [SimReplica(name, 60, 16, 4, 0, groups=GROUPS[:1]) for name in names]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("with_prefill", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_a_flood_does_not_delay_another_tenant(seed: int, with_prefill: bool) -> None:
    alone, flooded = Timed(seed, make(with_prefill)), Timed(seed, make(with_prefill))
    for simulation in (alone, flooded):
        for number in range(5):
            simulation.ask(100.0 + 80 * number, f"single-{number}", 16, tenant="single")
    for number in range(120):
        flooded.ask(number * 0.5, f"flood-{number}", 16, tenant="flood")
    alone.run()
    flooded.run()
    # Alone, a request takes some ten seconds to its first token; the flood takes ten minutes.
    assert max(flooded.waits("flood")) > 300
    service = max(alone.waits("single"))
    assert max(flooded.waits("single")) < 6 * service
    assert mean(flooded.waits("single")) < 3 * service


@pytest.mark.parametrize("with_prefill", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_a_higher_class_goes_first_and_the_lower_one_is_served(
    seed: int, with_prefill: bool
) -> None:
    simulation = Timed(seed, make(with_prefill))
    for number in range(80):
        simulation.ask(number * 0.5, f"batch-{number}", 16, priority=1, tenant="a")
    for number in range(40):
        simulation.ask(50.0 + 8 * number, f"interactive-{number}", 16, tenant="b")
    simulation.run()
    assert mean(simulation.waits("interactive")) < mean(simulation.waits("batch")) / 4
    # While there are higher ones, some lower ones are served.
    until = max(when for name, when in simulation.came.items() if name.startswith("interactive"))
    assert any(50 < simulation.first[f"batch-{n}"] < until for n in range(80))


@pytest.mark.parametrize("seed", range(12))
def test_every_request_gets_its_tokens_whatever_its_class_and_tenant(seed: int) -> None:
    """With few pages and rows, so that sequences are preempted."""
    rng = random.Random(seed)
    replicas = [
        SimReplica(name, rng.choice((24, 40)), rng.choice((3, 8, 64)), rng.choice((2, 8)), 6)
        for name in ("prefill-0", "prefill-1", "decode-0", "decode-1")
    ]
    simulation = Simulation(seed, replicas)
    requests = {}
    for number in range(40):
        prompt = [rng.randrange(97) for _ in range(rng.randint(1, 50))]
        request_id, max_tokens = f"r{number}", rng.randint(1, 20)
        requests[request_id] = prompt, max_tokens
        to = f"decode-{rng.randrange(2)}", rng.choice(("prefill-0", "prefill-1", ""))
        whose = {"tenant": rng.choice("ab"), "priority": rng.choice(CLASSES)}
        simulation.at(
            rng.random() * 100,
            lambda r=request_id, p=prompt, m=max_tokens, t=to, w=whose: simulation.generate(
                r, p, m, *t, **w
            ),
        )
    simulation.run()
    for request_id, (prompt, max_tokens) in requests.items():
        assert simulation.reasons(request_id) == ["length"]
        assert simulation.tokens(request_id) == reference(prompt, max_tokens)
    for replica in replicas:
        replica.leader.check_integrity()
        assert replica.leader.is_idle
