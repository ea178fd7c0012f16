"""A sidecar for which some inputs are poison: a device that some numbers do something to (``tests.fault.launching``).

Nothing of this is in the product: what kills a real engine is a fault of a kernel or a driver, which no test can order.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from trunkline.errors import DeviceFault

from sidecar.devices import TorchDevice

# An input with this number somewhere makes a kernel fail; the next keeps the engine busy, for longer than any test lasts; after
# the third the device is of no use any more, as a GPU after a failed assertion; the last keeps it busy for so long.
KILLS: Final = -666.0
HANGS: Final = -777.0
LOSES: Final = -888.0
IS_SLOW: Final = -555.0
SLOW_S: Final = 0.05


def poisoned(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return what runs a program, or several as one, and looks at the inputs first."""

    def looks_first(device: TorchDevice, program: Any, weights: Any, inputs: Sequence[Any]) -> Any:
        tensors = [tensor for each in inputs for tensor in (each if isinstance(each, list) else [each])]
        for tensor in tensors:
            if torch.any(tensor == KILLS):
                # To this thread: it must not get any further.
                signal.raise_signal(signal.SIGSEGV)
            if torch.any(tensor == HANGS):
                time.sleep(3600)
            if torch.any(tensor == LOSES):
                # Whatever is asked next fails, too.
                device.is_lost = lambda: True  # type: ignore[method-assign]
            if device.is_lost():
                raise DeviceFault("device-side assert triggered")
            if torch.any(tensor == IS_SLOW):
                time.sleep(SLOW_S)
        return run(device, program, weights, inputs)

    return looks_first


def sidecar() -> None:
    """Have a device look at its inputs first."""
    TorchDevice.run = poisoned(TorchDevice.run)  # type: ignore[method-assign]
    TorchDevice.run_stacked = poisoned(TorchDevice.run_stacked)  # type: ignore[method-assign]
