"""The fused graph: every deployed model, and which weights they have in common. Pure bookkeeping, no I/O, no torch.

In this form models share weights, found by the digest of their bytes and never declared: two models that were
converted independently and hold one equal tensor name it by the same digest. Owned by the engine thread.
"""

from __future__ import annotations

from collections.abc import Iterator

from trunkline.errors import UnknownModel

from sidecar.bundle import Bundle, Weight


class FusedGraph:
    """Bundles by model name, and the models that use each weight.

    Adding a model never changes what another one consists of; removing it forgets exactly the weights nobody else uses.
    """

    def __init__(self) -> None:
        self._bundles: dict[str, Bundle] = {}
        self._weights: dict[str, Weight] = {}
        self._users: dict[str, set[str]] = {}

    def add(self, bundle: Bundle) -> None:
        """Add a model, or replace the one of its name."""
        if bundle.name in self._bundles:
            self.remove(bundle.name)
        self._bundles[bundle.name] = bundle
        for weight in bundle.graph.weights:
            self._weights[weight.digest] = weight
            self._users.setdefault(weight.digest, set()).add(bundle.name)

    def remove(self, name: str) -> None:
        """Remove a model. Raises UnknownModel."""
        bundle = self.bundle(name)
        del self._bundles[name]
        for digest in {weight.digest for weight in bundle.graph.weights}:
            self._users[digest].discard(name)
            if not self._users[digest]:
                del self._users[digest]
                del self._weights[digest]

    def bundle(self, name: str) -> Bundle:
        """Return the bundle of a model. Raises UnknownModel, listing what there is."""
        if name not in self._bundles:
            known = ", ".join(sorted(self._bundles)[:8]) or "none"
            raise UnknownModel(
                f"the sidecar holds no model {name[:64]!r}; it holds {known}; `trunkline push` adds one",
                model=name[:64],
            )
        return self._bundles[name]

    def __contains__(self, name: str) -> bool:
        return name in self._bundles

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._bundles))

    def weights(self, name: str) -> dict[str, Weight]:
        """Return the weights of a model by digest, each once. Raises UnknownModel."""
        return {weight.digest: weight for weight in self.bundle(name).graph.weights}

    def all_weights(self) -> dict[str, Weight]:
        """Return every weight of the graph by digest."""
        return dict(self._weights)

    def users(self, digest: str) -> list[str]:
        """Return the names of the models that use a weight."""
        return sorted(self._users.get(digest, ()))

    def sharers(self, name: str) -> list[str]:
        """Return the other models that have at least one weight in common with ``name``."""
        return sorted({user for digest in self.weights(name) for user in self._users[digest]} - {name})

    def bytes_of(self, name: str) -> tuple[int, int]:
        """Return the bytes of a model's weights, and how many of them some other model uses too."""
        weights = self.weights(name).values()
        shared_bytes = sum(weight.size_bytes for weight in weights if len(self._users[weight.digest]) > 1)
        return sum(weight.size_bytes for weight in weights), shared_bytes

    def check_invariants(self) -> None:
        """Raise AssertionError when users and bundles disagree."""
        expected: dict[str, set[str]] = {}
        for name, bundle in self._bundles.items():
            for weight in bundle.graph.weights:
                expected.setdefault(weight.digest, set()).add(name)
        assert expected == self._users, "the users of weights disagree with the bundles"
        assert expected.keys() == self._weights.keys(), "the weights disagree with the bundles"
