"""A simulation beside a server under the same load: `pd simulate --against URL`.

The server gets the same requests at the same times, with equal tokens for equal blocks, other ones
in each repetition, so that none finds the pages of the one before. A repetition's error is that of
the simulated median against the measured one.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pd.bench.errors import BenchError
from pd.bench.serve import PlannedRequest, ask_server, run_load
from pd.bench.simulate import Load, SimulateRow
from pd.bench.stats import RequestResult, Summary, to_json
from pd.simulate.cluster import SimRequest

if TYPE_CHECKING:
    from rich.console import Console

_VOCABULARY = 1000
_DEADLINE_S = 600.0


@dataclasses.dataclass(frozen=True, slots=True)
class Against:
    simulated: SimulateRow
    measured: tuple[Summary, ...]

    def errors(self) -> list[dict[str, float | None]]:
        """By repetition: simulated / measured - 1, of medians and means."""
        return [
            {
                f"{name}_{figure}": _error(
                    getattr(getattr(self.simulated, name), figure),
                    getattr(getattr(summary, name), figure),
                )
                for name in ("ttft", "tpot")
                for figure in ("p50", "mean")
            }
            for summary in self.measured
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "simulated": self.simulated.to_json(),
            "measured": [to_json(summary) for summary in self.measured],
            "errors": self.errors(),
        }


def _error(simulated: float | None, measured: float | None) -> float | None:
    return simulated / measured - 1 if simulated is not None and measured else None


def plan_requests(
    load: Load, requests: Sequence[SimRequest], vocab_size: int, seed: int
) -> list[PlannedRequest]:
    low, high = vocab_size // 10, max(vocab_size // 10 + 1, vocab_size * 9 // 10)
    planned = []
    for request in requests:
        tokens: list[int] = []
        for block in request.blocks:
            tokens += random.Random(f"{seed} {block}").choices(
                range(low, high), k=load.block_tokens
            )
        prompt = tuple(tokens[: request.num_prompt])
        planned.append(PlannedRequest(prompt, request.num_output, request.at_s))
    return planned


async def run_against(
    row: SimulateRow,
    load: Load,
    url: str,
    key: str,
    repeats: int,
    seed: int,
    on_result: Callable[[RequestResult], None] = lambda result: None,
) -> Against:
    """Raises BenchError."""
    server = await ask_server(url, "", key)
    requests = load.at_rate(row.rate)
    measured = []
    for repeat in range(repeats):
        planned = plan_requests(
            load, requests, server.vocab_size or _VOCABULARY, seed * repeats + repeat
        )
        run = await run_load(
            server,
            planned,
            concurrency=None,
            deadline_s=_DEADLINE_S,
            extra={},
            stop=asyncio.Event(),
            on_result=on_result,
        )
        if run.summary.errors:
            raise BenchError(f"{url}: {next(iter(run.summary.errors))}")
        measured.append(run.summary)
    return Against(row, tuple(measured))


def print_against(against: Against, console: Console) -> None:
    from rich.table import Table

    table = Table("", "TTFT p50", "mean", "TPOT p50", "mean", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"

    def add(title: str, row: SimulateRow | Summary) -> None:
        values = (row.ttft.p50, row.ttft.mean, row.tpot.p50, row.tpot.mean)
        table.add_row(title, *("-" if v is None else f"{v * 1000:,.2f} ms" for v in values))

    add("simulated", against.simulated)
    for summary, errors in zip(against.measured, against.errors(), strict=True):
        add("measured", summary)
        table.add_row("  error", *("-" if v is None else f"{v:+.1%}" for v in errors.values()))
    console.print(table)
