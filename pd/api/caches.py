"""What an API process asks of the keepers of the nodes' caches, and what they answered.

Knows messages; no HTTP, no socket. `send` must not block. Everything runs on one event loop.

A command ends with its answer, with the keeper, or with its deadline, whichever comes first. What a
keeper did after its deadline stays done.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import msgspec

from pd.messages import AnyMessage, CacheAnswer, CacheCommand

Action = Literal["report", "clear", "attach", "detach", "clear_storage"]

TIMEOUT_S = 10.0
ATTACH_TIMEOUT_S = 60.0
"""A storage may have to connect, or to create its file."""


@dataclasses.dataclass(frozen=True, slots=True)
class KeeperAnswer:
    name: str
    error: str
    """Empty: it was done."""
    is_refused: bool
    """The keeper itself says so; else it is gone, or silent."""
    report: dict[str, Any] | None
    """None: nothing came."""


class Caches:
    def __init__(self, send: Callable[[str, AnyMessage], object]) -> None:
        self.keepers: dict[str, dict[str, float]] = {}
        """Of the nodes' caches, and the figures that each reported last."""
        self._send = send
        self._serials = itertools.count(1)
        self._pending: dict[int, tuple[str, asyncio.Future[CacheAnswer]]] = {}

    def keeper_up(self, name: str) -> None:
        self.keepers[name] = {}

    def keeper_down(self, name: str, reason: str) -> None:
        """What it has not answered, it never will."""
        self.keepers.pop(name, None)
        for keeper, answer in self._pending.values():
            if keeper == name and not answer.done():
                answer.set_exception(ConnectionError(f"it was lost: {reason}"))

    def answered(self, sender: str, message: CacheAnswer) -> bool:
        """Whether anybody waits for it."""
        keeper, answer = self._pending.get(message.serial, ("", None))
        if answer is None or keeper != sender or answer.done():
            return False
        answer.set_result(message)
        return True

    async def command(
        self,
        action: Action,
        *,
        keeper: str = "",
        tenant: str = "",
        backend: str = "",
        options: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> list[KeeperAnswer]:
        """Ask `keeper`, or all of them at once; by name. `timeout_s`: None is what the action
        usually needs. Raises KeyError when there is no such keeper."""
        names = [keeper] if keeper else sorted(self.keepers)
        if keeper and keeper not in self.keepers:
            raise KeyError(keeper)
        if timeout_s is None:
            timeout_s = ATTACH_TIMEOUT_S if action == "attach" else TIMEOUT_S
        wanted = CacheCommand(0, action, tenant, backend, dict(options or {}))
        return list(await asyncio.gather(*(self._ask(name, wanted, timeout_s) for name in names)))

    async def _ask(self, name: str, command: CacheCommand, timeout_s: float) -> KeeperAnswer:
        serial = next(self._serials)
        future: asyncio.Future[CacheAnswer] = asyncio.get_running_loop().create_future()
        self._pending[serial] = (name, future)
        try:
            self._send(name, msgspec.structs.replace(command, serial=serial))
            answer = await asyncio.wait_for(future, timeout_s)
            report = msgspec.json.decode(answer.report, type=dict) if answer.report else None
        except TimeoutError:
            return KeeperAnswer(name, f"no answer for {timeout_s:g} s", False, None)
        except (ConnectionError, msgspec.MsgspecError) as error:
            return KeeperAnswer(name, str(error), False, None)
        finally:
            del self._pending[serial]
        return KeeperAnswer(name, answer.error, bool(answer.error), report)
