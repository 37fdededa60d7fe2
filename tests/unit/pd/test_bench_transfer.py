"""The transfer benchmark: what it plans, its figures by hand, its check of bytes, and one small run
between two real processes."""

from __future__ import annotations

import dataclasses
import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from pd.bench.errors import BenchError
from pd.bench.transfer import (
    Case,
    Ends,
    Row,
    TransferOptions,
    TransferReport,
    find_devices,
    make_row,
    parse_backend_options,
    parse_pair,
    plan_cases,
    run_transfer_bench,
)
from pd.bench.transfer_ends import (
    Measured,
    Move,
    Setup,
    _layer_first,
    _Pool,
    scramble,
    sum_of_bytes,
)
from pd.bench.transfer_report import WIDTH, plot_transfer_report, print_transfer_report
from pd.cli import main
from transfer.plan import PairPlan
from transfer.topology import ReplicaLayout, Topology

SMALL = TransferOptions(
    backends=("shm",),
    pairs=("tp2:tp1",),
    page_tokens=(8,),
    pool_bytes=2 << 20,
    repeats=2,
    layers=4,
    kv_heads=2,
    head_dim=64,
)

# ----------------------------------------------------------------------------------------- planning


def test_pairs_are_read() -> None:
    assert parse_pair("tp8:tp4") == (Topology(tp=8), Topology(tp=4))
    assert parse_pair("cp3tp2:pp2") == (Topology(tp=2, cp=3), Topology(pp=2))


@pytest.mark.parametrize("text", ["tp8", "tp8:", "8:4", "tp8:tp4:tp2", "tp2tp3:tp1", "tp2x:tp1"])
def test_what_is_no_pair_is_refused(text: str) -> None:
    with pytest.raises(BenchError, match="--pair: found"):
        parse_pair(text)


def test_backend_options_are_read() -> None:
    assert parse_backend_options(["num_threads=4", "a=b=c"]) == {"num_threads": "4", "a": "b=c"}
    with pytest.raises(BenchError, match="--option: found 'fast', expected KEY=VALUE"):
        parse_backend_options(["fast"])


def test_cases_of_the_default() -> None:
    cases = plan_cases(TransferOptions())
    found = [(case.pair, case.pool, case.layout.page_tokens, case.moves) for case in cases]
    assert found == [
        (pair, pool, page_tokens, moves)
        for pair in ("tp1:tp1", "tp8:tp4")
        for page_tokens, moves in ((64, (16, 113)), (16, (64, 455)))
        for pool in ("page-first", "layer-first")
    ] + [("tp1:tp1", "4 KiB pages", 8, (65536,))]
    assert [case.layout.page_bytes for case in cases][::4] == [9 << 20, 9 << 20, 4096]


def test_cases_of_given_lengths() -> None:
    options = dataclasses.replace(SMALL, tokens=(9, 100_000), backends=("nixl", "shm"))
    cases = plan_cases(options)
    assert [case.backend for case in cases] == ["nixl"] * 3 + ["shm"] * 3
    assert cases[0].moves == (2, 12_500)
    assert cases[0].num_pages == 12_500


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backends": ("loopback",)}, "loopback: it stays within one process; expected nixl"),
        ({"backends": ("pigeon",)}, "--backend pigeon: there is none; expected nixl"),
        ({"pairs": ("tp1:pp5",)}, "5 stages for 4 layers"),
        ({"latent": True}, "--latent: found 2 KV heads"),
        ({"pool_bytes": 0}, "--bytes: found 0"),
        ({"options": ("fast",)}, "--option"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BenchError, match=message):
        plan_cases(dataclasses.replace(SMALL, **changes))


@pytest.mark.parametrize("cp", [1, 2, 3])
def test_a_scrambled_pool_has_each_slot_once_for_each_rank(cp: int) -> None:
    slots = scramble(20, cp, 7)
    for rank in range(cp):
        assert sorted(slots[rank::cp]) == list(range(1, 1 + len(slots[rank::cp])))
    assert (np.diff(slots) != 1).sum() > 10


# ------------------------------------------------------------------------------------------ figures


def a_row(**changes: Any) -> Row:
    (case,) = [case for case in plan_cases(TransferOptions()) if case.layout.page_tokens == 8]
    case = dataclasses.replace(case, **changes)
    moves = [Move(0.001 * i, 0.2, 1.0 + i, 4_000_000_000, 3, 1000) for i in (3, 0, 1)]
    measured = Measured(dataclasses.replace(moves[0], total_s=9.0), tuple(moves), (1.0, 4.0, 1.5))
    return make_row(case, 65536, measured)


def test_a_rows_figures_are_medians() -> None:
    row = a_row()
    assert (row.first_s, row.plan_s, row.post_s, row.wait_s) == (9.0, 0.001, 0.2, 1.8)
    assert (row.total_s, row.best_s) == (2.0, 1.0)
    assert (row.gb_per_s, row.limit_gb_per_s, row.limit_best_gb_per_s) == (2.0, 4 / 1.5, 4.0)
    assert row.ratio == 0.75
    assert (row.descriptors, row.descriptor_bytes) == (1000, 4_000_000)


