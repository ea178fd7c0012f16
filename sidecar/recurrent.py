"""Shape checks for recurrent layers, which torch itself leaves out.

``torch.lstm`` hands its weights to a library that believes the sizes it computes from the settings: a weight that is
smaller than that is read past its end, found by fuzzing (a crash within seconds, torch 2.13). So no recurrent operator
is called before every tensor was looked at. Works on tensors without importing torch; no state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

# Rows of a weight per unit of the hidden state.
_GATES = {"aten.lstm.input": 4, "aten.gru.input": 3, "aten.rnn_tanh.input": 1, "aten.rnn_relu.input": 1}


def checked(operator: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function``, the recurrent ``operator``, behind a check. What it returns raises ValueError.

    ``operators.check_node`` has made sure that the number of weights fits the settings.
    """
    gates = _GATES[operator]

    def call(
        source: Any,
        state: Any,
        weights: Sequence[Any],
        biases: bool,
        layers: int,
        dropout: float,
        train: bool,
        both_ways: bool,
        batch_first: bool,
    ) -> Any:
        states = state if operator == "aten.lstm.input" else (state,)
        _check(source, states, weights, biases, layers, 2 if both_ways else 1, batch_first, gates)
        return function(source, state, weights, biases, layers, dropout, train, both_ways, batch_first)

    return call


def _check(
    source: Any,
    states: Sequence[Any],
    weights: Sequence[Any],
    biases: bool,
    layers: int,
    directions: int,
    batch_first: bool,
    gates: int,
) -> None:
    if source.dim() != 3 or not source.is_floating_point() or not source.numel():
        raise ValueError("the input of a recurrent layer is [time, batch, features] in floats and not empty")
    batch = source.shape[0 if batch_first else 1]
    hidden = states[0].shape[-1] if states[0].dim() else 0
    wanted: list[tuple[int, ...]] = [(layers * directions, batch, hidden)] * len(states)
    for layer in range(layers):
        width = source.shape[2] if layer == 0 else hidden * directions
        wanted += [(gates * hidden, width), (gates * hidden, hidden), *[(gates * hidden,)] * (2 * biases)] * directions
    for tensor, shape in zip((*states, *weights), wanted, strict=True):
        if tuple(tensor.shape) != shape or tensor.dtype != source.dtype or not hidden:
            raise ValueError(f"a recurrent layer needs {source.dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
