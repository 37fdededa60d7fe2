"""The order of what a rank's compute thread does, with a stand-in for its model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pd.engine.batch import StepCommand, StepResult
from pd.events import RunStep, StepDone
from pd.rank import RankEvent, RankFailed, RankWorker
from pd.spec import ClusterSpec


class _Runner:
    """Steps have a number, which is their only token."""

    def __init__(self, log: list[str], fails: str) -> None:
        self._log, self._fails = log, fails
        self.may_finish = threading.Event()

    def _did(self, what: str) -> None:
        self._log.append(what)
        if what == self._fails:
            raise ValueError(what)

    def begin(self, command: StepCommand) -> Callable[[], StepResult]:
        number = int(command.tokens[0])
        self._did(f"begin {number}")

        def finish() -> StepResult:
            assert self.may_finish.wait(10)
            self._did(f"finish {number}")
            return StepResult([number], [None], 0.0)

        return finish


@pytest.mark.parametrize(
    ("fails", "expected"),
    [
        ("", "begin 1, finish 1, begin 2, told 1, finish 2, begin 3, told 2, finish 3, told 3"),
        ("begin 2", "begin 1, finish 1, begin 2, told 1, failed: ValueError: begin 2"),
        ("finish 2", "begin 1, finish 1, begin 2, told 1, finish 2, failed: ValueError: finish 2"),
    ],
)
def test_a_step_that_waits_begins_before_the_one_before_is_told(fails: str, expected: str) -> None:
    log: list[str] = []

    def note(event: RankEvent) -> None:
        if isinstance(event, StepDone):
            log.append(f"told {event.result.tokens[0]}")
        elif isinstance(event, RankFailed):
            log.append(f"failed: {event.error}")

    spec: Any = ClusterSpec.model_construct()
    worker = RankWorker("decode-0", spec, "decode", 0, "127.0.0.1", note)
    runner: Any = _Runner(log, fails)
    worker.runner = runner
    nothing = np.zeros(0, np.int32)
    for number in (1, 2, 3):
        tokens = np.array([number], np.int32)
        worker.carry_out(RunStep(StepCommand([], *[nothing] * 4, tokens, [])))  # type: ignore[arg-type]
    runner.may_finish.set()
    worker.compute.shutdown(wait=True)
    assert ", ".join(log).startswith(expected)
