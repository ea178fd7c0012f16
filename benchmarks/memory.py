"""Memory of process trees as the kernel accounts it: PSS, so that shared pages count once, split among their users."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sidecar.local.processes import descendants


def pss_bytes(pids: Iterable[int]) -> int:
    """Return the proportional set size of processes and all their descendants, in bytes."""
    every = {descendant for pid in pids for descendant in descendants(pid)}
    total = 0
    for pid in every:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def available_bytes() -> int:
    """Return what the kernel thinks can still be allocated without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo lacks MemAvailable")
