"""`pd serve` as a subprocess, for the demo and the benchmarks."""

from __future__ import annotations

import collections
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 60.0


class ServerError(RuntimeError):
    """It did not start, or did not stop, as it should; one line."""


class Server:
    """`pd serve` as a subprocess. Its output is read by threads, the last lines are kept."""

    def __init__(self, spec: Path) -> None:
        command = [sys.executable, "-m", "pd.cli", "serve", str(spec), "--port", "0"]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is ours to pass on
        )
        self.last_lines: collections.deque[str] = collections.deque(maxlen=30)
        self._lines: queue.Queue[tuple[str, str]] = queue.Queue()
        for name, stream in (("out", self._process.stdout), ("err", self._process.stderr)):
            threading.Thread(target=self._read, args=(name, stream), daemon=True).start()

    def _read(self, name: str, stream: Any) -> None:
        for line in stream:
            self.last_lines.append(line.rstrip())
            self._lines.put((name, line.strip()))
        self._lines.put((name, ""))

    def wait_ready(self, console: Console) -> str:
        """The URL. Raises ServerError."""
        deadline = time.monotonic() + START_TIMEOUT_S
        with console.status("starting") as spinner:
            while time.monotonic() < deadline:
                try:
                    name, line = self._lines.get(timeout=0.5)
                except queue.Empty:
                    if self._process.poll() is not None:
                        break
                    continue
                if name == "out" and line.startswith("ready: "):
                    return line.split()[1]
                if line:
                    spinner.update(f"starting: {line}")
                    if not console.is_terminal:
                        console.print(f"  {line}", highlight=False, markup=False)
        if self._process.poll() is None:
            raise ServerError(f"the server was not ready within {START_TIMEOUT_S:.0f} s")
        raise ServerError(f"the server ended with exit code {self._process.returncode}")

    def stop(self) -> None:
        """SIGTERM, and wait. Raises ServerError unless it ends cleanly in time."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise ServerError(f"the server did not stop within {STOP_TIMEOUT_S:.0f} s") from None
        if code != 0:
            raise ServerError(f"the server ended with exit code {code}")
