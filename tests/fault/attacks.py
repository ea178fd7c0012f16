"""What the rows about hostile and dying functions do to a sidecar: the same against the product and against its mutants.

Each attack takes the row, the sidecar and how often; what must not be goes into the row, or is an AssertionError.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import msgpack
import numpy as np
from trunkline import protocol
from trunkline.client import Model
from trunkline.errors import ArenaFull, FrameTooLarge, MalformedFrame, SidecarFault, ValueOutOfBounds
from trunkline.protocol import Describe, Fault, Message, Placement

from tests.fault.clients import STEPS
from tests.fault.looked import BAD, TABLE, right
from tests.fault.matrix import Neighbour, Row, pool_at
from tests.fault.wire import HARMLESS, Refused, Wire, connected, hello, infer
from tests.nodes import until
from tests.sidecar_process import ROOT, SidecarProcess

# What no stranger is told: paths, names of shared memory, addresses, and how Python shows objects.
TELLTALE: Final = re.compile(
    r"/(?:dev|proc|tmp|run|var|home|usr|etc|root|work|opt)/|"
    r"\.py\b|\bpsm_|memfd|trunkline-\d|0x[0-9a-f]{4,}|<\w+[^>]* at |Traceback"
)


# Who asks at once in ``raises``.
RAISERS: Final = 4


class Clients:
    """A process of ``tests.fault.clients``. ``told`` is what it says first, ``found`` what it says last."""

    def __init__(self, what: str, *, through: Sequence[str] = (), **arguments: object) -> None:
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/template/python3-trunkline"}
        command = [sys.executable, "-m", *through, "tests.fault.clients", what, json.dumps(arguments)]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def told(self) -> dict[str, Any]:
        """Return what it says before it is told to go on."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, self._process.communicate()
        found: dict[str, Any] = json.loads(line)
        return found

    def found(self) -> dict[str, Any]:
        """Tell it to go on, and return what it has found."""
        out, err = self._process.communicate("\n")
        assert self._process.returncode == 0, err
        found: dict[str, Any] = json.loads(out.splitlines()[-1])
        if err:
            found["said"] = err[-2000:]
        return found


# --- frames -----------------------------------------------------------------------------------------------------------


def frames(row: Row, box: SidecarProcess, count: int, seed: int = 0) -> None:
    """Send mutated frames, a fifth with descriptors, as the first message and later. For F1, T3 and T5."""
    choose = random.Random(seed)
    codes: Counter[str] = Counter()
    with Neighbour(row, box.socket) as neighbour:
        sock = None
        for _ in range(count):
            if sock is None:
                sock = connected(str(box.socket))
                if choose.random() < 0.5:
                    sock.send(hello("scaled"))
                    _let_go(sock)
            row.attempts += 1
            codes[_sent(sock, mutated(choose), choose)] += 1
            if not _is_open(sock, row, codes):
                sock.close()
                sock = None
            if row.wrong:
                break
        if sock is not None:
            sock.close()
        assert not row.wrong, f"wrong: {codes}"
        # Not only refusals were seen: nearly valid ones, too.
        assert {"malformed_frame", "unknown_model", "Welcome", "Result"} <= codes.keys(), codes
        neighbour.await_answers()


def _let_go(sock: socket.socket) -> None:
    _, fds, _, _ = socket.recv_fds(sock, 4096, 2)
    for fd in fds:
        os.close(fd)


def _sent(sock: socket.socket, frame: bytes, choose: random.Random) -> str:
    """Send a frame, with descriptors or without; return how."""
    if choose.random() < 0.2:
        try:
            socket.send_fds(sock, [frame], [sock.fileno()] * choose.randrange(1, 254))
            return "descriptors taken"
        except PermissionError:
            # The kernel keeps them off; the frame is to come in any case.
            pass
        except OSError:
            return "nobody there"
    with contextlib.suppress(OSError):
        sock.send(frame)
    return "sent"


