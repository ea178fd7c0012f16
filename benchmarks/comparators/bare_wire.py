"""The floor of our own wire: the same socket, the same arenas and the one private copy, with nothing around them.

No sessions, no queue, no checks, one thread, one model, its header a constant. What a call through the sidecar takes
longer than this is what the sidecar's Python costs.
"""

from __future__ import annotations

import mmap
import os
import socket
import sys

import torch

from benchmarks.comparators.stream_server import REQUEST_BYTES
from benchmarks.models import SIDE, build

HEADER_BYTES = 64


class BareClient:
    """The function's end. ``call`` asks for a forward of what lies in ``request``; the scores lie in ``reply``."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.connect(path)
        _, fds, _, _ = socket.recv_fds(self.socket, HEADER_BYTES, 2)
        self.request, self.reply = (mmap.mmap(fd, 0) for fd in fds)
        for fd in fds:
            os.close(fd)

    def call(self) -> None:
        self.socket.send(bytes(HEADER_BYTES))
        self.socket.recv(HEADER_BYTES)


def main(path: str, name: str, seed: int, threads: int) -> None:
    torch.set_num_threads(threads)
    model = build(name, seed)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen(1)
    sock, _ = listener.accept()
    arenas = []
    fds = [os.memfd_create(kind) for kind in ("request", "reply")]
    for fd, size_bytes in zip(fds, (REQUEST_BYTES, mmap.PAGESIZE), strict=True):
        os.posix_fallocate(fd, 0, size_bytes)
        arenas.append(memoryview(mmap.mmap(fd, size_bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE)))
    socket.send_fds(sock, [bytes(HEADER_BYTES)], fds)
    request, reply = arenas
    private = memoryview(bytearray(REQUEST_BYTES))
    image = torch.frombuffer(private, dtype=torch.float32).view(1, 3, SIDE, SIDE)
    with torch.inference_mode():
        while header := sock.recv(HEADER_BYTES):
            private[:] = request
            scores = model(image)
            torch.frombuffer(reply, dtype=torch.float32)[: scores.numel()].copy_(scores.view(-1))
            sock.send(header)
    os.unlink(path)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
