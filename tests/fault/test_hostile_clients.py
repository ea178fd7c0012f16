"""Rows of the matrix and of the threat table: functions that send, write and pass what they must not."""

from __future__ import annotations

import socket
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import msgpack
import numpy as np
import pytest
from trunkline import protocol
from trunkline.errors import FrameTooLarge, MalformedFrame
from trunkline.protocol import Describe, Fault

from tests.bundles import write_adding_bundle
from tests.fault import attacks, circumstances
from tests.fault.attacks import LARGEST, OFFSET, ask_without_reading, is_served, sessions
from tests.fault.launching import through
from tests.fault.matrix import Neighbour, Row, held, names_of, settled, tiers_of, until_tried
from tests.fault.wire import Wire, infer
from tests.sidecar_process import SidecarProcess, sidecar_process
from tests.waiting import until


@pytest.fixture(scope="module")
def steady_box(tmp_path_factory: pytest.TempPathFactory, scaled: Path) -> Iterator[SidecarProcess]:
    """As for other rows, with a model besides whose input has bounds."""
    folder = tmp_path_factory.mktemp("box")
    write_adding_bundle(folder / "bounded", "bounded", [OFFSET], dtype="int64", bounds=(0, LARGEST))
    with sidecar_process(folder) as box:
        box.admin.push(scaled)
        settled(box)
        before = [tier["used_bytes"] for tier in tiers_of(box)]
        box.admin.push(folder / "bounded")
        with sessions(box, 1, "bounded") as (wire,):
            assert isinstance(wire.ask(infer("bounded", "int64", (1, 1))), protocol.Result)
        until(lambda: all(tier["used_bytes"] > one for tier, one in zip(tiers_of(box), before, strict=True)))
        until_tried(box, "bounded")
        yield box


@pytest.mark.row("F1", "T3", "T5")
def test_mutated_frames_cost_their_senders_session_and_tell_nothing(row: Row, steady: SidecarProcess) -> None:
    attacks.frames(row, steady, row.count(10_000))


WITHIN_LIMITS = msgpack.packb([[[{}] * 15] * 15] * 15)
BOMBS = {
    "deep nesting": b"\x91" * 4095 + b"\xc0",
    "deep maps": b"\x81\x01" * 2047 + b"\xc0",
    "wide and deep": (b"\xdc\x0f\xff" + b"\xc0" * 15) * 220,
    "sixteen of sixteen of sixteen": msgpack.packb([2, [[list(range(13)) for _ in range(15)] for _ in range(15)]]),
    "four thousand maps": b"\xdc\x0f\xfa" + b"\x80" * 4090,
    "two thousand arrays": b"\xdc\x07\xf0" + b"\x91\xc0" * 2032,
    "three thousand maps within all limits": WITHIN_LIMITS,
    "an array that claims four billion elements": b"\xdd\xff\xff\xff\xff",
    "an array of 65535 elements": b"\xdc\xff\xff" + b"\xc0" * 4000,
    "a map that claims four billion entries": b"\xdf\xff\xff\xff\xff",
    "a map of 2000 entries": b"\xde\x07\xd0" + b"\x01\xc0" * 2000,
    "a text that claims four gigabytes": b"\xdb\xff\xff\xff\xff",
    "a long text": msgpack.packb([2, 1, "x" * 4080]),
    "a text of four bytes a character": msgpack.packb([2, 1, "\U0001f600" * 1000]),
    "bytes that claim four gigabytes": b"\xc6\xff\xff\xff\xff",
    "an extension that claims four gigabytes": b"\xc9\xff\xff\xff\xff\x01",
    "a timestamp": msgpack.packb(msgpack.Timestamp(1, 1)),
    "keys that are arrays": b"\x82\x91\x01\x01\x91\x02\x02",
    "more than a message": b"\x91" * 65_536,
}


@pytest.mark.row("T6")
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_costs_less_than_what_it_claims(row: Row, steady: SidecarProcess, name: str) -> None:
    frame = BOMBS[name]

    def refused() -> None:
        with pytest.raises((MalformedFrame, FrameTooLarge)):
            protocol.decode(frame)

    # In the best of several, since other processes take their turns.
    taken_s = []
    for _ in range(10):
        began_s = time.perf_counter()
        refused()
        taken_s.append(time.perf_counter() - began_s)
    assert min(taken_s) < 0.001
    tracemalloc.start()
    try:
        refused()
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # An empty map takes a byte on the way and 64 in memory, which no limit of msgpack's keeps.
    assert peak_bytes < (256 << 10 if frame is WITHIN_LIMITS else 64 << 10), peak_bytes
    for _ in range(row.count(5)):
        row.attempts += 1
        with sessions(steady, 1) as (wire,):
            answer = wire.ask(frame)
            row.wrong += not (isinstance(answer, Fault) and answer.code in (MalformedFrame.code, FrameTooLarge.code))
    assert is_served(steady)


