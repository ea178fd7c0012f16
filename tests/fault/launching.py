"""Starts a program of the project changed: `python -m tests.fault.launching MODULE:FUNCTION PROGRAM ARGUMENTS…`.

The function changes what it likes before the program's main begins. So a product is broken on purpose (``mutants``), or put into
circumstances that a test machine does not have (``circumstances``), without a switch in the product.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from collections.abc import Callable
from typing import Any

Change = Callable[[], None]


def through(change: Change) -> tuple[str, str]:
    """Return what stands between `python -m` and the program, for it to be changed."""
    return __name__, f"{change.__module__}:{change.__name__}"


def main() -> None:
    """Change, then run."""
    module, _, name = sys.argv[1].partition(":")
    change: Any = getattr(importlib.import_module(module), name)
    change()
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