def a_report() -> TransferReport:
    large = dataclasses.replace(a_row(), pool="page-first", gb_per_s=8.0, descriptor_bytes=9 << 20)
    other = dataclasses.replace(large, pool="layer-first", gb_per_s=3.0, descriptor_bytes=1 << 17)
    conditions = {"model": "tiny", "memory": "host memory", "cpu": "a chip", "options": []}
    return TransferReport(conditions, [], [large, other, a_row()])


def test_small_pages_are_compared_with_large_ones() -> None:
    report = a_report()
    assert [report.small_ratio(row) for row in report.rows] == [None, None, 0.25]
    assert report.to_json()["rows"][2]["of_large_pages"] == 0.25


def test_the_report_has_all_figures_in_its_width(tmp_path: Path) -> None:
    file = io.StringIO()
    print_transfer_report(a_report(), Console(file=file, width=WIDTH))
    text = file.getvalue()
    assert "…" not in text
    assert re.search(r"4 KiB pages +8 +524,288 +3\.725 GiB +1,000 +3\.815 MiB", text)
    assert re.search(r"9,000 +1\.00 +200 +1,800 +2,000 +2\.00 +2\.67 +4\.00 +75%", text)
    assert "nixl: pages of 4 KiB move at 25% of its large pages' rate" in text
    plot_transfer_report(a_report(), tmp_path / "rates.png")
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(BenchError, match="--plot"):
        plot_transfer_report(a_report(), tmp_path / "none" / "rates.png")


def test_a_plot_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BenchError, match=r"pip install 'pagerelay\[bench\]'"):
        plot_transfer_report(a_report(), Path("rates.png"))


# ------------------------------------------------------------------------------- the check of bytes


def a_setup(pair: str, layer_first: bool) -> Setup:
    layout = SMALL.layout(8)
    source, target = (ReplicaLayout(topology, (layout,)) for topology in parse_pair(pair))
    return Setup("shm", {}, source, target, 20, layer_first, (None, None), 0)


@pytest.mark.parametrize("layer_first", [False, True])
def test_wrong_and_stray_bytes_are_found(layer_first: bool) -> None:
    setup = a_setup("tp1:cp3", layer_first)
    slots = scramble(20, 3, 1)
    pool = _Pool(setup, "target", 1)
    pool.clear()
    assert "pages 1 to 10 have wrong bytes" in pool.find_wrong(slots, 12)
    pool.put(slots, 20)
    assert pool.find_wrong(slots, 20) == "slots 0 to 0 were written and must not be"
    pool.clear()
    for page in (1, 4, 7, 10):
        pool._pages[:, slots[page]] = pool._content(np.array([page]))[:, 0]
    assert pool.find_wrong(slots, 12) == ""
    assert "must not be" in pool.find_wrong(slots, 9)
    pool._pages[-1, slots[4], -1] += 1
    assert "wrong bytes" in pool.find_wrong(slots, 12)


@pytest.mark.parametrize("pair", ["tp1:tp1", "tp2:tp1", "tp1:tp2", "tp4:tp1", "pp2:tp2", "cp2:pp3"])
@pytest.mark.parametrize("layer_first", [False, True])
def test_writes_put_every_word_in_its_place(pair: str, layer_first: bool) -> None:
    setup = a_setup(pair, layer_first)
    pools: dict[str, list[_Pool]] = {"source": [], "target": []}
    for rank in range(setup.source.topology.num_ranks):
        pools["source"].append(_Pool(setup, "source", rank))
    for rank in range(setup.target.topology.num_ranks):
        pools["target"].append(_Pool(setup, "target", rank))
    slots = [scramble(20, each.topology.cp, 3) for each in (setup.source, setup.target)]
    for pool in pools["source"]:
        pool.put(slots[0], 20)
    for pool in pools["target"]:
        pool.clear()
    plan = PairPlan(setup.source, setup.target)
    moved = 0
    for write in plan.writes(0, 0, slots[0][:17], slots[1][:17]):
        pages: tuple[Any, Any] = (write.source_pages, write.target_pages)
        part = write.part
        if layer_first:
            piece = _layer_first(setup, 0, write)
            assert piece.part is not None
            pages, part = (piece.source_pages, piece.target_pages), piece.part
        ours, theirs = pools["source"][write.source], pools["target"][write.target]
        for source, target in zip(*pages, strict=True):
            for run in range(part.count):
                first = source * ours.region.page_bytes + part.source_offset
                first += run * part.source_stride
                there = target * theirs.region.page_bytes + part.target_offset
                there += run * part.target_stride
                theirs.words.view(np.uint8)[there : there + part.length] = ours.words.view(
                    np.uint8
                )[first : first + part.length]
                moved += part.length
    assert moved == sum_of_bytes(plan, 17)
    assert [pool.find_wrong(slots[1], 17) for pool in pools["target"]] == [""] * len(
        pools["target"]
    )


