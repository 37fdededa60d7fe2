"""Between people and the controller, which asks each API server for orders twice a second."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any, Literal

from pd.api.metrics import ApiMetrics
from pd.messages import ApiFigures
from pd.node import Order

_ANSWER_S = 30.0
_MOST_ORDERS = 16
"""That wait."""


class OrderError(Exception):
    """It was refused, or nobody has answered; the message says why."""

    def __init__(self, text: str, is_refused: bool) -> None:
        super().__init__(text)
        self.is_refused = is_refused


class Admin:
    def __init__(self, api: str = "api-0") -> None:
        self.api = api
        """The name of the API process."""
        self.state: dict[str, Any] = {}
        """What the controller told last."""
        self.metrics: ApiMetrics | None = None
        """Of the API server, whatever its spec."""
        self.siblings: dict[str, ApiFigures] = {}
        """Of the other API processes, as they told last."""
        self._serials = itertools.count(1)
        self._orders: list[Order] = []
        """That it has not taken yet."""
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}

    async def order(self, action: Literal["reload", "drain"], argument: str) -> dict[str, Any]:
        """Have the controller do it. Raises OrderError."""
        if len(self._orders) >= _MOST_ORDERS:
            raise OrderError(f"{_MOST_ORDERS} orders wait for the controller", False)
        order = Order(next(self._serials), action, argument)
        self._orders.append(order)
        waiting = self._waiting[order.serial] = asyncio.get_running_loop().create_future()
        try:
            return await asyncio.wait_for(waiting, _ANSWER_S)
        except TimeoutError:
            text = f"the controller has not answered for {_ANSWER_S:g} s"
            raise OrderError(text, False) from None
        finally:
            del self._waiting[order.serial]
            if order in self._orders:
                self._orders.remove(order)

    def take_orders(self) -> list[Order]:
        orders, self._orders = self._orders, []
        return orders

    def answered(self, serial: int, error: str, result: dict[str, Any]) -> None:
        waiting = self._waiting.get(serial)
        if waiting is None or waiting.done():
            return
        if error:
            waiting.set_exception(OrderError(error, True))
        else:
            waiting.set_result(result)
