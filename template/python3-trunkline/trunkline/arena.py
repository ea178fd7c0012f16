"""Shared memory of one connection: a request arena that the client writes, a reply arena that it reads.

The sidecar creates both, fills their pages in, and passes their descriptors. Nothing here has a name, so there is
nothing to guess, to squat on or to leave behind. The memory comes in two kinds:

``sealed``
    A memfd whose size is sealed, so that no client can make the sidecar's next access fault, and whose reply half cannot be
    mapped writable by anyone after the sidecar has mapped it. The sidecar maps it.
``copy``
    Where the kernel refuses to seal: a POSIX shared memory object, unlinked at birth. Its size cannot be sealed,
    and a client that shrinks it would kill whoever touches the lost pages. The sidecar therefore never maps it; it
    copies with ``preadv`` and ``pwrite``, which report a short count instead.

Sealing against SIGBUS is the method of Wayland's shared-memory pools.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from typing import Final

import posix_ipc

from trunkline.errors import ArenaFull, MalformedFrame, SidecarFault
from trunkline.protocol import COPY, SEALED

# linux/fcntl.h and linux/memfd.h; Python 3.11 lacks the newer ones.
_F_SEAL_FUTURE_WRITE: Final = 0x0010
_MFD_NOEXEC_SEAL: Final = 0x0008
_REQUEST_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_REPLY_SEALS: Final = _REQUEST_SEALS | _F_SEAL_FUTURE_WRITE
# Which seals the kernel adds by itself (MFD_NOEXEC_SEAL adds F_SEAL_EXEC) does not matter here.
_RELEVANT_SEALS: Final = _REPLY_SEALS | fcntl.F_SEAL_WRITE
# A node that is short of something says nothing about what its kernel can.
_SHORTAGES: Final = {errno.ENOMEM, errno.ENOSPC, errno.EMFILE, errno.ENFILE}


def page_aligned(size_bytes: int) -> int:
    """Return ``size_bytes`` rounded up to whole pages, at least one."""
    return max(1, -(-size_bytes // mmap.PAGESIZE)) * mmap.PAGESIZE


class ServerArena:
    """One arena as the sidecar sees it. ``fd`` is passed to the client and then closed by ``close``."""

    def __init__(self, size_bytes: int, transport: str, *, reply: bool) -> None:
        """Create an arena of ``size_bytes`` (whole pages), its pages already there and charged to the sidecar.

        Raises ArenaFull when the node has no memory for it, SidecarFault when sealing does not take.
        """
        self.size_bytes = size_bytes
        self.transport = transport
        self._memory: mmap.mmap | None = None
        self._view: memoryview | None = None
        try:
            name = "trunkline-reply" if reply else "trunkline-request"
            self.fd = sealable_memory(name) if transport == SEALED else _unlinked_memory()
        except (OSError, posix_ipc.Error) as error:
            raise ArenaFull(f"the node refuses shared memory ({error})", asked_bytes=size_bytes) from error
        try:
            # Allocated now, not at first touch: a page is charged to whoever touches it first, and a function's own
            # memory limit may be smaller than its arenas.
            os.posix_fallocate(self.fd, 0, size_bytes)
            if transport == SEALED:
                self._memory = mmap.mmap(self.fd, size_bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE)
                self._view = memoryview(self._memory)
                _seal(self.fd, _REPLY_SEALS if reply else _REQUEST_SEALS)
        except OSError as error:
            self.close()
            raise ArenaFull(
                f"the node has no {size_bytes} bytes of shared memory left ({os.strerror(error.errno or 0)})",
                asked_bytes=size_bytes,
            ) from error
        except SidecarFault:
            self.close()
            raise

    def read(self, offset: int, target: memoryview) -> None:
        """Copy ``len(target)`` bytes at ``offset`` into ``target``, the caller's private memory."""
        if self._view is not None:
            target[:] = self._view[offset : offset + len(target)]
            return
        done = 0
        while done < len(target):
            try:
                count = os.preadv(self.fd, [target[done:]], offset + done)
            except OSError as error:
                raise _unusable("request", error) from error
            if count == 0:
                raise MalformedFrame("the request arena was shrunk by the function", missing_bytes=len(target) - done)
            done += count

    def write(self, offset: int, source: bytes | memoryview) -> None:
        """Copy ``source`` to ``offset``."""
        if self._view is not None:
            self._view[offset : offset + len(source)] = source
            return
        view = memoryview(source)
        done = 0
        while done < len(view):
            try:
                done += os.pwrite(self.fd, view[done:], offset + done)
            except OSError as error:
                raise _unusable("reply", error) from error
        if os.fstat(self.fd).st_size != self.size_bytes:
            raise MalformedFrame("the reply arena was resized by the function", size_bytes=self.size_bytes)

    @property
    def memory(self) -> memoryview | None:
        """The writable bytes themselves, to save a copy; None where the arena is not mapped."""
        return self._view

    def passed(self) -> None:
        """Close the descriptor, now that the client has its own, where the mapping does without it."""
        if self._memory is not None:
            os.close(self.fd)
            self.fd = -1

    def close(self) -> None:
        """Release memory and descriptor; closing twice is safe. No view of the arena may be in use."""
        if self._view is not None:
            self._view.release()
            self._view = None
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class ClientArena:
    """One arena as the client sees it: a mapping, writable for requests and read-only for replies."""

    def __init__(self, fd: int, size_bytes: int, *, writable: bool) -> None:
        """Map ``size_bytes`` of ``fd``, then close ``fd``. Raises MalformedFrame when it is shorter than announced."""
        try:
            if os.fstat(fd).st_size < size_bytes:
                raise MalformedFrame(f"an arena is smaller than the {size_bytes} bytes announced")
            access = mmap.PROT_READ | mmap.PROT_WRITE if writable else mmap.PROT_READ
            # Populated at once: the first request should not pay for page faults.
            self.memory = mmap.mmap(fd, size_bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE, access)
        finally:
            os.close(fd)
        self.size_bytes = size_bytes


def _unusable(kind: str, error: OSError) -> MalformedFrame:
    # A function may shrink its own arena and fill the node's shared memory up meanwhile: its page cannot come back.
    return MalformedFrame(f"the {kind} arena cannot be used any more ({os.strerror(error.errno or 0)})")


def choose_transport() -> str:
    """Return ``sealed`` where this kernel can seal shared memory, else ``copy``. Tried, not guessed.

    What was chosen stays: where sealing fails later, arenas are refused, not left unsealed.
    """
    try:
        ServerArena(mmap.PAGESIZE, SEALED, reply=True).close()
    except SidecarFault:
        return COPY
    except ArenaFull as error:
        cause = error.__cause__
        return SEALED if isinstance(cause, OSError) and cause.errno in _SHORTAGES else COPY
    return SEALED


def sealable_memory(name: str) -> int:
    """Return the descriptor of new shared memory without bytes or a path; ``name`` shows in /proc. Raises OSError."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create(name, flags | _MFD_NOEXEC_SEAL)
    except OSError:
        # Kernels before 6.3 do not know the flag.
        return os.memfd_create(name, flags)


def _unlinked_memory() -> int:
    segment = posix_ipc.SharedMemory(None, posix_ipc.O_CREX, size=0, mode=0o600)
    segment.unlink()
    return int(segment.fd)


def _seal(fd: int, seals: int) -> None:
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    found = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _RELEVANT_SEALS
    if found != seals:
        # A sandboxed kernel may accept the call and do nothing.
        raise SidecarFault("the kernel did not seal shared memory", expected=seals, found=found)
