"""Replicas with a host tier, and a storage behind it, under a virtual clock: exact tokens, whatever
becomes of the keeper, its messages, its copies and its storage."""

from __future__ import annotations

import dataclasses
import random

import pytest
from cache_world import SimKeeper, SimStorage, StorageFaults
from cluster_sim import GROUPS, PAGE, Faults, SimReplica, Simulation, reference

from pd.spec import CacheSpec, HostCacheSpec, StorageCacheSpec
from transfer.layout import LayerGroup

LATENT = LayerGroup("latent", (0,), 1, 1)
SLIDING = LayerGroup("sliding", (0,), 1, 1, window=10)
NAMES = ("prefill-0", "prefill-1", "decode-0", "decode-1")
HIT_SEEDS = range(12)
FAULT_SEEDS = range(45)
WRITES = ("write_through", "write_through_selective", "write_back")


@dataclasses.dataclass
class Turn:
    request_id: str
    prompt: list[int]
    max_tokens: int
    when: float
    decode: str
    prefill: str


def make_turns(rng: random.Random, conversations: int, pause: float) -> list[Turn]:
    """Conversations of some turns; each continues the one before it, its reply included. Half of
    them have the same beginning."""
    turns = []
    system = [rng.randrange(97) for _ in range(12)]
    for number in range(conversations):
        tokens = list(system) if rng.random() < 0.5 else []
        when = rng.random() * 150
        for turn in range(rng.randint(2, 4)):
            tokens += [rng.randrange(97) for _ in range(rng.randint(4, 12))]
            max_tokens = rng.randint(1, 8)
            decode, prefill = f"decode-{rng.randrange(2)}", f"prefill-{rng.randrange(2)}"
            turns.append(Turn(f"c{number}t{turn}", list(tokens), max_tokens, when, decode, prefill))
            tokens += reference(tokens, max_tokens)
            when += pause * (0.5 + rng.random())
    return turns


def make_cache(rng: random.Random) -> CacheSpec:
    write = rng.choice(("write_through", "write_through", "write_through_selective", "write_back"))
    storage = StorageCacheSpec(
        backend="memory",
        prefetch=rng.choice(("timeout", "best_effort", "wait_complete")),
        prefetch_timeout=rng.choice((1.0, 30.0)),
    )
    return CacheSpec(host=HostCacheSpec(memory=1 << 20, write=write), storage=storage)


def make_simulation(
    seed: int,
    rng: random.Random,
    cache: CacheSpec,
    faults: Faults,
    storage: SimStorage | None,
    host_pages: int,
) -> Simulation:
    """Two replicas of each role, on one node or on two, which share the storage."""
    groups = rng.choice((GROUPS, GROUPS, GROUPS[:1], (SLIDING,), (LATENT,)))
    replicas = [
        SimReplica(
            name,
            pages=rng.choice((25, 25, 40)),
            max_batch_tokens=rng.choice((4, 16, 64)),
            max_running=rng.choice((2, 8)),
            local=rng.choice((0, 0, 6)),
            verify=faults.corrupt_writes > 0,
            groups=groups,
            cache=cache,
            token_seconds=rng.choice((0.0, 0.1)),
        )
        for name in NAMES
    ]
    nodes = rng.choice(((NAMES,), (NAMES[::2], NAMES[1::2])))
    keepers = [
        SimKeeper(f"cache-{number}", names, groups, PAGE, host_pages, storage)
        for number, names in enumerate(nodes)
    ]
    return Simulation(seed, replicas, faults, keepers)


def schedule(simulation: Simulation, turn: Turn, timeout: float = 1e5) -> None:
    simulation.at(
        turn.when,
        lambda: simulation.generate(
            turn.request_id, turn.prompt, turn.max_tokens, turn.decode, turn.prefill, timeout
        ),
    )


def check_idle(simulation: Simulation) -> None:
    for replica in simulation.replicas.values():
        if replica.alive:
            replica.leader.check_integrity()
            assert replica.leader.is_idle
            assert not any(replica.leader.load().pages_used)
    for keeper in simulation.keepers.values():
        if keeper.alive:
            keeper.check_integrity()
            assert keeper.is_idle


def check_tokens(simulation: Simulation, turns: list[Turn]) -> None:
    for turn in turns:
        assert simulation.reasons(turn.request_id) == ["length"]
        assert simulation.tokens(turn.request_id) == reference(turn.prompt, turn.max_tokens)


def pages_in(simulation: Simulation) -> int:
    """Copied from the host tier, by replicas that are there now."""
    return sum(replica.leader.load().host_pages_in for replica in simulation.replicas.values())


def run_conversations(seed: int) -> tuple[int, int, int]:
    """(pages copied from the host tier, objects read from storage, tokens that requests said they
    had from the host tier)."""
    rng = random.Random(seed)
    storage = SimStorage() if rng.random() < 0.5 else None
    host_pages = 30 if storage is not None else 300
    cache = make_cache(rng)
    simulation = make_simulation(seed, rng, cache, Faults(), storage, host_pages)
    turns = make_turns(rng, 10, 120.0)
    for turn in turns:
        schedule(simulation, turn)
    simulation.run()
    check_tokens(simulation, turns)
    assert simulation.warnings == []
    check_idle(simulation)
    stats = [
        output.stats
        for turn in turns
        for output in simulation.outputs[turn.request_id]
        if output.finish_reason is not None
    ]
    from_host = sum(each.cached_tokens_host for each in stats if each is not None)
    return pages_in(simulation), storage.num_hits if storage is not None else 0, from_host


