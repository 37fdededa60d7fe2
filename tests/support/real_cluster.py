"""Real processes for end-to-end tests: a Ray head of our own, and clusters started as `pd serve
SPEC`.

Everything that is started here is ended here, by pid, and its whole process tree is looked for
afterwards. All waits have deadlines. Folders have short names: Ray's and ZMQ's sockets live in
them, and a socket's path may have 107 characters.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from transfer.backends import make_transport
from transfer.transport import ConfigurationError

START_S = 120.0
STOP_S = 30.0


def wait_until(
    condition: Callable[[], Any], what: str, timeout_s: float = 20.0, every_s: float = 0.05
) -> Any:
    """The first true value of `condition`."""
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {timeout_s:g} s: {what}"
        time.sleep(every_s)
    return value


def require(backend: str) -> None:
    """Skip, saying what is missing, where a transport's library is not there."""
    try:
        make_transport(backend, "probe").close()
    except ConfigurationError as error:
        pytest.skip(str(error))


def free_ports(count: int) -> list[int]:
    """Loopback ports that are free now."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextmanager
def short_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="pr", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------------------------------- processes


@dataclasses.dataclass(frozen=True)
class ProcessId:
    """A pid that is not mistaken for its successor's."""

    pid: int
    started: int
    name: str = dataclasses.field(compare=False)

    @property
    def is_alive(self) -> bool:
        now = _read_process(self.pid)
        return now is not None and now[0] == self


def _read_process(pid: int) -> tuple[ProcessId, int] | None:
    """(process, parent's pid); None when there is none, or only its exit status is left."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    name, fields = (
        text[text.index("(") + 1 : text.rindex(")")],
        text[text.rindex(")") + 2 :].split(),
    )
    if fields[0] in "ZX":
        return None
    return ProcessId(pid, int(fields[19]), name), int(fields[1])


def descendants(pid: int) -> set[ProcessId]:
    """The process and all below it."""
    found: dict[int, list[ProcessId]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (known := _read_process(int(entry.name))):
            found.setdefault(known[1], []).append(known[0])
    own = _read_process(pid)
    result = {own[0]} if own else set()
    queue = [pid]
    while queue:
        for child in found.get(queue.pop(), []):
            result.add(child)
            queue.append(child.pid)
    return result


def end_all(processes: set[ProcessId]) -> None:
    for process in processes:
        if process.is_alive:
            os.kill(process.pid, signal.SIGKILL)


# -------------------------------------------------------------------------------------------------
# Ray


class RayHead:
    """`ray start --head --block` with ports and a folder of its own."""

    def __init__(
        self,
        folder: Path,
        num_cpus: int = 8,
        port: int = 0,
        options: Sequence[str] = (),
        **environment: str,
    ) -> None:
        """`port`: 0 is any free one. `options` and `environment`: more of them."""
        self.folder = folder
        ports = [port, *free_ports(6)] if port else free_ports(7)
        self.address = f"127.0.0.1:{ports[0]}"
        self.dashboard = f"http://127.0.0.1:{ports[1]}"
        command = [
            *(str(Path(sys.executable).parent / "ray"), "start", "--head", "--block"),
            *("--node-ip-address=127.0.0.1", f"--num-cpus={num_cpus}", f"--port={ports[0]}"),
            *("--include-dashboard=true", "--dashboard-host=127.0.0.1"),
            f"--dashboard-port={ports[1]}",
            f"--dashboard-agent-listen-port={ports[2]}",
            f"--dashboard-agent-grpc-port={ports[3]}",
            f"--runtime-env-agent-port={ports[4]}",
            f"--metrics-export-port={ports[5]}",
            *("--min-worker-port=0", "--max-worker-port=0", f"--ray-client-server-port={ports[6]}"),
            *(f"--temp-dir={folder}", "--disable-usage-stats", f"--object-store-memory={2**27}"),
            *options,
        ]
        self._log = (folder / "head.log").open("w")
        self._process = subprocess.Popen(
            command,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=_environment("", **environment),
            start_new_session=True,
        )

    def wait_ready(self) -> None:
        """Its ports answer, the job server's too."""

        def is_ready() -> bool:
            assert self._process.poll() is None, (self.folder / "head.log").read_text()
            try:
                return requests.get(f"{self.dashboard}/api/jobs/", timeout=5).ok
            except requests.RequestException:
                return False

        wait_until(is_ready, f"a Ray head at {self.dashboard}", START_S)

    def log_of(self, pid: int) -> str:
        """What a process of an actor said on stderr."""
        (path,) = self.folder.glob(f"session_2*/logs/worker-*-{pid}.err")
        return path.read_text()

    def stop(self) -> None:
        processes = descendants(self._process.pid)
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
            wait_until(
                lambda: not any(process.is_alive for process in processes),
                f"the end of Ray's processes {processes}",
            )
        finally:
            end_all(processes)
            self._log.close()


def _environment(address: str, **more: str) -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", **more}
    return environment | ({"RAY_ADDRESS": address} if address else {})


# ----------------------------------------------------------------------------------------- clusters

TRANSFER = "nixl"
"""The backend of specs that name none."""
NUM_STARTED = 0


