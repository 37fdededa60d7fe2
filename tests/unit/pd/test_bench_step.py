"""The step benchmark: its commands, its floors, its processes, and what it prints."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from reference_model import ReferenceModel
from typer.testing import CliRunner

from pd.bench.errors import BenchError
from pd.bench.step import StepOptions, floor_of, place_ranks, work_of
from pd.bench.step_ranks import Ceilings, RankFacts, RankProcesses, RankSetup, Rows
from pd.bench.tiny import make_tiny_model
from pd.cli import app
from pd.spec import ModelSpec
from transfer.topology import Topology

FACTS = RankFacts(0, 1000, 300, 2, 64, 4, 512, 512 * 8, 0, "bfloat16", "")


@pytest.mark.parametrize("cp", [1, 2, 3])
def test_rows_have_slots_of_their_own_on_the_ranks_of_their_pages(cp: int) -> None:
    rows = Rows(3, 50, 8, 1, cp)
    command = rows.start(rows.decode([50, 50, 50], np.zeros(3, np.int32)), range(3))
    row, page, slot = command.pages[0].T
    assert sorted(zip(row.tolist(), page.tolist(), strict=True)) == [
        (r, p) for r in range(3) for p in range(7)
    ]
    assert len(set(slot.tolist())) == 21
    assert (slot % cp == page % cp).all()
    assert slot.min() // cp >= 1  # not the null page
    assert slot.max() // cp < rows.num_pages
    assert [start.row for start in command.starts] == [0, 1, 2]


def test_work_of_a_chunk_and_of_a_decode_step() -> None:
    rows = Rows(2, 100, 8, 1)
    chunk = work_of(rows.chunk(0, 10, np.zeros(4, np.int32), False), FACTS, 1)
    assert chunk.num_bytes == 1000 * 2 + 14 * 512
    assert chunk.operations == 2 * 1000 * 4 + 4 * 64 * 4 * (11 + 12 + 13 + 14)
    decode = work_of(rows.decode([10, 20], np.zeros(2, np.int32)), FACTS, 1)
    assert decode.num_bytes == 1300 * 2 + (11 + 21) * 512
    assert decode.operations == 2 * 1300 * 2 + 4 * 64 * 4 * (11 + 21)


def test_floors_of_ranks_that_share_a_device_and_of_stages_add_up() -> None:
    command = Rows(1, 100, 8, 1).decode([10], np.zeros(1, np.int32))
    ceilings = Ceilings(1e6, 1e12)
    alone, bound = floor_of(command, [FACTS], [0], 1, ceilings)
    assert bound == "bytes"
    assert alone == pytest.approx((1300 * 2 + 11 * 512) / 1e6)
    assert floor_of(command, [FACTS] * 2, [0, 1], 1, ceilings)[0] == pytest.approx(alone)
    assert floor_of(command, [FACTS] * 2, [0, 0], 1, ceilings)[0] == pytest.approx(2 * alone)
    later = RankFacts(1, 1000, 300, 2, 64, 4, 512, 512 * 8, 0, "bfloat16", "")
    assert floor_of(command, [FACTS, later], [0, 1], 1, ceilings)[0] == pytest.approx(2 * alone)
    assert floor_of(command, [FACTS], [0], 1, Ceilings(1e12, 1e6))[1] == "operations"


def test_ranks_take_turns_on_too_few_gpus() -> None:
    assert place_ranks(2, 0) == (None, None)
    assert place_ranks(2, 2) == (0, 1)
    assert place_ranks(4, 2) == (0, 1, 0, 1)
    assert place_ranks(1, 2, first=1) == (1,)
    assert place_ranks(2, 1, first=2) == (0, 0)


def test_options_that_cannot_be_measured() -> None:
    with pytest.raises(BenchError, match="--shape: found 'large', expected qwen3-8b or tiny"):
        StepOptions(shape="large")
    with pytest.raises(BenchError, match="--prompt: found 5000, expected at most 4088"):
        StepOptions(shape="tiny", prompts=(5000,), contexts=())


def needs(gpus: int) -> pytest.MarkDecorator:
    missing = torch.cuda.device_count() < gpus
    return pytest.mark.skipif(missing, reason=f"needs {gpus} CUDA device(s)")


@pytest.mark.parametrize(
    ("family", "topology", "gpus"),
    [
        ("qwen3", Topology(tp=2), 0),
        *(
            pytest.param(family, topology, gpus, marks=needs(gpus))
            for family, topology, choices in (
                ("qwen3", Topology(tp=2), (1, 2)),
                ("gemma3_text", Topology(pp=2), (1, 2)),
                ("deepseek_v3", Topology(cp=2), (1, 2)),
                ("gpt_oss", Topology(tp=2, cp=2), (1, 4)),
            )
            for gpus in choices
        ),
    ],
    ids=str,
)
def test_ranks_in_processes_give_the_tokens_of_transformers(
    family: str, topology: Topology, gpus: int, tmp_path: Path
) -> None:
    """On the CPU; on one GPU that they share; on a GPU each, by NCCL."""
    folder = make_tiny_model(tmp_path / family, family)
    places = place_ranks(topology.num_ranks, gpus)
    spec = ModelSpec(path=str(folder), dtype="float32")
    prompt = np.random.default_rng(0).integers(0, 320, 70).astype(np.int32)
    with RankProcesses(RankSetup(folder, spec, topology, 8, places)) as ranks:
        assert {each.backend for each in ranks.facts} == {"nccl" if gpus > 1 else "gloo"}
        num_groups = 2 if family in ("gemma3_text", "gpt_oss") else 1
        rows = Rows(1, 100, 8, num_groups, topology.cp)
        ranks.allocate(rows.num_pages, 1, 100)
        ranks.step(rows.start(rows.chunk(0, 0, prompt[:40], False), [0]))
        tokens = ranks.step(rows.chunk(0, 40, prompt[40:], True)).tokens
        for position in range(70, 78):
            tokens += ranks.step(rows.decode([position], np.array(tokens[-1:], np.int32))).tokens
    assert tokens == ReferenceModel(folder).generate(prompt.tolist(), 9)
    assert multiprocessing.active_children() == []


def test_a_rank_that_fails_is_named(tmp_path: Path) -> None:
    spec = ModelSpec(path=str(tmp_path))
    with pytest.raises(BenchError, match="rank 0, load: UnsupportedModelError: "):
        RankProcesses(RankSetup(tmp_path, spec, Topology(), 8, (None,)))
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=tp"], "--topology: found 'tp', expected such as tp8"),
        (["--device=tpu"], "--device: found 'tpu', expected cpu or cuda"),
        (["--dtype=int8"], "--dtype: found 'int8', expected bfloat16, float16 or float32"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str) -> None:
    from pd.command import Failure

    done = CliRunner().invoke(app, ["bench", "step", *arguments])
    assert isinstance(done.exception, Failure)
    assert str(done.exception).startswith(message)
