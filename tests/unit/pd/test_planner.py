"""The planner on a model of a cluster: it finds what the load needs, and stays there."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from load_model import TICK_S, LoadModel, Speeds, Traffic

from pd.demand import mean_wait_s, replicas_for_ttft
from pd.messages import ReplicaLoad
from pd.planner import Observed, Planner, RoleBounds, bounds_of
from pd.spec import ObjectivesSpec, PlannerSpec, Role, parse_spec

NO_LOAD = Traffic(0.0, 1, 1)
BOTH_SIDES: dict[Role, RoleBounds] = {"prefill": RoleBounds(1, 8), "decode": RoleBounds(1, 8)}


def model(
    bounds: dict[Role, RoleBounds] | None = None,
    objectives: ObjectivesSpec | None = None,
    max_replicas: int | None = None,
    seed: int | None = None,
    speeds: Speeds | None = None,
) -> LoadModel:
    bounds = bounds or BOTH_SIDES
    planner = Planner(
        PlannerSpec(max_replicas=max_replicas), bounds, objectives or ObjectivesSpec()
    )
    start = {role: each.minimum for role, each in bounds.items()}
    return LoadModel(planner, start, speeds, seed)


def steps(numbers: list[int]) -> list[int]:
    """The numbers, each once in a row."""
    return [number for number, _ in itertools.groupby(numbers)]


# ------------------------------------------------------------------------------------- steady loads


@pytest.mark.parametrize("seed", [None, 1])
def test_light_load_keeps_the_minimum(seed: int | None) -> None:
    run = model(seed=seed)
    run.run(Traffic(2.0, 1000, 100), 300)
    assert run.changes() == 0
    assert run.wanted == {"prefill": 1, "decode": 1}


@pytest.mark.parametrize("seed", [None, 1])
def test_prefill_bound_load_gets_prefill_replicas(seed: int | None) -> None:
    """60,000 tokens a second at 20,000 for each replica, 0.8 busy: 3.75."""
    run = model(seed=seed)
    run.run(Traffic(30.0, 2000, 20), 900)
    assert steps(run.numbers("prefill"))[:2] == [1, 4]
    assert run.changes(since=100) <= 1
    assert 4 <= run.wanted["prefill"] <= 6
    assert run.wanted["decode"] == 1


@pytest.mark.parametrize("seed", [None, 2])
def test_decode_bound_load_gets_decode_replicas(seed: int | None) -> None:
    """10,000 tokens a second, and 51.2 / (10 ms + 51.2 * 0.1 ms) = 3,390 for each: 3."""
    run = model(seed=seed)
    run.run(Traffic(20.0, 200, 500), 900)
    assert steps(run.numbers("decode"))[:3] == [1, 2, 3]
    assert run.changes(since=500) <= 1
    assert 3 <= run.wanted["decode"] <= 5
    assert run.wanted["prefill"] == 1


def test_replicas_that_do_both() -> None:
    """One computes the prompts, 1.2 decode."""
    run = model({"both": RoleBounds(1, 8)})
    run.run(Traffic(20.0, 1000, 200), 900)
    assert 3 <= run.wanted["both"] <= 4
    assert run.changes(since=300) == 0


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    per_s=st.sampled_from([0.5, 5.0, 20.0, 40.0]),
    prompt=st.sampled_from([100, 1000, 4000]),
    output=st.sampled_from([10, 100, 400]),
    tpot=st.sampled_from([None, 0.012, 0.02]),
    seed=st.one_of(st.none(), st.integers(0, 99)),
)
def test_a_steady_load_settles(
    per_s: float, prompt: int, output: int, tpot: float | None, seed: int | None
) -> None:
    run = model(objectives=ObjectivesSpec(ttft=2.0, tpot=tpot), seed=seed)
    run.run(Traffic(per_s, prompt, output), 1200)
    for role in BOTH_SIDES:
        numbers = steps(run.numbers(role))
        top = numbers.index(max(numbers))
        assert numbers == [*sorted(numbers[:top]), *sorted(numbers[top:], reverse=True)]
    assert run.changes(since=1000) == 0


# ----------------------------------------------------------------------------------- changing loads


def test_up_at_once_and_down_slowly() -> None:
    run = model()
    run.run(Traffic(10.0, 2000, 100), 300)
    assert run.wanted["prefill"] == 2
    run.run(Traffic(50.0, 2000, 100), 200)
    assert run.wanted["prefill"] >= 7
    assert max(run.numbers("prefill")[:320]) >= 6, "20 s after the step"
    begin = run.now
    run.run(Traffic(10.0, 2000, 100), 900)
    assert run.wanted["prefill"] == 2
    numbers = run.numbers("prefill", since=begin)
    assert numbers == sorted(numbers, reverse=True)
    assert min(numbers[:110]) == numbers[0]
    assert all(a - b <= max(1, a // 4) for a, b in itertools.pairwise(numbers))


def test_a_burst_shorter_than_up_after_changes_nothing() -> None:
    run = model()
    run.run(Traffic(2.0, 1000, 10), 100)
    run.run(Traffic(40.0, 1000, 10), 1.0)
    run.run(Traffic(2.0, 1000, 10), 200)
    assert run.changes() == 0


def test_what_waits_is_not_asked_for_twice_while_replicas_start() -> None:
    """For ten minutes prompts pile up, and the number stays what their rate needs."""
    run = model(speeds=Speeds(start_s=600.0))
    run.run(Traffic(30.0, 2000, 20), 600)
    assert steps(run.numbers("prefill")) == [1, 4]


def test_replicas_go_over_to_the_role_that_needs_them() -> None:
    run = model(max_replicas=8)
    run.run(Traffic(60.0, 2000, 10), 400)
    assert run.wanted == {"prefill": 7, "decode": 1}
    begin = run.now
    run.run(Traffic(20.0, 100, 500), 600)
    wanted = [each for at, each in run.history if at > begin]
    assert all(sum(each.values()) <= 8 for each in wanted)
    assert wanted[60]["decode"] >= 3, "long before prefill alone would have given any away"
    assert wanted[60]["prefill"] < 7
    assert run.wanted["decode"] >= 3
    assert run.changes(since=begin + 450) == 0


def test_where_both_lack_replicas_equal_loads_stay() -> None:
    run = model(max_replicas=4)
    run.run(Traffic(60.0, 2000, 150), 600)
    assert sum(run.wanted.values()) == 4
    assert run.changes(since=150) == 0


def test_from_nothing_and_back() -> None:
    run = model({"prefill": RoleBounds(0, 8), "decode": RoleBounds(0, 8)})
    run.run(NO_LOAD, 60)
    assert run.wanted == {"prefill": 0, "decode": 0}
    run.run(Traffic(2.0, 1000, 50), 10)
    assert run.wanted["decode"] == 1, "requests are refused"
    run.run(Traffic(2.0, 1000, 50), 60)
    assert run.wanted == {"prefill": 1, "decode": 1}
    run.run(NO_LOAD, 200)
    assert run.wanted == {"prefill": 0, "decode": 0}


# ---------------------------------------------------------------------------------- what goes wrong


def test_replicas_that_die_and_counters_that_restart() -> None:
    run = model()
    traffic = Traffic(30.0, 2000, 20)
    run.run(traffic, 300)
    wanted = run.wanted
    for name in [name for name in run.replicas if name.startswith("prefill")]:
        run.kill(name, for_s=10.0)
        run.run(traffic, 60)
        assert run.wanted["decode"] == wanted["decode"]
        assert run.wanted["prefill"] >= wanted["prefill"]
    run.run(traffic, 300)
    assert run.wanted["prefill"] <= wanted["prefill"] + 2


def test_silence_is_not_idleness() -> None:
    run = model()
    run.run(Traffic(30.0, 2000, 20), 300)
    planner, wanted = run.planner, run.wanted
    for second in range(600):
        planner.observe({}, run.now + second)
        assert planner.desired(run.now + second) == wanted


def test_counters_from_before_the_planner_count_nothing() -> None:
    load = ReplicaLoad(arrived=10**6, prompt_step_tokens=10**9, prompt_step_s=10**5)
    planner = Planner(PlannerSpec(), BOTH_SIDES)
    for second in range(20):
        planner.observe({"prefill-0": Observed("prefill", load)}, float(second))
        assert planner.desired(float(second)) == {"prefill": 1, "decode": 1}


def test_a_replica_that_drains_works_but_is_none() -> None:
    """Its work counts, its place does not: what waits does not yet ask for more."""
    planner = Planner(PlannerSpec(), BOTH_SIDES)
    for second in range(60):
        tokens = 16_000 * second
        load = ReplicaLoad(arrived=second, prompt_step_tokens=tokens, prompt_step_s=0.8 * second)
        idle = Observed("prefill", ReplicaLoad())
        seen = {"prefill-0": Observed("prefill", load, draining=True), "prefill-1": idle}
        planner.observe(seen, float(second))
    assert planner.desired(59.0)["prefill"] == 1
    assert "prefill" in planner.reasons()


# --------------------------------------------------------------------------------------- objectives


def test_ttft_takes_more_prefill_replicas() -> None:
    """Prompts of 0.15 s, 8 a second, keep 1.2 busy, so 2 will do; a mean wait of 20 ms, 3."""
    bounds: dict[Role, RoleBounds] = {"prefill": RoleBounds(2, 8), "decode": RoleBounds(1, 8)}
    plain = model(bounds, seed=3)
    plain.run(Traffic(8.0, 3000, 10), 300)
    strict = model(bounds, ObjectivesSpec(ttft=0.17), seed=3)
    strict.run(Traffic(8.0, 3000, 10), 300)
    assert plain.wanted["prefill"] == 2
    assert strict.wanted["prefill"] >= 3
    wait = strict.mean_ttft(since=100) - 0.15 - TICK_S / 2
    assert wait < 0.02 < plain.mean_ttft(since=100) - 0.15 - TICK_S / 2


def test_tpot_limits_the_batch() -> None:
    """13 ms permit batches of 30, and 0.8 of them give 24 / 12.4 ms: 10,000 tokens a second need
    5.2 replicas, where 3 had rows enough."""
    run = model(objectives=ObjectivesSpec(tpot=0.013))
    run.run(Traffic(20.0, 200, 500), 600)
    assert 6 <= run.wanted["decode"] <= 8
    busy = run.ready("decode")
    assert all(0.01 + 0.0001 * len(each.decoding) <= 0.013 for each in busy)


def test_objectives_that_no_number_meets_are_left_aside() -> None:
    run = model(objectives=ObjectivesSpec(ttft=0.01, tpot=0.001))
    run.run(Traffic(2.0, 1000, 100), 300)
    assert run.wanted == {"prefill": 1, "decode": 1}


@given(
    work=st.floats(0.01, 30.0),
    more=st.floats(0.0, 5.0),
    each_s=st.floats(0.001, 10.0),
    wait_s=st.floats(0.001, 10.0),
    most=st.integers(1, 40),
)
def test_waits_grow_with_the_load_and_shrink_with_replicas(
    work: float, more: float, each_s: float, wait_s: float, most: int
) -> None:
    assert mean_wait_s(most, work, each_s) <= mean_wait_s(most, work + more, each_s)
    assert mean_wait_s(most + 1, work, each_s) <= mean_wait_s(most, work, each_s)
    enough = replicas_for_ttft(work, each_s, wait_s, most)
    assert 1 <= enough <= most
    assert enough == most or mean_wait_s(enough, work, each_s) <= wait_s
    assert enough == 1 or mean_wait_s(enough - 1, work, each_s) > wait_s
    assert enough <= replicas_for_ttft(work + more, each_s, wait_s, most)


def test_mean_wait_of_one_server_is_exact() -> None:
    """M/M/1: load / (1 - load) services."""
    assert mean_wait_s(1, 0.8, 0.5) == pytest.approx(0.5 * 0.8 / 0.2)
    assert mean_wait_s(2, 2.0, 0.5) == float("inf")


# --------------------------------------------------------------------------------------- properties

LOADS = st.fixed_dictionaries(
    {
        "per_s": st.floats(0.0, 100.0),
        "prompt": st.integers(1, 10_000),
        "waiting": st.floats(0.0, 100.0),
        "running": st.floats(0.0, 200.0),
        "batch_s": st.floats(0.005, 0.1),
        "slope": st.floats(0.0, 0.001),
        "refused": st.integers(0, 50),
    }
)


def plan(
    load: dict[str, float], factor: float, bounds: RoleBounds, objectives: ObjectivesSpec
) -> list[dict[Role, int]]:
    """What is wanted under a constant load, that one replica of each role reports."""
    spec = PlannerSpec(down_after=40.0)
    planner = Planner(spec, {"prefill": bounds, "decode": bounds}, objectives)
    wanted: dict[Role, int] = {"prefill": bounds.minimum, "decode": bounds.minimum}
    history = []
    for second in range(0, 180, 2):
        came = load["per_s"] * factor * second
        tokens = came * load["prompt"]
        prefill = ReplicaLoad(
            arrived=int(came),
            waiting_tokens=int(load["waiting"] * factor * load["prompt"]),
            prompt_step_tokens=int(tokens),
            prompt_step_s=tokens / 20_000,
        )
        running = load["running"] * factor
        decode = ReplicaLoad(
            arrived=int(came),
            waiting=int(load["waiting"] * factor),
            running=int(running),
            decode_steps=10 * second,
            decode_step_tokens=int(10 * second * running),
            decode_step_s=10 * second * load["batch_s"],
            decode_s_per_request=min(load["slope"], load["batch_s"] / max(running, 1.0)),
        )
        idle = ReplicaLoad()
        seen = {
            f"{role}-{n}": Observed(role, idle if n else busy)
            for role, busy in (("prefill", prefill), ("decode", decode))
            for n in range(wanted[role])
        }
        planner.observe(seen, float(second), int(load["refused"] * factor))
        wanted = planner.desired(float(second))
        history.append(wanted)
    return history


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    load=LOADS,
    low=st.integers(1, 3),
    high=st.integers(1, 20),
    ttft=st.one_of(st.none(), st.floats(0.01, 10.0)),
    tpot=st.one_of(st.none(), st.floats(0.001, 0.2)),
)
def test_constant_loads(
    load: dict[str, float], low: int, high: int, ttft: float | None, tpot: float | None
) -> None:
    """Never out of bounds, never down, and no change after the first half minute."""
    bounds = RoleBounds(low, max(low, high))
    history = plan(load, 1.0, bounds, ObjectivesSpec(ttft=ttft, tpot=tpot))
    for role in history[0]:
        numbers = [wanted[role] for wanted in history]
        assert all(bounds.minimum <= number <= bounds.maximum for number in numbers)
        assert numbers == sorted(numbers)
        assert len({*numbers[15:]}) == 1


@settings(max_examples=40, deadline=None, derandomize=True)
@given(load=LOADS, factor=st.floats(1.0, 10.0), ttft=st.one_of(st.none(), st.floats(0.01, 10.0)))
def test_more_load_never_wants_fewer(
    load: dict[str, float], factor: float, ttft: float | None
) -> None:
    bounds, objectives = RoleBounds(1, 40), ObjectivesSpec(ttft=ttft)
    less = plan(load, 1.0, bounds, objectives)[-1]
    more = plan(load, factor, bounds, objectives)[-1]
    assert all(more[role] >= less[role] for role in less)


def test_starts_from_what_there_is() -> None:
    planner = Planner(PlannerSpec(), BOTH_SIDES, counts={"prefill": 3, "decode": 99})
    assert planner.desired(0.0) == {"prefill": 3, "decode": 8}


def test_reasons_say_what_takes_the_replicas() -> None:
    run = model()
    run.run(Traffic(30.0, 2000, 20), 20)
    assert run.planner.reasons()["prefill"].startswith("prompts keep 3.0")
    assert run.planner.reasons()["decode"] == "replicas.min"


def test_bounds_of_a_spec() -> None:
    text = """
model: {path: org/model}
roles:
  prefill: {replicas: {min: 0, max: 3}, topology: {pp: 2}}
  decode: {replicas: 2, max_running: 9}
"""
    assert bounds_of(parse_spec(text, "x")) == {
        "prefill": RoleBounds(0, 3, 64, 2),
        "decode": RoleBounds(2, 2, 9, 1),
    }


def test_a_replica_that_changes_its_role_keeps_its_counters() -> None:
    """What it did before is no load of the new role."""
    planner = Planner(PlannerSpec(), BOTH_SIDES)
    hour = ReplicaLoad(prefill_tokens=10_000_000, prompt_step_s=1000.0, finished=1000)
    for now in range(40):
        role: Role = "prefill" if now < 20 else "decode"
        seen = {
            "prefill-0": Observed("prefill", ReplicaLoad()),
            "prefill-1": Observed(role, hour),
            "decode-0": Observed("decode", ReplicaLoad()),
        }
        planner.observe(seen, float(now))
        assert planner.desired(float(now))["decode"] == 1
