"""Names of versions: a model that was pushed with a version is stored and deployed as ``NAME:LABEL``, beside all others.

To graph, residency, scheduler and placement it is a model like any other; only here, and where a name is resolved
(``sidecar.routing``), is it known to be a version. Pure.
"""

from __future__ import annotations

import re
from typing import Final

from trunkline.protocol import MAX_NAME

from sidecar.bundle import MODEL_NAME

# Between the name of a model and the label of a version; neither has it, nor has what stands behind them (``@``, ``+``, ``/``).
_OF: Final = ":"
LABEL: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,30}[A-Za-z0-9])?")
LABEL_RULE: Final = "up to 32 of the characters A-Z, a-z, 0-9, '.', '_' and '-', and starts and ends with a letter or digit"
# What a model is stored as: its name, or that of a version.
STORED_NAME: Final = re.compile(f"{MODEL_NAME.pattern}({_OF}{LABEL.pattern})?")
LONGEST_NAME: Final = MAX_NAME


def labelled(name: str, label: str) -> str:
    """Return what a version of a model is called; an empty label stands for what was pushed without a version."""
    return f"{name}{_OF}{label}" if label else name


def parted(name: str) -> tuple[str, str]:
    """Return the name of a model and the label of a version of it, which is empty where ``name`` has none.

    By this, names are sorted: a model stands where it would stand without its label.
    """
    model, _, label = name.partition(_OF)
    return (model, label) if LABEL.fullmatch(label) else (name, "")
