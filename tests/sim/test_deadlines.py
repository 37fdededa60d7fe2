"""A request's deadline ends it in whatever stage it is, and the error names the stage."""

from __future__ import annotations

from typing import Any

import pytest
from cluster_sim import GROUPS, SimReplica, Simulation

PROMPT = list(range(30))


def make(name: str, **options: Any) -> SimReplica:
    defaults = {"pages": 100, "max_batch_tokens": 64, "max_running": 4, "local": 0}
    return SimReplica(name, **{**defaults, **options}, groups=GROUPS[:1])  # type: ignore[arg-type]


def end_of(simulation: Simulation, request_id: str) -> str:
    simulation.run()
    assert simulation.reasons(request_id) == ["error"]
    for replica in simulation.replicas.values():
        if replica.alive:
            replica.leader.check_integrity()
            assert replica.leader.is_idle
    return simulation.outputs[request_id][-1].error


def test_the_queue_for_a_row() -> None:
    simulation = Simulation(0, [make("decode-0", max_running=1)])
    simulation.generate("long", [1] * 9, 40, "decode-0", "")
    simulation.generate("late", PROMPT, 5, "decode-0", "", timeout=20.0)
    assert end_of(simulation, "late") == "timed out in the queue"
    assert simulation.reasons("long") == ["length"]


def test_the_queue_for_pages() -> None:
    simulation = Simulation(0, [make("prefill-0"), make("decode-0", pages=16)])
    simulation.generate("long", [1] * 40, 20, "decode-0", "prefill-0")
    simulation.at(
        20.0,
        lambda: simulation.generate("late", [2] * 40, 5, "decode-0", "prefill-0", timeout=20.0),
    )
    assert end_of(simulation, "late") == "timed out in the queue"
    assert simulation.reasons("long") == ["length"]


def test_prefill() -> None:
    simulation = Simulation(0, [make("decode-0", max_batch_tokens=1)])
    simulation.generate("late", PROMPT, 5, "decode-0", "", timeout=30.0)
    assert end_of(simulation, "late") == "timed out in prefill"


@pytest.mark.parametrize("what", ["its queue", "its prefill", "the transfer"])
def test_the_handover(what: str) -> None:
    options: dict[str, Any] = {}
    if what == "its queue":
        options = {"max_running": 1, "max_batch_tokens": 1}
    elif what == "its prefill":
        options = {"max_batch_tokens": 1}
    simulation = Simulation(0, [make("prefill-0", **options), make("decode-0")])
    if what == "its queue":
        simulation.generate("first", [1] * 60, 2, "decode-0", "prefill-0")
    if what == "the transfer":
        simulation.faults.stick_writes = 1.0
        simulation.at(60.0, lambda: setattr(simulation.faults, "stick_writes", 0.0))
    simulation.at(
        10.0,
        lambda: simulation.generate("late", PROMPT, 5, "decode-0", "prefill-0", timeout=28.0),
    )
    assert end_of(simulation, "late") == "timed out in the handover from prefill-0"


def test_decoding() -> None:
    simulation = Simulation(0, [make("prefill-0"), make("decode-0")])
    simulation.generate("late", PROMPT, 200, "decode-0", "prefill-0", timeout=100.0)
    assert end_of(simulation, "late") == "timed out in decoding"
    assert len(simulation.tokens("late")) > 1
