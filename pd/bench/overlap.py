"""How far a transfer stays out of the way: `python -m pd.bench.overlap`.

A prompt's KV moves in chunks, as a prefill replica's do: the pages of a chunk are posted when it
would have been computed, and go while the next one would be. Both processes have a mover, as
replicas do, and beside it a thread that runs steps of small kernels, as an engine does. Printed are

  usable after    from the last chunk's end until the target process has been told that all is there
  longest post    the longest single call into the transport, on the mover's thread
  step            how long a step takes, while nothing moves and while pages move
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt

from pd.bench.transfer import TransferOptions, find_devices, parse_backend_options
from pd.bench.transfer_ends import scramble
from transfer.backends import make_transport
from transfer.memory import allocate_host
from transfer.mover import Mover
from transfer.transport import Region, Transport, TransportError, WriteResult

_DEADLINE_S = 60.0
_STEP_KERNELS = 150


class _Steps:
    """A thread that runs steps, one after the other, and times each."""

    def __init__(self, device: int | None) -> None:
        self.seconds: list[float] = []
        self._device = device
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ending.set()
        self._thread.join(_DEADLINE_S)

    def _run(self) -> None:
        step = self._host_step if self._device is None else self._device_step(self._device)
        while not self._ending.is_set():
            started = time.perf_counter()
            step()
            self.seconds.append(time.perf_counter() - started)

    @staticmethod
    def _host_step() -> None:
        values = np.ones(4096, dtype=np.float32)
        for _ in range(_STEP_KERNELS):
            values = np.tanh(values)

    @staticmethod
    def _device_step(device: int) -> Callable[[], None]:
        import torch

        weights = torch.randn(2048, 2048, device=f"cuda:{device}", dtype=torch.bfloat16)
        hidden = torch.randn(16, 2048, device=f"cuda:{device}", dtype=torch.bfloat16)
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

        def step() -> None:
            with torch.cuda.stream(stream):
                for _ in range(_STEP_KERNELS):
                    torch.mm(hidden, weights)
                stream.synchronize()

        return step


class _End:
    """A process's pool, transport, mover and steps."""

    def __init__(
        self,
        name: str,
        backend: str,
        options: dict[str, str],
        region_bytes: int,
        page_bytes: int,
        device: int | None,
    ) -> None:
        address, self._memory = _allocate(region_bytes, device)
        self.transport: Transport = make_transport(backend, name, options)
        region = Region(address, region_bytes // page_bytes, page_bytes, device)
        self.transport.register([region])
        self.longest_post = 0.0
        self.results: dict[int, WriteResult] = {}
        self._time_posts()
        self.mover = Mover(
            self.transport,
            self._on_result,
            self._on_lost,
            self._on_failed,
            page_bytes=[page_bytes],
        )
        self.on_result: Callable[[int], None] = lambda key: None
        self.steps = _Steps(device)
        self.errors: list[str] = []

    def _time_posts(self) -> None:
        write = self.transport.write

        def timed(*arguments: Any) -> int:
            started = time.perf_counter()
            write_id = write(*arguments)
            self.longest_post = max(self.longest_post, time.perf_counter() - started)
            return write_id

        self.transport.write = timed  # type: ignore[method-assign, assignment]

    def _on_result(self, key: int, result: WriteResult) -> None:
        if result.error is not None:
            self.errors.append(result.error)
        self.on_result(key)

    def _on_lost(self, peer: str, error: str) -> None:
        self.errors.append(f"{peer}: {error}")

    def _on_failed(self, error: BaseException) -> None:
        self.errors.append(f"the mover failed: {error}")


def _allocate(num_bytes: int, device: int | None) -> tuple[int, object]:
    if device is None:
        memory = allocate_host(num_bytes)
        return memory.address, memory
    import torch

    tensor = torch.zeros(num_bytes, dtype=torch.uint8, device=f"cuda:{device}")
    torch.cuda.synchronize(device)
    return tensor.data_ptr(), tensor


def _serve_target(connection: Connection, *arguments: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end = _End("target", *arguments)
    end.mover.start()
    end.mover.expect(True)
    connection.send(end.transport.describe())
    end.steps.start()
    try:
        while (word := connection.recv()) != "end":
            if word == "landed":
                connection.send(time.monotonic())
            else:
                taken, end.steps.seconds = end.steps.seconds, []
                connection.send(taken)
    finally:
        end.steps.stop()
        end.mover.stop(_DEADLINE_S)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    layout = TransferOptions().layout(arguments.page_tokens)
    (source_device, target_device), where = find_devices(arguments.device)
    num_pages = arguments.tokens // arguments.page_tokens
    chunk_pages = arguments.chunk // arguments.page_tokens
    pool_bytes = (num_pages + num_pages // 4 + 1) * layout.page_bytes
    options = parse_backend_options(arguments.option)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    shared = (arguments.backend, options, pool_bytes, layout.page_bytes)
    process = context.Process(
        target=_serve_target, args=(there, *shared, target_device), daemon=True
    )
    process.start()
    there.close()
    end = _End("source", *shared, source_device)
    landed = threading.Semaphore(0)
    end.on_result = lambda key: landed.release()
    end.mover.start()
    try:
        end.mover.connect("target", _receive(here))
        end.steps.start()
        slots = scramble(num_pages, 1, 1), scramble(num_pages, 1, 2)
        usable: list[float] = []
        key = 0
        quiet: dict[str, list[float]] = {}
        for repeat in range(-1, arguments.repeats):
            if repeat == 0:
                time.sleep(1.0)
                quiet = {"source": end.steps.seconds, "target": _ask_steps(here)}
                end.steps.seconds = []
                end.longest_post = 0.0
            started = time.monotonic()
            for number, first in enumerate(range(0, num_pages, chunk_pages)):
                time.sleep(max(0.0, started + number * arguments.chunk_ms / 1e3 - time.monotonic()))
                pages = slice(first, first + chunk_pages)
                key += 1
                chunk_ended = time.monotonic()
                end.mover.write(key, "target", 0, slots[0][pages], slots[1][pages])
            for _ in range(0, num_pages, chunk_pages):
                if not landed.acquire(timeout=_DEADLINE_S):
                    raise TransportError(f"pages did not land in {_DEADLINE_S:.0f} s")
            here.send("landed")
            usable.append(_receive(here) - chunk_ended)
            if end.errors:
                raise TransportError(end.errors[0])
        moving = {"source": end.steps.seconds, "target": _ask_steps(here)}
        here.send("end")
        return {
            "conditions": {
                "backend": arguments.backend,
                "memory": where,
                "tokens": arguments.tokens,
                "page_tokens": arguments.page_tokens,
                "bytes": num_pages * layout.page_bytes,
                "chunk": arguments.chunk,
                "chunk_ms": arguments.chunk_ms,
                "repeats": arguments.repeats,
                "step": f"{_STEP_KERNELS} small kernels",
            },
            "usable_after_ms": _spread(usable[1:]),
            "longest_post_ms": end.longest_post * 1e3,
            "step_ms": {
                side: {"quiet": _spread(quiet[side]), "moving": _spread(moving[side])}
                for side in quiet
            },
        }
    finally:
        end.steps.stop()
        end.mover.stop(_DEADLINE_S)
        here.close()
        process.join(5.0)
        process.kill()


def _ask_steps(connection: Connection) -> list[float]:
    connection.send("steps")
    found: list[float] = _receive(connection)
    return found


def _receive(connection: Connection) -> Any:
    if not connection.poll(_DEADLINE_S):
        raise TransportError(f"the target process did not answer in {_DEADLINE_S:.0f} s")
    return connection.recv()


def _spread(seconds: list[float] | npt.NDArray[np.float64]) -> dict[str, float]:
    if not len(seconds):
        return {}
    return {
        "p50": statistics.median(seconds) * 1e3,
        "p99": float(np.percentile(seconds, 99)) * 1e3,
        "max": max(seconds) * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="How far a transfer stays out of the way.")
    parser.add_argument("--backend", default="nixl")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--page-tokens", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=1024, help="tokens")
    parser.add_argument("--chunk-ms", type=float, default=200.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    try:
        report = run(arguments)
    except (TransportError, RuntimeError, OSError, EOFError) as error:
        sys.exit(f"{parser.prog}: {error}")
    if arguments.json:
        print(json.dumps(report, indent=2))
        return
    print("  ".join(f"{name} {value}" for name, value in report["conditions"].items()))
    print(f"usable after   {_line(report['usable_after_ms'])}")
    print(f"longest post   {report['longest_post_ms']:.2f} ms")
    for side, steps in report["step_ms"].items():
        print(f"step, {side}   quiet {_line(steps['quiet'])}   moving {_line(steps['moving'])}")


def _line(spread: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in spread.items()) + " ms"


if __name__ == "__main__":
    main()
