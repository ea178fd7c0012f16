"""The operators that torch has, whatever a bundle may use of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sidecar import operators


def registered_off_the_list() -> Iterator[str]:
    """Give the name of every operator that is registered and that no bundle may use, as a bundle would name it."""
    for name in torch._C._dispatch_get_all_op_names():
        library, _, rest = name.partition("::")
        base, _, overload = rest.partition(".")
        op = f"{library}.{base}.{overload or 'default'}"
        if op not in operators.ALLOWED:
            yield op