def _is_open(sock: socket.socket, row: Row, codes: Counter[str]) -> bool:
    """Read the one answer that each frame gets, and say whether the session goes on after it as it must."""
    try:
        frame, fds, _, _ = socket.recv_fds(sock, 4097, 2)
    except ConnectionResetError:
        return False
    except TimeoutError:
        row.wrong += 1
        return False
    for fd in fds:
        os.close(fd)
    if not frame:
        return False
    answer = protocol.decode(frame)
    codes[answer.code if isinstance(answer, Fault) else type(answer).__name__] += 1
    if not isinstance(answer, Fault):
        return True
    told = f"{answer.message} {answer.details}"
    if answer.code == SidecarFault.code or TELLTALE.search(told):
        # A frame has found a bug, or learned what it should not.
        codes[told] += 1
        row.wrong += 1
    if answer.code not in (MalformedFrame.code, FrameTooLarge.code):
        return True
    # Whoever breaks the protocol is let go.
    sock.settimeout(5.0)
    try:
        is_over = not sock.recv(1)
    except TimeoutError:
        is_over = False
    except ConnectionResetError:
        is_over = True
    row.wrong += not is_over
    return False


_EDGES: Final[tuple[object, ...]] = (
    *(0, 1, -1, 127, 128, 255, 256, 4096, 65535, 65536, 2**31 - 1, 2**31, 2**32, 2**40, 2**40 + 1, 2**62, 2**63 - 1, 2**63),
    *(
        2**64 - 1,
        -(2**63),
        0.0,
        float("nan"),
        float("inf"),
        None,
        True,
        False,
        "",
        "x" * 128,
        "x" * 129,
        "scaled",
        "nobody",
        "a+b",
    ),
    *(b"", b"x" * 64, b"x" * 65, [], [[]], {}, {"a": 1}, "float32", "object", "float64", "\x00", "\u202e", "a/b", "..", "%s%n"),
)


def _corpus() -> list[bytes]:
    tensors = (Placement("x", "float32", (2, 8), 0),)
    made: list[Message] = [
        Describe(1, "scaled"),
        Describe(2, "nobody"),
        protocol.Infer(3, 10_000_000, "call", "scaled", "", tensors),
        protocol.Infer(4, 10_000_000, "", "scaled", "", tensors, f"00-{'1' * 32}-{'2' * 16}-01"),
        protocol.Command(5, "status", 2),
        protocol.Welcome(1, 1, 4096, 4096, "sealed", 1),
        protocol.Document(6, 10),
        protocol.Result(7, tensors),
        Fault(8, "code", "message", True, {"a": 1}),
    ]
    return [hello("scaled"), hello(), *map(protocol.encode, made)]


_CORPUS: Final = _corpus()


def mutated(choose: random.Random) -> bytes:
    """Return a frame that was valid once; now and then it still is."""
    frame = choose.choice(_CORPUS)
    if choose.random() < 0.4:
        return _edged(frame, choose)
    changed = bytearray(frame)
    for _ in range(choose.choice((0, 1, 1, 1, 2, 4))):
        at = choose.randrange(len(changed) + 1)
        match choose.randrange(6):
            case 0 if at < len(changed):
                changed[at] ^= 1 << choose.randrange(8)
            case 1 if at < len(changed):
                changed[at] = choose.randrange(256)
            case 2:
                changed[at:at] = choose.randbytes(choose.choice((1, 2, 8, 300)))
            case 3:
                del changed[at : at + choose.randrange(1, 9)]
            case 4:
                other = choose.choice(_CORPUS)
                changed[at:] = other[choose.randrange(len(other)) :]
            case _:
                changed += bytes(changed[at:]) * choose.choice((1, 2, 90))
    # A message without a byte is the end of a connection.
    return bytes(changed[: 2 * protocol.MAX_FRAME_BYTES]) or b"\xc0"


