"""A container made of the kernel's parts alone: namespaces, a read-only root, no capabilities, a memory limit.

util-linux's unshare and setpriv, iproute2's ip and the memory controller of cgroups do what a container runtime does with
them. It takes root: whoever lacks it is told what to do (``require``).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = {"unshare": "util-linux", "setpriv": "util-linux", "nsenter": "util-linux", "ip": "iproute2", "curl": "curl"}
# What OpenFaaS on Kubernetes runs functions as.
UID = 12000
_V1, _V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
_numbers = itertools.count()

# Arguments: function folder, environment of the interpreter, folder of the socket or "", whose folder is where it is mounted.
# Everything is read-only in the end but /tmp and /dev/shm, which every container has of its own.
_SCRIPT = """
set -eu
mount --make-rprivate /
app=$1; venv=$2; sockets=$3; shift 3
mount -t tmpfs -o mode=755 tmpfs /srv
mkdir /srv/app /srv/venv
mount --bind "$app" /srv/app
mount --bind "$venv" /srv/venv
if [ -n "$sockets" ]; then mkdir /srv/sockets; mount --bind "$sockets" /srv/sockets; fi
mount -t tmpfs -o mode=755 tmpfs /run
if [ -n "$sockets" ]; then mkdir /run/trunkline; mount --bind /srv/sockets /run/trunkline; fi
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t tmpfs -o mode=1777,size=64m tmpfs /dev/shm
mount -t proc proc /proc
while read -r _ _ _ _ where _; do
  [ -e "$where" ] || continue
  case $where in /proc*|/sys*|/dev|/dev/*|/tmp) ;; *) mount -o remount,bind,ro "$where" ;; esac
done < /proc/self/mountinfo
ip link set lo up
cd /srv/app
exec "$@"
"""


def require() -> None:
    """Skip the test, with what to do, where containers cannot be made."""
    if missing := sorted({package for program, package in PROGRAMS.items() if shutil.which(program) is None}):
        pytest.skip(f"containers cannot be made here: apt-get install {' '.join(missing)}")
    if os.geteuid() != 0:
        pytest.skip("containers cannot be made here: run the tests as root, or `sudo make test`")


def interpreter_is_private() -> bool:
    """Say whether another user could not run the interpreter of the tests, which may lie in somebody's home."""
    real = Path(sys.executable).resolve()
    return any(not folder.stat().st_mode & 0o001 for folder in real.parents)


@dataclass(frozen=True)
class Confined:
    """How a function is run. ``network`` is the name of a network namespace; without one it gets its own, with loopback alone."""

    context: Path
    sockets: Path | None = None
    network: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)

    def command(self, *command: str) -> list[str]:
        """Return what runs ``command`` so; its first word is an argument of the function's interpreter."""
        # Reading what is another user's is all that is left, and only where the interpreter is.
        kept = "-all,+dac_read_search" if interpreter_is_private() else "-all"
        user = ["--reuid", str(UID), "--regid", str(UID), "--clear-groups", "--no-new-privs"]
        sets = [f"--{each}={kept}" for each in ("inh-caps", "ambient-caps", "bounding-set")]
        given = {"PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"} | dict(self.environment)
        return [
            *(["ip", "netns", "exec", self.network] if self.network else []),
            *("unshare", "--mount", "--ipc", "--uts", "--pid", "--fork", "--kill-child"),
            *([] if self.network else ["--net"]),
            *("sh", "-c", _SCRIPT, "sh", str(self.context), str(Path(sys.prefix).resolve()), str(self.sockets or "")),
            *("setpriv", *user, *sets, "env", "-i", *(f"{key}={value}" for key, value in given.items())),
            *("/srv/venv/bin/python", *command),
        ]


def inside(pid: int) -> int:
    """Return the pid, as seen from here, of the first process in the namespaces that an ``unshare`` has made."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0]) if children else 0


def within(pid: int, *command: str, timeout_s: float = 60) -> subprocess.CompletedProcess[bytes]:
    """Run a command in the network of a process."""
    entered = ["nsenter", "--target", str(pid), "--net", *command]
    return subprocess.run(entered, capture_output=True, timeout=timeout_s, check=False)


@contextlib.contextmanager
def network() -> Iterator[str]:
    """Make a network namespace with loopback, which stands for a node; its name."""
    name = f"trunkline-{os.getpid()}-{next(_numbers)}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        yield name
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


class MemoryLimit:
    """A group of processes that may have so much memory, while the block runs. Version 1 or 2 of cgroups."""

    def __init__(self, limit_bytes: int) -> None:
        self.is_v2 = not _V1.is_dir()
        self.path = (_V2 if self.is_v2 else _V1) / f"trunkline-{os.getpid()}-{next(_numbers)}"
        try:
            if self.is_v2:
                (_V2 / "cgroup.subtree_control").write_text("+memory")
            self.path.mkdir()
        except OSError as error:
            pytest.skip(
                f"memory cannot be limited here ({error}): mount cgroups writably (docker run --privileged --cgroupns=host)"
            )
        (self.path / ("memory.max" if self.is_v2 else "memory.limit_in_bytes")).write_text(str(limit_bytes))

    def joined_by(self, command: list[str]) -> list[str]:
        """Return a command that runs ``command`` in the group."""
        return ["sh", "-c", 'echo $$ > "$0"/cgroup.procs; exec "$@"', str(self.path), *command]

    def used_bytes(self) -> int:
        """Return the most that was used at any time."""
        return int((self.path / ("memory.peak" if self.is_v2 else "memory.max_usage_in_bytes")).read_text())

    def kills(self) -> int:
        """Return how many of its processes the kernel has killed for memory."""
        text = (self.path / ("memory.events" if self.is_v2 else "memory.oom_control")).read_text()
        return int(dict(line.split() for line in text.splitlines()).get("oom_kill", "0"))

    def __enter__(self) -> MemoryLimit:
        return self

    def __exit__(self, *raised: object) -> None:
        """Remove the group, which has no processes any more."""
        self.path.rmdir()
