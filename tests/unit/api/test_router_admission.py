"""Objectives, classes, cohorts and draining: which requests a router refuses, and which replicas it
leaves out."""

from __future__ import annotations

import random

import pytest

from pd.messages import ReplicaLoad
from pd.router import NoReplica, Overloaded, Placement, Policy, Router
from pd.spec import ObjectivesSpec, PrioritySpec, Role

TTFT = ObjectivesSpec(ttft=1.0)
TPOT = ObjectivesSpec(tpot=0.05)
CLASSES = (PrioritySpec(share=1.0), PrioritySpec(slack=4.0, share=0.5), PrioritySpec(slack=None))
SPEED = 1000.0


def objective_router(
    objectives: ObjectivesSpec, classes: tuple[PrioritySpec, ...] = CLASSES[:1]
) -> Router:
    return Router(100, classes=classes, objectives=objectives)


def prefills(router: Router, *waiting: int, speed: float = SPEED) -> None:
    router.update("d0", "decode", ReplicaLoad())
    for number, tokens in enumerate(waiting):
        load = ReplicaLoad(waiting_tokens=tokens, prefill_tokens_per_s=speed)
        router.update(f"p{number}", "prefill", load)


def place(router: Router, num_tokens: int, priority: int = 0, now: float = 0.0) -> Placement:
    return router.place(num_tokens, priority=priority, may_refuse=True, now=now)


# ---------------------------------------------------------------------------------- the first token


def test_a_request_whose_first_token_would_be_late_is_refused() -> None:
    router = objective_router(TTFT)
    prefills(router, 700, 800)
    assert place(router, 300).prefill == "p0"  # just in time
    with pytest.raises(Overloaded, match=r"the first token is expected after 1\.1 s, of at most 1"):
        place(router, 300)
    assert place(router, 200).prefill == "p1"  # what was refused does not count


def test_retry_after_is_how_long_the_queue_takes_to_be_short_enough() -> None:
    router = objective_router(TTFT)
    prefills(router, 8200)
    with pytest.raises(Overloaded) as caught:
        place(router, 300)
    assert caught.value.retry_after_s == 8  # 8.5 s are expected: 7.5 too many
    with pytest.raises(Overloaded) as caught:
        place(router, 100_000)
    assert caught.value.retry_after_s == 9  # it would be late anyway: until nothing waits
    prefills(router, 10**9)
    with pytest.raises(Overloaded) as caught:
        place(router, 300)
    assert caught.value.retry_after_s == 60


def test_nobody_is_refused_by_an_idle_cluster_or_before_speeds_are_measured() -> None:
    router = objective_router(TTFT)
    prefills(router, 0)
    assert place(router, 100_000).prefill == "p0"
    with pytest.raises(Overloaded):
        place(router, 1)
    router = objective_router(TTFT)
    prefills(router, 10**9, speed=0.0)
    assert place(router, 100_000).prefill == "p0"


def test_without_objectives_and_for_what_was_admitted_nothing_is_refused() -> None:
    for router, may_refuse in (
        (objective_router(ObjectivesSpec()), True),
        (objective_router(TTFT), False),
    ):
        prefills(router, 10**9)
        router.place(100, may_refuse=may_refuse)


def test_the_class_has_its_slack_and_its_queue() -> None:
    router = objective_router(TTFT, CLASSES)
    router.update("d0", "decode", ReplicaLoad())
    load = ReplicaLoad(
        waiting_tokens=5000,
        waiting_tokens_by_priority=(800, 2200, 2000),
        prefill_tokens_per_s=SPEED,
    )
    router.update("p0", "prefill", load)
    # Of the first class 800 tokens wait, up to the second 3,000, up to the third 5,000.
    with pytest.raises(Overloaded):
        place(router, 201, 0)
    with pytest.raises(Overloaded):
        place(router, 1001, 1)
    place(router, 10**6, 2)
    place(router, 1000, 1)
    with pytest.raises(Overloaded):
        place(router, 1, 1)
    place(router, 200, 0)  # what was placed in lower classes does not wait before it
    with pytest.raises(Overloaded):
        place(router, 1, 0)