# ------------------------------------------------------------------------------------ two processes

Run_ = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run_:
    def call(*arguments: str) -> tuple[int, str, str]:
        """(exit code, stdout, stderr)."""
        monkeypatch.setattr(sys, "argv", ["pd", "bench", "transfer", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        code = caught.value.code
        return (code if isinstance(code, int) else 0), captured.out, captured.err

    return call


TINY = [
    *("--bytes=2MiB", "--repeats=2", "--page-tokens=8", "--pair=tp2:tp1", "--tokens=64"),
    *("--layers=4", "--kv-heads=2", "--head-dim=64"),
]


def test_a_small_run_over_nixl(run: Run_, tmp_path: Path) -> None:
    pytest.importorskip("nixl", reason="nixl is not installed")
    out = tmp_path / "results"
    code, text, err = run(*TINY, "--json", "--out", str(out), "--plot", str(tmp_path / "a.png"))
    assert (code, err) == (0, "")
    report = json.loads(text)
    assert json.loads((out / "transfer.json").read_text()) == report
    assert "layer-first" in (out / "transfer.txt").read_text()
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert not report["interrupted"]
    assert report["conditions"]["repeats"] == 2
    assert {"cpu", "cores", "load average", "python", "nixl"} <= set(report["conditions"])
    assert report["planning"][0]["links"] == 2
    rows = report["rows"]
    assert [row["pool"] for row in rows] == ["page-first", "layer-first", "4 KiB pages"]
    page_bytes = 2 * 4 * 2 * 8 * 64 * 2
    for row in rows:
        assert row["verified"] is True
        assert row["descriptors"] * row["descriptor_bytes"] == row["num_bytes"]
        assert row["gb_per_s"] > 0
        assert row["limit_gb_per_s"] <= row["limit_best_gb_per_s"]
        assert row["total_s"] >= row["best_s"] > 0
    assert [row["num_bytes"] for row in rows] == [8 * page_bytes, 8 * page_bytes, 2 << 20]
    # One run of a rank's heads in each page; one for each layer, plane and page.
    assert rows[0]["descriptors"] == 16
    assert 100 < rows[1]["descriptors"] <= 16 * 4 * 2
    assert rows[2]["of_large_pages"] > 0
    assert multiprocessing.active_children() == []


def test_wrong_arguments_are_one_line(run: Run_) -> None:
    for arguments, message in (
        (["--bytes", "much"], "pd: --bytes: found 'much', expected a size such as"),
        (["--device", "tpu"], "pd: --device: found 'tpu', expected cpu or cuda"),
        (["--backend", "loopback"], "pd: --backend loopback"),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith(message)
        assert len(err.splitlines()) == 1


def test_options_that_a_backend_refuses_are_an_error(run: Run_) -> None:
    code, out, err = run(*TINY, "--backend=shm", "--option=speed=9")
    assert (code, out) == (1, "")
    assert "shm transport has no options ['speed']" in err
    assert multiprocessing.active_children() == []


def test_a_process_that_dies_is_named() -> None:
    with Ends() as ends:
        ends.ask("target", "tear_down")
        for process in multiprocessing.active_children():
            os.kill(process.pid or 0, signal.SIGKILL)
        with pytest.raises(BenchError, match=r"the \w+ process ended \(signal 9\) during 'clear'"):
            ends.ask("target", "clear")
    assert multiprocessing.active_children() == []


def test_ctrl_c_keeps_the_rows_that_had_ended_and_leaves_no_process() -> None:
    titles = []

    def on_row(title: str, total: int) -> None:
        titles.append(title)
        assert total == 5
        if len(titles) == 3:
            raise KeyboardInterrupt

    report = run_transfer_bench(dataclasses.replace(SMALL, tokens=(8, 64)), on_row)
    assert titles[1] == "shm tp2:tp1 page-first 8 x 64"
    assert report.interrupted
    assert [row.tokens for row in report.rows] == [8, 64]
    assert multiprocessing.active_children() == []


def test_it_runs_without_what_only_a_cluster_needs() -> None:
    absent = ("ray", "fastapi", "uvicorn", "zmq", "aiohttp", "transformers", "torch")
    code = (
        f"import sys, runpy; sys.modules.update(dict.fromkeys({absent!r})); "
        f"sys.argv = ['transfer', '--backend=shm', *{TINY!r}]; "
        "runpy.run_module('pd.bench.transfer', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "shm: pages of 4 KiB move at" in done.stdout


def test_cuda_without_a_gpu_is_refused() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(BenchError, match="no CUDA device"):
        find_devices("cuda")


def test_a_case_is_described_by_its_fields() -> None:
    (first, *_rest) = plan_cases(SMALL)
    assert first == Case("shm", "tp2:tp1", "page-first", SMALL.layout(8), 128, (128,))
