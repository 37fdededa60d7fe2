"""Placement and admission: pure, so every case is a few lines."""

from __future__ import annotations

import random

import msgspec
import pytest

from pd.messages import PAGE_KEY_BYTES, PagesHeld, ReplicaLoad
from pd.router import NoReplica, Overloaded, Placement, Policy, Router
from pd.spec import Role


def make_router(**roles: str) -> Router:
    router = Router(max_queue=4)
    for name, role in roles.items():
        router.update(name, role, None)  # type: ignore[arg-type]
    return router


def test_prefill_and_decode_are_chosen_separately() -> None:
    router = make_router(d0="decode", d1="decode", p0="prefill", p1="prefill")
    router.update("d0", "decode", ReplicaLoad(running=3))
    router.update("d1", "decode", ReplicaLoad(running=2))
    router.update("p0", "prefill", ReplicaLoad(waiting_tokens=100))
    router.update("p1", "prefill", ReplicaLoad(waiting=9, waiting_tokens=90))
    assert router.place(10) == Placement("d1", "p1")


def test_own_placements_count_until_the_next_report() -> None:
    router = make_router(d0="decode", d1="decode", p0="prefill", p1="prefill")
    first = [router.place(10), router.place(10)]
    assert {placement.decode for placement in first} == {"d0", "d1"}
    assert {placement.prefill for placement in first} == {"p0", "p1"}
    router.update("d0", "decode", ReplicaLoad())
    router.update("p0", "prefill", ReplicaLoad(waiting_tokens=11))
    assert router.place(10) == Placement("d0", "p1")


def test_an_update_without_load_keeps_what_is_known() -> None:
    router = make_router(d0="decode", d1="decode")
    router.update("d0", "decode", ReplicaLoad(running=5))
    router.update("d0", "decode", None)
    assert router.place(1).decode == "d1"


def test_role_both_prefills_for_itself() -> None:
    router = make_router(b0="both", p0="prefill")
    assert router.place(5) == Placement("b0", "")


def test_decode_prefills_where_no_prefill_replica_is_up() -> None:
    router = make_router(d0="decode", p0="prefill")
    router.remove("p0")
    assert router.place(5) == Placement("d0", "")


def test_no_decode_replica() -> None:
    router = make_router(p0="prefill")
    with pytest.raises(NoReplica, match="no decode replica") as caught:
        router.place(5)
    assert caught.value.role == "decode"
    router.remove("never seen")


def test_beside_keeps_a_placement_while_its_replicas_are_up() -> None:
    router = make_router(d0="decode", d1="decode", p0="prefill", p1="prefill")
    first = router.place(10)
    assert router.place(10, beside=first) == first
    second = router.place(10)
    assert second.decode != first.decode
    assert second.prefill != first.prefill
    router.remove(first.prefill)
    assert router.place(10, beside=first).prefill == second.prefill


def test_admission_is_all_or_nothing() -> None:
    router = make_router(d0="decode")
    router.admit(3)
    with pytest.raises(Overloaded) as caught:
        router.admit(2)
    assert caught.value.retry_after_s >= 1
    assert router.in_flight == 3
    router.release()
    router.admit(2)
    assert router.in_flight == 4


# -------------------------------------------------------------------------------- what is cached


PAGE = 16


def prompt_pages(length: int, seed: int = 0) -> list[bytes]:
    rng = random.Random(seed)
    return [rng.randbytes(32) for _ in range(length)]


def tell(router: Router, replica: str, role: Role, pages: list[bytes]) -> None:
    """`replica` is up and holds these pages."""
    wanted = router.update(replica, role, None)
    assert wanted is not None
    keys = b"".join(page[:PAGE_KEY_BYTES] for page in pages)
    assert router.receive_pages(replica, PagesHeld(wanted.serial, 1, 0, True, keys), 0.0) is None


def cached_router(policy: Policy = "cost", local: int = 0, seed: str = "") -> Router:
    return Router(4, policy, PAGE, local, seed)


def test_a_prefix_is_used_where_it_saves_more_than_the_queue_costs() -> None:
    prompt = prompt_pages(10)
    for policy, waiting, expected in (
        ("cost", 100, "p1"),
        ("cost", 170, "p0"),
        ("prefix", 170, "p1"),
        ("least_loaded", 100, "p0"),
    ):
        router = cached_router(policy)  # type: ignore[arg-type]
        router.update("d0", "decode", None)
        tell_or_update(router, "p0", [])
        tell_or_update(router, "p1", prompt)
        router.update("p1", "prefill", ReplicaLoad(waiting_tokens=waiting))
        placement = router.place(10 * PAGE + 1, b"".join(prompt))
        assert placement == Placement("d0", expected), (policy, waiting)


