"""A sidecar in one thread: server, sessions, engine, scheduler, residency, mover and trials, and whoever asks them.

All of that is the production code. The test's own are the clock, the device (``tests.fakes.FakeDevice``), the store, and the
order in which threads would run: what each would do next is done when it is drawn, one piece at a time. A seed is a life. The
sockets and the shared memory are real, and nothing waits for them. There is one engine, on one device with one lane.

At random places the n-th run, load, allocation of a weight or of an arena, or send fails.
"""

from __future__ import annotations

import contextlib
import json
import logging
import mmap
import os
import queue
import random
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final
from unittest import mock

import numpy as np
from trunkline import arena, protocol
from trunkline.errors import DeviceFault, DeviceOutOfMemory
from trunkline.protocol import Command, Document, Fault, Hello, Infer, Message, Placement, Result, Welcome

from sidecar import blocks, forms, mover, server, session, trials
from sidecar.bundle import Weight
from sidecar.engine import Engine
from sidecar.errors import BlobCorrupt
from sidecar.inflight import InFlight
from sidecar.pins import Pins
from sidecar.routing import ReleaseFiles
from sidecar.server import Server, Session
from sidecar.tenants import OPEN, Quotas, Tenant, hash_of, qualified
from tests.fakes import ADMIN_TOKEN, FakeDevice, FakeSource, FakeWeight, bundle_of

EVENTS: Final = 500
SEAMS: Final = ("run", "read", "allocate", "arena", "send")
MODELS: Final = 5
MOST_CALLERS: Final = 8
QUEUE_LIMIT: Final = 6
# What nothing needs more pieces of work for than this has come to a stop that it should not.
MOST_STEPS: Final = 50_000
# What these say is of bugs, whatever failed.
_BUGS: Final = ("a command failed", "the mover failed at a job", "incident", "the books")


class Injected(Exception):
    """What nobody expects."""


class Clock:
    """The time; it goes on when something takes some."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Inbox:
    """The engine's inbox, where waiting takes no time but the clock's."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._items: list[Any] = []

    def put(self, item: Any) -> None:
        self._items.append(item)

    def empty(self) -> bool:
        return not self._items

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        if self._items:
            return self._items.pop(0)
        if block and timeout:
            self._clock.now += min(timeout, 0.01)
        raise queue.Empty


class Remembered:
    """Verdicts without a disk."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], Any] = {}

    def find(self, kind: str, structure: str) -> Any:
        return self._found.get((kind, structure))

    def unfinished(self, kind: str, structure: str) -> int:
        return 0

    def begin(self, kind: str, structure: str) -> None:
        pass

    def end(self, kind: str, structure: str, verdict: Any) -> None:
        if verdict is not None:
            self._found[kind, structure] = verdict


class Device(FakeDevice):
    """Takes time, and fails when it is due. What trials hold beside the budget is not counted."""

    def __init__(self, world: World) -> None:
        super().__init__("cpu")
        self._world = world

    def new_weight(self, weight: Weight, fill: Callable[[memoryview], None]) -> object:
        if self._world.in_trial:
            content = FakeWeight(SimpleNamespace(allocated_bytes=0, peak_bytes=0), weight.size_bytes)  # type: ignore[arg-type]
            fill(content.memory)
            return content
        if self._world.is_due("allocate"):
            raise self._world.random.choice([DeviceOutOfMemory("no room"), DeviceFault("no"), MemoryError()])
        return super().new_weight(weight, fill)

    def run(self, program: Any, weights: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        if not self._world.in_trial:
            self._world.clock.now += self._world.random.choice((0.001, 0.01, 0.05))
            if self._world.is_due("run"):
                raise self._world.random.choice(
                    [DeviceOutOfMemory("no room"), DeviceFault("no"), Injected("of no kind that is known")]
                )
        return super().run(program, weights, inputs)

    def agree(self, one: Any, other: Any, tolerance: float | None) -> bool:
        return bool(one.tobytes() == other.tobytes())


class Line(socket.socket):
    """The server's end of a connection. Sees every answer, and fails when it is due."""

    def __init__(self, world: World, fd: int) -> None:
        super().__init__(fileno=fd)
        self._world = world
        self.is_over = False
        self.answers: Counter[int] = Counter()
        # Answers that were lost on the way, to whom nobody can tell.
        self.lost: set[int] = set()

    def send(self, frame: bytes, flags: int = 0) -> int:  # type: ignore[override]
        assert not self.is_over, "an answer after all of a session was let go of"
        message = protocol.decode(frame)
        assert isinstance(message, (Result, Document, Fault))
        if message.request_id:
            self.answers[message.request_id] += 1
            assert self.answers[message.request_id] == 1, f"two answers for one request: {message}"
        if self._world.is_due("send"):
            self.lost.add(message.request_id)
            raise self._world.random.choice([BlockingIOError(11, "not read"), BrokenPipeError(32, "gone")])
        return super().send(frame, flags)