def test_a_late_request_goes_where_its_first_token_comes_soonest() -> None:
    """Rather than where it costs least altogether."""
    router = objective_router(TTFT)
    prefills(router, 300, 450)
    # On the first one it would push out pages that are asked for again.
    busy = ReplicaLoad(
        waiting_tokens=300,
        prefill_tokens_per_s=SPEED,
        cached_tokens=900,
        prefill_tokens=100,
        pages_free=(0,),
        pages_cached=(50,),
    )
    free = ReplicaLoad(
        waiting_tokens=450, prefill_tokens_per_s=SPEED, pages_free=(50,), pages_cached=(0,)
    )
    router.update("p0", "prefill", busy)
    router.update("p1", "prefill", free)
    assert place(router, 500).prefill == "p1"
    router.update("p1", "prefill", free)
    assert place(router, 600).prefill == "p0"
    router.update("p0", "prefill", busy)
    assert router.place(600).prefill == "p1"


# ------------------------------------------------------------------------------------ later tokens


def decodes(router: Router, *running: int) -> None:
    router.update("p0", "prefill", ReplicaLoad())
    for number, count in enumerate(running):
        # Steps take 20 ms, and 1 ms more for each request.
        load = ReplicaLoad(
            running=count,
            decode_steps=100,
            decode_step_tokens=1000,
            decode_step_s=3.0,
            decode_s_per_request=0.001,
        )
        router.update(f"d{number}", "decode", load)


def test_requests_that_would_make_tokens_late_are_refused() -> None:
    router = objective_router(TPOT)
    decodes(router, 29)
    assert place(router, 10).decode == "d0"
    with pytest.raises(Overloaded, match=r"a token is expected every 0\.051 s, of at most 0\.05"):
        place(router, 10)
    decodes(router, 80, 29)
    assert place(router, 10).decode == "d1"
    slow = objective_router(ObjectivesSpec(tpot=0.001))
    decodes(slow, 0)
    place(slow, 10)  # alone it is late as well
    with pytest.raises(Overloaded):
        place(slow, 10)


@pytest.mark.parametrize(("num_routers", "seconds"), [(1, 5), (2, 3)])
def test_retry_after_for_tokens_counts_requests_that_have_to_end(
    num_routers: int, seconds: int
) -> None:
    """Those of other routers end as well."""
    router = Router(100, objectives=TPOT, num_routers=num_routers)
    decodes(router, 39)  # ten too many
    router.admit(50, now=100.0)
    for number in range(1, 21):
        router.release(now=100.0 + number / 2)
    with pytest.raises(Overloaded) as caught:
        place(router, 10, now=110.0)
    assert caught.value.retry_after_s == seconds


# ------------------------------------------------------------------------------ cohorts and drains


def join(router: Router, name: str, role: Role, cohort: str, tokens: int = 0) -> None:
    router.update(name, role, ReplicaLoad(waiting_tokens=tokens), cohort=cohort)


def test_prefill_and_decode_are_of_one_cohort() -> None:
    router = Router(4)
    join(router, "p-old", "prefill", "old", 100)
    join(router, "d-old", "decode", "old")
    join(router, "p-new", "prefill", "new", 10)
    assert router.place(10) == Placement("d-old", "p-old")
    join(router, "d-new", "decode", "new")
    assert router.place(10) == Placement("d-new", "p-new")
    router.remove("p-old")
    join(router, "p-new", "prefill", "new", 10**6)
    assert router.place(10) == Placement("d-old", "")  # its cohort has no other


def test_a_replica_of_another_cohort_is_another_replica() -> None:
    router = Router(4)
    join(router, "b0", "both", "old", 10)
    router.update("b0", "both", None)  # its cohort stays
    assert [(state.cohort, state.load.waiting_tokens) for state in router.replicas()] == [
        ("old", 10)
    ]
    assert router.update("b0", "both", None, cohort="new") is not None  # its pages are asked for
    assert [(state.cohort, state.load.waiting_tokens) for state in router.replicas()] == [
        ("new", 0)
    ]


