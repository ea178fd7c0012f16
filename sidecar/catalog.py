"""The catalog: which models are deployed, in which domains and which version, and what the engine prepared for each.

A model of the store is deployed once in each domain that may use it, under a name and with identities of its own
(``sidecar.merkle.in_domain``): to all else here, these are different models. Only programs, which hold no weights, serve all.

After a start models are *awaited* until they are deployed: those that are asked for first, the others while there is time. To all
who ask they are there; what they are like is read from the store by whichever thread needs it first.

Owned by the engine thread, which changes it; other threads read what is *published* or awaited: signatures, of single models and
of several asked together.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from trunkline.errors import BudgetExceeded, InvalidInput, ModelCorrupt, TrunklineError, UnknownModel
from trunkline.protocol import JOINT, MAX_JOINT
from trunkline.signature import Signature

from sidecar.bundle import Bundle, Weight
from sidecar.errors import BundleError, StoreError
from sidecar.graph import FusedGraph, Looked
from sidecar.independence import tried_sizes
from sidecar.ir import Graph
from sidecar.labels import parted
from sidecar.lowering import Form, Lowered, Recipe
from sidecar.memory import Memory
from sidecar.merkle import in_domain, skeleton_id
from sidecar.pins import Pins
from sidecar.ports import Device, Source
from sidecar.residency import Residency
from sidecar.slices import stopping
from sidecar.stages import Key, Stage, Staged
from sidecar.stretches import JOINED, Stretch, ranges, stretched
from sidecar.tenants import OPEN, as_asked, as_known_to, matches, qualified, unqualified
from sidecar.together import Interface, join
from sidecar.trials import Verdict
from sidecar.wavefront import Layouts, Padding

log = logging.getLogger("trunkline.engine")

# Trials measure no shorter times.
_SHORTEST_S: Final = 1e-6
# Combinations of models whose signature is kept.
_MOST_JOINT: Final = 64


@dataclass(slots=True, eq=False)
class Step:
    """A stage as one deployed model runs it: its graph, the weights it needs, and once prepared, the program.

    ``recipes`` say how its packed weights are made; without any, the graph is the stage's own. ``bound`` are the handles of its
    weights, while they are known to be in memory.
    """

    key: str
    takes: tuple[Key, ...]
    gives: tuple[Key, ...]
    alive: frozenset[Key]
    block: str
    graph: Graph
    recipes: dict[str, Recipe]
    form: Form | Literal["plain"] = "plain"
    program: Any = None
    # Runs this step and others of its structure as one; None where that cannot be.
    stacked: Any = None
    bound: list[object] | None = None


@dataclass(slots=True, eq=False)
class Deployed:
    """A deployed version of a model. ``plan`` names the weights it needs, ``weights``, to the residency."""

    bundle: Bundle
    plan: str
    signature: Signature
    staged: Staged
    steps: tuple[Step, ...]
    weights: dict[str, Weight]
    # By the number of the first stage, those that may be run at once.
    stretches: dict[int, Stretch] = field(default_factory=dict)
    # What trying it out has shown; until then its requests are not batched.
    verdict: Verdict | None = None
    # Whether all weights were seen to be in memory; until it lets go of any.
    loaded: bool = False
    request_count: int = 0
    last_used_s: float | None = None
    # By the number of the first stage and how many they are, parts of stretches; None where nothing is joined.
    cuts: dict[tuple[int, int], Stretch | None] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.bundle.name

    @property
    def most_rows(self) -> int:
        """Return how large a batch the model takes; 1 where the size is fixed."""
        return next((symbol.maximum for symbol in self.bundle.graph.symbols if symbol.name == self.bundle.batch), 1)

    @property
    def layouts(self) -> Layouts | None:
        """Return where the rows of a batch lie; None where rows must not stand beside others."""
        return None if self.verdict is None else self.verdict.layouts

    @property
    def run_s(self) -> tuple[float, ...]:
        """Return the seconds each step took when it was tried; empty where that is not known."""
        return () if self.verdict is None else self.verdict.run_s

    def reckoned_s(self, index: int, inputs: Mapping[Key, Any], rows: int) -> float:
        """Return what a step takes at most for so many rows of a call's ``inputs``, by what it took when it was tried; or 0.

        It was tried with axes as short as these at least, and what there is to compute grows with their square, at most.
        """
        if not self.run_s:
            return 0.0
        longer: dict[str, float] = {}
        tried = tried_sizes(self.bundle)
        for key, spec in zip(self.staged.inputs, self.bundle.graph.inputs, strict=True):
            for axis, size in zip(spec.shape, inputs[key].shape, strict=True):
                if isinstance(axis, str) and axis != self.bundle.batch:
                    longer[axis] = max(1.0, size / tried[axis])
        # Less than can be measured is not unknown.
        return max(_SHORTEST_S, self.run_s[index] * (rows if self.bundle.batch else 1) * math.prod(longer.values()) ** 2)

    def stretch_at(self, index: int) -> tuple[int, Stretch | None]:
        """Return the stretch that a step is in, and the number of its first step; None where it is in none."""
        for start, stretch in self.stretches.items():
            if start <= index < start + stretch.count:
                return start, stretch
        return index, None

    def padding(self, inputs: Mapping[Key, Any]) -> Padding | None:
        """Return how a call's inputs may be made longer; None where that would change its answer, or was not tried."""
        symbol = "" if self.verdict is None else self.verdict.padded
        if not symbol:
            return None
        graph = self.bundle.graph
        axes = {
            key: spec.shape.index(symbol)
            for key, spec in zip(self.staged.inputs, graph.inputs, strict=True)
            if symbol in spec.shape
        }
        cuts = tuple(spec.shape.index(symbol) if symbol in spec.shape else None for spec in graph.outputs)
        key, axis = next(iter(axes.items()))
        return Padding(axes, cuts, inputs[key].shape[axis])

    def unbind(self) -> None:
        """Forget the handles of the weights; they would keep the bytes alive."""
        self.loaded = False
        for step in self.steps:
            step.bound = None


