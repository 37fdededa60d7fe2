"""Whole replicas under a virtual clock: exact tokens, one end per request, nothing left behind."""

from __future__ import annotations

import random

import pytest
from cluster_sim import SimReplica, Simulation, reference


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


def make_cluster(rng: random.Random) -> list[SimReplica]:
    def replica(name: str) -> SimReplica:
        return SimReplica(
            name,
            pages=rng.choice((24, 40, 200)),
            max_batch_tokens=rng.choice((3, 8, 64)),
            max_running=rng.choice((2, 8)),
            local=rng.choice((0, 6)),
        )

    return [replica(name) for name in ("prefill-0", "prefill-1", "decode-0", "decode-1")]


@pytest.mark.parametrize("seed", range(60))
def test_every_request_gets_its_tokens_and_gives_everything_back(seed: int) -> None:
    rng = random.Random(seed)
    replicas = make_cluster(rng)
    simulation = Simulation(seed, replicas)
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
    for replica in replicas:
        assert replica.leader.is_idle


@pytest.mark.parametrize("seed", range(60))
def test_aborts_failures_and_deaths_leave_nothing(seed: int) -> None:
    rng = random.Random(1000 + seed)
    replicas = make_cluster(rng)
    simulation = Simulation(
        seed,
        replicas,
        lose_writes=rng.choice((0.0, 0.05)),
        lose_messages=rng.choice((0.0, 0.1)),
    )
    requests = {}
    for number, prompt in enumerate(make_prompts(rng, 40)):
        request_id, max_tokens = f"r{number}", rng.randint(1, 20)
        decode = f"decode-{rng.randrange(2)}"
        prefill = rng.choice(("prefill-0", "prefill-1"))
        requests[request_id] = (prompt, max_tokens, decode)
        when = rng.random() * 200
        timeout = rng.choice((500.0, 40.0))
        simulation.at(
            when,
            lambda r=request_id, p=prompt, m=max_tokens, d=decode, f=prefill, t=timeout: (
                simulation.generate(r, p, m, d, f, t)
            ),
        )
        if rng.random() < 0.4:
            simulation.at(
                when + rng.random() * 60, lambda r=request_id, d=decode: simulation.abort(r, d)
            )
    for when in range(0, 1500, 7):
        simulation.at(when, simulation.tick_all)
    dead = rng.choice(("", "prefill-0", "decode-0"))
    if dead:
        simulation.at(rng.random() * 200, lambda: simulation.kill(dead))
    simulation.run()
    for request_id, (prompt, max_tokens, decode) in requests.items():
        tokens, reasons = simulation.tokens(request_id), simulation.reasons(request_id)
        expected = reference(prompt, max_tokens)
        assert tokens == expected[: len(tokens)]
        if decode != dead:
            assert len(reasons) == 1
            assert reasons[0] != "length" or tokens == expected
    for replica in replicas:
        if replica.alive:
            assert replica.leader.is_idle
