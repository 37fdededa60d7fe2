"""`pd bench router`: small runs, their tables and JSON, and what is refused."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from hicache.replay import parse_trace
from pd.bench import placement, router
from pd.bench.placement import PlacementOptions, simulate_placement
from pd.bench.router import KINDS, WIDTH, RouterOptions, print_router_report, run_router_bench
from pd.cli import main

SMALL = RouterOptions(replicas=(2, 30), prompt_tokens=(2048,), pages=3000, decisions=60)


@pytest.fixture(autouse=True)
def few_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router, "_MEMORY_PAGES", 10_000)


def call(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["pd", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_a_small_run() -> None:
    report = run_router_bench(SMALL)
    assert [row.replicas for row in report.rows] == [2, 30]
    for row in report.rows:
        assert 0 < row.p50_us <= row.p99_us
        assert list(row.kind_p50_us) == list(KINDS)
        assert row.map_pages > 1000
    assert 40 < report.entry_bytes["one_holder"] < 200
    assert report.entry_bytes["hundred_holders"] < 200
    text = io.StringIO()
    print_router_report(report, Console(file=text, width=WIDTH))
    assert max(map(len, text.getvalue().splitlines())) <= WIDTH
    assert json.loads(json.dumps(report.to_json()))["rows"][0]["prompt_tokens"] == 2048


def conversations(count: int, turns: int) -> list[str]:
    """Each turn has the blocks of the one before and another; they all share the first block."""
    lines = []
    for turn in range(turns):
        for number in range(count):
            own = [1000 * (number + 1) + block for block in range(2 * turn + 3)]
            ids = [0, *own]
            time = (turn * count + number) * 500
            item = {"timestamp": time, "input_length": 4 * len(ids), "output_length": 1}
            lines.append(json.dumps(item | {"hash_ids": ids}))
    return lines


def test_conversations_stay_where_they_are() -> None:
    trace = parse_trace(conversations(13, 6), 4)
    options = PlacementOptions(replicas=4, room_tokens=400, tokens_per_s=50.0)
    rows = {
        policy: simulate_placement(trace, policy, options)
        for policy in ("cost", "prefix", "least_loaded", "round_robin")
    }
    assert rows["cost"] == simulate_placement(trace, "cost", options)
    assert rows["cost"].hit_rate > 0.6
    assert rows["cost"].hit_rate > rows["least_loaded"].hit_rate + 0.3
    assert rows["cost"].ttft_mean_s < rows["round_robin"].ttft_mean_s
    for row in rows.values():
        assert sum(row.computed_tokens) == round((1 - row.hit_rate) * trace.num_tokens)
        assert row.max_over_mean >= 1


def test_what_tiers_add() -> None:
    """Spread out turns find in a tier that all share what they would have found where they were."""
    trace = parse_trace(conversations(13, 6), 4)
    alone = PlacementOptions(replicas=4, room_tokens=400, tokens_per_s=50.0)
    host = dataclasses.replace(alone, host_room_tokens=10_000, host_replicas=2)
    storage = dataclasses.replace(alone, storage_room_tokens=10_000)
    both = dataclasses.replace(host, storage_room_tokens=10_000)
    rows = [simulate_placement(trace, "round_robin", each) for each in (alone, host, storage, both)]
    rates = [row.hit_rate for row in rows]
    assert rates[0] < rates[1] < rates[2] == rates[3]
    assert [row.host_hit_rate > 0 for row in rows] == [False, True, False, True]
    assert [row.storage_hit_rate > 0 for row in rows] == [False, False, True, True]
    for row in rows:
        assert sum(row.computed_tokens) == round((1 - row.hit_rate) * trace.num_tokens)
    assert rows[2].ttft_mean_s < rows[0].ttft_mean_s


def test_it_ends_as_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = placement._Simulation(
        parse_trace(conversations(5, 3), 4), "cost", PlacementOptions(3, 400, 50.0)
    )
    simulation.run(lambda done: None)
    for replica in simulation._replicas.values():
        replica.index.check_integrity()
        replica.feed.check_integrity()
        assert replica.index.num_used(0) == 0
        assert not replica.waiting
    assert simulation._router.pages is not None
    simulation._router.pages.check_integrity()
    assert simulation._router.pages.num_resyncs == 0


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(conversations(4, 3)))
    return path


def test_the_command(
    trace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", "router", str(trace), "--block-tokens", "4", "--replicas", "2"]
    arguments += ["--room", "100", "--speed", "100", "--speed", "1000"]
    assert call([*arguments, "--json"], monkeypatch) == 0
    out, err = capsys.readouterr()
    assert err == ""
    rows = json.loads(out)["rows"]
    assert len(rows) == 8
    assert {row["tokens_per_s"] for row in rows} == {100, 1000}
    assert call([*arguments, "--json"], monkeypatch) == 0
    assert capsys.readouterr().out == out
    assert call([*arguments, "--policy", "cost"], monkeypatch) == 0
    table = capsys.readouterr().out
    assert "cost" in table
    assert "round_robin" not in table
    small = ["--replicas", "4", "--prompt-tokens", "2048", "--decisions", "100"]
    assert call(["bench", "router", *small, "--json"], monkeypatch) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policy", "x"], "--policy: found 'x', expected one of cost, prefix"),
        (["--replicas", "1"], "--replicas: found 1, expected at least 2"),
        (["--prompt-tokens", "64"], "--prompt-tokens: found 64, expected at least 1088"),
        (["/nowhere"], "/nowhere: cannot be read"),
        (["TRACE", "--block-tokens", "4", "--room", "8"], "--room: found 8 tokens, expected"),
        (["TRACE", "--block-tokens", "4", "--speed", "0"], "--speed: expected numbers above 0"),
        (["TRACE"], "hash_ids"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    trace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    options = [str(trace) if option == "TRACE" else option for option in options]
    assert call(["bench", "router", *options], monkeypatch) == 2
    assert message in capsys.readouterr().err