def tell_or_update(router: Router, replica: str, pages: list[bytes]) -> None:
    if router.pages is None:
        router.update(replica, "prefill", None)
    else:
        tell(router, replica, "prefill", pages)


def test_own_placements_count_what_they_lack() -> None:
    router, prompt = cached_router(), prompt_pages(10)
    router.update("d0", "decode", None)
    tell(router, "p0", "prefill", prompt)
    tell(router, "p1", "prefill", [])
    names = [router.place(10 * PAGE + 1, b"".join(prompt)).prefill for _ in range(3)]
    assert names == ["p0"] * 3
    states = {state.name: state for state in router.replicas()}
    assert (states["p0"].placed_tokens, states["p0"].placed_requests) == (3, 3)
    router.place(50)
    assert states["p1"].placed_tokens == 50


def test_speeds_are_compared_and_unknown_ones_are_the_mean() -> None:
    router = cached_router()
    router.update("d0", "decode", None)
    router.update("p0", "prefill", ReplicaLoad(waiting_tokens=100, prefill_tokens_per_s=10.0))
    router.update("p1", "prefill", ReplicaLoad(waiting_tokens=250, prefill_tokens_per_s=30.0))
    assert router.place(10).prefill == "p1"  # 260 / 30 < 110 / 10
    router.update("p2", "prefill", ReplicaLoad(waiting_tokens=150))
    assert router.place(10).prefill == "p2"  # 160 / 20


def test_decode_goes_where_it_slows_the_least_and_the_fewest_pages_move() -> None:
    router, prompt = cached_router(), prompt_pages(10)
    router.update("p0", "prefill", ReplicaLoad(kv_seconds=1.0, kv_pages=10))
    tell(router, "d0", "decode", prompt)
    tell(router, "d1", "decode", [])
    load = ReplicaLoad(decode_tokens=100, finished=1, decode_s_per_request=0.02)
    for running, expected in ((0, "d0"), (1, "d1")):
        # 10 pages take 1 s to move, 100 steps by 0.02 s longer take 2.
        router.update("d0", "decode", msgspec.structs.replace(load, running=running))
        router.update("d1", "decode", load)
        assert router.place(10 * PAGE + 1, b"".join(prompt)).decode == expected


def test_a_decode_replica_without_free_pages_is_not_fast() -> None:
    """Whatever it has measured: others must end first."""
    router = cached_router()
    router.update("p0", "prefill", None)
    full = ReplicaLoad(
        running=1,
        decode_tokens=100,
        finished=1,
        decode_steps=100,
        decode_step_tokens=100,
        decode_step_s=1.0,
        decode_s_per_request=1e-6,
        pages_free=(1,),
        pages_cached=(1,),
        pages_used=(98,),
    )
    free = msgspec.structs.replace(full, pages_free=(90,))
    busy = msgspec.structs.replace(free, running=50)
    slow = msgspec.structs.replace(free, running=2, decode_s_per_request=0.02)
    for in_d0, expected in ((full, "d1"), (free, "d0"), (busy, "d1")):
        router.update("d0", "decode", in_d0)
        in_d1 = slow if in_d0 is busy else msgspec.structs.replace(free, running=2)
        router.update("d1", "decode", in_d1)
        assert router.place(10 * PAGE + 1).decode == expected


def test_what_is_nearly_all_cached_is_prefilled_where_it_is() -> None:
    prompt = prompt_pages(10)
    for waiting, expected in ((0, Placement("d1", "")), (1000, Placement("d0", "p0"))):
        router = cached_router(local=20)
        router.update("p0", "prefill", None)
        tell(router, "d0", "decode", [])
        tell(router, "d1", "decode", prompt)
        router.update("d1", "decode", ReplicaLoad(waiting_tokens=waiting))
        assert router.place(10 * PAGE + 20, b"".join(prompt)) == expected