@pytest.mark.row("T4")
def test_descriptors_are_kept_off(row: Row, steady: SidecarProcess) -> None:
    found = attacks.descriptors(row, steady, row.count(10_000))
    # All of one kind: Linux from 6.16 on refuses them to the sender, before that they are thrown away.
    assert len(found) == 1, found


@pytest.mark.row("T4")
def test_descriptors_are_thrown_away_where_the_kernel_cannot_keep_them_off(row: Row, tmp_path: Path, scaled: Path) -> None:
    with sidecar_process(tmp_path, through=through(circumstances.older_kernel)) as box:
        box.admin.push(scaled)
        settled(box)
        with sessions(box, 1) as (wire,):
            before = held(box)["engine descriptors"]
            found = attacks.descriptors(row, box, row.count(10_000))
            assert found == {"unknown_model": row.attempts}
            wire.ask(protocol.encode(Describe(1, "scaled")))
            assert held(box)["engine descriptors"] <= before


@pytest.mark.row("F9", "T1")
def test_no_change_of_an_arena_makes_the_sidecar_fall(row: Row, steady: SidecarProcess) -> None:
    attacks.changes(row, steady, row.count(1000))


@pytest.mark.row("F10", "T2")
def test_what_was_not_checked_is_not_computed(row: Row, steady: SidecarProcess) -> None:
    # 50,000 take 17 s on two busy cores, 200,000 took 68.
    found = attacks.flips(row, steady, row.count(200_000, push=50_000))
    row.figures |= {"computed": found["good"], "refused": found["value_out_of_bounds"]}


@pytest.mark.row("T3")
def test_what_is_shared_with_functions_has_no_name(row: Row, steady: SidecarProcess) -> None:
    names = names_of(steady)
    with sessions(steady, row.count(100), "scaled") as opened:
        row.attempts += len(opened)
        for wire in opened:
            wire.ask(infer("scaled", "float32", (1, 8)))
        assert names_of(steady) <= names
        mapped = Path(f"/proc/{steady.await_engine()}/maps").read_text()
        arenas = [line for line in mapped.splitlines() if "memfd:trunkline-re" in line]
        assert len(arenas) >= 2 * len(opened)
        assert all(line.endswith("(deleted)") for line in arenas)


@pytest.mark.row("F12", "T20")
def test_whoever_never_reads_is_let_go_and_slows_nobody(row: Row, steady: SidecarProcess) -> None:
    count, most = row.count(20), 10_000
    with Neighbour(row, steady.socket) as neighbour, sessions(steady, count, "scaled") as opened:
        asked = []
        for wire in opened:
            row.attempts += 1
            wire.sock.send(infer("scaled", "float32", (1, 8)))
            # It is there; to ask again before would be against the protocol, and end the session for that.
            wire.sock.recv(1, socket.MSG_PEEK)
            asked.append(ask_without_reading(wire, most))
        # The kernel keeps some 300 small answers, and a session goes only when there is no room for another.
        assert min(asked) > 64
        assert max(asked) < most
        neighbour.await_answers()


@pytest.mark.row("T15")
def test_nothing_of_one_function_is_ever_in_the_memory_of_another(row: Row, steady: SidecarProcess) -> None:
    # A bit pattern that no product of the others has; the second weight is 1, so it comes back as it is.
    canary = np.frombuffer(b"\x5a\x37\xc1\x49", np.float32)[0]
    rows = 16
    secret = np.full((rows, 8), canary, np.float32).tobytes()
    with Neighbour(row, steady.socket), sessions(steady, 2, "scaled") as (one, other):
        whole = np.frombuffer(other.reply, np.int32)
        mine = np.frombuffer(one.reply, np.int32)
        for number in range(row.count(10_000)):
            row.attempts += 1
            one.request[: len(secret)] = secret
            one.sock.send(infer("scaled", "float32", (1 + number % rows, 8)))
            # Together with the other, so that both are in one batch now and then.
            x = np.full((1 + number % 3, 8), number % 1000, np.float32)
            other.request[: x.nbytes] = x.tobytes()
            other.sock.send(infer("scaled", "float32", x.shape))
            assert isinstance(other.answer(), protocol.Result)
            row.answered += 1
            row.wrong += bool((whole == canary.view(np.int32)).any())
            # Answers, and nothing behind them.
            row.wrong += bool(whole[3 * 8 :].any())
            assert isinstance(one.answer(), protocol.Result)
        assert (mine == canary.view(np.int32)).any()
        # An arena that is looked at cannot be closed.
        del whole, mine
        # A session that begins has none of it either, whose memory it may have got.
        for _ in range(row.count(50)):
            one.close()
            one = Wire(str(steady.socket), "scaled")
            row.wrong += any(one.reply[:]) or any(one.request[:])
        one.close()
