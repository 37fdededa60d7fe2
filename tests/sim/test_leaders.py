"""Whole replicas under a virtual clock: exact tokens, one end per request, nothing left behind."""

from __future__ import annotations

import random

import pytest
from cluster_sim import GROUPS, Faults, SimReplica, Simulation, reference


def make_prompts(rng: random.Random, count: int) -> list[list[int]]:
    """Prompts of 1 to 60 tokens, half of them sharing a prefix with another."""
    prompts: list[list[int]] = []
    for _ in range(count):
        fresh = [rng.randrange(97) for _ in range(rng.randint(1, 40))]
        if prompts and rng.random() < 0.5:
            base = rng.choice(prompts)
            fresh = base[: rng.randint(1, len(base))] + fresh[:20]
        prompts.append(fresh)
    return prompts


def make_cluster(rng: random.Random, verify: bool = False) -> list[SimReplica]:
    groups = rng.choice((GROUPS, GROUPS[:1]))

    def replica(name: str) -> SimReplica:
        return SimReplica(
            name,
            pages=rng.choice((24, 40, 200)),
            max_batch_tokens=rng.choice((3, 8, 64)),
            max_running=rng.choice((2, 8)),
            local=rng.choice((0, 6)),
            verify=verify,
            groups=groups,
        )

    return [replica(name) for name in ("prefill-0", "prefill-1", "decode-0", "decode-1")]


def check_idle(simulation: Simulation) -> None:
    for replica in simulation.replicas.values():
        if replica.alive:
            replica.leader.check_integrity()
            assert replica.leader.is_idle
            assert not any(replica.leader.load().pages_used)


@pytest.mark.parametrize("seed", range(60))
def test_every_request_gets_its_tokens_and_gives_everything_back(seed: int) -> None:
    rng = random.Random(seed)
    simulation = Simulation(seed, make_cluster(rng, verify=seed % 4 == 0))
    requests = {}
    for number, prompt in enumerate(make_prompts(rng, 30)):
        request_id, max_tokens = f"r{number}", rng.randint(1, 20)
        decode = f"decode-{rng.randrange(2)}"
        prefill = rng.choice(("prefill-0", "prefill-1", ""))
        requests[request_id] = (prompt, max_tokens)
        simulation.at(
            rng.random() * 200,
            lambda r=request_id, p=prompt, m=max_tokens, d=decode, f=prefill: simulation.generate(
                r, p, m, d, f
            ),
        )
    simulation.run()
    for request_id, (prompt, max_tokens) in requests.items():
        assert simulation.reasons(request_id) == ["length"]
        assert simulation.tokens(request_id) == reference(prompt, max_tokens)
    assert simulation.warnings == []
    check_idle(simulation)


@pytest.mark.parametrize("seed", range(90))
def test_whatever_fails_requests_get_their_tokens_and_nothing_is_left(seed: int) -> None:
    """Messages are lost, repeated and overtake each other, writes fail, hang or go wrong, replicas
    die and start again; clients leave. Only a deadline, or the decode replica's death, is an
    error."""
    rng = random.Random(1000 + seed)
    verify = rng.random() < 0.4
    faults = Faults(
        lose_messages=rng.choice((0.0, 0.15)),
        repeat_messages=rng.choice((0.0, 0.2)),
        fail_writes=rng.choice((0.0, 0.0, 0.1, 0.4)),
        stick_writes=rng.choice((0.0, 0.0, 0.05)),
        corrupt_writes=0.2 if verify else 0.0,
    )
    simulation = Simulation(seed, make_cluster(rng, verify), faults)
    requests = {}
    for number, prompt in enumerate(make_prompts(rng, 40)):
        request_id, max_tokens = f"r{number}", rng.randint(1, 20)
        decode = f"decode-{rng.randrange(2)}"
        prefill = rng.choice(("prefill-0", "prefill-1"))
        when = rng.random() * 200
        timeout = 40.0 if rng.random() < 0.2 else 1e5
        aborts = rng.random() < 0.3
        requests[request_id] = (prompt, max_tokens, decode, timeout, aborts)
        simulation.at(
            when,
            lambda r=request_id, p=prompt, m=max_tokens, d=decode, f=prefill, t=timeout: (
                simulation.generate(r, p, m, d, f, t)
            ),
        )
        if aborts:
            simulation.at(
                when + rng.random() * 60, lambda r=request_id, d=decode: simulation.abort(r, d)
            )
    dead = set()
    for name in ("prefill-0", "prefill-1", "decode-0"):
        for _ in range(rng.choice((0, 0, 1, 2))):
            dead.add(name)
            restart = rng.random() < 0.7
            simulation.at(
                rng.random() * 220,
                lambda n=name, r=restart: simulation.kill(n, r),
            )
    simulation.run()
    for request_id, (prompt, max_tokens, decode, timeout, aborts) in requests.items():
        tokens, reasons = simulation.tokens(request_id), simulation.reasons(request_id)
        expected = reference(prompt, max_tokens)
        assert tokens == expected[: len(tokens)]
        if decode in dead:
            continue
        assert len(reasons) == 1
        assert reasons[0] != "length" or tokens == expected
        last = simulation.outputs[request_id][-1]
        if reasons[0] == "error":
            assert timeout < 1e5
            assert last.error.startswith("timed out"), last.error
        else:
            assert reasons[0] == "length" or aborts
    check_idle(simulation)


def test_loads_tell_what_came_and_what_steps_took() -> None:
    """Prompts of 40 tokens, 8 of output: the first is sampled by the prefill replica."""
    sizes = {"pages": 200, "max_batch_tokens": 64, "max_running": 8, "local": 0}
    simulation = Simulation(0, [SimReplica(name, **sizes) for name in ("prefill-0", "decode-0")])
    for number in range(5):
        prompt = [number, *range(39)]
        simulation.generate(f"r{number}", prompt, 8, "decode-0", "prefill-0")
    simulation.run()
    prefill, decode = (each.leader.load() for each in simulation.replicas.values())
    assert (prefill.arrived, decode.arrived) == (5, 5)
    assert (prefill.prompt_step_tokens, decode.prompt_step_tokens) == (200, 0)
    assert (prefill.decode_step_tokens, decode.decode_step_tokens) == (0, 35)
    assert prefill.decode_steps == 0
    assert 7 <= decode.decode_steps <= 35
