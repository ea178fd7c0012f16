"""Clients that die, stop, lie or change their minds, as processes: `python -m tests.fault.clients WHAT JSON`, which prints JSON.

They are forked from a process that has imported the wire and the client, nothing else: a thousand are started in seconds.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import random
import select
import signal
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from trunkline import client, errors, protocol
from trunkline.connection import Connection
from trunkline.endpoint import Endpoint
from trunkline.pool import Pool
from trunkline.protocol import Fault, Placement, Result

from tests.fault.wire import Refused, Wire, changes_of_arenas, connected, hello, infer
from tests.waiting import PATIENCE_S, soon

WEIGHTS: Final = np.arange(8, dtype=np.float32)
_WIDTH: Final = len(WEIGHTS)
# How a child ends that has found something wrong.
_WRONG: Final = 3


def _forked(run: Callable[[], None]) -> int:
    """Run something in a child that ends with it; return its pid."""
    pid = os.fork()
    if pid:
        return pid
    status = _WRONG
    try:
        run()
        status = 0
    except BaseException as error:  # noqa: BLE001 - it is told, and the child ends
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(status)


def _ended_by(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# --- killed at any moment ---------------------------------------------------------------------------------------------


def killed(socket: str, count: int, seed: int, at_once: int = 8) -> dict[str, Any]:
    """Have so many functions killed, ``at_once`` at a time, each 1 to 60 ms after it began. Return how they ended."""
    moments = random.Random(seed)
    ended: Counter[str] = Counter()
    due: list[tuple[float, int]] = []
    for number in range(count + at_once):
        if number < count:
            pid = _forked(lambda seed=seed + number: _live(socket, random.Random(seed)))  # type: ignore[misc]
            due.append((time.monotonic() + moments.uniform(0.001, 0.06), pid))
        if len(due) < at_once and number < count:
            continue
        due.sort()
        moment, pid = due.pop(0)
        time.sleep(max(0.0, moment - time.monotonic()))
        os.kill(pid, signal.SIGKILL)
        ended["killed" if _ended_by(pid) == -signal.SIGKILL else "by itself"] += 1
        if not due:
            break
    return dict(ended)


def _live(socket: str, choose: random.Random) -> None:
    """Be a function: sessions of all sizes, calls without rest."""
    while True:
        connection = Connection(
            socket,
            models=("scaled",),
            request_bytes=choose.choice((0, 1 << 20)),
            reply_bytes=choose.choice((0, 1 << 20)),
            deadline=soon(),
        )
        for _ in range(choose.randrange(1, 30)):
            rows = choose.randrange(1, 9)
            connection.request[: 4 * _WIDTH * rows] = b"\0" * (4 * _WIDTH * rows)
            connection.infer("scaled", (Placement("x", "float32", (rows, _WIDTH), 0),), soon())
        connection.close()


# --- killed at each step ----------------------------------------------------------------------------------------------

STEPS: Final = (
    "connected",
    "said hello",
    "the welcome has come",
    "welcomed",
    "asked what a model takes",
    "wrote half an input",
    "wrote an input",
    "asked",
    "the answer has come",
    "answered",
    "asked once more",
    "asked before the answer",
    "ended the session",
    "begins anew",
)


def killed_at_steps(socket: str, times: int) -> dict[str, Any]:
    """Have functions killed at each step of the protocol, so many at each. Return how many died there."""
    died: Counter[str] = Counter()
    for step in STEPS:
        for _ in range(times):
            there, reached = os.pipe()
            pid = _forked(lambda step=step, reached=reached: _go_to(socket, step, reached))  # type: ignore[misc]
            os.close(reached)
            # Empty where the child ended before it came there.
            arrived = os.read(there, 1)
            os.close(there)
            os.kill(pid, signal.SIGKILL)
            if _ended_by(pid) == -signal.SIGKILL and arrived:
                died[step] += 1
    return dict(died)


def _go_to(socket: str, wanted: str, reached: int) -> None:
    for step in _steps(socket):
        if step == wanted:
            os.write(reached, b"x")
            signal.pause()


def _steps(socket: str) -> Iterator[str]:
    early = connected(socket)
    yield "connected"
    early.send(hello("scaled"))
    yield "said hello"
    early.recv(1, 0x02)  # MSG_PEEK
    yield "the welcome has come"
    wire = Wire(socket, "scaled")
    yield "welcomed"
    wire.sock.send(protocol.encode(protocol.Describe(1, "scaled")))
    yield "asked what a model takes"
    wire.answer()
    rows = 4
    half = struct.pack(f"{2 * _WIDTH}f", *range(2 * _WIDTH))
    wire.request[: len(half)] = half
    yield "wrote half an input"
    wire.request[len(half) : 2 * len(half)] = half
    yield "wrote an input"
    frame = infer("scaled", "float32", (rows, _WIDTH))
    wire.sock.send(frame)
    yield "asked"
    wire.sock.recv(1, 0x02)
    yield "the answer has come"
    wire.answer()
    yield "answered"
    wire.sock.send(frame)
    yield "asked once more"
    with contextlib.suppress(OSError):
        # Against the protocol, unless the answer was quicker.
        wire.sock.send(frame)
    yield "asked before the answer"
    wire.sock.close()
    yield "ended the session"
    again = connected(socket)
    yield "begins anew"
    again.close()


# --- stopped ----------------------------------------------------------------------------------------------------------


def stopped(socket: str, each: int) -> dict[str, Any]:
    """Stop so many functions at each of four moments; say so; when told to go on, kill half of them and let the others run."""
    begun = []
    for step in ("connected", "welcomed", "wrote half an input", "asked"):
        for _ in range(each):
            there, reached = os.pipe()
            begun.append(_forked(lambda step=step, reached=reached: _go_to(socket, step, reached)))  # type: ignore[misc]
            os.close(reached)
            assert os.read(there, 1), f"nobody came to where they are {step}"
            os.close(there)
            os.kill(begun[-1], signal.SIGSTOP)
    print(json.dumps({"stopped": len(begun)}), flush=True)
    sys.stdin.readline()
    for number, pid in enumerate(begun):
        # Who runs on waits for a signal.
        os.kill(pid, signal.SIGKILL if number % 2 else signal.SIGCONT)
        if not number % 2:
            os.kill(pid, signal.SIGTERM)
    return dict(Counter(str(_ended_by(pid)) for pid in begun))


# --- memory -----------------------------------------------------------------------------------------------------------


def changes(socket: str, count: int, seed: int) -> dict[str, Any]:
    """Attach so often, and try all there is to try on the arenas while requests read them. Return what took, and the answers."""
    choose = random.Random(seed)
    took: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    answers: Counter[str] = Counter()
    attached = 0
    frame = infer("scaled", "float32", (64, _WIDTH))
    for _ in range(count):
        try:
            wire = Wire(socket, "scaled")
        except (OSError, Refused) as error:
            answers[f"not let in: {error}"] += 1
            continue
        attached += 1
        try:
            tries = list(changes_of_arenas(wire).items())
            choose.shuffle(tries)
            wire.sock.send(frame)
            for name, change in tries:
                try:
                    change()
                except (OSError, ValueError):
                    refused[name] += 1
                else:
                    took[name] += 1
            answers[type(wire.answer()).__name__] += 1
            # And with the arenas as they are now.
            answers[type(wire.ask(frame)).__name__] += 1
        except OSError as error:
            answers[type(error).__name__] += 1
        wire.close()
    return {"attached": attached, "took": took, "refused": refused, "answers": answers}


def flips(socket: str, count: int, model: str, good: int, bad: int, offset: int) -> dict[str, Any]:
    """Ask so often about one integer that another process keeps changing, from ``good`` to ``bad`` and back.

    Return how often the answer was that of each, how often it was refused as out of bounds, and what else was answered.
    """
    wire = Wire(socket, model)
    shared = memoryview(wire.request).cast("q")
    shared[0] = good
    flipper = _forked(lambda: _flip(shared, good, bad))
    outcome: Counter[str] = Counter()
    try:
        frame = infer(model, "int64", (1, 1))
        expected = protocol.encode(Result(1, (Placement("y", "int64", (1, 1), 0),)))
        value = memoryview(wire.reply).cast("q")
        sock = wire.sock
        answers: Counter[int] = Counter()
        for _ in range(count):
            sock.send(frame)
            answer = sock.recv(4096)
            if answer == expected:
                answers[value[0] - offset] += 1
                continue
            told = protocol.decode(answer) if answer else None
            outcome[told.code if isinstance(told, Fault) else str(told)] += 1
            if not answer:
                break
        outcome["good"] = answers.pop(good, 0)
        outcome["out of range"] = answers.pop(bad, 0)
        outcome["neither"] = answers.total()
    finally:
        os.kill(flipper, signal.SIGKILL)
        os.waitpid(flipper, 0)
    return dict(outcome)


def _flip(shared: memoryview, good: int, bad: int) -> None:
    while True:
        for _ in range(1000):
            shared[0] = bad
            shared[0] = good


def floods(socket: str, count: int, descriptors: int) -> dict[str, Any]:
    """Send so many messages with so many descriptors each. Return what became of them."""
    wire = Wire(socket)
    frame = protocol.encode(protocol.Describe(1, "nobody"))
    outcome: Counter[str] = Counter()
    ancillary = [(1, 1, struct.pack(f"{descriptors}i", *[0] * descriptors))]  # SOL_SOCKET, SCM_RIGHTS
    for _ in range(count):
        try:
            wire.sock.sendmsg([frame], ancillary)
        except PermissionError:
            outcome["refused by the kernel"] += 1
            continue
        answer = wire.answer()
        outcome[answer.code if isinstance(answer, Fault) else type(answer).__name__] += 1
    return dict(outcome)


# --- changing their minds ---------------------------------------------------------------------------------------------

_DONE, _WRONG_ANSWERS, _CANCELLED, _LATE, _DIED, _LOST, _COUNTERS = 0, 1, 2, 3, 4, 5, 6


class Cancelled(Exception):
    """What a signal handler raises in the middle of a call."""


def canaries(socket: str, clients: int, calls: int, seed: int) -> dict[str, Any]:
    """Have clients call with numbers that are nobody else's, some with a deadline too short, some cancelled at a random moment,
    some killed at one and followed by another. Return what became of the calls.
    """
    counters = memoryview(mmap.mmap(-1, max(1, 8 * clients * _COUNTERS))).cast("q")
    running = {}
    for number in range(clients):
        running[_forked_canary(socket, number, calls, seed, counters)] = number
    ended: Counter[str] = Counter()
    while running:
        pid, status = os.wait()
        number = running.pop(pid)
        code = os.waitstatus_to_exitcode(status)
        ended[str(code)] += 1
        if code == -signal.SIGKILL:
            counters[number * _COUNTERS + _DIED] += 1
            running[_forked_canary(socket, number, calls, seed, counters)] = number
    found = [sum(counters[number * _COUNTERS + what] for number in range(clients)) for what in range(_COUNTERS)]
    return {
        "calls": found[_DONE],
        "wrong": found[_WRONG_ANSWERS],
        "cancelled": found[_CANCELLED],
        "late": found[_LATE],
        "died": found[_DIED],
        "lost": found[_LOST],
        "failed clients": ended[str(_WRONG)],
    }


def _forked_canary(socket: str, number: int, calls: int, seed: int, counters: memoryview) -> int:
    own = counters[number * _COUNTERS : (number + 1) * _COUNTERS]
    return _forked(lambda: _sing(socket, number, calls, seed, own))


def _sing(socket: str, number: int, calls: int, seed: int, counters: memoryview) -> None:
    pool = Pool(endpoint=Endpoint(socket), credential=lambda: b"")
    model = client.Model("scaled", pool)
    choose = random.Random(f"{seed} {number} {counters[_DIED]}")
    doom = 0.0

    def interrupt(_: int, __: object) -> None:
        if doom > 0.995:
            os.kill(os.getpid(), signal.SIGKILL)
        raise Cancelled

    signal.signal(signal.SIGALRM, interrupt)
    while counters[_DONE] < calls:
        # Counted before: who dies in it does not repeat it.
        counters[_DONE] += 1
        # Nobody else's, and the product with any weight is still exact.
        x = np.full((choose.randrange(1, 4), _WIDTH), number * calls + counters[_DONE], np.float32)
        doom = choose.random()
        try:
            what = _asked(model, x, choose, is_hasty=0.9 < doom < 0.95, is_interrupted=doom > 0.95)
        except Cancelled:
            what = _CANCELLED
        counters[what] += what != _DONE
    pool.close()


def _asked(model: client.Model, x: NDArray[np.float32], choose: random.Random, *, is_hasty: bool, is_interrupted: bool) -> int:
    """Call once; return what is to be counted besides. Raises Cancelled at a random moment."""
    what = _DONE
    if is_interrupted:
        signal.setitimer(signal.ITIMER_REAL, choose.uniform(0.00005, 0.003))
    try:
        answer = model.call({"x": x}, deadline_s=choose.uniform(0.0001, 0.005) if is_hasty else PATIENCE_S)
        if not np.array_equal(answer, x * WEIGHTS):
            what = _WRONG_ANSWERS
    except errors.TrunklineError as error:
        what = _LATE if is_hasty and (error.retryable or isinstance(error, errors.DeadlineExceeded)) else _LOST
        if what == _LOST:
            print(f"lost: {error.code}: {error}", file=sys.stderr, flush=True)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return what


# --- more than their share --------------------------------------------------------------------------------------------


def hammers(socket: str, sessions: int, token: str) -> dict[str, Any]:
    """Ask in so many sessions at once, each again as soon as it is answered, until a line comes. Return the answers."""
    frame = infer("scaled", "float32", (1, _WIDTH))
    waiting = select.poll()
    waiting.register(sys.stdin, select.POLLIN)
    wires = {}
    for _ in range(sessions):
        wire = Wire(socket, "scaled", token=token.encode())
        wires[wire.sock.fileno()] = wire
        waiting.register(wire.sock, select.POLLIN)
        wire.sock.send(frame)
    print(json.dumps({"sessions": sessions}), flush=True)
    outcome: Counter[str] = Counter()
    while True:
        for fd, _ in waiting.poll():
            if fd == sys.stdin.fileno():
                return dict(outcome)
            answer = wires[fd].answer()
            outcome[answer.code if isinstance(answer, Fault) else type(answer).__name__] += 1
            wires[fd].sock.send(frame)


WHAT: Final[dict[str, Callable[..., dict[str, Any]]]] = {
    each.__name__: each for each in (killed, killed_at_steps, stopped, changes, flips, floods, canaries, hammers)
}


def main() -> None:
    """Do what the command line says, and print what was found."""
    found = WHAT[sys.argv[1]](**json.loads(sys.argv[2]))
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
