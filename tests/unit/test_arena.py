"""Shared memory: sealed where the kernel can, copied where it cannot, and harmless when a function attacks it."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import resource

import pytest
from trunkline import arena
from trunkline.arena import ClientArena, ServerArena, choose_transport, page_aligned
from trunkline.errors import ArenaFull, MalformedFrame, SidecarFault
from trunkline.protocol import COPY, SEALED

PAGE = mmap.PAGESIZE


@pytest.fixture(params=[SEALED, COPY])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_sizes_are_whole_pages() -> None:
    assert [page_aligned(size) for size in (0, 1, PAGE, PAGE + 1)] == [PAGE, PAGE, PAGE, 2 * PAGE]


def test_a_request_travels(transport: str) -> None:
    server = ServerArena(2 * PAGE, transport, reply=False)
    client = ClientArena(os.dup(server.fd), 2 * PAGE, writable=True)
    client.memory[100:3433] = b"x" * 3333
    private = bytearray(3333)
    server.read(100, memoryview(private))
    assert private == b"x" * 3333
    server.close()
    server.close()


def test_a_reply_travels(transport: str) -> None:
    server = ServerArena(PAGE, transport, reply=True)
    client = ClientArena(os.dup(server.fd), PAGE, writable=False)
    server.write(7, b"answer")
    assert client.memory[7:13] == b"answer"
    server.close()


def test_the_size_of_a_sealed_arena_cannot_change() -> None:
    server = ServerArena(PAGE, SEALED, reply=False)
    for size in (0, 2 * PAGE):
        with pytest.raises(PermissionError):
            os.ftruncate(server.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(server.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    server.close()


def test_a_function_cannot_write_its_replies() -> None:
    server = ServerArena(PAGE, SEALED, reply=True)
    with pytest.raises(PermissionError):
        mmap.mmap(server.fd, PAGE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(PermissionError):
        os.pwrite(server.fd, b"x", 0)
    server.write(0, b"still writable here")
    server.close()


def test_shrinking_an_unsealed_request_is_an_error_not_a_signal() -> None:
    server = ServerArena(2 * PAGE, COPY, reply=False)
    os.ftruncate(server.fd, PAGE)
    with pytest.raises(MalformedFrame, match="shrunk"):
        server.read(0, memoryview(bytearray(2 * PAGE)))
    server.close()


def test_shrinking_an_unsealed_reply_is_noticed() -> None:
    server = ServerArena(2 * PAGE, COPY, reply=True)
    os.ftruncate(server.fd, 0)
    with pytest.raises(MalformedFrame, match="resized"):
        server.write(0, b"x")
    server.close()


def test_an_unsealed_arena_leaves_no_name(transport: str) -> None:
    server = ServerArena(PAGE, transport, reply=False)
    assert os.readlink(f"/proc/self/fd/{server.fd}").endswith(" (deleted)")
    server.close()


def test_the_descriptor_of_a_mapped_arena_can_go_once_it_was_passed() -> None:
    server = ServerArena(PAGE, SEALED, reply=True)
    server.passed()
    server.write(0, b"x")
    server.close()
    copied = ServerArena(PAGE, COPY, reply=True)
    copied.passed()
    copied.write(0, b"x")
    copied.close()


def test_pages_are_there_from_the_start(transport: str) -> None:
    server = ServerArena(16 * PAGE, transport, reply=False)
    assert os.fstat(server.fd).st_blocks * 512 >= 16 * PAGE
    server.close()


def test_memory_the_node_does_not_have_is_refused(transport: str) -> None:
    fds = len(os.listdir("/proc/self/fd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * PAGE, hard))
    try:
        with pytest.raises(ArenaFull, match="shared memory"):
            ServerArena(8 * PAGE, transport, reply=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(os.listdir("/proc/self/fd")) == fds


def test_a_kernel_that_ignores_seals_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena.fcntl, "fcntl", lambda fd, command, argument=0: 0)
    with pytest.raises(SidecarFault, match="did not seal"):
        ServerArena(PAGE, SEALED, reply=False)
    assert choose_transport() == COPY


def test_a_kernel_without_memfd_gets_the_copying_transport(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, flags: int) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(arena.os, "memfd_create", refuse)
    assert choose_transport() == COPY


def test_a_kernel_before_noexec_seals_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.memfd_create

    def older(name: str, flags: int) -> int:
        if flags & 0x8:
            raise OSError(22, "Invalid argument")
        return original(name, flags)

    monkeypatch.setattr(arena.os, "memfd_create", older)
    assert choose_transport() == SEALED


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EMFILE])
def test_a_node_that_is_short_of_memory_does_not_go_without_seals(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(name: str, flags: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(arena.os, "memfd_create", refuse)
    assert choose_transport() == SEALED
    with pytest.raises(ArenaFull, match=os.strerror(number)):
        ServerArena(PAGE, SEALED, reply=False)


def test_this_kernel_seals() -> None:
    assert choose_transport() == SEALED


def test_an_arena_shorter_than_announced_is_refused() -> None:
    fd = os.memfd_create("short")
    os.ftruncate(fd, PAGE)
    with pytest.raises(MalformedFrame, match="smaller"):
        ClientArena(fd, 2 * PAGE, writable=True)
    with pytest.raises(OSError):
        os.fstat(fd)