def test_routers_settle_what_is_equal_differently_but_each_the_same_way() -> None:
    names = [f"p{number}" for number in range(20)]

    def first(seed: str) -> str:
        router = cached_router(seed=seed)
        router.update("d0", "decode", None)
        for name in names:
            router.update(name, "prefill", None)
        return router.place(5).prefill

    assert first("api-0") == first("api-0")
    assert len({first(f"api-{number}") for number in range(20)}) > 5


def test_equal_replicas_take_turns_by_tokens() -> None:
    """Also when reports say that all is done between any two requests."""
    router = cached_router()
    router.update("d0", "decode", None)
    names = [f"p{number}" for number in range(4)]
    placed = dict.fromkeys(names, 0)
    rng = random.Random(0)
    for _ in range(400):
        for name in names:
            router.update(name, "prefill", ReplicaLoad(pages_free=(50,), pages_cached=(50,)))
        num_tokens = rng.randrange(10, 1000)
        placed[router.place(num_tokens).prefill] += num_tokens
    assert max(placed.values()) < 1.05 * sum(placed.values()) / 4


def test_in_turn() -> None:
    router = Router(4, "round_robin")
    for number in range(3):
        router.update(f"p{number}", "prefill", ReplicaLoad(waiting_tokens=number))
        router.update(f"d{number}", "decode", ReplicaLoad(running=number))
    placements = [router.place(10) for _ in range(6)]
    for part in (placements[:3], placements[3:]):
        assert {placement.decode for placement in part} == {"d0", "d1", "d2"}
        assert {placement.prefill for placement in part} == {"p0", "p1", "p2"}
    assert router.pages is None


def test_a_replica_that_left_is_not_chosen_for_its_pages() -> None:
    router, prompt = cached_router(), prompt_pages(5)
    tell(router, "b0", "both", prompt)
    tell(router, "b1", "both", [])
    router.remove("b0")
    assert router.place(100, b"".join(prompt)).decode == "b1"
    tell(router, "b0", "both", [])  # started again, from nothing
    router.update("b0", "both", ReplicaLoad(waiting_tokens=200))
    assert router.place(100, b"".join(prompt)).decode == "b1"


@pytest.mark.parametrize("seed", range(40))
def test_the_cost_is_the_least_of_all_pairs(seed: int) -> None:
    """Against the formula, one pair after the other."""
    rng = random.Random(seed)
    router, prompt = cached_router(local=PAGE), prompt_pages(20)
    roles: dict[str, Role] = {}
    held, loads = {}, {}
    for number in range(rng.randrange(2, 14)):
        roles[f"r{number}"] = rng.choice(("prefill", "decode", "decode", "both"))
    roles["r0"] = "decode"
    for name, role in roles.items():
        held[name] = rng.choice((0, 19, 20, rng.randrange(21)))
        tell(router, name, role, prompt[: held[name]])
        loads[name] = ReplicaLoad(
            waiting=rng.randrange(3),
            running=rng.randrange(5),
            waiting_tokens=rng.randrange(2000),
            decode_tokens=60,
            finished=3,
            kv_seconds=0.5,
            kv_pages=100,
            prefill_tokens_per_s=rng.uniform(50, 100),
            decode_s_per_request=rng.uniform(0.1, 0.5),
            pages_told=1,
        )
        router.update(name, role, loads[name])
    num_tokens = 20 * PAGE + 3

    def missing(name: str) -> int:
        return num_tokens - held[name] * PAGE

    def compute(name: str) -> float:
        return (loads[name].waiting_tokens + missing(name)) / loads[name].prefill_tokens_per_s

    mean_slope = sum(load.decode_s_per_request for load in loads.values()) / len(loads)

    def cost(decode: str, prefill: str) -> float:
        load = loads[decode]
        slope = max(load.decode_s_per_request, mean_slope)
        slowdown = (load.waiting + load.running) * slope * 20
        if not prefill:
            return compute(decode) + slowdown
        return compute(prefill) + missing(decode) * 0.5 / (100 * PAGE) + slowdown

    prefills = [name for name, role in roles.items() if role == "prefill"]
    costs = {}
    for name, role in roles.items():
        if role == "both" or (role == "decode" and (not prefills or missing(name) <= PAGE)):
            costs[Placement(name, "")] = cost(name, "")
        elif role == "decode":
            costs |= {Placement(name, prefill): cost(name, prefill) for prefill in prefills}
    placement = router.place(num_tokens, b"".join(prompt))
    assert costs[placement] == pytest.approx(min(costs.values()))