@dataclass(frozen=True)
class Joint:
    """Several models in one call: what they take and give, and the names of the inputs as stages know them."""

    bundles: tuple[Bundle, ...]
    interface: Interface
    signature: Signature

    def inputs_of(self, deployed: Deployed, inputs: Sequence[Any]) -> list[Any]:
        """Return those of a call's inputs that one of its models takes, in the order of its graph."""
        named = dict(zip(self.interface.values, inputs, strict=True))
        return [named[key] for key in deployed.staged.inputs]


class _Awaited:
    """A model that is to be deployed under a name: what is found of it in the store, once for all who ask. Any thread."""

    def __init__(
        self, name: str, stored: Callable[[], Bundle | TrunklineError], known_as: Callable[[Bundle, str], Bundle]
    ) -> None:
        """``stored`` reads it from the store, once for all domains; ``known_as`` returns it as it is known by a name."""
        self._name = name
        self._stored = stored
        self._known_as = known_as

    @functools.cached_property
    def found(self) -> Bundle | TrunklineError:
        """What is to be deployed, or what is wrong with it. Raises UnknownModel."""
        found = self._stored()
        return found if isinstance(found, TrunklineError) else self._known_as(found, self._name)

    @functools.cached_property
    def published(self) -> Signature | TrunklineError:
        """What there is to publish of it. Raises UnknownModel."""
        return self.found if isinstance(self.found, TrunklineError) else _signature(self.found)


