"""The report of `pd bench multiturn`, with servers that are none."""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from pd.bench import multiturn
from pd.bench.errors import BenchError
from pd.bench.multiturn import (
    MultiturnOptions,
    print_multiturn,
    print_paired,
    run_multiturn,
    run_paired,
)

SPEC = {
    "model": {"path": "/nowhere"},
    "roles": {"both": {"pool": {"memory": "1GiB"}, "max_running": 3}},
}


class FakeServer:
    specs: list[dict[str, Any]] = []  # noqa: RUF012

    def __init__(self, spec: Path) -> None:
        self.specs.append(yaml.safe_load(spec.read_text()))

    def wait_ready(self, _: Console) -> str:
        return f"http://{len(self.specs)}"

    def stop(self) -> None:
        pass


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    def answer(url: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        # The second server says something else.
        token = 7 if "http://2/" in url and "differ" in FakeServer.specs[0]["model"]["path"] else 5
        yield {"choices": [{"token_ids": [token] * body["max_tokens"]}]}
        timings = {"cached_tokens_prefill": 9, "cached_tokens_decode": 0}
        yield {"timings": timings | {"cached_tokens_host": 4, "cached_tokens_storage": 1}}

    ticks = itertools.count()
    monkeypatch.setattr(multiturn, "Server", FakeServer)
    monkeypatch.setattr(
        multiturn, "get_json", lambda url: {"data": [{"id": "m", "vocab_size": 320}]}
    )
    monkeypatch.setattr(multiturn, "stream_json", answer)
    monkeypatch.setattr(multiturn.time, "perf_counter", lambda: next(ticks) * 0.25)
    FakeServer.specs = []
    yield FakeServer.specs
    with contextlib.suppress(AttributeError):
        del FakeServer.specs[:]


def run(tmp_path: Path, path: str = "/nowhere", **options: Any) -> dict[str, Any]:
    spec = tmp_path / "spec.yaml"
    spec.write_text(yaml.safe_dump({**SPEC, "model": {"path": path}}))
    return run_multiturn(
        MultiturnOptions(spec, clients=1, rounds=2, **options),
        Console(quiet=True),
        lambda t, n: None,
    )


def test_every_set_of_tiers_is_served_with_its_pools(
    servers: list[dict[str, Any]], tmp_path: Path
) -> None:
    run(tmp_path, device_pages=50, host_memory="64MiB")
    assert all(spec["roles"]["both"]["pool"] == {"pages": 50} for spec in servers)
    off, device, host, storage = (spec["cache"] for spec in servers)
    assert (off, device) == ({"device": False}, {"device": True})
    assert host == {"device": True, "host": {"memory": 64 << 20}}
    assert storage["host"] == {"memory": 16 << 20}
    assert storage["storage"]["backend"] == "file"


def test_report(servers: list[dict[str, Any]], tmp_path: Path) -> None:
    report = run(tmp_path, new_tokens=10, output_tokens=3)
    assert report["tokens_equal"]
    first, second = report["runs"][3]["rounds"]
    assert (first["prompt_tokens"], second["prompt_tokens"]) == (10, 23)
    assert second["cached_tokens"] == {"device": 5, "host": 3, "storage": 1}
    assert second["ttft_p50_s"] == 0.25
    assert second["ttft_ratio_to_off"] == 1
    console = Console(width=150, file=io.StringIO())
    print_multiturn(report, console)
    assert "device + host + storage" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_paired_run_compares_each_turn_with_a_server_without_a_cache(
    servers: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {"http://1/": 0.5, "http://2/": 0.25}
    asked: list[str] = []
    clock = [0.0]

    def answer(url: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        assert all(10 <= token < 320 for token in body["prompt"])
        server = url.removesuffix("v1/completions")
        asked.append(server)
        clock[0] += seconds[server]
        yield {"choices": [{"token_ids": [11] * body["max_tokens"]}]}
        timings = dict.fromkeys(("cached_tokens_prefill", "cached_tokens_decode"), 9)
        yield {"timings": timings | {"cached_tokens_host": 4, "cached_tokens_storage": 0}}

    monkeypatch.setattr(multiturn, "stream_json", answer)
    monkeypatch.setattr(multiturn.time, "perf_counter", lambda: clock[0])
    spec = tmp_path / "spec.yaml"
    spec.write_text(yaml.safe_dump(SPEC))
    options = MultiturnOptions(
        spec, 5, 2, storage="memory", tiers=("device + host + storage",), pause_s=0.0
    )
    report = run_paired(options, Console(quiet=True), lambda tiers, number: None)
    off, tiers = (spec["cache"] for spec in servers)
    assert off == {"device": False}
    assert tiers["storage"]["backend"] == "memory"
    turns = asked[6:]  # three of each server before
    assert len(turns) == 2 * 5 * 2
    assert all(set(pair) == seconds.keys() for pair in zip(turns[::2], turns[1::2], strict=True))
    assert turns[::2] != [turns[0]] * 10
    (run,) = report["runs"]
    assert len(run["rounds"]) == 2
    first = run["rounds"][0]
    assert (first["base_ttft_p50_s"], first["ttft_p50_s"], first["ratio_p50"]) == (0.5, 0.25, 0.5)
    assert first["ratio_p50_interval"] == [0.5, 0.5]
    assert first["cached_tokens"]["host"] == 5 * 4
    console = Console(width=150, file=io.StringIO())
    print_paired(report, console)
    assert "0.500 to 0.500" in console.file.getvalue()  # type: ignore[attr-defined]


def test_other_tokens_are_seen(servers: list[dict[str, Any]], tmp_path: Path) -> None:
    report = run(tmp_path, "/differ")
    assert not report["tokens_equal"]
    console = Console(width=150, file=io.StringIO())
    print_multiturn(report, console)
    assert "the tokens differ" in console.file.getvalue()  # type: ignore[attr-defined]


def test_nonsense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="at least 1"):
        run(tmp_path, new_tokens=0)
    with pytest.raises(BenchError, match="'tape', expected some of off, device"):
        run(tmp_path, tiers=("tape",))
