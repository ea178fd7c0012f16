"""A process that holds one model and nothing else: what K unrelated models take in K processes of torch.

Arguments: width and units per stage of the ResNet, side of its picture, threads of torch, device. It answers one request of its
own, says ``ready``, and ends with its standard input.
"""

from __future__ import annotations

import sys

import torch

from benchmarks.models import resnet


def main() -> None:
    width, units, side, threads = map(int, sys.argv[1:5])
    torch.set_num_threads(threads)
    model = resnet(width, units).eval().to(sys.argv[5])
    with torch.inference_mode():
        model(torch.zeros(1, 3, side, side, device=sys.argv[5])).cpu()
    print("ready", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
