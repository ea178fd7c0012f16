"""Versions of models in the store: pushed beside each other, released, removed. What the admin endpoint does; never the engine.

A version never changes: its label stands for one graph until it is removed, and it is not removed while it is released. What was
pushed under a name without a version may be replaced as ever; as long as it is part of a split, by what callers cannot tell from
it. All of this holds because whoever changes something holds the lock of versions meanwhile. Each change is one file that is
replaced or removed, so that whoever is killed leaves what was before or what is after. Must not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from trunkline.errors import InvalidInput, ModelCorrupt, SignatureMismatch, UnknownModel

from sidecar.bundle import Bundle, graph_digest, parse_bundle
from sidecar.labels import labelled, parted
from sidecar.releases import Release, as_asked, checked_label, difference
from sidecar.store import Store

# What the Open Inference Protocol has at the place of a model's name: /v2/models/stats.
_TAKEN: Final = "stats"

Vet = Callable[[bytes, bytes], None]


class Versions:
    """Any thread, and several processes at a time."""

    def __init__(self, store: Store, vet: Vet = lambda manifest, graph: None) -> None:
        """``vet`` looks at the files of a bundle before anybody else does. Raises BundleError."""
        self._store = store
        self._vet = vet

    def labels(self, name: str) -> dict[str, str]:
        """Return the versions of a model: what each is stored as, by its label.

        What was pushed without a version is called as its manifest says; empty where that cannot be read.
        """
        stored = [each for each in self._store.models() if parted(each)[0] == name]
        return {parted(each)[1] or self._plain_label(name): each for each in sorted(stored, key=parted)}

    def _plain_label(self, name: str) -> str:
        try:
            return self._store.model(name).version
        except (ModelCorrupt, UnknownModel):
            return ""

    def release(self, name: str) -> Release | None:
        """Return the release of a model, with labels as ``labels`` has them; None where nothing answers for the name alone.

        Raises ModelCorrupt.
        """
        found = self._store.release(name)
        labels = self.labels(name)
        if found is None and name not in labels.values():
            return None
        return (found or Release({"": 1})).relabelled({"": next((k for k, v in labels.items() if v == name), "")})

    def put(self, manifest_data: bytes, graph_data: bytes, label: str | None = None) -> Bundle:
        """Publish a model, with a ``label`` as a version beside others; an empty one is what its manifest says.

        Raises BundleError, BlobMissing, SignatureMismatch, InvalidInput.
        """
        self._vet(manifest_data, graph_data)
        bundle = parse_bundle(manifest_data, graph_data)
        if bundle.name == _TAKEN:
            raise InvalidInput(
                f"{_TAKEN} cannot be the name of a model, since /v2/models/{_TAKEN} tells the counts of all; pack it as another"
            )
        with self._store.versions_locked():
            if label is None:
                self._check_plain(bundle)
                return self._store.put_model(manifest_data, graph_data)
            label = checked_label(label or bundle.version, "version")
            self._check_new(bundle, label)
            return self._store.put_model(manifest_data, graph_data, label)

    def _check_plain(self, bundle: Bundle) -> None:
        labels = self.labels(bundle.name)
        if not labels:
            return
        if bundle.name not in labels.values():
            raise InvalidInput(
                f"{bundle.name} has versions, {', '.join(labels)[:200]}; push this one as a version, too: `trunkline push "
                "--version LABEL`, with `--default` to have it answer"
            )
        if labels.get(bundle.version, bundle.name) != bundle.name:
            raise InvalidInput(f"{bundle.name} has a version {bundle.version} already, which is what this bundle says it is")
        release = self._store.release(bundle.name)
        if release is not None and release.is_split and "" in release.weights:
            others = [self._store.model(labelled(bundle.name, label)) for label in release.weights if label]
            _check_alike([bundle, *others])

    def _check_new(self, bundle: Bundle, label: str) -> None:
        stored = self.labels(bundle.name).get(label)
        if stored == bundle.name:
            raise InvalidInput(f"what was pushed as {bundle.name} says it is version {label}; give this one another")
        if stored is None:
            return
        try:
            known = self._store.model(stored)
        except ModelCorrupt:
            # That is how it is healed.
            return
        if known.graph_digest != graph_digest(bundle.graph) or known.batch != bundle.batch:
            raise InvalidInput(
                f"{bundle.name} has a version {label} that is something else, and versions do not change; give this one another"
            )

    def is_unanswered(self, name: str) -> bool:
        """Say whether nothing answers for a name, although versions of it may be there. Raises ModelCorrupt."""
        return self.release(name) is None

    def checked(self, name: str, asked: Mapping[str, Any]) -> list[str]:
        """Return what the versions of a release are stored as that an operator asks for.

        Raises InvalidInput, UnknownModel, ModelCorrupt, and SignatureMismatch where callers could tell those of a split apart.
        """
        release, labels = as_asked(asked), self.labels(name)
        for label in release.weights:
            if label not in labels:
                raise UnknownModel(f"{name} has no version {label}; it has {', '.join(labels)[:200] or 'none'}", model=name)
        bundles = [self._store.model(labels[label]) for label in release.weights]
        _check_alike(bundles)
        return [bundle.name for bundle in bundles]

    def put_release(self, name: str, asked: Mapping[str, Any]) -> None:
        """Have the versions answer for a name that an operator asks for. Raises as ``checked`` does."""
        with self._store.versions_locked():
            # Again, since what it names may be gone.
            stored = self.checked(name, asked)
            plain = {self._plain_label(name): ""} if name in stored else {}
            self._store.put_release(name, as_asked(asked).relabelled(plain))

    def stored_as(self, name: str, label: str) -> str:
        """Return what a version is stored as that may be removed. Raises UnknownModel; InvalidInput for one that is released."""
        labels = self.labels(name)
        if label not in labels:
            raise UnknownModel(f"{name} has no version {label[:64]}; it has {', '.join(labels)[:200] or 'none'}", model=name)
        release = self.release(name)
        if release is not None and label in release.weights:
            raise InvalidInput(
                f"version {label} of {name} answers for it; release others first (`trunkline model release {name} VERSION`), or "
                f"remove all of it (`trunkline model rm {name}`)"
            )
        return labels[label]

    def remove_version(self, name: str, label: str) -> None:
        """Forget a version. Raises as ``stored_as`` does."""
        with self._store.versions_locked():
            self._store.remove_model(self.stored_as(name, label))

    def remove(self, name: str) -> list[str]:
        """Forget a model with all its versions, and return what they were stored as. Raises UnknownModel."""
        with self._store.versions_locked():
            stored = list(self.labels(name).values())
            if not stored and name not in self._store.releases():
                raise UnknownModel(f"the store holds no model {name!r}", model=name)
            # In this order: what is left, should this not come to its end, answers nobody whom it would not have answered before.
            for each in stored[: name in stored]:
                self._store.remove_model(each)
            self._store.remove_release(name)
            for each in stored[name in stored :]:
                self._store.remove_model(each)
        return stored


def _check_alike(bundles: list[Bundle]) -> None:
    first, *others = bundles
    for other in others:
        if differs := difference(first.graph, other.graph):
            raise SignatureMismatch(
                f"{first.name} and {other.name} cannot answer for one name by turns, since callers could tell: {differs}"
            )
