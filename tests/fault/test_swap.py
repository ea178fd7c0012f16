"""An engine whose device copies is killed: nothing is on the device any more, and all below it is where it was."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from tests.copying import CopyingDevice, CopyingNode
from tests.integration.test_swap_memory import bring, check_all, keys, weights_of

pytestmark = pytest.mark.usefixtures("nothing_leaks")


def test_a_killed_engine_finds_below_what_the_device_had(tmp_path: Path) -> None:
    node = CopyingNode(tmp_path, 16 * 4096, 8 * 4096, lambda: CopyingDevice(late=False))
    try:
        wanted = weights_of(node, 4096, 1000, 3 * 4096, 4096)
        pid = os.fork()
        if not pid:
            try:
                # Threads of torch's do not come with a fork.
                torch.set_num_threads(1)
                memory = node.memory()
                bring(memory, wanted[:3])
                # This one is on its way.
                memory.read(memory.begin(wanted[3:]))
                os.kill(os.getpid(), signal.SIGKILL)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        memory = node.memory()
        assert memory.facts()["weight_bytes"] == 0
        assert memory.facts()["host_weight_bytes"] == 5 * 4096
        last = node.source.blobs.copy()
        for key in keys(wanted[:3]):
            del node.source.blobs[key]
        handles = bring(memory, wanted)
        node.source.blobs = last
        check_all(node, wanted, handles)
        assert memory.facts()["host_kept_bytes"] == 4096 + 1000 + 3 * 4096
        assert memory.facts()["store_bytes"] == 4096
        memory.check_invariants()
    finally:
        node.close()
