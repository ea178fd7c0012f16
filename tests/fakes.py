"""Stand-ins for the device and the store, in numpy and without a disk, and a server that runs on them in this process."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from trunkline.errors import DeviceFault, UnknownModel
from trunkline.protocol import TensorSpec

from sidecar.bundle import Bundle, Graph, Node, Symbol, Value, Weight
from sidecar.constraints import Constraints
from sidecar.engine import Engine
from sidecar.engines import Engines
from sidecar.errors import BlobCorrupt, BlobMissing
from sidecar.inflight import InFlight
from sidecar.pins import Pins
from sidecar.releases import Release
from sidecar.routing import ReleaseFiles
from sidecar.server import Reload, Server
from sidecar.tenants import OPEN, Quotas
from sidecar.tenantsockets import listen_at
from sidecar.tracing import Tracer
from tests.waiting import PATIENCE_S

ADMIN_TOKEN = b"administrator"


def weight_of(content: bytes) -> Weight:
    """Return the description of a weight that holds ``content`` as uint8."""
    return Weight(hashlib.sha256(content).hexdigest(), "uint8", (len(content),), len(content), zlib.crc32(content))


def bundle_of(
    name: str,
    contents: Sequence[bytes],
    *,
    inputs: tuple[TensorSpec, ...] = (TensorSpec("x", "float32", ("batch", 3)),),
    outputs: tuple[TensorSpec, ...] = (TensorSpec("y", "float32", ("batch", 3)),),
    version: str = "1",
) -> Bundle:
    """Return a bundle whose weights are ``contents``; the fake device answers x + sum of all weight bytes."""
    symbols = {axis for spec in (*inputs, *outputs) for axis in spec.shape if isinstance(axis, str) and axis != "?"}
    graph = Graph(
        symbols=tuple(Symbol(symbol, 1, 64) for symbol in sorted(symbols)),
        inputs=inputs,
        outputs=outputs,
        weights=tuple(weight_of(content) for content in contents),
        nodes=tuple(
            Node("aten.add.Tensor", (Value("node", n - 1) if n else Value("input", 0), Value("weight", n)), (), "test")
            for n in range(len(contents))
        ),
        results=(Value("node", len(contents) - 1),) * len(outputs),
    )
    digest = hashlib.sha256(f"{name} {version} {[w.digest for w in graph.weights]} {inputs}".encode()).hexdigest()
    return Bundle(name, version, graph, digest, "batch", 1e-4, {})


class FakeSource:
    """Bundles and blobs in dictionaries. ``before_read`` is called in the mover thread ahead of each read."""

    def __init__(self) -> None:
        self.bundles: dict[str, Bundle] = {}
        self.broken: dict[str, Exception] = {}
        self.blobs: dict[str, bytes] = {}
        self.before_read: Callable[[str], None] = lambda digest: None
        self.read_count = 0
        self.released: dict[str, Release | Exception] = {}

    def put(self, bundle: Bundle, contents: Sequence[bytes]) -> None:
        self.bundles[bundle.name] = bundle
        self.blobs.update({weight_of(content).digest: content for content in contents})

    def models(self) -> list[str]:
        return sorted({*self.bundles, *self.broken})

    def model(self, name: str) -> Bundle:
        if name in self.broken:
            raise self.broken[name]
        if name not in self.bundles:
            raise UnknownModel(f"no model {name}")
        return self.bundles[name]

    def releases(self) -> list[str]:
        return sorted(self.released)

    def release(self, name: str) -> Release | None:
        found = self.released.get(name)
        if isinstance(found, Exception):
            raise found
        return found

    def read_blob(self, digest: str, target: memoryview, crc32: int | None = None) -> None:
        self.before_read(digest)
        self.read_count += 1
        if digest not in self.blobs:
            raise BlobMissing("gone")
        content = self.blobs[digest]
        if zlib.crc32(content) != crc32:
            raise BlobCorrupt("altered")
        target[:] = content


class FakeDevice:
    """Computes y = x + the sum of all weight bytes, for every output. ``on_run`` is called first, where programs are run."""

    can_pack = False
    lane_counts: tuple[int, ...] = (1, 2)
    is_shared_by_lanes = False

    def __init__(self, name: str = "fake") -> None:
        self.name = name
        self.allocated_bytes = 0
        self.peak_bytes = 0
        self.trim_count = 0
        self.prepare_count = 0
        self.lanes_begun = 0
        self.on_run: Callable[[], None] = lambda: None
        self.capacity_bytes = 1 << 40
        self._live: dict[int, int] = {}

    def new_weight(self, weight: Weight, fill: Callable[[memoryview], None]) -> object:
        if self.allocated_bytes + weight.size_bytes > self.capacity_bytes:
            raise DeviceFault("out of memory")
        content = FakeWeight(self, weight.size_bytes)
        fill(content.memory)
        return content

    def as_weight(self, held: Any, weight: Weight) -> object:
        return held

    def dry_run(self, graph: Graph) -> Any:
        # What an operator without numbers does; nothing is known then.
        return SimpleNamespace(peak_bytes=lambda inputs: None)

    def prepare(self, graph: Graph) -> Any:
        self.prepare_count += 1
        return graph

    def view(self, buffer: memoryview, dtype: str, shape: tuple[int, ...]) -> object:
        return np.frombuffer(buffer, dtype).reshape(shape)

    def run(self, program: Any, weights: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        self.on_run()
        total = sum(int(np.frombuffer(weight.memory, np.uint8).sum()) for weight in weights)
        return [inputs[0] + inputs[0].dtype.type(total) for _ in program.outputs]

    def enter(self) -> None:
        pass

    def begin_lane(self, count: int) -> None:
        self.lanes_begun += 1

    def mark(self) -> object:
        return None

    def begin_after(self, mark: object) -> None:
        pass

    def settle(self) -> None:
        pass

    def stacked(self, graph: Graph, program: Any) -> Any:
        return None

    def join(self, tensors: Sequence[Any], axis: int) -> Any:
        return np.concatenate(tensors, axis)

    def pad(self, tensor: Any, axis: int, size: int) -> Any:
        widths = [(0, size - length if number == axis else 0) for number, length in enumerate(tensor.shape)]
        return np.pad(tensor, widths)

    def part(self, tensor: Any, axis: int, start: int, length: int) -> Any:
        return tensor[(slice(None),) * axis + (slice(start, start + length),)]

    def same(self, one: Any, other: Any) -> bool:
        return bool(one.shape == other.shape and one.dtype == other.dtype and one.tobytes() == other.tobytes())

    def agree(self, one: Any, other: Any, tolerance: float | None) -> bool:
        return bool(one.shape == other.shape and np.allclose(one, other, rtol=0, atol=tolerance or 0, equal_nan=True))

    def copy(self, tensor: Any) -> Any:
        return tensor.copy()

    def output_spec(self, tensor: Any) -> tuple[str, tuple[int, ...]]:
        return tensor.dtype.name, tensor.shape

    def read_output(self, tensor: Any, target: Any) -> None:
        target[...] = tensor

    def trim(self) -> None:
        self.trim_count += 1

    def is_lost(self) -> bool:
        return False

    def memory(self) -> dict[str, int]:
        return {"allocated_bytes": self.allocated_bytes}


class FakeWeight:
    """Bytes whose life the device counts."""

    def __init__(self, device: FakeDevice, size_bytes: int) -> None:
        self._device = device
        self._size_bytes = size_bytes
        self.memory = memoryview(bytearray(size_bytes))
        device.allocated_bytes += size_bytes
        device.peak_bytes = max(device.peak_bytes, device.allocated_bytes)

    def __del__(self) -> None:
        self._device.allocated_bytes -= self._size_bytes


class Running:
    """A server and its engine, or those of several devices, running in threads of this process."""

    def __init__(
        self, path: Path, relay: Path, device: Any, source: Any, engine: Engine, server: Server, engines: Engines | None = None
    ) -> None:
        self.path = str(path)
        self.relay = str(relay)
        self.device = device
        self.source = source
        self.engine = engine
        self.server = server
        self.engines = engines


@contextlib.contextmanager
def running_server(
    directory: Path,
    source: Any,
    *,
    device: Any = None,
    beside: Sequence[Any] = (),
    placing_clock: Callable[[], float] = time.monotonic,
    budget_bytes: int = 1 << 20,
    queue_limit: int = 64,
    arena_limit_bytes: int = 1 << 22,
    arena_total_bytes: int = 1 << 24,
    connection_limit: int = 64,
    transport: str | None = None,
    quotas: Quotas = OPEN,
    reload: Reload | None = None,
    tracer: Tracer | None = None,
    **engine_settings: Any,
) -> Iterator[Running]:
    """Serve ``source`` on a socket in ``directory`` until the block ends; check that nothing was left behind.

    ``source`` is a ``FakeSource`` or a real store, ``device`` a real one or, where there is none, a ``FakeDevice``. Devices
    ``beside`` it have engines of their own; models are placed by ``placing_clock``.
    """
    path, relay_path = directory / "trunkline.sock", directory / "relay.sock"
    listener, relay = listen_at(path, 0o600), listen_at(relay_path, 0o600)
    device = device or FakeDevice()
    in_flight = InFlight()
    all_engines = [
        Engine(
            each,
            source,
            Pins(directory / f"pins{number or ''}.json"),
            budget_bytes=budget_bytes,
            queue_limit=queue_limit,
            quotas=quotas,
            in_flight=in_flight,
            tracing=tracer is not None,
            **engine_settings,
        )
        for number, each in enumerate((device, *beside))
    ]
    engine, engines = all_engines[0], None
    if beside:
        by_device = {each.device_name: each for each in all_engines}
        constraints = Constraints(directory / "constraints.json", list(by_device))
        engines = Engines(by_device, constraints, directory / "places.json", placing_clock)
    serving = engines or engine
    releases = ReleaseFiles(source)
    server = Server(
        listener,
        serving,
        admin_token=ADMIN_TOKEN,
        arena_limit_bytes=arena_limit_bytes,
        arena_total_bytes=arena_total_bytes,
        connection_limit=connection_limit,
        quotas=quotas,
        relay=relay,
        reload=reload,
        releases=releases,
        transport=transport,
        tracer=tracer,
    )
    serving.deploy_stored()
    threads = [threading.Thread(target=each.run) for each in (serving, server, releases)]
    for thread in threads:
        thread.start()
    try:
        yield Running(path, relay_path, device, source, engine, server, engines)
    finally:
        serving.drain(server.stop)
        releases.stop()
        for thread in threads:
            thread.join(PATIENCE_S)
        for each, at in ((listener, path), (relay, relay_path)):
            each.close()
            at.unlink()
    assert not any(thread.is_alive() for thread in threads), "engine or server did not stop"
    for each in all_engines:
        each.check_invariants()
    assert not in_flight._by_tenant, "requests are under way that nobody has"
    for each in (device, *beside):
        assert getattr(each, "peak_bytes", 0) <= budget_bytes, "the budget was exceeded"
