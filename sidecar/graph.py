"""The fused graph: every deployed model, and what they have in common. Pure bookkeeping, no I/O, no torch.

Sharing is found by content and never declared. Two models that were converted independently and hold one equal tensor name it
by the same digest; two that begin with equal computation have nodes of the same value id (``sidecar.merkle``). Models of
different domains have neither in common, whatever they are. Owned by the engine thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from trunkline.errors import UnknownModel

from sidecar.blocks import Block, block_id, cut
from sidecar.bundle import Bundle, Weight
from sidecar.errors import BundleError
from sidecar.ir import Graph
from sidecar.merkle import CollisionError, Identities, Tokens, in_domain
from sidecar.stages import Staged, split


class Looked(NamedTuple):
    """What there is to know of a graph before it is added: ids and what is behind them, blocks by id in order, stages."""

    graph: Graph
    identities: Identities
    tokens: Tokens
    blocks: dict[str, Block]
    staged: Staged


class _Entry(NamedTuple):
    bundle: Bundle
    identities: Identities
    # Of the nodes alone: value ids.
    nodes: frozenset[bytes]
    # Ids of the blocks in order, and what belongs to each.
    blocks: dict[str, Block]
    staged: Staged


class FusedBlock(NamedTuple):
    """One block of the fused DAG. ``parent`` is the id of the block it follows; ``models`` are all that run through it.

    ``weights`` are the sizes in bytes, by digest, of those it is the first to use: in the whole DAG each digest counts once. A
    sibling that was tuned in its last block has none of its own in the others, even where they compute something else.
    """

    id: str
    parent: str | None
    node_count: int
    weights: dict[str, int]
    models: list[str]

    def to_plain(self) -> dict[str, object]:
        """Return the block as plain values, for JSON."""
        return {
            "id": self.id,
            "parent": self.parent,
            "nodes": self.node_count,
            "bytes": sum(self.weights.values()),
            "models": self.models,
        }


class FusedGraph:
    """Bundles by model name, and the models that use each weight and each node.

    Adding a model never changes what another one consists of; removing it forgets exactly what nobody else uses.
    """

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._weights: dict[str, Weight] = {}
        self._users: dict[str, set[str]] = {}
        self._node_users: dict[bytes, set[str]] = {}
        # What ``bytes_of`` has found since a model was last added or removed: operators look more often than that happens.
        self._bytes: dict[str, tuple[int, int]] = {}
        self._tokens = Tokens()
        # In how many models each id is.
        self._id_counts: Counter[bytes] = Counter()

    def look(self, bundle: Bundle) -> Looked:
        """Find out what there is to know of a model; that takes long, and nothing changes. Raises BundleError for a collision."""
        graph, like = bundle.graph, self._like(bundle.graph)
        tokens = self._tokens.of(() if like is None else _ids(like.identities))
        try:
            if like is None:
                found = tokens.identify(graph)
                blocks = _named(cut(graph), found)
            else:
                found = tokens.identify_again(like.identities, graph.domain)
                blocks = _named(like.blocks.values(), found)
        except CollisionError as error:
            raise _not_told_apart(bundle, error) from error
        # Not what only the other one is known by: when it is added, that may be gone.
        tokens.keep(_ids(found))
        return Looked(graph, found, tokens, blocks, split(graph, found, blocks))

    def add(self, bundle: Bundle, looked: Looked | None = None) -> None:
        """Add a model, or replace the one of its name. ``looked`` is what there is to know of it, if somebody has looked.

        Raises BundleError when something of it has the id of something else that is here; then nothing changes.
        """
        found = self.look(bundle) if looked is None else looked
        assert found.graph == bundle.graph, f"{bundle.name} is not what was looked at"
        try:
            self._tokens.add(found.tokens)
        except CollisionError as error:
            self._tokens.keep(self._id_counts)
            raise _not_told_apart(bundle, error) from error
        if bundle.name in self._entries:
            self.remove(bundle.name)
            # Those it has in common with its last version went with that.
            self._tokens.add(found.tokens)
        nodes = frozenset(identity.value for identity in found.identities.nodes)
        entry = _Entry(bundle, found.identities, nodes, found.blocks, found.staged)
        self._entries[bundle.name] = entry
        self._bytes.clear()
        self._id_counts.update(_ids(entry.identities))
        for weight in bundle.graph.weights:
            self._weights[weight.digest] = weight
            self._users.setdefault(weight.digest, set()).add(bundle.name)
        for node in entry.nodes:
            self._node_users.setdefault(node, set()).add(bundle.name)

    def _like(self, graph: Graph) -> _Entry | None:
        """Return the same model in another domain, read from the store once for both: contents, structures, cuts are the same."""
        for name, entry in tuple(self._entries.items()):
            other = entry.bundle.graph
            # Work stops in between: it may have been removed by now.
            if other.nodes is graph.nodes and in_domain(other, "") == in_domain(graph, "") and self._entries.get(name) is entry:
                return entry
        return None

    def remove(self, name: str) -> None:
        """Remove a model. Raises UnknownModel."""
        bundle = self.bundle(name)
        entry = self._entries.pop(name)
        self._bytes.clear()
        for digest in {weight.digest for weight in bundle.graph.weights}:
            self._users[digest].discard(name)
            if not self._users[digest]:
                del self._users[digest]
                del self._weights[digest]
        for node in entry.nodes:
            self._node_users[node].discard(name)
            if not self._node_users[node]:
                del self._node_users[node]
        ids = _ids(entry.identities)
        self._id_counts.subtract(ids)
        unused = {each for each in ids if not self._id_counts[each]}
        for each in unused:
            del self._id_counts[each]
        self._tokens.forget(unused)

    def bundle(self, name: str) -> Bundle:
        """Return the bundle of a model. Raises UnknownModel, listing what there is."""
        if name not in self._entries:
            known = ", ".join(sorted(self._entries)[:8]) or "none"
            raise UnknownModel(
                f"the sidecar holds no model {name[:64]!r}; it holds {known}; `trunkline push` adds one",
                model=name[:64],
            )
        return self._entries[name].bundle

    def staged(self, name: str) -> Staged:
        """Return the stages of a model. Raises UnknownModel."""
        self.bundle(name)
        return self._entries[name].staged

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

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
        found = self._bytes.get(name)
        if found is None:
            weights = self.weights(name).values()
            shared_bytes = sum(weight.size_bytes for weight in weights if len(self._users[weight.digest]) > 1)
            found = self._bytes[name] = (sum(weight.size_bytes for weight in weights), shared_bytes)
        return found

    def nodes_of(self, name: str) -> tuple[int, int]:
        """Return how many different nodes a model computes, and how many of them some other model computes too."""
        self.bundle(name)
        nodes = self._entries[name].nodes
        return len(nodes), sum(1 for node in nodes if len(self._node_users[node]) > 1)

    def blocks(self) -> list[FusedBlock]:
        """Return each block of the fused DAG once, after the block it follows; models in order of their names.

        Blocks of two models are one exactly as far as the models begin alike, so together they form a tree.
        """
        found: dict[str, FusedBlock] = {}
        counted: set[str] = set()
        for name in self:
            entry = self._entries[name]
            weights = entry.bundle.graph.weights
            parent: str | None = None
            for each, block in entry.blocks.items():
                if each not in found:
                    own = {weights[index].digest: weights[index].size_bytes for index in block.weights}
                    new = {digest: size_bytes for digest, size_bytes in own.items() if digest not in counted}
                    counted.update(new)
                    found[each] = FusedBlock(each, parent, block.end - block.first, new, [])
                found[each].models.append(name)
                parent = each
        return list(found.values())

    def tree(self) -> dict[str, object]:
        """Return the fused DAG as plain values."""
        logical_bytes = sum(self.bytes_of(name)[0] for name in self)
        unique_bytes = sum(weight.size_bytes for weight in self._weights.values())
        return {
            "models": list(self),
            "logical_bytes": logical_bytes,
            "unique_bytes": unique_bytes,
            "saved_bytes": logical_bytes - unique_bytes,
            "blocks": [block.to_plain() for block in self.blocks()],
        }

    def check_invariants(self) -> None:
        """Raise AssertionError when users and bundles disagree."""
        expected: dict[str, set[str]] = {}
        expected_nodes: dict[bytes, set[str]] = {}
        for name, entry in self._entries.items():
            for weight in entry.bundle.graph.weights:
                expected.setdefault(weight.digest, set()).add(name)
            for node in entry.nodes:
                expected_nodes.setdefault(node, set()).add(name)
        assert expected == self._users, "the users of weights disagree with the bundles"
        assert expected.keys() == self._weights.keys(), "the weights disagree with the bundles"
        assert expected_nodes == self._node_users, "the users of nodes disagree with the bundles"
        expected_counts = Counter(each for entry in self._entries.values() for each in _ids(entry.identities))
        assert expected_counts == self._id_counts, "the counts of ids disagree with the bundles"
        assert len(self._tokens) == len(self._id_counts), "tokens are kept for nobody"


def _not_told_apart(bundle: Bundle, error: CollisionError) -> BundleError:
    return BundleError(f"{bundle.name} is not told apart from what is deployed: {error}", model=bundle.name)


def _named(blocks: Iterable[Block], identities: Identities) -> dict[str, Block]:
    named: dict[str, Block] = {}
    parent = ""
    for block in blocks:
        parent = block_id(block, identities, parent)
        named[parent] = block
    return named


def _ids(found: Identities) -> set[bytes]:
    identities = (*found.inputs, *found.weights, *found.nodes)
    return {each for identity in identities for each in (identity.structure, identity.content, identity.value)}
