"""How long a run is expected to take, by what was measured, and before that by what its model was tried with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from trunkline.protocol import TensorSpec

from sidecar.catalog import Deployed
from sidecar.costs import BatchCosts
from sidecar.trials import Verdict
from tests.fakes import bundle_of


def test_what_was_measured_is_expected() -> None:
    costs = BatchCosts()
    assert costs.expected_s("stage", 1, 1) == 0.0
    costs.record("stage", 1, 9.0)
    assert costs.expected_s("stage", 1, 1) == 0.0, "the first run counts for nothing"
    costs.record("stage", 1, 0.5)
    assert costs.expected_s("stage", 1, 1) == 0.5
    assert costs.expected_s("other", 1, 1) == 0.0
    assert costs.expected_s("stage", 1, 2) == 0.0, "of two lanes each has another part of the device"


def test_a_larger_batch_is_expected_to_take_as_much_for_each_row() -> None:
    costs = BatchCosts()
    for _ in range(2):
        costs.record("stage", 2, 1.0)
        costs.record("stage", 8, 2.0)
    assert costs.expected_s("stage", 2, 1) == 1.0
    assert costs.expected_s("stage", 4, 1) == 2.0
    assert costs.expected_s("stage", 16, 1) == 4.0
    assert costs.expected_s("stage", 1, 1) == 0.0, "nothing is known of what takes less"


def deployed(axes: tuple[int | str, ...], run_s: tuple[float, ...]) -> Deployed:
    bundle = bundle_of("m", [b"w"], inputs=(TensorSpec("x", "float32", axes),), outputs=(TensorSpec("y", "float32", axes),))
    staged: Any = SimpleNamespace(inputs=("key",))
    signature: Any = None
    return Deployed(bundle, "plan", signature, staged, (), {}, verdict=Verdict(None, run_s=run_s))


@pytest.mark.parametrize(
    ("axes", "shape", "rows", "expected_s"),
    [
        (("batch", 3), (1, 3), 1, 0.25),
        (("batch", 3), (4, 3), 4, 1.0),
        # Tried with 32 places perhaps; what there is to compute grows with the square at most.
        (("batch", "length"), (1, 32), 1, 0.25),
        (("batch", "length"), (1, 2), 1, 0.25),
        (("batch", "length"), (2, 64), 2, 2.0),
        (("batch", "width", "height"), (1, 64, 64), 1, 4.0),
        (("batch", "length", "length"), (1, 64, 64), 1, 1.0),
    ],
)
def test_before_that_it_is_reckoned_from_a_trial(
    axes: tuple[int | str, ...], shape: tuple[int, ...], rows: int, expected_s: float
) -> None:
    found = deployed(axes, (9.0, 0.25)).reckoned_s(1, {"key": np.zeros(shape, np.float32)}, rows)
    assert found == expected_s


def test_what_was_not_tried_nobody_knows_and_less_than_can_be_measured_is_not_unknown() -> None:
    x = {"key": np.zeros((1, 3), np.float32)}
    assert deployed(("batch", 3), ()).reckoned_s(0, x, 1) == 0.0
    assert deployed(("batch", 3), (0.0,)).reckoned_s(0, x, 1) > 0.0