class Cluster:
    """`pd serve` of one spec. Folders that it makes lie in `folder`."""

    def __init__(
        self, spec: dict[str, Any], folder: Path, ray_address: str = "", host: str = ""
    ) -> None:
        global NUM_STARTED
        NUM_STARTED += 1
        self.name: str = spec["name"]
        self.spec = spec = {"transfer": {"backend": TRANSFER}, **spec}
        self.folder = folder
        self.url = ""
        self.key = ""
        path = folder / f"{self.name}-{NUM_STARTED}.yaml"
        path.write_text(yaml.safe_dump(spec))
        self._out, self._err = path.with_suffix(".out"), path.with_suffix(".err")
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pd.cli", "serve", str(path)],
                stdout=out,
                stderr=err,
                env=_environment(ray_address, TMPDIR=str(folder)),
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        """What it said on stderr."""
        return self._err.read_text()

    def wait_ready(self) -> Cluster:
        def find_url() -> str:
            line = next(
                (s for s in self._out.read_text().splitlines() if s.startswith("ready: ")), ""
            )
            ended = self.process.poll()
            assert line or ended is None, f"pd serve exited with {ended}"
            return line.split()[1] if line else ""

        try:
            self.url = wait_until(find_url, f"ready: {self.name}", START_S)
        except AssertionError as error:
            self.stop()
            raise AssertionError(f"{error}\n{self.log}") from None
        return self

    def wait_exit(self, timeout_s: float = START_S) -> int:
        return self.process.wait(timeout_s)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Its exit code; every process below it is gone then."""
        below = descendants(self.process.pid)
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(STOP_S)
        finally:
            end_all(below)

    def pid_of(self, replica: str) -> int:
        """From the last line that says that it is ready."""
        line = [line for line in self.log.splitlines() if f"{replica}: ready" in line][-1]
        return int(line.split("pid ")[1].split(",")[0].rstrip(")"))

    def kill(self, process: str) -> None:
        """kill -9."""
        os.kill(self.pid_of(process), signal.SIGKILL)

    def wait_back(self, unit: str, times: int = 1) -> None:
        """Until a replica or keeper has been started again so often."""
        line = f"{unit}: back after"
        wait_until(lambda: self.log.count(line) >= times, line, START_S)

    # --------------------------------------------------------------------------------------- asking

    def get(self, path: str) -> requests.Response:
        return requests.get(self.url + path, headers=self._headers(), timeout=30)

    def post(self, path: str, timeout_s: float = 120, **body: Any) -> requests.Response:
        body = {"model": "tiny", **body}
        return requests.post(self.url + path, json=body, headers=self._headers(), timeout=timeout_s)

    def change_caches(self, path: str, **body: Any) -> None:
        """POST to a path below /cache, for every keeper."""
        url = f"{self.url}/cache/{path}"
        response = requests.post(url, json=body, headers=self._headers(), timeout=90)
        assert response.ok, response.text

    def keeper(self) -> dict[str, Any]:
        """The report of the only one."""
        (report,) = self.get("/cache").json()["keepers"]
        assert "error" not in report, report
        return dict(report)

    def _headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"} if self.key else {}

    def complete(self, prompt: list[int], max_tokens: int) -> Answer:
        """A greedy completion that ends with its length."""
        body = self._complete(prompt, max_tokens)
        return Answer(body["choices"][0]["token_ids"], body["timings"], body["usage"])

    def complete_all(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        """Tokens by prompt, of one HTTP request: all reach the decode replicas together."""
        choices = self._complete(prompts, max_tokens)["choices"]
        return [choice["token_ids"] for choice in choices]

    def _complete(self, prompt: list[int] | list[list[int]], max_tokens: int) -> Any:
        response = self.post(
            "/v1/completions",
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=0.0,
            ignore_eos=True,
            return_token_ids=True,
            return_timings=True,
        )
        assert response.ok, response.text
        return response.json()

    @property
    def replicas(self) -> list[str]:
        return [
            f"{role}-{number}"
            for role, spec in self.spec["roles"].items()
            for number in range(spec.get("replicas", 1))
        ]

    def loads(self) -> dict[str, dict[str, Any]]:
        """By replica, what its leader counts; the leader's `check_integrity` has passed."""
        return {name: state["load"] for name, state in self.check().items()}

    def check(self, replicas: list[str] | None = None) -> dict[str, dict[str, Any]]:
        """By replica {idle, load}; runs `check_integrity` there. The test process is connected to
        Ray."""
        import ray

        names = self.replicas if replicas is None else replicas
        actors = [ray.get_actor(name, namespace=f"pagerelay/{self.name}") for name in names]
        answers = ray.get([actor.check.remote() for actor in actors], timeout=30)
        return dict(zip(names, answers, strict=True))

    def wait_idle(self, replicas: list[str] | None = None, timeout_s: float = 20.0) -> None:
        """Every replica has given everything back, and the API has no request open."""

        def is_idle() -> bool:
            states = self.check(replicas).values()
            return (
                all(state["idle"] for state in states)
                and not self.get("/admin/status").json()["in_flight"]
            )

        wait_until(is_idle, f"{self.name} idle", timeout_s)
        for state in self.check(replicas).values():
            load = state["load"]
            assert not any(load["pages_used"])
            assert (load["waiting"], load["running"]) == (0, 0)
            assert (load["handovers_in"], load["handovers_out"]) == (0, 0)


@dataclasses.dataclass(frozen=True)
class Answer:
    tokens: list[int]
    timings: dict[str, Any]
    usage: dict[str, Any]


# ------------------------------------------------------------------------------------ shared memory


def abandoned_shared_memory() -> set[str]:
    """Segments that exist though no process has them: POSIX by name, System V by key and id."""
    mapped = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                lines = (entry / "maps").read_text().splitlines()
            except OSError:
                continue
            mapped |= {line.split()[-1] for line in lines if "/dev/shm/" in line}
    posix = {str(path) for path in Path("/dev/shm").iterdir()} - mapped
    rows = [line.split() for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]]
    return posix | {f"sysv {row[0]} {row[1]}" for row in rows if row[6] == "0"}
