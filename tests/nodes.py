"""A node that outlives its engines: host tier, block files, verdicts, and a store in memory."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from trunkline import model

from sidecar.devices import open_device
from sidecar.memories import memory_of
from sidecar.segment import Segment
from sidecar.tiermemory import TierMemory
from sidecar.verdicts import Verdicts
from tests.fakes import FakeSource, Running, running_server
from tests.integration.test_sharing import ask
from tests.networks import Network, agrees
from tests.waiting import until

BUDGET_BYTES = 8 << 20


class Node:
    """What outlives an engine: store, segment, block files, verdicts. ``serve`` runs an engine on it."""

    def __init__(self, folder: Path, budget_bytes: int = BUDGET_BYTES) -> None:
        self.folder = folder
        self.source = FakeSource()
        self.budget_bytes = budget_bytes
        self.segment = Segment.create_or_adopt(folder, budget_bytes)

    def memory(self) -> TierMemory:
        made = memory_of(open_device("cpu"), self.source, self.segment.descriptor, self.folder / "blocks")
        assert isinstance(made, TierMemory)
        return made

    def serve(self, memory: TierMemory | None = None, **settings: Any) -> contextlib.AbstractContextManager[Running]:
        return running_server(
            self.folder,
            self.source,
            device=open_device("cpu"),
            budget_bytes=self.budget_bytes,
            verdicts=Verdicts(self.folder / "verdicts", "test"),
            memory=memory or self.memory(),
            **settings,
        )

    def resize(self, budget_bytes: int) -> None:
        """Begin anew with another budget; nothing is in memory then."""
        self.close()
        self.budget_bytes = budget_bytes
        self.segment = Segment.create_or_adopt(self.folder, budget_bytes)

    def close(self) -> None:
        self.segment.unlink()
        self.segment.close()


def moved(running: Running) -> dict[str, int]:
    memory = ask(running, "memory")
    return {name: memory[name] for name in ("kept_bytes", "block_file_bytes", "store_bytes")}


def until_on_disk(node: Node, running: Running, name: str) -> None:
    """Wait until the weights of a model are in block files, in the form that it is served in."""
    wanted = running.engine._catalog.deployed[name].weights.keys()
    until(lambda: all(running.engine._memory._files.find(digest) for digest in wanted))  # type: ignore[attr-defined]


def check(made: Network, seed: int) -> None:
    inputs = made.inputs(1, seed)
    assert agrees(model(made.name).call(inputs), made.eager(inputs), exact=False)


def weight_bytes(running: Running, name: str) -> list[int]:
    """Return what each weight of a model takes in memory."""
    deployed = running.engine._catalog.deployed[name]
    return [running.engine._memory.size_bytes(weight) for weight in deployed.weights.values()]
