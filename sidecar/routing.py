"""Routing: which deployed models answer a request, by the releases of the models that it names.

The table of releases is read when an engine starts, and again whenever an operator has changed one, by a thread of its own, so
that no session waits for a disk. It is replaced as a whole, in the server's thread, which alone draws by it: a request is
answered by the old table or by the new one, and by the version that was drawn when it came. A name without a release costs one
look into the table, once for each session and table.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import queue
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from trunkline.errors import InvalidInput, TrunklineError, UnknownModel
from trunkline.protocol import JOINT, JOINT_OUTPUT
from trunkline.signature import Signature

from sidecar.errors import anew
from sidecar.labels import labelled, parted
from sidecar.releases import RELEASED, Release, RoundRobin, by_call_id
from sidecar.tenants import as_asked, qualified, unqualified

log = logging.getLogger("trunkline.server")

# By names of models as they were published; an error where a release cannot be read.
Table = Mapping[str, Release | TrunklineError]


class Source(Protocol):
    """Where releases are kept; ``sidecar.store.Store`` is one."""

    def releases(self) -> list[str]: ...
    def release(self, name: str) -> Release | None: ...


class ReleaseFiles:
    """Reads releases. ``run`` is a thread's body; all else may be called anywhere."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._asked: queue.SimpleQueue[tuple[str, Callable[[Release | TrunklineError | None], None]] | None] = queue.SimpleQueue()

    def table(self) -> Table:
        """Return all releases. One that cannot be read is told, and what answers for its name is nobody's guess."""
        found = {name: self._read(name) for name in self._source.releases()}
        return {name: release for name, release in found.items() if release is not None}

    def _read(self, name: str) -> Release | TrunklineError | None:
        try:
            return self._source.release(name)
        except TrunklineError as error:
            log.error("%s", error.message)
            return error

    def reread(self, name: str, told: Callable[[Release | TrunklineError | None], None]) -> None:
        """Have the release of a name read again; ``told`` is called with it, or with what is wrong, in another thread.

        What is told last was read last.
        """
        self._asked.put((name, told))

    def run(self) -> None:
        """Read what is asked for, one after the other, until told to stop."""
        while (asked := self._asked.get()) is not None:
            name, told = asked
            told(self._read(name))

    def stop(self) -> None:
        """End ``run``."""
        self._asked.put(None)


@dataclass(slots=True)
class _Part:
    """One of the models that a request names: as it is known to the engine, what that says, and its release.

    ``names`` are the engine's of what may answer, by label; of a version that is named, what its model is without one.
    """

    known_as: str
    model: str
    label: str
    release: Release | None
    names: Mapping[str, str]


class Routing:
    """The table in force, and whose turn it is of the versions in each split. The server's thread.

    ``signature`` is the engine's: of a deployed model, or of several asked together.
    """

    def __init__(self, signature: Callable[[str], Signature], table: Table) -> None:
        self._signature = signature
        self.table: Table = {}
        # By the engine's names: what those of one domain ask says nothing to those of another.
        self._turns: dict[str, RoundRobin] = {}
        for name, release in table.items():
            self.use(name, release)

    def use(self, name: str, release: Release | TrunklineError | None) -> None:
        """Go by another release of a name from now on; None: by none."""
        table = {known: each for known, each in self.table.items() if known != name}
        if release is not None and not (isinstance(release, Release) and release.is_plain):
            table[name] = release
        self._turns = {known_as: turns for known_as, turns in self._turns.items() if unqualified(known_as)[0] != name}
        self.table = table

    def route(self, known_as: str) -> Route | None:
        """Return what answers for the engine's name of a model, or of several together; None where that is the name itself.

        Raises InvalidInput, and ModelCorrupt where a release cannot be read.
        """
        parts = [self._part(each) for each in known_as.split(JOINT)]
        if not any(part.label or part.release for part in parts):
            return None
        if len(parts) > 1:
            _check_together(as_asked(known_as).split(JOINT), parts)
            # As the engine wants the names of versions.
            parts.sort(key=lambda part: (part.model, part.label))
        return Route(self, parts)

    def _part(self, known_as: str) -> _Part:
        name, domain = unqualified(known_as)
        model, label = parted(name)
        release = None if label else self.table.get(model)
        if isinstance(release, TrunklineError):
            raise anew(release)
        names = {each: qualified(labelled(model, each), domain) for each in (release.weights if release is not None else ("",))}
        return _Part(known_as, model, label, release, names)

    def signature_of(self, name: str) -> Signature:
        """Return the engine's signature. Raises UnknownModel, ModelCorrupt, InvalidInput."""
        return self._signature(name)

    def options(self, part: _Part) -> Sequence[str]:
        """Return the engine's names of all that may answer for a part."""
        if part.release is not None:
            return [*part.names.values()]
        return [self._version(part) if part.label else part.known_as]

    def _version(self, part: _Part) -> str:
        """Return the engine's name of a version that is named. What was pushed without one is called as its manifest says."""
        try:
            self._signature(part.known_as)
        except UnknownModel:
            plain = part.names[""]
            with contextlib.suppress(UnknownModel):
                if self._signature(plain).version == part.label:
                    return plain
            told = f"there is no version {part.label} of {part.model} here"
            raise UnknownModel(told, model=as_asked(part.known_as)) from None
        return part.known_as

    def draw(self, part: _Part, call_id: str) -> str:
        """Return the engine's name of what answers for a part of the next request."""
        release = part.release
        if release is None or not release.is_split:
            return self.options(part)[0]
        if release.sticky and call_id:
            return part.names[by_call_id(part.model, call_id, release.weights)]
        turns = self._turns.get(part.known_as)
        if turns is None:
            turns = self._turns[part.known_as] = RoundRobin(release.weights)
        return part.names[turns.draw()]