@dataclass(slots=True)
class Catalog:
    """Models by name. Methods that change it return the weights nobody needs any more; the engine drops them."""

    source: Source
    device: Device
    memory: Memory
    residency: Residency
    pins: Pins
    # Told of the digests of weights that no model has any more.
    forget: Callable[[Collection[str]], None] = lambda digests: None
    # By domain, patterns of the models that may be used in it.
    domains: Mapping[str, Sequence[str]] = field(default_factory=OPEN.domains)
    # Of models whose weights anybody may know; and names of what was deployed anew because that has changed.
    public: Sequence[str] = ()
    renamed: list[str] = field(default_factory=list)
    graph: FusedGraph = field(default_factory=FusedGraph)
    deployed: dict[str, Deployed] = field(default_factory=dict)
    broken: dict[str, TrunklineError] = field(default_factory=dict)
    # Versions that were replaced while they were in use, by plan.
    retired: dict[str, Deployed] = field(default_factory=dict)
    # Prepared programs by skeleton, of the models that are deployed, each with its stacked form.
    programs: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    # Replaced as a whole, never changed in place, so that other threads may read it without a lock.
    _published: dict[str, Signature | TrunklineError] = field(default_factory=dict)
    _bundles: dict[str, Bundle] = field(default_factory=dict)
    # Those that are still to be deployed, by name. Whoever looks here and at what is published looks here first.
    _awaited: dict[str, _Awaited] = field(default_factory=dict)
    # By public model the blobs of its weights, and all of them. Replaced as a whole, too.
    _blobs: dict[str, frozenset[str]] = field(default_factory=dict)
    _public_blobs: frozenset[str] = frozenset()
    # Digests of weights of what was removed.
    _gone: set[str] = field(default_factory=set)
    # How often that has changed: what is made of it is right while this stays.
    changes: int = 0
    # Made by whichever thread needs it first, from what is published.
    _joint: dict[str, Joint] = field(default_factory=dict)

    # --- any thread --------------------------------------------------------------------------------------------------

    def signature(self, name: str) -> Signature:
        """Return the signature of a deployed model, or of several of one domain with JOINT between their names.

        Who asks learns of that domain and no other. Raises UnknownModel, ModelCorrupt, InvalidInput.
        """
        awaited = self._awaited.get(name)
        found = self._published.get(name)
        if found is None and awaited is not None:
            found = awaited.published
        if isinstance(found, Signature):
            return found
        model, domain = unqualified(name)
        if found is not None:
            raise ModelCorrupt(f"{model} cannot be served: {as_known_to(domain, found.message)}", model=model)
        if JOINT in name:
            return self.joint(name).signature
        around = {unqualified(each) for each in (*self._awaited, *self._published)}
        raise _unknown(model, sorted(known for known, where in around if where == domain))

    def versions(self, name: str) -> list[str]:
        """Return the versions that a model is deployed in, in the domain of ``name``; one without a label as its bundle says."""
        model, domain = unqualified(name)
        model, _ = parted(model)
        known = {unqualified(each) for each in (*self._awaited, *self._published)}
        labels = [parted(each)[1] for each, where in known if (parted(each)[0], where) == (model, domain)]
        found = sorted(filter(None, labels))
        if "" in labels:
            # Of one that cannot be read, nobody knows which it is.
            with contextlib.suppress(ModelCorrupt, UnknownModel):
                found.insert(0, self.signature(qualified(model, domain)).version)
        return found

    def served(self) -> list[str]:
        """Return the names of models that are deployed and can be served, or are awaited."""
        found = [name for name, published in self._published.items() if isinstance(published, Signature)]
        return [*dict.fromkeys((*self._awaited, *found))]

    def check_deployed(self, name: str) -> None:
        """Raise UnknownModel, naming what there is in all domains, or ModelCorrupt. For operators."""
        known = {*self._awaited, *self._published}
        if name not in known:
            raise _unknown(name, sorted(known))
        self.signature(name)

    def joint(self, name: str) -> Joint:
        """Return what several models take and give in one call. Raises UnknownModel, ModelCorrupt, InvalidInput."""
        names = name.split(JOINT)
        models, domains = zip(*map(unqualified, names), strict=True)
        if len(set(domains)) > 1:
            raise InvalidInput(f"{name[:64]!r} names models of several domains; those of one call are of one")
        if len(names) > MAX_JOINT or list(models) != sorted(set(models), key=parted):
            raise InvalidInput(
                f"{as_asked(name)[:64]!r} does not name up to {MAX_JOINT} models in the order of their names, each once"
            )
        for each in names:
            self.signature(each)
        bundles = tuple(map(self._bundle, names))
        known = self._joint.get(name)
        if known is not None and all(one is other for one, other in zip(known.bundles, bundles, strict=True)):
            return known
        interface = join({model: bundle.graph for model, bundle in zip(models, bundles, strict=True)})
        signature = Signature(
            as_asked(name),
            JOINT.join(bundle.version for bundle in bundles),
            interface.inputs,
            interface.outputs,
            {symbol.name: (symbol.minimum, symbol.maximum) for symbol in interface.symbols},
            _signature_id(*bundles),
        )
        # Two threads may be here; a copy of the keys is taken at one stroke.
        for oldest in list(self._joint)[: len(self._joint) - _MOST_JOINT + 1]:
            self._joint.pop(oldest, None)
        made = self._joint[name] = Joint(bundles, interface, signature)
        return made

    def _bundle(self, name: str) -> Bundle:
        """Return a model of which there is a signature. Raises UnknownModel when it changes meanwhile."""
        awaited = self._awaited.get(name)
        found = self._bundles.get(name)
        if found is None and awaited is not None and isinstance(awaited.found, Bundle):
            found = awaited.found
        if found is None:
            model, _ = unqualified(name)
            raise UnknownModel(f"{model} is being replaced; try again", model=model)
        return found

    # --- the engine thread -------------------------------------------------------------------------------------------

    def await_stored(self) -> None:
        """Have every model of the store be deployed, by a call of ``complete`` for each name that is ``awaited`` from now on."""
        for model in self.source.models():
            stored = functools.cache(functools.partial(self._stored, model))
            self._awaited.update({name: _Awaited(name, stored, self._as_known) for name in self.names(model)})

    @property
    def awaited(self) -> Collection[str]:
        """Return the names of what is to be deployed."""
        return self._awaited.keys()

    def pinned(self) -> list[str]:
        """Return the names of deployed models that an operator pinned, before a restart perhaps."""
        return [name for name in self.pins.names() if name in self.deployed]

    def check_invariants(self) -> None:
        """Raise AssertionError when something is kept for nobody."""
        self.graph.check_invariants()
        assert self.programs.keys() <= self._skeletons(), "programs are kept for nobody"

    def _skeletons(self) -> set[str]:
        used = {id(step.program) for entry in self.all() for step in entry.steps}
        for entry in self.all():
            for stretch in (*entry.stretches.values(), *filter(None, entry.cuts.values())):
                used |= {id(piece.program) for piece in stretch.pieces}
        return {skeleton for skeleton, (program, _) in self.programs.items() if id(program) in used}

    def all(self) -> Iterator[Deployed]:
        """Yield every version there is, retired ones too."""
        return itertools.chain(self.deployed.values(), self.retired.values())

    def has_all(self, name: str) -> bool:
        """Say whether all models are deployed that ``name`` stands for."""
        return all(each in self.deployed for each in name.split(JOINT))

    def parts(self, name: str) -> tuple[Deployed, ...]:
        """Return the models that ``name`` stands for, one or several. Raises KeyError for one that is not deployed."""
        return tuple(self.deployed[each] for each in name.split(JOINT))

    def names(self, model: str) -> list[str]:
        """Return what a model is called in each domain that may use it."""
        return [qualified(model, domain) for domain in self.domains if self._may_use(domain, model)]

    def _may_use(self, domain: str, model: str) -> bool:
        return matches(model, self.domains.get(domain, ()))

    def deploy(self, model: str) -> Sequence[str]:
        """Deploy the version of a model that the store has now, in every domain that may use it.

        What is wrong with it is kept in ``broken``. Raises UnknownModel.
        """
        with stopping():
            found = self._stored(model)
        if matches(model, self.public):
            self._note_public(model, found)
        looked: dict[str, Looked] = {}
        # Domains may be others after it stopped.
        while isinstance(found, Bundle) and (bundle := self._not_looked_at(model, found, looked)) is not None:
            try:
                with stopping():
                    looked[bundle.name] = self.graph.look(bundle)
            except BundleError as error:
                log.error("%s cannot be served: %s", model, error.message)
                found = error
        return [digest for name in self.names(model) for digest in self._deploy(name, found, looked.get(name))]

    def _not_looked_at(self, model: str, found: Bundle, looked: Mapping[str, Looked]) -> Bundle | None:
        """Return a model as it is known by a name by which nobody has looked at it yet; None when there is no such name."""
        for name in self.names(model):
            bundle = self._as_known(found, name)
            if name not in looked or looked[name].graph != bundle.graph:
                return bundle
        return None

    def _stored(self, model: str) -> Bundle | TrunklineError:
        """Return a model of the store, or what is wrong with it. Raises UnknownModel."""
        try:
            return self.source.model(model)
        except (BundleError, StoreError, ModelCorrupt) as error:
            log.error("%s cannot be served: %s", model, error.message)
            return error

    def remove(self, model: str) -> Sequence[str]:
        """Forget a model that is in the store no more, in all domains."""
        freed = [digest for name in self.names(model) for digest in self.withdraw(name)]
        self.pins.forget(model)
        return freed

    def use_domains(self, domains: Mapping[str, Sequence[str]], public: Sequence[str] = ()) -> Sequence[str]:
        """Have these domains from now on, and these patterns of public models.

        What they may use no more is withdrawn; what they may use besides is ``lacking``. What knows its weights by other names
        from now on is deployed anew, and ``renamed``.
        """
        self.domains, self.public = dict(domains), tuple(public)
        self._find_public()
        freed: list[str] = []
        for name in (*self.deployed, *self.broken):
            model, domain = unqualified(name)
            if not self._may_use(domain, model):
                freed += self.withdraw(name)
            elif name in self.deployed and not self._is_known_as_now(self.deployed[name]):
                freed += self._deploy(name, self.deployed[name].bundle)
                self.renamed.append(name)
        self.publish()
        return freed

    def _find_public(self) -> None:
        """Find out which weights anybody may know: those of public models of the store, whichever other models have them."""
        models = [model for model in self.source.models() if matches(model, self.public)] if self.public else []
        self._blobs = {model: known for model, known in self._blobs.items() if model in models}
        for model in models:
            # What is deployed is not what was pushed since: that will be noted when it is deployed.
            if model not in self._blobs:
                self._note_public(model, self._stored(model))
        self._public_blobs = frozenset[str]().union(*self._blobs.values())

    def _note_public(self, model: str, found: Bundle | TrunklineError) -> None:
        if isinstance(found, Bundle):
            self._blobs[model] = frozenset(weight.blob for weight in found.graph.weights)
            self._public_blobs = frozenset[str]().union(*self._blobs.values())

    def _is_known_as_now(self, deployed: Deployed) -> bool:
        """Say whether a model has the names for its weights that it would have were it deployed now."""
        return self._as_known(deployed.bundle, deployed.name).graph.weights == deployed.bundle.graph.weights

    def _as_known(self, bundle: Bundle, name: str) -> Bundle:
        """Return a model as it is known by a name, in the domain that this says."""
        return replace(bundle, name=name, graph=in_domain(bundle.graph, unqualified(name)[1], self._public_blobs))

    def lacking(self) -> list[str]:
        """Return the names under which models of the store may be used and are not deployed."""
        names = [name for model in self.source.models() for name in self.names(model)]
        return [name for name in names if name not in self.deployed and name not in self.broken]

    def complete(self, name: str) -> Deployed | None:
        """Deploy one of those that are awaited, or were lacking; None when it is not to be, or cannot.

        What was lacking is deployed in the version that other domains have. Raises UnknownModel when nobody has it, the store
        included.
        """
        try:
            return self._complete(name)
        finally:
            # Only now: whoever asks finds it here or there.
            self._awaited.pop(name, None)
            self._forget_gone()

    def _complete(self, name: str) -> Deployed | None:
        model, domain = unqualified(name)
        if name in self.deployed or name in self.broken or not self._may_use(domain, model):
            return None
        awaited = self._awaited.get(name)
        if awaited is None:
            others = (self.deployed[each].bundle for each in self.names(model) if each in self.deployed)
            self._deploy(name, next(others, None) or self._stored(model))
        else:
            self._deploy(name, awaited.found)
        made = self.deployed.get(name)
        if made is not None and name in self.pins.names():
            self.pin_if_possible(made)
        self.publish()
        return made

    def _deploy(self, name: str, found: Bundle | TrunklineError, looked: Looked | None = None) -> Sequence[str]:
        self.broken.pop(name, None)
        if isinstance(found, TrunklineError):
            freed = self.withdraw(name)
            self.broken[name] = found
            return freed
        bundle = self._as_known(found, name)
        plan = f"{name}@{bundle.graph_digest}{_names_of(bundle)}"
        if name in self.deployed and self.deployed[name].plan.partition("#")[0] == plan:
            # The same graph under another version, perhaps.
            self.deployed[name].bundle, self.deployed[name].signature = bundle, _signature(bundle)
            return ()
        was_pinned = name in self.deployed and self.residency.is_pinned(self.deployed[name].plan)
        freed = self.withdraw(name)
        try:
            self.graph.add(bundle, looked)
        except BundleError as error:
            log.error("%s cannot be served: %s", name, error.message)
            self.broken[name] = error
            return freed
        deployed = self.retired.pop(plan, None) or _deployed(bundle, plan, self.graph.staged(name))
        deployed.bundle, deployed.signature = bundle, _signature(bundle)
        self._serve(deployed, was_pinned)
        return freed

    def _serve(self, deployed: Deployed, was_pinned: bool) -> None:
        size_bytes = self.memory.size_bytes
        self.residency.add_plan(deployed.plan, {digest: size_bytes(weight) for digest, weight in deployed.weights.items()})
        self.deployed[deployed.name] = deployed
        self.keep(deployed)
        if was_pinned and not self.pin_if_possible(deployed):
            # After a restart, too: its pin could come before those of others, and keep them out.
            self.pins.discard(deployed.name)

    def is_deployed(self, deployed: Deployed) -> bool:
        """Say whether this is the version, and the form, that requests are served by."""
        return self.deployed.get(deployed.name) is deployed

    def adopt(self, deployed: Deployed, verdict: Verdict) -> Sequence[str]:
        """Serve a model as its trial has shown to be best. Requests under way keep the form they began with."""
        if not self.is_deployed(deployed):
            return ()
        if not any(lowered is not None for lowered in verdict.forms):
            deployed.verdict = verdict
            return ()
        forms = hashlib.sha256(str([lowered and lowered.form for lowered in verdict.forms]).encode()).hexdigest()[:8]
        plan = f"{deployed.plan}#{forms}"
        formed = self.retired.pop(plan, None) or _deployed(deployed.bundle, plan, deployed.staged, verdict)
        # One that comes back may be of an earlier version.
        formed.bundle, formed.signature = deployed.bundle, deployed.signature
        formed.request_count, formed.last_used_s = deployed.request_count, deployed.last_used_s
        was_pinned = self.residency.is_pinned(deployed.plan)
        del self.deployed[deployed.name]
        freed = self._retire(deployed)
        self._serve(formed, was_pinned)
        self.publish()
        return freed

    def keep(self, deployed: Deployed) -> None:
        """Have a model kept as the operator said, before a restart or a push perhaps."""
        keep = self.pins.kept(deployed.name)
        self.residency.set_priority(deployed.plan, keep.priority)
        self.residency.set_ttl(deployed.plan, keep.keep_alive_s)

    def pin_if_possible(self, deployed: Deployed) -> bool:
        """Pin again what was pinned before a restart or a push. A pin is a preference: without it the model still serves."""
        try:
            self.residency.pin(deployed.plan)
        except BudgetExceeded as error:
            log.error("%s is not pinned any more: %s", deployed.name, error.message)
            return False
        return True

    def withdraw(self, name: str) -> Sequence[str]:
        """Deploy a model no more. A version in use is kept until ``let_go``."""
        self.broken.pop(name, None)
        deployed = self.deployed.pop(name, None)
        if deployed is None:
            return ()
        self.graph.remove(name)
        return self._retire(deployed)

    def _retire(self, deployed: Deployed) -> Sequence[str]:
        if self.residency.lease_count(deployed.plan):
            self.residency.unpin(deployed.plan)
            self.retired[deployed.plan] = deployed
            return ()
        return self._remove(deployed)

    def let_go(self, deployed: Deployed) -> Sequence[str]:
        """Forget a retired version when its last lease was returned."""
        if deployed.plan not in self.retired or self.residency.lease_count(deployed.plan):
            return ()
        del self.retired[deployed.plan]
        freed = self._remove(deployed)
        self._forget_gone()
        return freed

    def _remove(self, deployed: Deployed) -> Sequence[str]:
        freed = self.residency.remove_plan(deployed.plan)
        deployed.unbind()
        self._gone |= deployed.weights.keys()
        kept = self._skeletons()
        self.programs = {skeleton: program for skeleton, program in self.programs.items() if skeleton in kept}
        return freed

    def _forget_gone(self) -> None:
        if self._awaited or not self._gone:
            # Those may have them.
            return
        # Only now: the next version, or form, has most weights of the last.
        if gone := self._gone - {digest for entry in self.all() for digest in entry.weights}:
            self.forget(gone)
        self._gone.clear()

    def publish(self) -> None:
        """Let other threads see what is deployed. Every change ends with this."""
        self.changes += 1
        self._forget_gone()
        self._bundles = {name: entry.bundle for name, entry in self.deployed.items()}
        for name, joint in list(self._joint.items()):
            if any(self._bundles.get(bundle.name) is not bundle for bundle in joint.bundles):
                self._joint.pop(name, None)
        self._published = {**self.broken, **{name: entry.signature for name, entry in self.deployed.items()}}

    def prepare(self, deployed: Deployed) -> None:
        """Prepare the programs of a model. Raises BundleError when this device cannot run an operator."""
        for step in deployed.steps:
            if step.program is None:
                # Stages that differ in nothing but the bytes of their weights are run by one program.
                skeleton = skeleton_id(step.graph)
                prepared = self.programs.get(skeleton)
                if prepared is None:
                    prepare = self.device.prepare_lowered if step.recipes else self.device.prepare
                    program = prepare(step.graph)
                    prepared = self.programs[skeleton] = (program, self.device.stacked(step.graph, program))
                step.program, step.stacked = prepared
        for first, stretch in deployed.stretches.items():
            self._prepare_stretch(deployed, first, stretch)

    def _prepare_stretch(self, deployed: Deployed, first: int, stretch: Stretch) -> None:
        for piece in stretch.pieces:
            if piece.count == 1:
                piece.program = deployed.steps[first + piece.start].program
            elif piece.program is None:
                skeleton = skeleton_id(piece.graph)
                if skeleton not in self.programs:
                    self.programs[skeleton] = (self.device.prepare_lowered(piece.graph, is_long=True), None)
                piece.program, _ = self.programs[skeleton]

    def cut(self, deployed: Deployed, first: int, count: int) -> Stretch | None:
        """Return ``count`` stages of a stretch from stage ``first`` on; None where nothing is joined.

        A model's stretches are its own; where several models meet and part is seen when they are asked for.
        """
        place = first, count
        if place not in deployed.cuts:
            found = _stretch(deployed.steps[first : first + count])
            if found is not None:
                self._prepare_stretch(deployed, first, found)
            deployed.cuts[place] = found
        return deployed.cuts[place]

    def unbind(self) -> None:
        """Forget the handles of every model of which a weight may have left; its next load finds out what is still there."""
        for deployed in self.all():
            if not self.residency.is_held(deployed.plan):
                deployed.unbind()

    def unbind_all(self) -> None:
        """Forget the handles of every model: weights may lie elsewhere now."""
        for deployed in self.all():
            deployed.unbind()