@pytest.mark.parametrize("policy", ["cost", "prefix", "least_loaded", "round_robin"])
@pytest.mark.parametrize("seed", range(10))
def test_random_clusters_never_pair_strangers_nor_use_what_drains(
    policy: Policy, seed: int
) -> None:
    rng = random.Random(seed)
    router = Router(4, policy, 16)
    known: dict[str, tuple[Role, str, bool]] = {}
    for _ in range(300):
        name = f"r{rng.randrange(12)}"
        if rng.random() < 0.1:
            router.remove(name)
            known.pop(name, None)
        elif rng.random() < 0.5:
            roles: tuple[Role, ...] = ("prefill", "prefill", "decode", "decode", "both")
            role, cohort, draining = rng.choice(roles), rng.choice("ab"), rng.random() < 0.3
            load = ReplicaLoad(waiting_tokens=rng.randrange(99), running=rng.randrange(9))
            router.update(name, role, load, cohort=cohort, draining=draining)
            known[name] = role, cohort, draining
        usable = {name: who for name, who in known.items() if not who[2]}
        try:
            placement = router.place(rng.randrange(1, 500))
        except NoReplica:
            assert all(role == "prefill" for role, _, _ in usable.values())
            continue
        role, cohort, _ = usable[placement.decode]
        assert role != "prefill"
        if placement.prefill:
            assert usable[placement.prefill][:2] == ("prefill", cohort)
            assert role == "decode"
        elif role == "decode" and policy != "cost":
            assert ("prefill", cohort) not in {who[:2] for who in usable.values()}


@pytest.mark.parametrize("seed", range(20))
def test_the_cheapest_pair_over_cohorts(seed: int) -> None:
    rng = random.Random(seed)
    router = Router(4)
    waiting, running, cohorts = {}, {}, {}
    for number in range(20):
        role: Role = rng.choice(("prefill", "decode"))
        name, cohort = f"{role}-{number}", rng.choice("abc")
        cohorts[name] = cohort
        tokens, requests = rng.randrange(5000), rng.randrange(30)
        load = ReplicaLoad(
            waiting_tokens=tokens,
            running=requests,
            prefill_tokens_per_s=100.0,
            decode_s_per_request=0.05,
            decode_tokens=40,
            finished=1,
        )
        router.update(name, role, load, cohort=cohort)
        (waiting if role == "prefill" else running)[name] = (
            (tokens + 10) / 100 if role == "prefill" else requests * 0.05 * 40
        )
    costs = {
        Placement(decode, prefill): waiting[prefill] + running[decode]
        for decode in running
        for prefill in waiting
        if cohorts[decode] == cohorts[prefill]
    }
    alone = [name for name in running if cohorts[name] not in {cohorts[p] for p in waiting}]
    placement = router.place(10)
    assert placement.decode in alone or costs[placement] == pytest.approx(min(costs.values()))


def test_nothing_new_is_placed_on_what_drains() -> None:
    router = Router(4)
    for name, role in (("p0", "prefill"), ("p1", "prefill"), ("d0", "decode"), ("d1", "decode")):
        router.update(name, role, None)  # type: ignore[arg-type]
    first = router.place(10)
    router.update(first.prefill, "prefill", None, draining=True)
    router.drain(first.decode)
    for beside in (first, None):
        placement = router.place(10, beside=beside)
        assert placement.prefill not in ("", first.prefill)
        assert placement.decode != first.decode
    router.update(first.prefill, "prefill", ReplicaLoad(waiting=3))  # a report changes nothing
    assert router.place(10).prefill != first.prefill
    assert router.role_of(first.prefill) == "prefill"
    assert len(router.replicas()) == 4
    router.update(first.prefill, "prefill", None, draining=False)
    router.update(placement.prefill, "prefill", ReplicaLoad(waiting_tokens=10**6))
    assert router.place(10).prefill == first.prefill
    for state in router.replicas():
        router.drain(state.name)
    with pytest.raises(NoReplica):
        router.place(10)
