"""What this machine, or the container on it, has for a sidecar: memory, cores, descriptors."""

from __future__ import annotations

import os
import re
import resource
from pathlib import Path


def available_bytes(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return how much memory can be had without swapping: what the kernel calls available, or what the cgroup has left.

    Not what is free: the page cache takes nearly all of that on a machine that has run for a while, and gives it back.
    """
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
    available = int(found[1]) * 1024 if found else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):
        # No cgroup of our own, or the older kind.
        return available
    return available if limit == "max" else min(available, max(0, int(limit) - used))


def has_gpu_driver(device: Path = Path("/dev/nvidiactl")) -> bool:
    """Say whether a GPU may be found here, without touching one: a process that did could not fork any more."""
    return device.exists()


def core_count() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def raise_descriptor_limit() -> int:
    """Allow as many open files as the system lets this process have; return the limit. Children inherit it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
