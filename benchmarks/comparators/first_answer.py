"""A process of torch that loads one task of `benchmarks.swap`, answers one request of its own, says ``ready``, and waits.

Arguments: task, ``full`` or ``quick``, file of its state dict, threads of torch. It ends with its standard input.
"""

from __future__ import annotations

import sys

import torch

from benchmarks.swap_tasks import FULL, QUICK


def main() -> None:
    name, scale, weights, threads = sys.argv[1:5]
    torch.set_num_threads(int(threads))
    task = (FULL if scale == "full" else QUICK)[name]
    with torch.device("meta"):
        model = task.build().eval()
    model.load_state_dict(torch.load(weights, weights_only=True), assign=True)
    with torch.inference_mode():
        model(task.example)
    print("ready", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
