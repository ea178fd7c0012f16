"""Comparator H: the same model in another process, its tensors sent through a Unix stream socket."""

from __future__ import annotations

import os
import socket
import sys

import numpy as np
import torch

from benchmarks.models import SIDE, build

REQUEST_BYTES = 3 * SIDE * SIDE * 4


def receive(sock: socket.socket, buffer: memoryview) -> bool:
    """Fill ``buffer``; False at the end of the connection."""
    done = 0
    while done < len(buffer):
        count = sock.recv_into(buffer[done:])
        if not count:
            return False
        done += count
    return True


def main(path: str, name: str, seed: int, threads: int) -> None:
    torch.set_num_threads(threads)
    model = build(name, seed)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(1)
    sock, _ = listener.accept()
    buffer = bytearray(REQUEST_BYTES)
    with torch.inference_mode():
        while receive(sock, memoryview(buffer)):
            image = torch.frombuffer(buffer, dtype=torch.float32).view(1, 3, SIDE, SIDE)
            sock.sendall(np.ascontiguousarray(model(image).numpy()).tobytes())
    os.unlink(path)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