def test_conversations_find_their_pages_in_the_host_tier_and_in_storage() -> None:
    num_in = num_read = num_tokens = 0
    for seed in HIT_SEEDS:
        try:
            one_in, one_read, one_tokens = run_conversations(seed)
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
        num_in, num_read, num_tokens = num_in + one_in, num_read + one_read, num_tokens + one_tokens
    assert num_in > 80
    assert num_read > 40
    assert num_tokens > 200


@pytest.mark.parametrize("seed", range(8))
def test_pages_are_their_tenants_in_all_tiers_and_quotas_hold(seed: int) -> None:
    """Prefill and decode replicas alike; one tenant has a small quota, another none."""
    rng = random.Random(900 + seed)
    cache = CacheSpec(host=HostCacheSpec(memory=1 << 20, write=WRITES[seed % len(WRITES)]))
    simulation = make_simulation(seed, rng, cache, Faults(), None, 300)
    has_tenants = any(group.kind != "sliding" for group in simulation.replicas[NAMES[0]].groups)
    for keeper in simulation.keepers.values():
        if has_tenants:
            keeper.index.set_quota("poor", 6)
    turns = make_turns(rng, 8, 60.0)
    for turn in turns:
        tenant = "poor" if turn.request_id < "c4" else "rich"
        simulation.at(
            turn.when,
            lambda t=turn, tenant=tenant: simulation.generate(
                t.request_id, t.prompt, t.max_tokens, t.decode, t.prefill, tenant=tenant
            ),
        )
    simulation.run()
    check_tokens(simulation, turns)
    check_idle(simulation)
    if not has_tenants:
        return
    indexes = [replica.leader.index for replica in simulation.replicas.values()]
    for index in indexes:
        assert set(index.tenant_pages()) <= {"poor", "rich"}
        assert sum(index.tenant_pages().values()) == index.num_cached(0)
    assert set().union(*(index.tenant_pages() for index in indexes)) == {"poor", "rich"}
    hosts = [keeper.index for keeper in simulation.keepers.values()]
    for index in hosts:
        assert sum(index.tenant_pages().values()) == index.num_cached(0)
        assert index.tenant_pages().get("poor", 0) <= 6
    assert sum(index.tenant_pages().get("rich", 0) for index in hosts) > 6


@pytest.mark.parametrize("seed", FAULT_SEEDS)
def test_whatever_fails_requests_get_their_tokens_and_nothing_is_left(seed: int) -> None:
    """Messages are lost, repeated and overtake each other; copies fail; keepers and replicas die;
    storage fails, forgets and hangs, or is detached; clients leave."""
    rng = random.Random(5000 + seed)
    faults = Faults(
        lose_messages=rng.choice((0.0, 0.15)),
        repeat_messages=rng.choice((0.0, 0.2)),
        fail_writes=rng.choice((0.0, 0.1)),
        stick_writes=rng.choice((0.0, 0.05)),
        corrupt_writes=rng.choice((0.0, 0.0, 0.2)),
        fail_copies=rng.choice((0.0, 0.2)),
    )
    storage = None
    if rng.random() < 0.7:
        storage_faults = StorageFaults(
            fail=rng.choice((0.0, 0.1)),
            forget=rng.choice((0.0, 0.1)),
            hang=rng.choice((0.0, 0.0, 0.1)),
        )
        storage = SimStorage(storage_faults)
    cache = make_cache(rng)
    host_pages = rng.choice((8, 40, 300, 300))
    simulation = make_simulation(seed, rng, cache, faults, storage, host_pages)
    turns = make_turns(rng, 14, 100.0)
    timeouts, aborts, dead = {}, set(), set()
    for turn in turns:
        timeouts[turn.request_id] = timeout = 40.0 if rng.random() < 0.1 else 1e5
        schedule(simulation, turn, timeout)
        if rng.random() < 0.25:
            aborts.add(turn.request_id)
            simulation.at(
                turn.when + rng.random() * 25,
                lambda t=turn: simulation.abort(t.request_id, t.decode),
            )
    for name in simulation.keepers:
        for _ in range(rng.choice((0, 1, 2))):
            restart = rng.random() < 0.8
            simulation.at(
                rng.random() * 300, lambda n=name, r=restart: simulation.kill_keeper(n, r)
            )
        if rng.random() < 0.2:
            simulation.at(rng.random() * 300, lambda n=name: simulation.detach(n))
    for name in NAMES[:3]:
        for _ in range(rng.choice((0, 0, 1))):
            dead.add(name)
            restart = rng.random() < 0.7
            simulation.at(rng.random() * 300, lambda n=name, r=restart: simulation.kill(n, r))
    simulation.run()
    for turn in turns:
        tokens, reasons = simulation.tokens(turn.request_id), simulation.reasons(turn.request_id)
        expected = reference(turn.prompt, turn.max_tokens)
        assert tokens == expected[: len(tokens)]
        if turn.decode in dead:
            continue
        assert len(reasons) == 1
        assert reasons[0] != "length" or tokens == expected
        if reasons[0] == "error":
            error = simulation.outputs[turn.request_id][-1].error
            assert timeouts[turn.request_id] < 1e5
            assert error.startswith("timed out"), error
        else:
            assert reasons[0] == "length" or turn.request_id in aborts
    check_idle(simulation)
