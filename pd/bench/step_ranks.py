"""A replica's ranks without a leader, Ray or sockets: one process for each rank, which runs the
steps it is told, times them and says where their time goes. For `pd bench step`.

The parent makes the commands (`Rows`); ranks obey in order and answer by pipe. Weights may be
random, pools hold random numbers: neither changes what a step costs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from pd.bench.errors import BenchError
from pd.engine.batch import RowStart, StepCommand, StepResult
from pd.messages import Int32Array, SamplingParams
from pd.rank import merge_steps
from pd.spec import ModelSpec
from transfer.topology import Topology

_DEADLINE_S = 300.0
_COPY_BYTES = {"cpu": 64 << 20, "cuda": 4 << 30}
_MATMUL_SIZE = {"cpu": 512, "cuda": 8192}
GREEDY = SamplingParams(max_tokens=1, temperature=0.0)
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_grouped_mm")


@dataclasses.dataclass(frozen=True, slots=True)
class RankSetup:
    """What all ranks of a replica are told."""

    folder: Path
    model: ModelSpec
    topology: Topology
    page_tokens: int
    devices: tuple[int | None, ...]
    """By rank, its GPU; None: the CPU."""

    @property
    def shares_devices(self) -> bool:
        return len(set(self.devices)) < len(self.devices) or None in self.devices


@dataclasses.dataclass(frozen=True, slots=True)
class RankFacts:
    stage: int
    layer_weights: int
    """Parameters of matrix products that every token goes through."""
    head_weights: int
    """Those that only sampled tokens go through; 0 where another stage has them."""
    weight_bytes: int
    """Of each of those."""
    query_width: int
    """Numbers in a token's queries, over all heads of a layer."""
    num_layers: int
    token_bytes: int
    """In the pools, for each token that it holds."""
    page_bytes: int
    free_bytes: int
    """Of the device's memory; of a CPU's nothing is said."""
    compute_dtype: str
    backend: str


@dataclasses.dataclass(frozen=True, slots=True)
class Ceilings:
    """What the device does at best, measured."""

    copy_bytes_s: float
    """Bytes read and written, each counted."""
    matmul_flops_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class Profile:
    """One step's seconds by what they went to; on a GPU those in kernels and copies, on a CPU those
    in operators. With ranks that share a GPU, collectives are the host's time."""

    seconds: dict[str, float]
    launches: float
    """Kernels and copies; operators on a CPU."""


