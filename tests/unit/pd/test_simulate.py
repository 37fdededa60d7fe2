"""`pd simulate` and the cost models: whole small clusters, exact figures, and what a user may get
wrong."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from hicache.replay import parse_trace
from pd.bench.profile import DecodeTime, Measurements, PrefillTime, fit_profile
from pd.bench.simulate import Load, SimModel, SimulateOptions, SimulateReport, run_simulate
from pd.bench.simulate import _scaled as scaled
from pd.bench.simulate_against import plan_requests
from pd.cli import main
from pd.engine.batch import StepCommand
from pd.router import Policy
from pd.simulate.cluster import ReplicaShape, SimCluster, SimRequest
from pd.simulate.profile import (
    DEVICES,
    Device,
    Profile,
    ProfileError,
    StepCost,
    analytic_profile,
    fit,
    load_profile,
)
from pd.spec import ClusterSpec, parse_spec
from transfer.layout import LayerGroup, PageLayout

BLOCK = 8
GROUP = LayerGroup("full", (0, 1), 2, 4)
PREFILL = StepCost(fixed_s=0.002, token_s=1e-4, pair_s=1e-7, row_s=1e-4, context_s=1e-7)
DECODE = StepCost(fixed_s=0.004, token_s=1e-4, row_s=2e-4, context_s=1e-6)
PROFILE = Profile({"prefill": PREFILL, "decode": DECODE}, 1e6, 1e-3, 2e-4, 3e-3, 1e-6, "test")


def make_spec(
    prefill: int | str = 2, decode: int = 2, pages: int = 200, more: str = ""
) -> ClusterSpec:
    role = f"pool: {{pages: {pages}}}, max_batch_tokens: 64, max_running: 8"
    return parse_spec(
        f"""
model: {{path: ./m}}
page_tokens: 4
roles:
  prefill: {{replicas: {prefill}, {role}}}
  decode: {{replicas: {decode}, {role}}}
