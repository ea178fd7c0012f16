"""What an engine looks through while it serves: some weights once a minute, all that is on disk once a day."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from sidecar import upkeep
from sidecar.mover import Mover
from sidecar.tiermemory import TierMemory
from tests.waiting import PATIENCE_S


class FakeTier:
    """Weights of ten bytes each, some of them altered."""

    def __init__(self, *altered: str) -> None:
        self.altered = set(altered)
        self.held = dict.fromkeys(["a", "b", "c", "d", "e"], 10)

    def keys(self) -> dict[str, int]:
        return self.held

    def is_whole(self, key: str) -> bool:
        return key not in self.altered


def memory_of(tier: Any) -> TierMemory:
    nothing: Any = None
    return TierMemory(nothing, nothing, tier, nothing)


def test_the_next_ones_are_compared_each_time() -> None:
    tier = FakeTier("b", "d")
    memory = memory_of(tier)
    assert [memory.compare(20) for _ in range(5)] == [["b"], ["d"], [], ["b"], ["d"]]
    # All of them at most, and none twice.
    assert memory.compare(1 << 30) == ["b", "d"]
    tier.held.clear()
    assert memory.compare(20) == []


def test_what_is_altered_is_told_in_the_mover_s_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "_COMPARE_EVERY_S", 0.001)
    told: queue.SimpleQueue[tuple[Sequence[str], str]] = queue.SimpleQueue()
    memory, ended = memory_of(FakeTier("c")), threading.Event()
    mover = Mover(memory, lambda job: None)
    thread = threading.Thread(target=mover.run, name="the mover's")
    thread.start()
    upkeep.begin(memory, mover, ended, lambda keys: told.put((keys, threading.current_thread().name)))
    assert told.get(timeout=PATIENCE_S) == (["c"], "the mover's")
    ended.set()
    mover.stop()
    thread.join(PATIENCE_S)


@pytest.mark.row("T16")
def test_an_engine_whose_memory_was_altered_ends() -> None:
    pid = os.fork()
    if not pid:
        upkeep.end_of_altered(["a"])
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == upkeep.ALTERED


def test_what_is_on_disk_is_read_again_and_again_until_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "_SCRUB_EVERY_S", 0.001)
    monkeypatch.setattr(upkeep, "_SCRUB_PAUSE_S", 0.001)
    ended, read = threading.Event(), threading.Semaphore(0)

    def work(pause: Any) -> None:
        assert not pause() or ended.is_set()
        read.release()

    thread = threading.Thread(target=upkeep.scrub, args=(work, ended))
    thread.start()
    for _ in range(3):
        assert read.acquire(timeout=PATIENCE_S)
    ended.set()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
