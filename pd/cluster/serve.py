"""`pd serve`: a controller from start to end, ended by signals."""

from __future__ import annotations

import signal
from collections.abc import Callable

from pd.cluster.controller import Controller
from pd.cluster.launcher import Progress
from pd.models import resolve_model
from pd.spec import ClusterSpec


class Interrupted(Exception):
    """SIGINT or SIGTERM."""


class _Signals:
    """Turns SIGINT and SIGTERM into Interrupted, raised by `check`: Ray's calls do not bear
    exceptions that come out of a signal handler. Restores what was there before."""

    def __init__(self) -> None:
        self._received = ""
        self._before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}

    def install(self) -> None:
        for number in self._before:
            signal.signal(number, self._note)

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        self._received = signal.Signals(number).name

    def check(self) -> None:
        if self._received:
            raise Interrupted(self._received)


def serve(
    spec: ClusterSpec, progress: Progress, ready: Callable[[str], None], replace: bool = False
) -> str:
    """Run a cluster until SIGINT or SIGTERM; returns the signal's name. `replace`: end what an
    earlier controller has left, instead of adopting it. Raises StartError, SpecError, and
    TakenOverError."""
    weights = spec.model.load == "weights"
    folder = resolve_model(spec.model.path, progress=progress, weights=weights)
    signals = _Signals()
    controller = Controller(spec, progress, signals.check)
    try:
        signals.install()
        controller.connect(replace)
        signals.install()  # Ray has put its own in their place
        controller.start(folder)
        ready(controller.url)
        while True:
            controller.watch_once()
    except Interrupted as name:
        progress(f"{name}: stopping")
        return str(name)
    except Exception:
        if controller.is_serving:  # that a controller fails is no reason to end what serves
            controller.leave()
        raise
    finally:
        controller.stop()
        signals.restore()