def _edged(frame: bytes, choose: random.Random) -> bytes:
    """Return a frame with a value at an edge in place of one of its fields, or of one within them."""
    fields: list[Any] = msgpack.unpackb(frame)
    place, at = fields, choose.randrange(len(fields))
    while isinstance(place[at], list) and place[at] and choose.random() < 0.7:
        place, at = place[at], choose.randrange(len(place[at]))
    match choose.randrange(4):
        case 0:
            place.insert(at, choose.choice(_EDGES))
        case 1:
            del place[at]
        case _:
            place[at] = choose.choice(_EDGES)
    return bytes(msgpack.packb(fields))


# --- descriptors ------------------------------------------------------------------------------------------------------


def descriptors(row: Row, box: SidecarProcess, count: int) -> dict[str, Any]:
    """Send messages with as many descriptors as one may have. For T4. Return what became of them."""
    with Neighbour(row, box.socket) as neighbour:
        row.attempts += count
        found = Clients("floods", socket=str(box.socket), count=count, descriptors=253).found()
        neighbour.await_answers()
    assert sum(found.values()) == count, found
    return found


# --- deaths -----------------------------------------------------------------------------------------------------------


def deaths(row: Row, box: SidecarProcess, count: int, seed: int = 0) -> None:
    """Have functions killed at any moment. For F2."""
    with Neighbour(row, box.socket) as neighbour:
        row.attempts += count
        found = Clients("killed", socket=str(box.socket), count=count, seed=seed).found()
        assert found == {"killed": count}, found
        neighbour.await_answers()


def deaths_at_steps(row: Row, box: SidecarProcess, times: int) -> None:
    """Have functions killed at each step of the protocol. For F3."""
    with Neighbour(row, box.socket) as neighbour:
        row.attempts += times * len(STEPS)
        found = Clients("killed_at_steps", socket=str(box.socket), times=times).found()
        assert found == dict.fromkeys(STEPS, times), found
        neighbour.await_answers()


# --- memory -----------------------------------------------------------------------------------------------------------


def changes(row: Row, box: SidecarProcess, count: int, seed: int = 0) -> None:
    """Have functions do to their arenas all that can be tried. For F9 and T1."""
    with Neighbour(row, box.socket) as neighbour:
        found = Clients("changes", socket=str(box.socket), count=count, seed=seed).found()
        row.attempts += found["attached"]
        assert found["took"].keys() <= HARMLESS, found["took"]
        assert found["answers"] == {"Result": 2 * count}, found["answers"]
        assert set(found["refused"].values()) == {count}, found["refused"]
        neighbour.await_answers()


def shortages(row: Row, box: SidecarProcess, count: int, short: Path) -> None:
    """Come while there is no memory for arenas, which a file tells a sidecar of ``circumstances.memory_runs_out``. For F15."""
    with Neighbour(row, box.socket) as neighbour:
        for _ in range(count):
            row.attempts += 1
            short.touch()
            try:
                Wire(str(box.socket), "scaled").close()
            except Refused as refused:
                assert refused.fault.code == ArenaFull.code, refused.fault
                assert not TELLTALE.search(refused.fault.message), refused.fault
            else:
                raise AssertionError("somebody was let in for whom there is no memory")
            finally:
                short.unlink()
            assert is_served(box)
        neighbour.await_answers()


# The model that ``flips`` asks: y = x + OFFSET, where x may be from 0 to LARGEST.
OFFSET: Final = 1000
LARGEST: Final = 7
OUT_OF_RANGE: Final = 2**40


def flips(row: Row, box: SidecarProcess, count: int) -> dict[str, Any]:
    """Have an input changed all the time while it is asked about: what was not checked must not be computed. For F10 and T2."""
    with Neighbour(row, box.socket) as neighbour:
        found = Clients(
            "flips", socket=str(box.socket), count=count, model="bounded", good=LARGEST, bad=OUT_OF_RANGE, offset=OFFSET
        ).found()
        row.attempts += count
        row.wrong += found["out of range"] + found["neither"]
        row.lost += count - found["good"] - found["out of range"] - found["neither"] - found.get("value_out_of_bounds", 0)
        # Both were there when they were looked at, each many times: there was a race.
        assert min(found["good"], found.get("value_out_of_bounds", 0)) > count / 20, found
        neighbour.await_answers()
    return found


