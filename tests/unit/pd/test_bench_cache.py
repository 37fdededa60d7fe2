"""`pd bench cache` and `pd replay`: small runs, their tables and JSON, and what is refused."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from hicache.policy import order_names
from pd.bench import cache as bench
from pd.bench.cache import (
    STEPS,
    WIDTH,
    CacheOptions,
    measure_entry_bytes,
    plan_turns,
    print_cache_report,
    run_cache_bench,
)
from pd.bench.errors import BenchError
from pd.cli import main

SMALL = CacheOptions(sessions=8, turns=3, turn_tokens=64, orders=("lru", "s3fifo"))


def call(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["pd", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


# ------------------------------------------------------------------------------------- bench cache


def test_a_small_run() -> None:
    titles: list[str] = []
    report = run_cache_bench(SMALL, lambda title, done: titles.append(f"{done} {title}"))
    assert titles[0] == "0 pages of 16, ample, lru"
    assert titles[3] == "3 pages of 16, scarce, s3fifo"
    assert len(report.rows) == len(titles) == SMALL.num_rows == 8
    for row in report.rows:
        pages = 8 * 3 * 64 // row.page_tokens
        assert row.num_pages == (pages if row.room == "ample" else pages // 4)
        assert row.turns == 8 * 3
        assert 0 < row.p50_us <= row.p99_us
        assert list(row.step_p50_us) == list(STEPS)
        if row.room == "ample":
            assert (row.evictions, row.hit_rate) == (0, 0.5)  # 0 + 1 + 2 of 1 + 2 + 3 turns' pages
        else:
            assert row.evictions > 0
            assert row.hit_rate < 0.5
    text = io.StringIO()
    print_cache_report(report, Console(file=text, width=WIDTH))
    assert "s3fifo" in text.getvalue()
    assert max(map(len, text.getvalue().splitlines())) <= WIDTH
    assert json.loads(json.dumps(report.to_json()))["rows"][0]["page_tokens"] == 16


def test_turns_are_in_order_within_a_session() -> None:
    for interleaving in ("random", "rounds"):
        options = CacheOptions(sessions=5, turns=4, interleaving=interleaving)
        turns = list(plan_turns(options))
        assert sorted(turns) == sorted([*range(5)] * 4)
        assert turns == list(plan_turns(options))
        assert (turns == [*range(5)] * 4) is (interleaving == "rounds")


def test_memory_is_counted() -> None:
    tokens = np.arange(100 * 320, dtype=np.int32).reshape(100, 320)
    sizes = measure_entry_bytes(tokens, 16)
    assert 50 < sizes["without_hash"] < 400
    assert sizes["with_hash"] - sizes["without_hash"] == sys.getsizeof(b"x" * 32)


def test_an_interrupted_run_keeps_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "measure_entry_bytes", interrupt)
    report = run_cache_bench(SMALL)
    assert report.interrupted
    assert len(report.rows) == 4
    text = io.StringIO()
    print_cache_report(report, Console(file=text, width=WIDTH))
    assert "interrupted" in text.getvalue()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (CacheOptions(turns=0), "--turns: found 0"),
        (CacheOptions(orders=("mru",)), "--order: found 'mru', expected one of lru"),
        (CacheOptions(sessions=3), "--sessions: found 3, expected at least 4"),
        (CacheOptions(turns=1, turn_tokens=8), "at least a page of 16 tokens"),
    ],
)
def test_what_cannot_be_measured_is_refused(options: CacheOptions, message: str) -> None:
    with pytest.raises(BenchError, match=message):
        run_cache_bench(options)


def test_the_cache_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = "bench cache --sessions 8 --turns 2 --turn-tokens 64 --order cost --page-tokens 16"
    assert call([*arguments.split(), "--json"], monkeypatch) == 0
    out, err = capsys.readouterr()
    assert [row["order"] for row in json.loads(out)["rows"]] == ["cost", "cost"]
    assert err == ""
    assert call([*arguments.split(), "--rounds"], monkeypatch) == 0
    assert "in rounds" in capsys.readouterr().out
    assert call(["bench", "cache", "--order", "x"], monkeypatch) == 2
    assert "pd: --order: found 'x'" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ replay


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 0, "input_length": 8, "output_length": 1, "hash_ids": [1, 2]},
        {"timestamp": 1, "input_length": 6, "output_length": 1, "hash_ids": [1, 3]},
        {"timestamp": 2, "input_length": 8, "output_length": 1, "hash_ids": [1, 2]},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_the_replay_command(
    trace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["replay", str(trace), "--block-tokens", "4", "--capacity", "2", "--order", "lru"]
    assert call([*arguments, "--json"], monkeypatch) == 0
    out, err = capsys.readouterr()
    assert err == ""
    answer = json.loads(out)
    assert answer["trace"] == {
        "requests": 3,
        "block_tokens": 4,
        "blocks": 6,
        "distinct_blocks": 3,
        "tokens": 22,
    }
    assert (answer["infinite"]["hits"], answer["infinite"]["hit_tokens"]) == (3, 12)
    lru, belady = answer["results"]
    assert (lru["order"], lru["hits"], lru["evictions"], lru["block_rate"]) == ("lru", 2, 2, 2 / 6)
    assert (belady["order"], belady["hits"]) == ("belady", 3)
    assert call([*arguments, "--json"], monkeypatch) == 0
    assert capsys.readouterr().out == out
    assert call(arguments[:4], monkeypatch) == 0
    table = capsys.readouterr().out
    assert all(order in table for order in (*order_names(), "belady", "infinite", "100,000"))


def test_tiers_are_replayed(
    trace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["replay", str(trace), "--block-tokens", "4", "--capacity", "1", "--order", "lru"]
    arguments += ["--host", "2", "--host", "infinite", "--storage", "7"]
    arguments += ["--write", "write_through", "--write", "write_back"]
    assert call([*arguments, "--json"], monkeypatch) == 0
    out, err = capsys.readouterr()
    assert err == ""
    results = json.loads(out)["results"]
    assert [(row["order"], row["write"], row["tiers"][1]["capacity"]) for row in results] == [
        ("lru", "write_through", 2),
        ("lru", "write_back", 2),
        ("belady", None, 2),
        ("lru", "write_through", "infinite"),
        ("lru", "write_back", "infinite"),
        ("belady", None, "infinite"),
    ]
    row = results[0]  # the device tier has room for block 1 only, and so that is all that is copied
    assert [(tier["tier"], tier["hits"]) for tier in row["tiers"]] == [
        ("device", 2),
        ("host", 0),
        ("storage", 0),
    ]
    assert (row["hits"], row["computed"], row["computed_tokens"]) == (2, 4, 22 - 8)
    assert [tier["hits"] for tier in results[2]["tiers"]] == [2, 1, 0]
    assert row["tiers"][0]["block_rate"] == row["block_rate"] == 2 / 6
    assert row["tiers"][0]["token_rate"] == 8 / 22
    assert call([*arguments, "--json"], monkeypatch) == 0
    assert capsys.readouterr().out == out
    assert call(arguments, monkeypatch) == 0
    table = capsys.readouterr().out
    assert all(word in table for word in ("storage", "through", "back", "computed", "belady"))
    assert max(map(len, table.splitlines())) <= 80


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0"], "found '0', expected a number of blocks or infinite"),
        (["--host", "1e9"], "found '1e9'"),
        (["--storage", "5"], "--storage: expected --host beside it"),
        (["--host", "5", "--write", "later"], "--write: found 'later', expected one of write_thr"),
    ],
)
def test_tiers_that_cannot_be_are_refused(
    trace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert call(["replay", str(trace), *options], monkeypatch) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--capacity", "2", "--host", "3", "--storage", "infinite"]])
def test_the_replay_is_drawn(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "rates.png"
    arguments = ["replay", str(trace), "--block-tokens", "4", "--plot", str(picture)]
    assert call([*arguments, *more], monkeypatch) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_extra_is_named(
    trace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    arguments = ["replay", str(trace), "--block-tokens", "4", "--plot", str(tmp_path / "x.png")]
    assert call(arguments, monkeypatch) == 1
    assert "pagerelay[bench]" in capsys.readouterr().err


def test_what_cannot_be_replayed_is_refused(
    trace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(["replay", str(trace)], monkeypatch) == 2
    assert f"{trace}: line 1: hash_ids: found 2 blocks" in capsys.readouterr().err
    assert call(["replay", str(trace) + "x"], monkeypatch) == 2
    assert "cannot be read: No such file" in capsys.readouterr().err
    trace.write_bytes(b"\xff")
    assert call(["replay", str(trace)], monkeypatch) == 2
    assert "not UTF-8" in capsys.readouterr().err
    assert call(["replay", str(trace), "--order", "x"], monkeypatch) == 2
    assert "--order: found 'x'" in capsys.readouterr().err
