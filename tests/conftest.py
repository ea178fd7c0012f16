"""Fixtures for all tests: nothing a test starts may outlive it."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator

import pytest
from trunkline import client


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def nothing_leaks() -> Iterator[None]:
    """Compare descriptors, threads and shared memory names before and after the test."""
    client._pool.close()
    gc.collect()
    before = open_descriptors(), threading.active_count(), sorted(os.listdir("/dev/shm"))
    yield
    client._pool.close()
    gc.collect()
    assert (open_descriptors(), threading.active_count(), sorted(os.listdir("/dev/shm"))) == before