# --- minds ------------------------------------------------------------------------------------------------------------


def canaries(
    row: Row, box: SidecarProcess, clients: int, calls: int, *, through: Sequence[str] = (), seed: int = 0
) -> dict[str, Any]:
    """Have clients call with numbers of their own, late, cancelled and dying; return what became of that. For F27 and T14."""
    with Neighbour(row, box.socket) as neighbour:
        found = Clients("canaries", through=through, socket=str(box.socket), clients=clients, calls=calls, seed=seed).found()
        row.attempts += clients * calls
        row.answered += found["calls"] - found["cancelled"] - found["late"] - found["died"] - found["lost"]
        row.wrong += found["wrong"]
        row.lost += found["lost"]
        assert found["calls"] == clients * calls, found
        assert not found["failed clients"], found
        neighbour.await_answers()
    return found


# --- readers ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def sessions(box: SidecarProcess, count: int, *models: str) -> Iterator[list[Wire]]:
    """Open so many sessions, and close them."""
    with contextlib.ExitStack() as stack:
        opened = []
        for _ in range(count):
            opened.append(wire := Wire(str(box.socket), *models))
            stack.callback(wire.close)
        yield opened


def ask_without_reading(wire: Wire, most: int) -> int:
    """Ask until the sidecar ends the session, and read nothing. Return how often, ``most`` where it never did."""
    frame = protocol.encode(Describe(1, "scaled"))
    for count in range(most):
        try:
            wire.sock.send(frame)
        except (BrokenPipeError, ConnectionResetError):
            return count
    return most


def is_served(box: SidecarProcess) -> bool:
    """Say whether a new session has its answer."""
    with sessions(box, 1, "scaled") as (wire,):
        x = np.full((1, 8), 3, np.float32)
        wire.request[: x.nbytes] = x.tobytes()
        answer = wire.ask(infer("scaled", "float32", (1, 8)))
        return isinstance(answer, protocol.Result) and bool((np.frombuffer(wire.reply, np.float32, 8) == 3 * np.arange(8)).all())


def raises(row: Row, box: SidecarProcess, count: int) -> None:
    """Have four clients ask "looked", each for something it fails for one time in twenty, which is nobody else's. For F23.

    Some of that is computed as a batch: one call after another, until it is known how much memory a call takes.
    """

    def ask(seed: int) -> tuple[int, int]:
        random, pool, wrong, lost = np.random.default_rng(seed), pool_at(box.socket), 0, 0
        model = Model("looked", pool)
        for number in range(count // RAISERS):
            ids = random.integers(0, TABLE // 2, (1, 4))
            is_bad = number % 20 == seed
            if is_bad:
                ids[0, number % 4] = BAD[number // 20 % len(BAD)]
            try:
                answer = model(ids)
                wrong += is_bad or not np.array_equal(answer, right(ids))
            except ValueOutOfBounds:
                lost += not is_bad
        pool.close()
        return wrong, lost

    def rows_beside() -> int:
        sharing = box.admin.get("status")["sharing"]
        return int(sharing["stage_rows"]) - int(sharing["stages"])

    def ask_good(seed: int) -> None:
        with contextlib.closing(pool_at(box.socket)) as pool:
            Model("looked", pool)(np.full((1, 4), seed))

    with Neighbour(row, box.socket), ThreadPoolExecutor(RAISERS) as threads:
        before = rows_beside()

        def are_batched() -> bool:
            list(threads.map(ask_good, range(RAISERS)))
            return rows_beside() > before

        until(are_batched)
        for each in [threads.submit(ask, seed) for seed in range(RAISERS)]:
            wrong, lost = each.result()
            row.attempts += count // RAISERS
            row.answered += count // RAISERS - lost
            row.wrong += wrong
            row.lost += lost
