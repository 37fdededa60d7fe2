"""Replicas of many ranks: any tensor, pipeline and context parallelism on either side, with several
steps in flight in a pipeline, with faults and a host tier. Exact tokens, and every byte of every
page in its place on every rank that is to have it."""

from __future__ import annotations

import random

import pytest
from cache_world import SimKeeper, SimStorage
from cluster_sim import PAGE, Faults, SimReplica, Simulation, reference

from pd.spec import CacheSpec, HostCacheSpec, StorageCacheSpec
from transfer.layout import LayerGroup
from transfer.topology import Topology

FULL = LayerGroup("full", (0, 2), 2, 1)
SLIDING = LayerGroup("sliding", (1, 3), 3, 1, window=10)
LATENT = LayerGroup("latent", (0, 1), 1, 1)
MANY_HEADS = LayerGroup("full", (0, 1), 6, 1)
GROUPS = ((FULL, SLIDING), (FULL, SLIDING), (MANY_HEADS,), (LATENT,))
NAMES = ("prefill-0", "prefill-1", "decode-0", "decode-1")


def make_topology(rng: random.Random) -> Topology:
    return Topology(tp=rng.choice((1, 1, 2, 3, 4)), pp=rng.choice((1, 2)), cp=rng.choice((1, 2, 3)))


def make_replicas(
    rng: random.Random, verify: bool = False, cache: CacheSpec | None = None
) -> list[SimReplica]:
    groups = rng.choice(GROUPS)

    def replica(name: str) -> SimReplica:
        topology = make_topology(rng)
        usable = rng.choice((23, 30, 100))
        return SimReplica(
            name,
            pages=1 + -(-usable // topology.cp),
            max_batch_tokens=rng.choice((3, 8, 64)),
            max_running=rng.choice((2, 8)),
            local=rng.choice((0, 6)),
            verify=verify,
            groups=groups,
            cache=cache or CacheSpec(),
            token_seconds=rng.choice((0.0, 0.1)) if cache else 0.0,
            topology=topology,
        )

    return [replica(name) for name in NAMES]


def make_requests(
    rng: random.Random, simulation: Simulation, count: int
) -> dict[str, tuple[list[int], int, str]]:
    """Prompts of 1 to 60 tokens, half of them sharing a prefix with another."""
    requests: dict[str, tuple[list[int], int, str]] = {}
    for number in range(count):
        prompt = [rng.randrange(97) for _ in range(rng.randint(1, 40))]
        if requests and rng.random() < 0.5:
            base = rng.choice(list(requests.values()))[0]
            prompt = base[: rng.randint(1, len(base))] + prompt[:20]
        request_id, max_tokens = f"r{number}", rng.randint(1, 16)
        decode, prefill = rng.choice(NAMES[2:]), rng.choice((*NAMES[:2], *NAMES[:2], ""))
        requests[request_id] = (prompt, max_tokens, decode)
        simulation.at(
            rng.random() * 150,
            lambda r=request_id, p=prompt, m=max_tokens, d=decode, f=prefill: simulation.generate(
                r, p, m, d, f
            ),
        )
    return requests


def check_idle(simulation: Simulation) -> None:
    for replica in simulation.replicas.values():
        if replica.alive:
            replica.leader.check_integrity()
            assert replica.leader.is_idle
            assert not any(replica.leader.load().pages_used)
    for keeper in simulation.keepers.values():
        keeper.check_integrity()
        assert keeper.is_idle


@pytest.mark.parametrize("seed", range(40))
def test_every_request_gets_its_tokens(seed: int) -> None:
    rng = random.Random(seed)
    simulation = Simulation(seed, make_replicas(rng, verify=seed % 4 == 0))
    requests = make_requests(rng, simulation, 16)
    simulation.run()
    for request_id, (prompt, max_tokens, _) in requests.items():
        assert simulation.reasons(request_id) == ["length"]
        assert simulation.tokens(request_id) == reference(prompt, max_tokens)
    assert simulation.warnings == []
    check_idle(simulation)


@pytest.mark.parametrize("seed", range(40))
def test_whatever_fails_requests_get_their_tokens(seed: int) -> None:
    """One of a page's writes fails, goes wrong or has no end, while others land; replicas die and
    start again; clients leave."""
    rng = random.Random(1000 + seed)
    verify = rng.random() < 0.4
    faults = Faults(
        lose_messages=rng.choice((0.0, 0.15)),
        repeat_messages=rng.choice((0.0, 0.2)),
        fail_writes=rng.choice((0.0, 0.02, 0.1)),
        stick_writes=rng.choice((0.0, 0.0, 0.01)),
        corrupt_writes=0.02 if verify else 0.0,
    )
    simulation = Simulation(seed, make_replicas(rng, verify), faults)
    requests = make_requests(rng, simulation, 20)
    aborted = {request_id for request_id in requests if rng.random() < 0.2}
    for request_id in aborted:
        decode = requests[request_id][2]
        when = rng.random() * 200
        simulation.at(when, lambda r=request_id, d=decode: simulation.abort(r, d))
    dead = set()
    for name in NAMES[:3]:
        if rng.random() < 0.4:
            dead.add(name)
            restart = rng.random() < 0.7
            simulation.at(rng.random() * 180, lambda n=name, r=restart: simulation.kill(n, r))
    simulation.run()
    for request_id, (prompt, max_tokens, decode) in requests.items():
        tokens, reasons = simulation.tokens(request_id), simulation.reasons(request_id)
        expected = reference(prompt, max_tokens)
        assert tokens == expected[: len(tokens)]
        if decode not in dead:
            assert reasons == ["length"] or (request_id in aborted and reasons == ["abort"])
            assert reasons != ["length"] or tokens == expected
    check_idle(simulation)


def run_with_a_host_tier(seed: int) -> int:
    """Pages copied from it."""
    rng = random.Random(2000 + seed)
    storage = StorageCacheSpec(backend="memory", prefetch=rng.choice(("timeout", "wait_complete")))
    write = rng.choice(("write_through", "write_back"))
    cache = CacheSpec(host=HostCacheSpec(memory=1 << 20, write=write), storage=storage)
    replicas = make_replicas(rng, cache=cache)
    keeper = SimKeeper("cache-0", NAMES, replicas[0].groups, PAGE, 60, SimStorage())
    faults = Faults(fail_copies=rng.choice((0.0, 0.1)))
    simulation = Simulation(seed, replicas, faults, [keeper])
    requests = make_requests(rng, simulation, 24)
    simulation.run()
    for request_id, (prompt, max_tokens, _) in requests.items():
        assert simulation.reasons(request_id) == ["length"]
        assert simulation.tokens(request_id) == reference(prompt, max_tokens)
    check_idle(simulation)
    return sum(replica.leader.load().host_pages_in for replica in replicas)


def test_replicas_of_any_topology_share_a_host_tier() -> None:
    num_in = 0
    for seed in range(10):
        try:
            num_in += run_with_a_host_tier(seed)
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
    assert num_in > 40