def _names_of(bundle: Bundle) -> str:
    """Return what tells a deployment with some of a model's weights public from those with others; nothing where none is."""
    digests = [weight.digest for weight in bundle.graph.weights]
    if not bundle.graph.domain or in_domain(bundle.graph, bundle.graph.domain).weights == bundle.graph.weights:
        return ""
    return f"@{hashlib.sha256(' '.join(digests).encode()).hexdigest()[:8]}"


def _deployed(bundle: Bundle, plan: str, staged: Staged, verdict: Verdict | None = None) -> Deployed:
    forms = verdict.forms if verdict is not None else (None,) * len(staged.stages)
    steps = tuple(map(_step, staged.stages, forms))
    weights = {weight.digest: weight for step in steps for weight in step.graph.weights}
    return Deployed(bundle, plan, _signature(bundle), staged, steps, weights, _stretches(steps, verdict), verdict)


def _stretches(steps: Sequence[Step], verdict: Verdict | None) -> dict[int, Stretch]:
    """Return the stretches of a model: where there are stages in sessions, whose borders cost most."""
    if verdict is None or not verdict.run_s:
        return {}
    in_session = [step.form == "blocked" for step in steps]
    found = ranges([seconds * (JOINED if joins else 1.0) for seconds, joins in zip(verdict.run_s, in_session, strict=True)])
    made = {each.start: _stretch(steps[each.start : each.stop]) for each in found}
    return {start: stretch for start, stretch in made.items() if stretch is not None}


