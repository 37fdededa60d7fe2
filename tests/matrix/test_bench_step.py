"""The step benchmark, as it is called."""

from __future__ import annotations

import json
import multiprocessing

from typer.testing import CliRunner

from pd.cli import app


def test_the_command_times_steps_and_first_tokens() -> None:
    done = CliRunner().invoke(
        app,
        [
            *("bench", "step", "--shape=tiny", "--topology=tp2", "--dtype=float32", "--json"),
            *("--prompt=40", "--chunk=24", "--batch=1", "--batch=3", "--context=30"),
            *("--page-tokens=8", "--repeats=2", "--check", "--ttft=40", "--backend=shm"),
        ],
    )
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["ceilings"]["copy_bytes_s"] > 0
    assert report["skipped"] == []
    assert [(row["what"], row["requests"]) for row in report["rows"]] == [
        *(("prefill", 1), ("decode", 1), ("decode", 3))
    ]
    for row in report["rows"]:
        assert 0 < row["floor_s"] < row["best_s"] <= row["step_s"]
        assert all(row["profile"]["seconds"][k] > 0 for k in ("attention", "pages", "products"))
        assert row["profile"]["seconds"]["collectives"] > 0
        assert row["profile"]["launches"] > 100
    assert report["check"]["one_rank"] == 0.0
    assert 0 < report["check"]["all_ranks"] < 1e-5
    assert report["check"]["same_tokens"] == 1.0
    assert [row["replicas"] for row in report["ttft"]] == ["colocated", "shm"]
    for row in report["ttft"]:
        assert 0 < row["first_s"] < row["second_s"]
        assert row["later_s"] > 0
    colocated, apart = report["ttft"]
    assert colocated["moved_bytes"] == 0
    # Five pages of 8 tokens, 4 layers of 2 heads of 16, keys and values, float32.
    assert apart["moved_bytes"] == 5 * 8 * 4 * 2 * 16 * 2 * 4
    assert multiprocessing.active_children() == []