class Route:
    """What answers for a name: to callers a model, whose signature is that of every version that may answer."""

    def __init__(self, routing: Routing, parts: Sequence[_Part]) -> None:
        self._routing = routing
        self._parts = parts
        # The signatures of all that may answer, and what was made of them.
        self._made: tuple[list[Signature], Signature] | None = None

    @property
    def names(self) -> list[str]:
        """The engine's names of all that may answer. Raises UnknownModel, ModelCorrupt."""
        return [name for part in self._parts for name in self._routing.options(part)]

    @property
    def signature(self) -> Signature:
        """What callers are told: one object as long as nothing has changed. Raises UnknownModel, ModelCorrupt, InvalidInput."""
        options = [self._routing.options(part) for part in self._parts]
        own = [self._routing.signature_of(name) for names in options for name in names]
        if self._made is None or any(one is not other for one, other in zip(self._made[0], own, strict=True)):
            self._made = own, self._told(options)
        return self._made[1]

    def _told(self, options: Sequence[Sequence[str]]) -> Signature:
        asked = as_asked(JOINT.join(part.known_as for part in self._parts))
        found = self._routing.signature_of(JOINT.join(names[0] for names in options))
        is_released = any(part.release for part in self._parts)
        if found.model == asked and not is_released:
            return found
        versions = [",".join(self._routing.signature_of(name).version for name in names) for names in options]
        outputs = found.outputs
        if len(self._parts) > 1:
            outputs = tuple(
                replace(spec, name=f"{named}{JOINT_OUTPUT}{spec.name.partition(JOINT_OUTPUT)[2]}")
                for spec, named in zip(outputs, self._output_owners(found), strict=True)
            )
        told = replace(found, model=asked, version=JOINT.join(versions), outputs=outputs)
        if not is_released:
            return told
        alike = str((told.inputs, told.outputs, sorted(told.symbols.items())))
        return replace(told, id=RELEASED + hashlib.sha256(alike.encode()).hexdigest()[:16])

    def _output_owners(self, joint: Signature) -> list[str]:
        """Return for each output of several models the name that its model was asked by."""
        models = dict.fromkeys(spec.name.partition(JOINT_OUTPUT)[0] for spec in joint.outputs)
        asked = dict(zip(models, (as_asked(part.known_as) for part in self._parts), strict=True))
        return [asked[spec.name.partition(JOINT_OUTPUT)[0]] for spec in joint.outputs]

    def draw(self, call_id: str) -> tuple[str, Signature]:
        """Return the engine's name of what answers the next request, and its signature."""
        name = JOINT.join(self._routing.draw(part, call_id) for part in self._parts)
        return name, self._routing.signature_of(name)


def _check_together(asked: Sequence[str], parts: Sequence[_Part]) -> None:
    """Raise InvalidInput where what is asked together has no one meaning."""
    if list(asked) != sorted(set(asked)):
        raise InvalidInput(f"{JOINT.join(asked)[:64]!r} does not name models in the order of their names, each once")
    counts = Counter(part.model for part in parts)
    for part in parts:
        if not part.label and counts[part.model] > 1:
            raise InvalidInput(f"{part.model[:64]} is named together with one of its versions; name the versions of both")
