"""The Ray actor around a node: its lifecycle calls, nothing on a request's path."""

from __future__ import annotations

import asyncio
import dataclasses
import faulthandler
import logging
import os
from typing import Any

import ray

from pd.node import Member, NodeConfig, make_node


class NodeActor:
    """One process: `start` once, then `set_members` and `report` as often as wanted, `stop` at the
    end."""

    def __init__(self, config: NodeConfig) -> None:
        faulthandler.enable()
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
        logging.getLogger("pagerelay").setLevel(os.environ.get("PAGERELAY_LOG", "INFO"))
        host = ray.util.get_node_ip_address()
        self._node = make_node(dataclasses.replace(config, host=host))

    async def start(self) -> Member:
        return await self._node.start()

    async def set_members(self, members: list[Member], reason: str = "") -> None:
        self._node.set_members(members, reason)

    async def report(self) -> dict[str, Any]:
        """Answered while the node's event loop lives."""
        return {"failure": self._node.failure, "silent": self._node.silent_peers()}

    async def check(self) -> dict[str, Any]:
        return self._node.check()

    async def ended(self) -> None:
        """Returns never; its reference fails when the process dies."""
        await asyncio.Event().wait()

    async def stop(self) -> None:
        await self._node.stop()