def _stretch(steps: Sequence[Step]) -> Stretch | None:
    """Return stages as a stretch; None where none of them is in a session."""
    in_session = [step.form == "blocked" for step in steps]
    return stretched(steps, in_session) if any(in_session) else None


def _step(stage: Stage, lowered: Lowered | None) -> Step:
    if lowered is None:
        return Step(stage.id, stage.takes, stage.gives, stage.alive, stage.block, stage.graph, {})
    # What is computed in two forms differs in its last bits, and needs other weights.
    key = f"{stage.id}+{lowered.form}"
    return Step(key, stage.takes, stage.gives, stage.alive, stage.block, lowered.graph, lowered.recipes, lowered.form)


def _unknown(name: str, known: Sequence[str]) -> UnknownModel:
    held = ", ".join(known[:8]) or "none"
    return UnknownModel(f"the sidecar holds no model {name[:64]!r}; it holds {held}; `trunkline push` adds one", model=name[:64])


def _signature(bundle: Bundle) -> Signature:
    """Return the signature of a model as functions see it, who know nothing of domains."""
    graph = bundle.graph
    return Signature(
        as_asked(bundle.name),
        bundle.version,
        graph.inputs,
        graph.outputs,
        {symbol.name: (symbol.minimum, symbol.maximum) for symbol in graph.symbols},
        _signature_id(bundle),
    )


def _signature_id(*bundles: Bundle) -> str:
    versions = " ".join(f"{bundle.version} {bundle.graph_digest}" for bundle in bundles)
    return hashlib.sha256(versions.encode()).hexdigest()[:16]
