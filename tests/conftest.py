"""Fixtures for all tests: nothing a test starts may outlive it."""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
from collections.abc import Iterator

import pytest
from trunkline import client


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def held() -> tuple[int, int]:
    """Return how many descriptors and threads this process has."""
    return open_descriptors(), threading.active_count()


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """Have the log as it was before the test: how much is logged is one setting of a whole process, and some change it."""
    loggers = [logging.getLogger(), logging.getLogger("trunkline")]
    before = [(each.level, each.propagate, each.disabled, [*each.handlers], [*each.filters]) for each in loggers]
    yield
    for each, (level, propagate, disabled, handlers, filters) in zip(loggers, before, strict=True):
        each.setLevel(level)
        each.propagate, each.disabled = propagate, disabled
        each.handlers[:], each.filters[:] = handlers, filters


@pytest.fixture
def nothing_leaks() -> Iterator[None]:
    """Compare what is held before and after the test. Less is no leak: an earlier test's rest may end meanwhile."""
    client._pool.close()
    gc.collect()
    before = held()
    yield
    client._pool.close()
    deadline = time.monotonic() + 10
    while True:
        gc.collect()
        after = held()
        if after[0] <= before[0] and after[1] <= before[1]:
            return
        assert time.monotonic() < deadline, f"descriptors, threads: {before} before, {after} after"
        time.sleep(0.05)


def pytest_sessionfinish() -> None:
    """Wait for threads of engines that have ended: an interpreter must not end while torch is in the middle of an operator."""
    for thread in threading.enumerate():
        if thread.name in ("trials", "dry runs"):
            thread.join(20)
