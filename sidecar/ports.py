"""What the engine is given and given to: devices, the store, sessions, and the work they bring. Types only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from trunkline.errors import TrunklineError
from trunkline.signature import Signature

from sidecar.bundle import Bundle, Weight

# What outputs a request has: name, dtype and shape of each.
OutputSpecs = tuple[tuple[str, str, tuple[int, ...]], ...]


class Device(Protocol):
    """What the engine needs of a device; ``sidecar.devices.TorchDevice`` is one."""

    @property
    def name(self) -> str: ...
    def new_weight(self, weight: Weight, fill: Callable[[memoryview], None]) -> object: ...
    def as_weight(self, held: Any, weight: Weight) -> object: ...
    def prepare(self, graph: Any) -> Any: ...
    def view(self, buffer: memoryview, dtype: str, shape: tuple[int, ...]) -> object: ...
    def run(self, program: Any, weights: Sequence[Any], inputs: Sequence[Any]) -> list[Any]: ...
    def output_spec(self, tensor: Any) -> tuple[str, tuple[int, ...]]: ...
    def read_output(self, tensor: Any, target: Any) -> None: ...
    def memory(self) -> dict[str, int]: ...
    def trim(self) -> None: ...


class Source(Protocol):
    """Where bundles and weights come from; ``sidecar.store.Store`` is one. Its reads run in the mover thread."""

    def models(self) -> list[str]: ...
    def model(self, name: str) -> Bundle: ...
    def read_blob(self, digest: str, target: memoryview, crc32: int | None = None) -> None: ...


class Session(Protocol):
    """The connection a request came through. The engine thread calls these; they must not block."""

    def answer(self, request_id: int, specs: OutputSpecs, outputs: Sequence[Any], read: Callable[[Any, Any], None]) -> None: ...
    def document(self, request_id: int, plain: object) -> None: ...
    def fail(self, request_id: int, error: TrunklineError) -> None: ...
    def released(self) -> None: ...


@dataclass(slots=True)
class Work:
    """A request for a model: to run it on ``inputs`` (the device's views of private bytes, in the graph's order), or
    just to load it, where ``inputs`` is None. ``deadline`` is a time of the engine's clock, ``signature`` the one that
    the inputs were checked against."""

    session: Session
    request_id: int
    model: str
    deadline: float
    call_id: str = ""
    inputs: Sequence[object] | None = None
    signature: Signature | None = None