class Listener(socket.socket):
    """Accepts lines."""

    world: World

    def accept(self) -> tuple[socket.socket, Any]:
        fd, address = self._accept()  # type: ignore[attr-defined]
        line = Line(self.world, fd)
        self.world.lines.append(line)
        return line, address


@dataclass
class Version:
    """What a model was from one event to another: the sum of its weights' bytes is what it adds."""

    total: int
    begun: int
    ended: int | None = None


@dataclass
class Asked:
    """A request on its way. ``names`` are empty for an operator's command."""

    request_id: int
    names: tuple[str, ...]
    x: Any
    at: int
    deadline: float
    then: Callable[[], None] = lambda: None


@dataclass(eq=False)
class Caller:
    """A function, or an operator: one connection, and what it was told."""

    sock: socket.socket
    tenant: Tenant | None
    # How many came before: the sidecar accepts them in this order.
    number: int
    welcome: Welcome | None = None
    request: mmap.mmap | None = None
    reply: mmap.mmap | None = None
    asked: Asked | None = None
    last_id: int = 0
    # It has broken the rules, and does not care what it is told.
    is_rude: bool = False

    def close(self) -> None:
        self.sock.close()
        for memory in (self.request, self.reply):
            if memory is not None:
                memory.close()


class World:
    """One life. ``act`` does something that somebody outside does, ``step`` a piece of work of the sidecar."""

    def __init__(self, seed: int, folder: Path, everywhere: SimpleNamespace) -> None:
        """``everywhere`` is what other modules take for ``time``: it is given this world's clock."""
        self.random = random.Random(seed)
        self.clock = Clock()
        everywhere.monotonic = everywhere.perf_counter = self.clock
        self.in_trial = False
        self.event = 0
        self.outcomes: Counter[str] = Counter()
        self.injected: Counter[str] = Counter()
        self.bugs: list[str] = []
        # What happened, for those who compare two lives.
        self.trace: list[object] = []
        self.lines: list[Line] = []
        self.callers: list[Caller] = []
        self._connected = 0
        self._due: dict[str, int] = {}
        self._folder = folder
        self._path = str(folder / "s")
        self.versions: dict[str, list[Version]] = {}
        self.source = FakeSource()
        self.source.before_read = self._before_read
        self._common = [self.random.randbytes(self.random.randint(20, 90)) for _ in range(2)]
        for number in range(MODELS):
            self._publish(f"m{number}")
        self._tokens: dict[str, bytes] = {}
        self.quotas = self._some_quotas()
        self.budget_bytes = self._some_budget()
        self.device = Device(self)
        self.in_flight = InFlight()
        self.engine = Engine(
            self.device,
            self.source,
            Pins(folder / "pins.json"),
            budget_bytes=self.budget_bytes,
            queue_limit=QUEUE_LIMIT,
            batch_limit=self.random.choice((1, 4, 8)),
            batch_window_s=self.random.choice((0.0, 0.0, 0.02)),
            compute_once=self.random.random() < 0.5,
            eviction_policy=self.random.choice(("adaptive", "lru", "gdsf")),
            quotas=self.quotas,
            verdicts=Remembered(),  # type: ignore[arg-type]
            in_flight=self.in_flight,
            clock=self.clock,
        )
        self.engine._inbox = Inbox(self.clock)  # type: ignore[assignment]
        listener = Listener(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.world = self
        listener.bind(self._path)
        listener.listen(64)
        self._listener = listener
        self.releases = ReleaseFiles(self.source)
        self.server = Server(
            listener,
            self.engine,
            admin_token=ADMIN_TOKEN,
            arena_limit_bytes=1 << 20,
            arena_total_bytes=8 * 3 * 65536,
            connection_limit=MOST_CALLERS + 4,
            transport=protocol.SEALED,
            quotas=self.quotas,
            releases=self.releases,
        )
        self.engine.deploy_stored()
        self.engine._division.divide()
        self.operator = self.connect(None)

    # --- what there is -----------------------------------------------------------------------------------------------

    def _publish(self, name: str) -> None:
        """Put a model, or another version of it, into the store."""
        own = [self.random.randbytes(self.random.randint(10, 120)) for _ in range(self.random.randint(1, 3))]
        contents = [*self._common[: self.random.randint(0, 2)], *own]
        history = self.versions.setdefault(name, [])
        self.source.put(bundle_of(name, contents, version=str(len(history))), contents)
        history.append(Version(sum(map(sum, contents)), self.event))

    def _some_quotas(self) -> Quotas:
        """Return nobody's quotas, or three tenants of two domains."""
        if self.random.random() < 0.3:
            self._tokens = {"anyone": b""}
            return OPEN
        names = ("one", "two", "three")
        self._tokens = {name: name.encode() for name in names}
        tenants = [
            Tenant(
                name=name,
                domain="a" if name == "one" else "b",
                token_hashes=(hash_of(self._tokens[name]),),
                models=("*",),
                in_flight_limit=self.random.choice((1, 2, 100)),
                connection_limit=self.random.choice((2, 100)),
                priority=self.random.choice((2, 5)),
            )
            for name in names
        ]
        return Quotas({tenant.name: tenant for tenant in tenants})

    def _some_budget(self) -> int:
        sizes = [sum(weight.size_bytes for weight in bundle.graph.weights) for bundle in self.source.bundles.values()]
        everything = sum(sizes) * len({tenant.domain for tenant in self.quotas.tenants.values()})
        return max(int(max(sizes) * self.random.choice((0.7, 1.0))), int(everything * self.random.choice((0.3, 0.6, 1.5))))

    # --- what fails --------------------------------------------------------------------------------------------------

    def break_something(self) -> None:
        """Have the n-th use of something fail."""
        self._due[self.random.choice(SEAMS)] = self.random.randint(1, 4)

    def is_due(self, seam: str) -> bool:
        left = self._due.get(seam)
        if left is None:
            return False
        self._due[seam] = left - 1
        if left > 1:
            return False
        del self._due[seam]
        self.injected[seam] += 1
        return True

    def _before_read(self, digest: str) -> None:
        if not self.in_trial and self.is_due("read"):
            raise self.random.choice([BlobCorrupt("altered"), OSError(5, "the disk")])

    # --- the sidecar's work ------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Do a piece of the work of one of the sidecar's threads; return False when there was none for any."""
        engine, moves, tries = self.engine, self.engine._mover, self.engine._trials
        assert tries is not None
        ready: list[Callable[[], object]] = []
        if not engine._inbox.empty() or (engine._has_work() and not engine._loads._in_flight) or engine._wavefront:
            ready.append(engine._step)
        if not moves._inbox.empty():
            ready.append(self._move)
        if not moves._to_read.empty():
            ready.append(lambda: mover._take(moves._to_read))
        if not tries._jobs.empty():
            ready.append(self._try)
        if self.server._poll.poll(0):
            ready.append(lambda: self.server._turn(0))
        if not ready:
            return False
        self.random.choice(ready)()
        return True

    def _move(self) -> None:
        mover._take(self.engine._mover._inbox)
        self.engine._mover._go_on()

    def _try(self) -> None:
        assert self.engine._trials is not None
        job = self.engine._trials._jobs.get()
        self.in_trial = True
        try:
            if job is not None:
                job()
        finally:
            self.in_trial = False

    def rest(self) -> None:
        """Work until there is nothing left to do, and everybody has read what they were told."""
        for _ in range(MOST_STEPS):
            if not self.step() and not self.read():
                return
        raise AssertionError(f"it does not come to rest: {self.engine._request_counts()}")

    # --- those who ask -----------------------------------------------------------------------------------------------

    def connect(self, tenant: Tenant | None, token: bytes | None = None) -> Caller:
        """Open a connection; None for an operator's. It is greeted when it is its turn."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.setblocking(False)
        sock.connect(self._path)
        caller = Caller(sock, tenant, self._connected)
        self._connected += 1
        if token is None:
            token = ADMIN_TOKEN if tenant is None else self._tokens[tenant.name]
        hints = tuple(self.random.sample(sorted(self.versions), self.random.randint(0, 2)))
        sock.send(protocol.encode(Hello(1, protocol.VERSION, token, "simulated", 0, 0, () if tenant is None else hints)))
        self.callers.append(caller)
        return caller

    def leave(self, caller: Caller) -> None:
        if caller.asked is not None:
            self.outcomes["left"] += 1
        self.callers.remove(caller)
        caller.close()

    def ask(self, *callers: Caller) -> None:
        """Ask for a model, or for two at once; several callers ask for the same."""
        names = tuple(self.random.sample(sorted(self.versions), self.random.choice((1, 1, 1, 2))))
        for caller in callers:
            self._ask(caller, names)

    def _ask(self, caller: Caller, names: tuple[str, ...]) -> None:
        assert caller.request is not None
        x = np.full((self.random.randint(1, 3), 3), self.random.randint(0, 5), np.float32)
        caller.request[: x.nbytes] = x.tobytes()
        patience_s = self.random.choice((0.02, 1.0, 1000.0, 1000.0))
        caller.last_id += 1
        caller.asked = Asked(caller.last_id, names, x, self.event, self.clock.now + patience_s)
        inputs = (Placement("x", "float32", x.shape, 0),)
        deadline_us = int(patience_s * 1e6)
        self._send(caller, Infer(caller.last_id, deadline_us, f"c{self.event}", protocol.JOINT.join(names), "", inputs))

    def order(self, command: str, then: Callable[[], None] = lambda: None, **arguments: object) -> None:
        """Have an operator's command done."""
        operator = self.operator
        if operator.welcome is None or operator.asked is not None:
            return
        assert operator.request is not None
        body = json.dumps(arguments).encode()
        operator.request[: len(body)] = body
        operator.last_id += 1
        operator.asked = Asked(operator.last_id, (), None, self.event, self.clock.now + 1e6, then)
        self._send(operator, Command(operator.last_id, command, len(body)))

    def publish(self) -> None:
        """Replace a model by another version; until it is said that it is there, either may answer."""
        if self.operator.welcome is None or self.operator.asked is not None:
            return
        name = self.random.choice(sorted(self.versions))
        self._publish(name)
        *before, _ = self.versions[name]

        def deployed() -> None:
            for version in before:
                version.ended = self.event if version.ended is None else version.ended

        self.order("model_changed", deployed, name=name)

    def _send(self, caller: Caller, message: Message) -> None:
        with contextlib.suppress(OSError):
            caller.sock.send(protocol.encode(message))

    def read(self) -> bool:
        """Have everybody read what they were told; return False when nobody was told anything."""
        return sum(self._read(caller) for caller in list(self.callers)) > 0

    def _read(self, caller: Caller) -> bool:
        try:
            frame, fds, _, _ = socket.recv_fds(caller.sock, protocol.MAX_FRAME_BYTES, 2)
        except BlockingIOError:
            return False
        except ConnectionError:
            frame, fds = b"", []
        self.trace.append((self.event, round(self.clock.now, 6), len(frame)))
        if not frame:
            self._ended(caller)
            return True
        message = protocol.decode(frame)
        if isinstance(message, Welcome):
            caller.welcome = message
            caller.request = mmap.mmap(fds[0], message.request_bytes)
            caller.reply = mmap.mmap(fds[1], message.reply_bytes, prot=mmap.PROT_READ)
            for fd in fds:
                os.close(fd)
            return True
        if caller.is_rude:
            return True
        asked = caller.asked
        if isinstance(message, Fault):
            assert message.request_id in ((0, asked.request_id) if asked else (0,)), f"nobody asked for {message}"
            self.outcomes[message.code] += 1
        else:
            assert asked is not None, f"nobody asked for {message}"
            assert message.request_id == asked.request_id
            if isinstance(message, Result):
                self._check(caller, asked, message)
                self.outcomes["answered"] += 1
            else:
                asked.then()
                self.outcomes["told"] += 1
        caller.asked = None
        return True

    def _ended(self, caller: Caller) -> None:
        """A connection that the sidecar has ended: who broke the rules, came in vain, or was not heard in time."""
        self.outcomes["ended"] += 1
        self.callers.remove(caller)
        caller.close()
        if caller is self.operator:
            self.operator = self.connect(None)

    def _check(self, caller: Caller, asked: Asked, result: Result) -> None:
        assert caller.reply is not None
        assert len(result.outputs) == len(asked.names)
        for name, output in zip(asked.names, result.outputs, strict=True):
            y = np.frombuffer(caller.reply[output.offset : output.offset + asked.x.nbytes], np.float32).reshape(asked.x.shape)
            could = [
                version.total
                for version in self.versions[name]
                if version.begun <= self.event and (version.ended is None or version.ended >= asked.at)
            ]
            assert output.shape == asked.x.shape
            assert any(np.array_equal(y, asked.x + np.float32(total)) for total in could), (
                f"{name} answers {y.tolist()} to {asked.x.tolist()}; its versions add {could}"
            )

    # --- what may happen ---------------------------------------------------------------------------------------------

    def act(self) -> None:
        """Let one thing happen, and some work be done."""
        self.event += 1
        chance = self.random.random()
        idle = [
            each
            for each in self.callers
            if each.welcome is not None and each.asked is None and each.tenant is not None and not each.is_rude
        ]
        functions = [each for each in self.callers if each.tenant is not None]
        if chance < 0.06 and len(functions) < MOST_CALLERS:
            self.connect(self.random.choice(list(self.quotas.tenants.values())))
        elif chance < 0.07:
            self.connect(next(iter(self.quotas.tenants.values())), b"a token that nobody has")
        elif chance < 0.10 and functions:
            self.leave(self.random.choice(functions))
        elif chance < 0.11 and functions:
            # Another request before the answer to the first, or what is no message at all.
            rude = self.random.choice(functions)
            rude.is_rude = True
            frame = self.random.choice([b"\xc1", protocol.encode(protocol.Describe(1_000_000 + self.event, "m0"))])
            with contextlib.suppress(OSError):
                rude.sock.send(frame)
        elif chance < 0.14:
            self.break_something()
        elif chance < 0.17:
            self.publish()
        elif chance < 0.22:
            domain = self.random.choice(list(self.quotas.tenants.values())).domain
            name = qualified(self.random.choice(sorted(self.versions)), domain)
            self.order(self.random.choice(("load", "evict", "pin", "unpin", "status", "leases", "residency")), name=name)
        elif chance < 0.24:
            self.order("resume" if self.engine._paused or self.random.random() < 0.9 else "drain")
        elif chance < 0.26:
            self.clock.now += self.random.choice((0.1, 2.0))
        elif chance < 0.4 and idle:
            self.ask(*idle)
        elif idle:
            self.ask(self.random.choice(idle))
        for _ in range(self.random.choice((0, 1, 2, 4, 8))):
            if not self.step():
                break
        if self.random.random() < 0.7:
            self.read()

    def live(self, events: int) -> None:
        """Let so many things happen, and then everything come to its end."""
        for _ in range(events):
            self.act()
        self.finish()

    # --- the end -----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """See that the books balance, and nothing is over its budget."""
        self.engine.check_invariants()
        assert self.device.peak_bytes <= self.budget_bytes, "the budget was exceeded"
        assert not self.bugs, self.bugs

    def finish(self) -> None:
        """Let everything come to an end, and see that nobody waits and nothing is held."""
        self._due.clear()
        self.rest()
        while self.operator.asked is not None or self.operator.welcome is None:
            # Its answer was lost on the way, or it was not let in.
            self.leave(self.operator)
            self.operator = self.connect(None)
            self.rest()
        self.order("resume")
        self.rest()
        for caller in self.callers:
            lost = self.lines[caller.number].lost
            assert caller.asked is None or caller.is_rude or lost, f"somebody waits for ever: {caller.asked}"
            assert caller.welcome is not None, "somebody was not greeted"
        self.check()
        for caller in list(self.callers):
            self.leave(caller)
        self.rest()
        engine, held = self.engine, self.server
        assert not {*held._sessions.values(), *held._ending}, "sessions are left"
        assert held._arena_bytes == 0
        assert not self.in_flight._by_tenant, "requests are under way that nobody has"
        assert not engine._has_work()
        assert engine._session_count == 0
        leases = sum(engine._residency.lease_count(each.plan) for each in engine._catalog.all())
        assert leases == 0, f"{leases} leases are left"
        counts = engine._runs.counts
        self.outcomes["stages for several"] += counts.stage_requests - counts.stages
        assert self.device.allocated_bytes == engine._residency.committed_bytes, "the books say otherwise than the device"
        self.check()

    def close(self) -> None:
        """Let go of all, also of a life that has ended badly."""
        self.engine._runs.stop()
        for caller in self.callers:
            caller.close()
        self._listener.close()
        for each in self._folder.iterdir():
            each.unlink()
        try:
            self.server._shut_down()
        finally:
            for line in self.lines:
                line.close()


class _Bugs(logging.Handler):
    """Takes note of what is logged and must never be."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.ERROR)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        told = record.getMessage()
        if told.startswith(_BUGS) and not isinstance(record.exc_info and record.exc_info[1], Injected):
            self._world.bugs.append(f"{told}: {record.exc_info}")


@contextlib.contextmanager
def life(seed: int, folder: Path) -> Iterator[World]:
    """Give a world whose clock is the only one, and end it."""
    clock = SimpleNamespace()
    worlds: list[World] = []

    def memory(name: str, real: Callable[[str], int] = arena.sealable_memory) -> int:
        if worlds[0].is_due("arena"):
            raise OSError(12, "no memory")
        return real(name)

    def released(session: Session, real: Callable[[Session], None] = Session.released) -> None:
        assert isinstance(session.sock, Line)
        session.sock.is_over = True
        real(session)

    log = logging.getLogger("trunkline")
    with contextlib.ExitStack() as patches:
        for module in (server, session, mover, forms, trials):
            patches.enter_context(mock.patch.object(module, "time", clock))
        patches.enter_context(mock.patch.object(arena, "sealable_memory", memory))
        patches.enter_context(mock.patch.object(Session, "released", released))
        patches.enter_context(mock.patch.object(blocks, "SMALLEST_BYTES", 30))
        world = World(seed, folder, clock)
        worlds.append(world)
        handler = _Bugs(world)
        log.addHandler(handler)
        # Whoever keeps records keeps the frames of errors in them, and so weights in memory.
        patches.enter_context(mock.patch.object(log, "propagate", False))
        try:
            yield world
        except BaseException:
            # Frames of the error may still look into shared memory.
            with contextlib.suppress(BufferError):
                world.close()
            raise
        else:
            world.close()
        finally:
            log.removeHandler(handler)


def main() -> None:
    """Live one life again, the one of a seed, and say what became of it."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    with tempfile.TemporaryDirectory() as folder, life(int(sys.argv[1]), Path(folder)) as world:
        world.live(EVENTS)
        print(dict(world.outcomes), dict(world.injected))


if __name__ == "__main__":
    main()
