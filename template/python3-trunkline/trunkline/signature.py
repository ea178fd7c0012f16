"""What a model takes and gives: names, dtypes, shapes, bounds. Pure; the same check runs in function and sidecar."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trunkline.errors import MalformedFrame, SignatureMismatch
from trunkline.protocol import ITEM_BYTES, TensorSpec

# An output axis of a size that is known only once the model has run.
UNKNOWN_AXIS = "?"


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of a model. ``symbols`` maps each symbolic axis to its smallest and largest size.

    ``id`` changes with every version that is pushed. A request names it, so that a function that still goes by the version
    before is told, instead of being answered by a model it does not know.
    """

    model: str
    version: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    symbols: Mapping[str, tuple[int, int]]
    id: str = ""

    def check_current(self, named: str, called: str) -> None:
        """Raise SignatureMismatch unless a caller that goes by the signature ``named`` goes by this one; empty: by any.

        ``called`` is what the caller calls the model.
        """
        if named not in ("", self.id):
            raise SignatureMismatch(
                f"{called} is version {self.version} now; ask for its signature again",
                version=self.version,
            )

    def bind(self, tensors: Iterable[tuple[str, str, Sequence[int]]]) -> dict[str, int]:
        """Check (name, dtype, shape) of every input; return the size of each symbolic axis.

        Raises SignatureMismatch, naming the input, what the model takes and what it got.
        """
        given: dict[str, tuple[str, Sequence[int]]] = {}
        for name, dtype, shape in tensors:
            if name in given:
                raise SignatureMismatch(f"{self.model} takes {self._names()}; {name!r} comes twice")
            given[name] = dtype, shape
        sizes: dict[str, int] = {}
        for spec in self.inputs:
            if spec.name not in given:
                raise SignatureMismatch(f"{self.model} takes {self._names()}; {spec.name!r} is missing")
            dtype, shape = given.pop(spec.name)
            if dtype != spec.dtype:
                raise SignatureMismatch(
                    f"{self.model} takes {spec.name} as {spec.dtype}, got {dtype}", expected=spec.dtype, got=dtype
                )
            self._bind_shape(spec, shape, sizes)
        if given:
            raise SignatureMismatch(f"{self.model} takes {self._names()}; it has no input {next(iter(given))!r}")
        return sizes

    def _bind_shape(self, spec: TensorSpec, shape: Sequence[int], sizes: dict[str, int]) -> None:
        if len(shape) != len(spec.shape):
            raise SignatureMismatch(
                f"{self.model} takes {spec.name} of shape {show_shape(spec.shape)}, got {show_shape(shape)}",
                expected=show_shape(spec.shape),
                got=show_shape(shape),
            )
        for axis, (wanted, got) in enumerate(zip(spec.shape, shape, strict=True)):
            if isinstance(wanted, int):
                if wanted != got:
                    raise SignatureMismatch(
                        f"{self.model} takes {spec.name} of shape {show_shape(spec.shape)}, got {show_shape(shape)}: "
                        f"axis {axis} must be {wanted}",
                        expected=show_shape(spec.shape),
                        got=show_shape(shape),
                    )
                continue
            minimum, maximum = self.symbols[wanted]
            if not minimum <= got <= maximum:
                raise SignatureMismatch(
                    f"{self.model} takes {spec.name} with {wanted} (axis {axis}) from {minimum} to {maximum}, got {got}",
                    minimum=minimum,
                    maximum=maximum,
                    got=got,
                )
            if sizes.setdefault(wanted, got) != got:
                raise SignatureMismatch(
                    f"{self.model} takes inputs of one {wanted}; {spec.name} has {got}, another input {sizes[wanted]}",
                    expected=sizes[wanted],
                    got=got,
                )

    def _names(self) -> str:
        return ", ".join(spec.name for spec in self.inputs)

    def resolve(self, spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape of ``spec`` for given symbol sizes; symbols that are not given take their smallest size."""
        return tuple(axis if isinstance(axis, int) else sizes.get(axis, self.symbols.get(axis, (1, 1))[0]) for axis in spec.shape)

    def reply_bytes(self, sizes: Mapping[str, int], alignment: int) -> int:
        """Return an estimate of the bytes the outputs take; exact unless an output has an unknown axis."""
        return sum(math.prod(self.resolve(spec, sizes)) * ITEM_BYTES[spec.dtype] + alignment for spec in self.outputs)

    def to_plain(self) -> dict[str, object]:
        """Return the signature as plain values, for JSON."""
        return {
            "model": self.model,
            "version": self.version,
            "inputs": [asdict(spec) for spec in self.inputs],
            "outputs": [asdict(spec) for spec in self.outputs],
            "symbols": {name: list(bounds) for name, bounds in self.symbols.items()},
            "id": self.id,
        }

    @classmethod
    def from_plain(cls, plain: Any) -> Signature:
        """Rebuild what ``to_plain`` gave. Raises MalformedFrame when it is something else."""
        try:
            return cls(
                model=str(plain["model"]),
                version=str(plain["version"]),
                inputs=tuple(_spec(entry) for entry in plain["inputs"]),
                outputs=tuple(_spec(entry) for entry in plain["outputs"]),
                symbols={str(name): (int(low), int(high)) for name, (low, high) in plain["symbols"].items()},
                id=str(plain["id"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise MalformedFrame("the sidecar described a model in a way this client does not understand") from error


def _spec(plain: Any) -> TensorSpec:
    if plain["dtype"] not in ITEM_BYTES:
        raise ValueError("unknown dtype")
    return TensorSpec(
        name=str(plain["name"]),
        dtype=plain["dtype"],
        shape=tuple(axis if isinstance(axis, int) else str(axis) for axis in plain["shape"]),
        minimum=plain["minimum"],
        maximum=plain["maximum"],
    )


def show_shape(shape: Sequence[int | str]) -> str:
    """Return a shape as people write it: [batch, 3, 224, 224]."""
    return "[" + ", ".join(str(axis) for axis in shape) + "]"
