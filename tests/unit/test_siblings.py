"""Siblings of the benchmarks: what was not converted again is what a conversion would have made."""

from __future__ import annotations

import torch

from benchmarks.models import perceptron
from benchmarks.siblings import Family
from sidecar.bundle import read_bundle
from sidecar.export import convert


def test_a_sibling_that_was_not_converted_is_as_if_it_had_been(tmp_path):
    example = torch.zeros(1, 256)
    family = Family(perceptron(32, 16), example, seed=1)
    model = family.with_head(2)
    family.write(tmp_path, "sibling", model)
    written = read_bundle(tmp_path).graph
    converted = convert(model, (example,), name="sibling", max_batch=16).bundle.graph
    assert written == converted
    shared = {weight.digest for weight in written.weights} & {weight.digest for weight in family.graph.weights}
    assert len(shared) == 4, "weights and biases of the trunk, and no more"