router: {{max_queue: 100000, local_prefill_tokens: 4}}
{more}""",
        "spec",
    )


def make_load(num_requests: int = 60, seed: int = 0, gap_ms: float = 20) -> Load:
    """Conversations: each prompt continues one of the ten before it, or is new."""
    rng = np.random.default_rng(seed)
    prompts: list[list[int]] = []
    lines = []
    block = 0
    for number in range(num_requests):
        earlier = prompts[-1 - int(rng.integers(10)) :][:1] if len(prompts) > 10 else []
        ids = list(earlier[0]) if earlier and rng.random() < 0.6 else []
        for _ in range(int(rng.integers(1, 5))):
            ids.append(block)
            block += 1
        prompts.append(ids)
        lines.append(
            json.dumps(
                {
                    "timestamp": number * gap_ms,
                    "input_length": len(ids) * BLOCK - int(rng.integers(BLOCK)),
                    "output_length": int(rng.integers(1, 12)),
                    "hash_ids": ids,
                }
            )
        )
    return scaled(parse_trace(lines, BLOCK), None, 1.0, "made up")


def make_cluster(
    spec: ClusterSpec, load: Load, policy: Policy = "cost", profile: Profile = PROFILE
) -> SimCluster:
    shapes = [
        ReplicaShape(role, each, (each.pool.pages or 0,), None) for role, each in spec.roles.items()
    ]
    return SimCluster(
        spec, shapes, [PageLayout(GROUP, 4, 2)], profile, policy, load.block_tokens, start_s=0.5
    )


@pytest.mark.parametrize("policy", ["cost", "prefix", "least_loaded", "round_robin"])
def test_every_request_ends_once_and_tokens_add_up(policy: Policy) -> None:
    load = make_load()
    cluster = make_cluster(make_spec(), load, policy)
    results = cluster.run(load.requests)
    assert [result.reason for result in results] == ["length"] * len(load.requests)
    assert [result.num_tokens for result in results] == [r.num_output for r in load.requests]
    assert not any(result.preemptions for result in results)
    computed = sum(replica.computed_tokens for replica in cluster.replicas.values())
    of_prompts = sum(r.request.num_prompt - r.cached_tokens for r in results)
    assert computed == of_prompts + sum(r.num_tokens - 1 for r in results)
    assert 0 < sum(r.cached_tokens for r in results) < sum(r.num_prompt for r in load.requests)
    while cluster.step():
        pass
    for replica in cluster.replicas.values():
        replica.leader.check_integrity()
        assert replica.leader.is_idle


def test_a_request_alone_takes_what_its_profile_says() -> None:
    load = Load((SimRequest(0.0, 40, 3, (0, 1, 2, 3, 4)),), BLOCK)
    (result,) = make_cluster(make_spec(1, 1), load).run(load.requests)
    prefill_s = PREFILL.of(40, 40 * 40 / 2, 0, 0.0)
    assert result.ttft_s == pytest.approx(3e-3 + 40e-6 + 4 * 2e-4 + prefill_s)
    # After the first token, 11 pages and its word; then two steps, less the token's own way.
    page_s = 1e-3 + 10 * PageLayout(GROUP, 4, 2).page_bytes / 1e6
    steps_s = DECODE.of(0, 0.0, 1, 40) + DECODE.of(0, 0.0, 1, 41)
    assert result.tpot_s == pytest.approx((page_s + steps_s) / 2)


def test_the_same_seed_gives_the_same_figures() -> None:
    spec, load = make_spec(3, 2, 60), make_load(80, gap_ms=2)
    first, second = (make_cluster(spec, load, "cost").run(load.requests) for _ in range(2))
    assert first == second
    first = make_cluster(spec, load, "round_robin").run(load.requests)
    assert sum(result.cached_tokens for result in first) == 860
    assert max(result.last_s for result in first) == pytest.approx(0.38891245)


def test_with_too_few_pages_requests_are_preempted_and_still_end() -> None:
    load = make_load(40, gap_ms=0)
    cluster = make_cluster(make_spec(1, 1, pages=45), load)
    results = cluster.run([dataclasses.replace(r, num_output=30) for r in load.requests])
    assert all(result.num_tokens == 30 for result in results)
    assert sum(result.preemptions for result in results) > 0


def test_what_the_router_refuses_is_an_error_of_the_request() -> None:
    load = make_load(30, gap_ms=0)
    spec = make_spec(1, 1)
    spec = spec.model_copy(update={"router": spec.router.model_copy(update={"max_queue": 8})})
    results = make_cluster(spec, load).run(load.requests)
    refused = [result for result in results if result.reason == "error"]
    assert 0 < len(refused) < 30
    assert "try again" in refused[0].error


def test_the_planner_adds_replicas_under_load_and_drains_them_after() -> None:
    planner = "planner: {up_after: 0.5, down_after: 3, interval: 0.1}"
    spec = make_spec("{min: 1, max: 6}", 3, more=planner)
    requests = [
        dataclasses.replace(each, at_s=3 + (number - 1500) * 0.4) if number >= 1500 else each
        for number, each in enumerate(make_load(1545, gap_ms=2).requests)
    ]
    fast = msgspec.structs.replace(PROFILE, bytes_per_s=1e9, write_s=0.0)
    cluster = make_cluster(spec, make_load(1), "cost", fast)
    results = cluster.run(requests)
    assert all(result.is_good for result in results)
    assert cluster.retired
    assert {replica.role for replica in cluster.retired} == {"prefill"}
    assert all(replica.leader.is_idle for replica in cluster.retired)
    assert all(0 < replica.joined_s < 6 for replica in cluster.retired)
    used = {replica.name for replica in cluster.retired} & {result.prefill for result in results}
    assert used


# -------------------------------------------------------------------------------------- the profile


def test_a_step_is_the_sum_of_its_parts() -> None:
    cost = StepCost(1.0, 100.0, 2.0, 3.0, 5.0, 7.0)
    command = StepCommand(
        starts=[],
        rows=np.array([0, 1, 2], np.int32),
        positions=np.array([10, 20, 30], np.int32),
        counts=np.array([1, 1, 40], np.int32),
        sample=np.array([True, True, False]),
        tokens=np.zeros(42, np.int32),
        pages=[],
    )
    assert cost.seconds(command) == 1 + max(100, 40 * 2 + 2 * 5) + 40 * 50 * 3 + 30 * 7
    assert cost.of(0, 0.0, 2, 30.0) == 1 + 100 + 30 * 7


def test_the_fit_finds_the_parameters_of_synthetic_times() -> None:
    rng = np.random.default_rng(1)

    def noisy(seconds: float) -> float:
        return seconds * float(rng.normal(1, 0.01))

    prefills = [
        PrefillTime(
            cached,
            cached + new,
            is_local,
            noisy(
                -(-new // 64) * PREFILL.fixed_s
                + new * 1e-4
                + ((cached + new) ** 2 - cached**2) / 2e7
            ),
            noisy(PROFILE.request_s + (cached + new) * 1e-6 + (2 if is_local else 4) * 2e-4),
            0 if is_local else new * 64,
            0.0 if is_local else noisy(-(-new // 64) * 1e-3 + new * 64 / 1e6),
        )
        for cached in (0, 512, 4096)
        for new in (16, 64, 256, 1024, 4096)
        for is_local in (False, True)
        for _ in range(20)
    ]
    decodes = [
        DecodeTime(batch, context, noisy(DECODE.of(0, 0.0, batch, batch * context)))
        for batch in (1, 2, 4, 8)
        for context in (10, 100, 1000)
        for _ in range(20)
    ]
    fitted = fit_profile(
        Measurements(64, 1, tuple(prefills), tuple(decodes)), ("prefill", "decode"), ""
    )
    for name, found in (("prefill", PREFILL), ("decode", DECODE)):
        cost = fitted.steps[name]  # type: ignore[index]
        assert cost.fixed_s == pytest.approx(found.fixed_s, rel=0.05)
        assert cost.token_s == pytest.approx(1e-4, rel=0.05)
    assert fitted.steps["prefill"].pair_s == pytest.approx(1e-7, rel=0.05)
    assert fitted.steps["decode"].row_s == pytest.approx(DECODE.row_s, rel=0.05)
    assert fitted.steps["decode"].context_s == pytest.approx(DECODE.context_s, rel=0.05)
    assert fitted.bytes_per_s == pytest.approx(1e6, rel=0.05)
    assert fitted.write_s == pytest.approx(1e-3, rel=0.05)
    assert fitted.message_s == pytest.approx(2e-4, rel=0.1)
    assert fitted.request_s == pytest.approx(3e-3, rel=0.05)
    assert fitted.request_token_s == pytest.approx(1e-6, rel=0.1)


def test_no_coefficient_is_below_zero() -> None:
    found = fit({"a": [1, 1, 1], "b": [1, 2, 3]}, [3.0, 2.0, 1.0])
    assert found["b"] == 0
    assert found["a"] > 0
    with pytest.raises(ValueError, match="1 times for 2 coefficients"):
        fit({"a": [1], "b": [1]}, [1.0])


def test_an_analytic_profile_counts_operations_and_bytes() -> None:
    device = Device(100e12, 1e12, 50e9, 1e-3)
    group = LayerGroup("full", tuple(range(10)), kv_heads=4, head_dim=64)
    profile = analytic_profile(make_spec(), device, [group], 16, 2e9, 1e9, 2)
    step = profile.steps["prefill"]
    assert step.weights_s == pytest.approx(2e-3)
    assert step.token_s == step.row_s == pytest.approx(2e-5)
    assert step.pair_s == pytest.approx(4 * 10 * 16 * 64 / 100e12)
    assert step.context_s == pytest.approx(2 * 10 * 4 * 64 * 2 / 1e12)
    assert profile.bytes_per_s == 50e9


def test_a_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(profile_json()))
    assert load_profile(path) == PROFILE


def profile_json() -> dict[str, Any]:
    built: dict[str, Any] = msgspec.to_builtins(PROFILE)
    return built


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bytes_per_s": 0}, "bytes_per_s: found 0.0, expected a number above 0"),
        ({"write_s": -1}, "write_s: found -1.0, expected 0 or more seconds"),
        ({"steps": {"decode": {"row_s": -2.0}}}, "steps.decode.row_s: found -2.0"),
        ({"steps": {"decode": {}}}, "steps.decode: found 0.0, expected a step"),
        ({"steps": {"decode": {"row": 1}}}, "unknown field `row`"),
        ({"steps": {"decode": {"row_s": "a"}}}, "Expected `float`, got `str`"),
        ({"links": 3}, "unknown field `links`"),
    ],
)
def test_a_bad_profile_is_refused_by_field(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(profile_json() | change))
    with pytest.raises(ProfileError) as error:
        load_profile(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


# -------------------------------------------------------------------------------------- the command


def test_a_report_has_a_row_for_each_rate_and_policy() -> None:
    report = simulated(("cost", "round_robin"), (1.0, 4.0))
    assert [(row.rate, row.policy) for row in report.rows] == [
        (1.0, "cost"),
        (1.0, "round_robin"),
        (4.0, "cost"),
        (4.0, "round_robin"),
    ]
    slow, fast = report.rows[0], report.rows[2]
    assert fast.requests_per_s == pytest.approx(4 * slow.requests_per_s)
    assert fast.utilisation["prefill"].mean > slow.utilisation["prefill"].mean
    for row, results in zip(report.rows, report.results, strict=True):
        within = [r.ttft_s <= 0.02 and (r.tpot_s or 0) <= 0.01 for r in results]
        assert row.goodput == sum(within) / len(within)
    json.dumps(report.to_json())


def simulated(policies: tuple[Policy, ...], rates: tuple[float, ...]) -> SimulateReport:
    spec, load = make_spec(), make_load()
    shapes = tuple(
        ReplicaShape(role, each, (each.pool.pages or 0,), None) for role, each in spec.roles.items()
    )
    model = SimModel((PageLayout(GROUP, 4, 2),), shapes, 4, 1000, 1000)
    return run_simulate(
        spec, model, PROFILE, load, SimulateOptions(policies, rates, ttft_s=0.02, tpot_s=0.01)
    )


def test_scaled_lengths_keep_what_prompts_share() -> None:
    lines = [
        json.dumps({"timestamp": 0, "input_length": n, "output_length": 100, "hash_ids": ids})
        for n, ids in ((1500, [0, 1, 2]), (1536, [0, 1, 3]))
    ]
    load = scaled(parse_trace(lines), None, 0.1, "")
    assert load.block_tokens == 52
    assert [(r.num_prompt, r.num_output, len(r.blocks)) for r in load.requests] == [
        (150, 10, 3),
        (154, 10, 3),
    ]
    first, second = (plan.prompt for plan in plan_requests(load, load.requests, 1000, 0))
    assert (len(first), len(second)) == (150, 154)
    assert first[:104] == second[:104]
    assert first[104:] != second[104:150]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    config = {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 320,
        "max_position_embeddings": 4096,
    }
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    spec, trace, profile = (
        tmp_path / name for name in ("spec.yaml", "trace.jsonl", "profile.json")
    )
    spec.write_text(
        "model: {path: ./m}\npage_tokens: 4\nroles:\n  prefill: {pool: {pages: 500}}\n"
        "  decode: {pool: {pages: 500}}\n"
    )
    trace.write_text(
        "".join(
            json.dumps(
                {
                    "timestamp": n * 9,
                    "input_length": 600,
                    "output_length": 4,
                    "hash_ids": [n % 3, 7],
                }
            )
            + "\n"
            for n in range(12)
        )
    )
    profile.write_text(json.dumps(profile_json()))
    return {"spec": spec, "trace": trace, "profile": profile}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["pd", *map(str, arguments)])
    try:
        main()
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


def test_the_command_prints_a_table_json_and_a_picture(
    files: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    common = ("simulate", files["spec"], files["trace"], "--policy", "cost", "--decode", 2)
    picture = tmp_path / "plot.png"
    assert run(monkeypatch, *common, "--device", "1e12:1e11:1e10", "--plot", picture) == 0
    out = capsys.readouterr().out
    assert "2 decode" in out
    assert "device 1e12:1e11:1e10" in out
    assert picture.stat().st_size > 10_000
    assert run(monkeypatch, *common, "--profile", files["profile"], "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    (row,) = answer["rows"]
    assert row["num_ok"] == 12
    assert row["errors"] == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--policy", "best"), "--policy: found 'best', expected one of cost"),
        (("--rate", "0"), "--rate: found 0.0, expected a number above 0"),
        (("--scale-tokens", "-1"), "--scale-tokens: found -1.0"),
        (("--both", "2"), "--both: found 2, but the spec has no such role"),
        (("--device", "h300"), "--device: found 'h300', expected h200 or FLOPS:MEMORY:LINK"),
        (("--memory", "much"), "--memory: found 'much', expected a size"),
        (("--profile", "none.json"), "--profile: none.json: cannot be read"),
    ],
)
def test_bad_options_are_named(
    arguments: tuple[str, ...],
    message: str,
    files: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, "simulate", files["spec"], files["trace"], *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_bad_trace_and_a_profile_without_a_role_are_named(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = profile_json()
    del profile["steps"]["decode"]
    files["profile"].write_text(json.dumps(profile))
    arguments = (files["spec"], files["trace"], "--profile", files["profile"])
    assert run(monkeypatch, "simulate", *arguments) == 2
    assert "steps: expected decode" in capsys.readouterr().err
    files["trace"].write_text('{"timestamp": 0, "input_length": "x", "output_length": 1}\n')
    assert run(monkeypatch, "simulate", files["spec"], files["trace"]) == 2
    assert 'line 1: input_length: found "x"' in capsys.readouterr().err


def test_the_h200_decodes_as_was_measured() -> None:
    """5.06 ms a token alone, prefill of 8k 226 ms, as docs say of the machine it is fitted to."""
    group = LayerGroup("full", tuple(range(36)), 8, 128)
    step = analytic_profile(make_spec(), DEVICES["h200"], [group], 32, 15.1e9, 7.57e9, 2).steps[
        "decode"
    ]
    assert step.of(0, 0.0, 1, 1024) == pytest.approx(5.06e-3, rel=0.1)
    assert step.of(8192, 8192**2 / 2, 0, 0.0) == pytest.approx(0.226, rel=0.1)