class Rows:
    """Places in a running batch, each with all the pages that `context` tokens need, in random
    slots; the same in all layer groups."""

    def __init__(
        self,
        num_rows: int,
        context: int,
        page_tokens: int,
        num_groups: int,
        cp: int = 1,
        seed: int = 0,
    ) -> None:
        rng = np.random.default_rng(seed)
        width = -(-context // page_tokens)
        share = -(-width // cp)
        self.num_pages = 1 + num_rows * share
        """Of each rank's pools."""
        self.context = context
        slots = np.zeros((num_rows, share * cp), np.int32)
        for rank in range(cp):
            own = rng.permutation(num_rows * share).astype(np.int32).reshape(num_rows, share)
            slots[:, rank::cp] = (1 + own) * cp + rank
        page = np.arange(width, dtype=np.int32)
        self._pages = [
            np.stack((np.full(width, row, np.int32), page, slots[row, :width]), 1)
            for row in range(num_rows)
        ]
        self._num_groups = num_groups
        self._nothing = np.zeros((0, 3), np.int32)

    def start(
        self, command: StepCommand, rows: Sequence[int], params: SamplingParams = GREEDY
    ) -> StepCommand:
        """The command, beginning with these rows."""
        starts = [RowStart(row, params, np.zeros(1, np.int32), 1) for row in rows]
        pages = np.concatenate([self._pages[row] for row in rows])
        return dataclasses.replace(command, starts=starts, pages=[pages] * self._num_groups)

    def chunk(self, row: int, position: int, tokens: Int32Array, samples: bool) -> StepCommand:
        return self._command([row], [position], [len(tokens)], [samples], tokens)

    def decode(self, positions: Sequence[int], tokens: Int32Array) -> StepCommand:
        """One token of each of the first rows."""
        count = len(positions)
        return self._command(range(count), positions, [1] * count, [True] * count, tokens)

    def _command(
        self,
        rows: Sequence[int],
        positions: Sequence[int],
        counts: Sequence[int],
        samples: Sequence[bool],
        tokens: Int32Array,
    ) -> StepCommand:
        return StepCommand(
            [],
            np.array(rows, np.int32),
            np.array(positions, np.int32),
            np.array(counts, np.int32),
            np.array(samples, np.bool_),
            tokens,
            [self._nothing] * self._num_groups,
        )


class RankProcesses:
    """The ranks; `close` ends them."""

    def __init__(self, setup: RankSetup) -> None:
        """Raises BenchError."""
        from pd.engine.ranks import make_store

        self.setup = setup
        self._store = make_store("127.0.0.1", _DEADLINE_S)
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        try:
            for rank in range(setup.topology.num_ranks):
                here, there = context.Pipe()
                process = context.Process(
                    target=_serve_rank, args=(there, setup, rank, self._store.port), daemon=True
                )
                process.start()
                there.close()
                self._pipes.append(here)
                self._processes.append(process)
            self.facts: list[RankFacts] = self._answers("load")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def allocate(self, num_pages: int, num_rows: int, context: int) -> None:
        self._ask("allocate", num_pages, num_rows, context)

    def step(self, command: StepCommand) -> StepResult:
        """On all ranks; the time is that of the slowest. Raises BenchError."""
        return merge_steps(self._ask("step", command))

    def profile(self, command: StepCommand, repeats: int) -> Profile:
        """Of the first rank."""
        first: Profile = self._ask("profile", command, repeats)[0]
        return first

    def logits(self, command: StepCommand) -> npt.NDArray[np.float32]:
        """(items that sample, vocabulary)."""
        return next(each for each in self._ask("logits", command) if each is not None)

    def ceilings(self) -> Ceilings:
        """Of the first rank's device, while the others rest."""
        self._pipes[0].send(("ceilings", ()))
        found: Ceilings = self._answer(0, "ceilings")
        return found

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10.0)
            process.kill()
            process.join()

    def _ask(self, what: str, *arguments: object) -> list[Any]:
        for pipe in self._pipes:
            with contextlib.suppress(OSError):  # its end is told where it should have answered
                pipe.send((what, arguments))
        return self._answers(what)

    def _answers(self, what: str) -> list[Any]:
        return [self._answer(rank, what) for rank in range(len(self._pipes))]

    def _answer(self, rank: int, what: str) -> Any:
        try:
            if not self._pipes[rank].poll(_DEADLINE_S):
                raise BenchError(f"rank {rank} did not answer {what!r} in {_DEADLINE_S:.0f} s")
            kind, answer = self._pipes[rank].recv()
        except (EOFError, ConnectionResetError):
            self._processes[rank].join(1.0)
            code = self._processes[rank].exitcode
            raise BenchError(f"rank {rank} ended (exit code {code}) during {what!r}") from None
        if kind == "error":
            raise BenchError(f"rank {rank}, {what}: {answer}")
        return answer


# ----------------------------------------------------------------------------------- in the process


def _serve_rank(connection: Connection, setup: RankSetup, number: int, port: int) -> None:
    """A process's main function. Ctrl-C is for the parent, which ends us."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler's own remarks
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    device = setup.devices[number]
    if device is not None:
        choose_gpu(device)
    try:
        rank = _Rank(setup, number, port)
        connection.send(("ok", rank.facts()))
        while True:
            name, arguments = connection.recv()
            connection.send(("ok", getattr(rank, name)(*arguments)))
    except EOFError:
        pass  # the parent has ended
    except (BenchError, RuntimeError, ValueError, OSError) as error:
        connection.send(("error", f"{type(error).__name__}: {error}"))


def choose_gpu(device: int) -> None:
    """The only one that this process sees: as its first, as in a deployment."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = seen.split(",") if seen else []
    os.environ["CUDA_VISIBLE_DEVICES"] = names[device] if names else str(device)


class _Rank:
    """What a rank's process does; `_serve_rank` calls its public methods."""

    def __init__(self, setup: RankSetup, number: int, port: int) -> None:
        import torch

        from pd.cost import load_config
        from pd.engine.model import ModelRunner
        from pd.engine.ranks import Ranks, join_store
        from pd.engine.shards import balanced

        is_cuda = setup.devices[number] is not None
        self.device = torch.device("cuda", 0) if is_cuda else torch.device("cpu")
        if not is_cuda:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // len(setup.devices)))
        topology = balanced(setup.topology, load_config(setup.folder))
        self._backend = "gloo" if setup.shares_devices else "nccl"
        self._ranks = Ranks(
            topology,
            number,
            join_store("127.0.0.1", port, _DEADLINE_S),
            timeout_s=_DEADLINE_S,
            device=self.device,
            backend="gloo" if setup.shares_devices else "nccl",
        )
        self.runner = ModelRunner(
            setup.folder, setup.model, setup.page_tokens, self.device, self._ranks
        )

    def facts(self) -> RankFacts:
        import torch

        runner, model = self.runner, self.runner.model
        modules = model.get_decoder().layers.modules()
        linear = [each.weight for each in modules if isinstance(each, torch.nn.Linear)]
        head = getattr(model.lm_head, "weight", None)
        config = model.config.get_text_config()
        pages = [layout.page_bytes for layout in runner.rank_layouts]
        return RankFacts(
            stage=self._ranks.coord.pp,
            layer_weights=sum(weight.numel() for weight in linear),
            head_weights=0 if head is None else head.numel(),
            weight_bytes=runner.compute_dtype.itemsize,
            query_width=config.num_attention_heads * config.head_dim,
            num_layers=sum(len(layout.group.layers) for layout in runner.rank_layouts),
            token_bytes=sum(pages) // runner.layouts[0].page_tokens,
            page_bytes=sum(pages),
            free_bytes=torch.cuda.mem_get_info(0)[0] if self.device.type == "cuda" else 0,
            compute_dtype=str(runner.compute_dtype).removeprefix("torch."),
            backend=self._backend if self._ranks.topology.num_ranks > 1 else "",
        )

    def allocate(self, num_pages: int, num_rows: int, context: int) -> None:
        import torch

        self.runner.pools = []
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.runner.allocate([num_pages] * len(self.runner.groups), num_rows, context)
        for pool in self.runner.pools:
            pool.data.normal_()

    def step(self, command: StepCommand) -> StepResult:
        if self.runner.graphs is not None:
            self.runner.graphs.prepare(command)
        return self.runner.step(command)

    def logits(self, command: StepCommand) -> npt.NDArray[np.float32] | None:
        found = []

        def keep(_: object, __: object, output: Any) -> None:
            found.append(output[0].float().cpu().numpy())

        handle = self.runner.model.lm_head.register_forward_hook(keep)
        graphs, self.runner.graphs = self.runner.graphs, None  # in a graph there are no hooks
        try:
            self.runner.step(command)
        finally:
            handle.remove()
            self.runner.graphs = graphs
        return found[0] if self._ranks.samples else None

    def ceilings(self) -> Ceilings:
        import torch

        kind, device = self.device.type, self.device
        size, width = _COPY_BYTES[kind], _MATMUL_SIZE[kind]
        source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        copying = _seconds(lambda: target.copy_(source), device)
        dtype = self.runner.compute_dtype
        one, other = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
        multiplying = _seconds(lambda: one @ other, device)
        return Ceilings(2 * size / copying, 2 * width**3 / multiplying)

    def profile(self, command: StepCommand, repeats: int) -> Profile:
        from torch._C._autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile, schedule

        is_cuda = self.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
        # A GPU's clocks are low after the profiler's start: two steps do not count.
        counted = schedule(wait=0, warmup=2, active=repeats, repeat=1)
        with (
            _named_ranges(self.runner),
            profile(activities=activities, schedule=counted, acc_events=True) as profiler,
        ):
            for _ in range(2 + repeats):
                self.runner.step(command)
                profiler.step()
        seconds = dict.fromkeys(("attention", "pages", "products", "collectives", "other"), 0.0)
        launches = 0
        graphs = self.runner.graphs
        is_graph = graphs is not None and graphs.covers(command)
        for event in profiler.events():
            if is_graph:
                if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
                    seconds[_purpose_of_kernel(event.name)] += event.device_time_total * 1e-6
                    launches += 1
                continue
            what = _purpose(event)
            if what == "collectives" and self._backend == "gloo":
                if event.name == "pd.collectives":
                    seconds[what] += event.cpu_time_total * 1e-6
            elif is_cuda and not event.name.startswith("cu"):
                # Calls of the driver have numbers of their own, which may be those of operators.
                seconds[what] += sum(kernel.duration for kernel in event.kernels) * 1e-6
                launches += len(event.kernels)
            elif not is_cuda:
                seconds[what] += event.self_cpu_time_total * 1e-6
                launches += event.name.startswith("aten::")
        return Profile(
            {name: value / repeats for name, value in seconds.items()}, launches / repeats
        )


def _purpose(event: Any) -> str:
    """By the innermost range that it is in, and else by its operator."""
    each, is_product = event, False
    while each is not None:
        if each.name.startswith("pd."):
            return str(each.name[3:])
        is_product |= each.name in _PRODUCTS
        each = each.cpu_parent
    return "products" if is_product else "other"


def _purpose_of_kernel(name: str) -> str:
    """Of one that a graph has launched, which knows no operators."""
    purposes = {
        "attention": ("_attend", "_merge"),
        "pages": ("_write",),
        "products": ("gemm", "gemv", "nvjet", "cutlass", "splitK", "cublas"),
    }
    return next(
        (what for what, names in purposes.items() if any(each in name for each in names)), "other"
    )


@contextlib.contextmanager
def _named_ranges(runner: Any) -> Iterator[None]:
    """Meanwhile the profiler sees what attention, pages and collectives are."""
    import torch
    from torch.profiler import record_function
    from transformers import AttentionInterface

    from pd.engine import attention
    from pd.engine.pool import PagePool
    from pd.engine.ranks import Group

    def named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **more: Any) -> Any:
            if name == "collectives":
                if arguments[0].size == 1:
                    return function(*arguments, **more)
                if runner.device.type == "cuda" and arguments[0].is_staged:
                    # It would wait for what is computed before; that is not its time.
                    torch.cuda.synchronize()
            with record_function(f"pd.{name}"):
                return function(*arguments, **more)

        return call

    wanted = [
        ("pages", PagePool, ("write", "gather")),
        ("collectives", Group, ("all_reduce", "all_gather", "all_to_all", "send", "receive")),
    ]
    with contextlib.ExitStack() as stack:
        for name, owner, methods in wanted:
            for method in methods:
                plain = getattr(owner, method)
                setattr(owner, method, named(name, plain))
                stack.callback(setattr, owner, method, plain)
        function = attention.paged_attention
        AttentionInterface.register(attention.IMPLEMENTATION, named("attention", function))
        stack.callback(AttentionInterface.register, attention.IMPLEMENTATION, function)
        yield


def _seconds(work: Callable[[], object], device: Any) -> float:
    """Median of ten, after three."""
    import torch

    taken = []
    for _ in range(13):
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[3:])
