"""Sharing as a compiler's elimination of common subexpressions is tested: on random families of programs.

Whatever the programs are, the fused DAG holds what is equal once, whoever came first; it forgets exactly what nobody uses;
a program run block by block computes what it computes in one piece; and two things of one name are never taken for one.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import zlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trunkline.protocol import TensorSpec

from sidecar.blocks import Block, cut
from sidecar.bundle import Bundle, graph_digest
from sidecar.devices import TorchDevice, open_device
from sidecar.errors import BundleError
from sidecar.graph import FusedGraph
from sidecar.ir import Argument, Graph, Node, Symbol, Value, Weight
from sidecar.merkle import Tokens, in_domain
from sidecar.operators import SIZES
from sidecar.stages import Key
from sidecar.tenants import qualified, unqualified

WIDTH, BATCH = 4, 3
X = Value("input", 0)


@pytest.fixture(scope="module", autouse=True)
def _small_blocks() -> Iterator[None]:
    """Blocks as small as these programs: some end at narrow places, others are cut apart where several tensors are alive."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sidecar.blocks.SMALLEST_BYTES", WIDTH * 4)
        patched.setattr("sidecar.blocks.LARGEST_BYTES", WIDTH * WIDTH * 4 + 1)
        yield


@pytest.fixture(scope="module")
def device() -> TorchDevice:
    return open_device("cpu")


# --- random programs --------------------------------------------------------------------------------------------------


def content_of(number: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(number)) - 0.5


def content_bytes(number: int, shape: tuple[int, ...]) -> bytes:
    return content_of(number, shape).numpy().tobytes()


class Writer:
    """Writes a program node by node; every tensor is [batch, 4], and every weight [4] or [4, 4]."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.nodes: list[Node] = [Node("aten.sym_size.int", (X, 0), (), "test")]
        self.weights: list[Weight] = []
        self.numbers: list[int] = []
        self.results: list[Value] = []
        self.last = X

    def add(self, op: str, *args: Argument) -> Value:
        self.nodes.append(Node(f"aten.{op}", args, (), "test"))
        return Value("node", len(self.nodes) - 1)

    def weight(self, *shape: int) -> Value:
        number = self.draw.randrange(6)
        content = content_bytes(number, shape)
        made = Weight(hashlib.sha256(content).hexdigest(), "float32", shape, len(content), zlib.crc32(content))
        if made not in self.weights:
            self.weights.append(made)
            self.numbers.append(number)
        return Value("weight", self.weights.index(made))

    def unit(self) -> None:
        """Write a few nodes, most of which take only each other and the last of the unit before."""
        near = [self.last]
        for _ in range(self.draw.randint(1, 5)):
            one, other = self.draw.choice(near), self.draw.choice([*near, X])
            near.append(self.node(one, other))
            if self.last not in near:
                near.append(self.last)
        self.last = near[-1]
        if self.draw.random() < 0.15:
            self.results.append(self.draw.choice(near[1:]))

    def node(self, one: Value, other: Value) -> Value:
        match self.draw.randrange(9):
            case 0 | 1:
                bias = self.weight(WIDTH) if self.draw.random() < 0.5 else None
                return self.add("linear.default", one, self.weight(WIDTH, WIDTH), bias)
            case 2:
                return self.add("add.Tensor", one, self.weight(WIDTH))
            case 3:
                return self.add(self.draw.choice(["add.Tensor", "sub.Tensor", "mul.Tensor"]), one, other)
            case 4:
                return self.add(self.draw.choice(["tanh.default", "relu.default", "sigmoid.default"]), one)
            case 5:
                # Sizes: one from the very beginning, one from here.
                rows = self.draw.choice([Value("node", 0), self.add("sym_size.int", one, 0)])
                return self.add("reshape.default", one, (rows, WIDTH))
            case 6:
                halves = self.add("split.Tensor", one, WIDTH // 2, 1)
                first, second = replace(halves, item=0), replace(halves, item=1)
                return self.add("cat.default", (second, first), 1)
            case 7:
                # Results of one node that are taken one by one, some of them late.
                parts = self.add("split.Tensor", self.add("cat.default", (one, other), 1), WIDTH, 1)
                first, second = replace(parts, item=0), replace(parts, item=1)
                self.last = second
                return self.add("linear.default", first, self.weight(WIDTH, WIDTH))
            case _:
                return self.add("layer_norm.default", one, (WIDTH,), self.weight(WIDTH), self.weight(WIDTH))

    def graph(self) -> Graph:
        results = (*dict.fromkeys(value for value in self.results if value != self.last), self.last)[-4:]
        return Graph(
            symbols=(Symbol("batch", 1, 8),),
            inputs=(TensorSpec("x", "float32", ("batch", WIDTH)),),
            outputs=tuple(TensorSpec(f"y{number}", "float32", ("batch", WIDTH)) for number in range(len(results))),
            weights=tuple(self.weights),
            nodes=tuple(self.nodes),
            results=results,
        )


def program(*seeds: int) -> Graph:
    """Return a program of one part for each seed: programs whose first seeds are equal begin alike."""
    writer = Writer(random.Random())
    for seed in seeds:
        writer.draw.seed(seed)
        for _ in range(writer.draw.randint(1, 4)):
            writer.unit()
    return writer.graph()


def bundle(name: str, graph: Graph) -> Bundle:
    return Bundle(name, "1", graph, graph_digest(graph), "batch", 1e-4, {})


SEEDS = st.integers(0, 2**32)


@st.composite
def families(draw: st.DrawFn) -> list[Bundle]:
    """Two to four programs on one trunk or on parts of it, perhaps two of them equal, perhaps one a stranger."""
    trunk = draw(st.lists(SEEDS, min_size=1, max_size=3))
    made = []
    for number in range(draw(st.integers(2, 4))):
        kept = draw(st.integers(0, len(trunk)))
        made.append(bundle(f"m{number}", program(*trunk[:kept], *draw(st.lists(st.integers(0, 3), min_size=1, max_size=2)))))
    return made


def state(graph: FusedGraph) -> object:
    """Return everything a fused graph says of itself: ids, weights, users, blocks."""
    graph.check_invariants()
    names = list(graph)
    return (
        graph.tree(),
        [(block.id, block.parent, block.node_count, block.weights, block.models) for block in graph.blocks()],
        {digest: graph.users(digest) for digest in sorted(graph.all_weights())},
        {name: (graph.bytes_of(name), graph.nodes_of(name), graph.sharers(name)) for name in names},
        ids(graph),
    )


def ids(graph: FusedGraph) -> set[bytes]:
    return set(graph._id_counts)


def fused(bundles: list[Bundle]) -> FusedGraph:
    made = FusedGraph()
    for each in bundles:
        made.add(each)
    return made


# --- the fused DAG ----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(families())
def test_a_model_under_a_second_name_adds_nothing_to_the_dag(family: list[Bundle]) -> None:
    made = fused(family)
    before_ids, before_blocks = ids(made), [block.id for block in made.blocks()]
    before_weights, before = made.all_weights(), state(made)
    made.add(replace(family[0], name="twin"))
    assert ids(made) == before_ids
    assert [block.id for block in made.blocks()] == before_blocks
    assert made.all_weights() == before_weights
    assert all("twin" in block.models for block in made.blocks() if family[0].name in block.models)
    made.remove("twin")
    # And under its own name it replaces itself.
    made.add(family[0])
    assert state(made) == before


@settings(deadline=None, max_examples=50)
@given(families(), st.randoms(use_true_random=False))
def test_who_came_first_does_not_matter(family: list[Bundle], order: random.Random) -> None:
    first = state(fused(family))
    orders = list(itertools.permutations(family))
    for each in order.sample(orders, min(4, len(orders))):
        assert state(fused(list(each))) == first


@settings(deadline=None, max_examples=50)
@given(families(), families())
def test_removing_restores_what_was_there(family: list[Bundle], others: list[Bundle]) -> None:
    made = fused(family)
    before = state(made)
    strangers = [replace(other, name=f"other-{other.name}") for other in others]
    for other in strangers:
        made.add(other)
    for other in reversed(strangers[1:]):
        made.remove(other.name)
    assert state(made) == state(fused([*family, strangers[0]]))
    made.remove(strangers[0].name)
    assert state(made) == before
    for each in family:
        made.remove(each.name)
    assert state(made) == state(FusedGraph())
    assert not ids(made)


@settings(deadline=None, max_examples=50)
@given(st.lists(SEEDS, min_size=2, max_size=3), SEEDS, SEEDS)
def test_what_programs_have_in_common_at_their_beginning_is_in_the_dag_once(trunk: list[int], one: int, other: int) -> None:
    graphs = [program(*trunk), program(*trunk, one), program(*trunk, other)]
    made = fused([bundle(f"m{number}", graph) for number, graph in enumerate(graphs)])
    tokens = Tokens()
    nodes = [{identity.value for identity in tokens.identify(graph).nodes} for graph in graphs]
    assert nodes[0] <= nodes[1] & nodes[2]
    assert made.nodes_of("m0") == (len(nodes[0]), len(nodes[0]))
    assert set.union(*nodes) <= ids(made)


# --- blocks -----------------------------------------------------------------------------------------------------------


def whole(device: TorchDevice, graph: Graph, x: torch.Tensor) -> list[torch.Tensor]:
    return device.run(device.prepare(graph), [tensor_of(weight) for weight in graph.weights], [x])


def tensor_of(weight: Weight) -> torch.Tensor:
    contents = (content_of(number, weight.shape) for number in range(6))
    return next(each for each in contents if hashlib.sha256(each.numpy().tobytes()).hexdigest() == weight.digest)


def extracted(graph: Graph, block: Block, sizes: dict[Value, int]) -> tuple[Graph, list[Value], list[Value]]:
    """Return a block as a graph of its own, with what it takes and gives, sizes left out.

    Sizes that come from outside stand in it as the numbers they have in this run; they are no tensors to pass along.
    """
    taken = [value for value in block.inputs if value not in sizes]
    given = [value for value in block.outputs if value not in sizes]

    def moved(argument: Argument) -> Argument:
        if isinstance(argument, tuple):
            return tuple(moved(member) for member in argument)
        if not isinstance(argument, Value):
            return argument
        if argument.kind == "weight":
            return replace(argument, index=block.weights.index(argument.index))
        if argument in taken:
            return Value("input", taken.index(argument))
        if argument in block.inputs:
            return sizes[argument]
        assert argument.kind == "node"
        assert block.first <= argument.index < block.end, f"{argument} is neither inside nor taken"
        return replace(argument, index=argument.index - block.first)

    nodes = [replace(node, args=tuple(map(moved, node.args))) for node in graph.nodes[block.first : block.end]]
    part = Graph(
        symbols=(),
        inputs=tuple(TensorSpec(f"i{number}", "float32", ()) for number in range(len(taken))),
        outputs=tuple(TensorSpec(f"o{number}", "float32", ()) for number in range(len(given))),
        weights=tuple(graph.weights[index] for index in block.weights),
        nodes=tuple(nodes),
        results=tuple(moved(value) for value in given),  # type: ignore[misc]
    )
    return part, taken, given


@settings(deadline=None, max_examples=50)
@given(st.lists(SEEDS, min_size=1, max_size=4), SEEDS)
def test_a_program_run_block_by_block_computes_the_same(device: TorchDevice, seeds: list[int], seed: int) -> None:
    graph = program(*seeds)
    x = torch.rand((BATCH, WIDTH), generator=torch.Generator().manual_seed(seed)) - 0.5
    sizes = {Value("node", number): BATCH for number, node in enumerate(graph.nodes) if node.op in SIZES}
    values = {X: x}
    for block in cut(graph):
        part, taken, given = extracted(graph, block, sizes)
        results = device.run(device.prepare(part), [tensor_of(weight) for weight in part.weights], [values[v] for v in taken])
        values.update(zip(given, results, strict=True))
    for result, wanted in zip(graph.results, whole(device, graph, x), strict=True):
        assert torch.equal(values[result], wanted)


def test_the_random_programs_are_of_every_kind_that_matters_to_blocks() -> None:
    """Otherwise the properties above would hold for nothing."""
    found = [(graph, cut(graph)) for graph in (program(seed, seed + 1, seed + 2) for seed in range(200))]
    assert sum(len(blocks) > 3 for _, blocks in found) > 100
    assert any(value.item is not None for _, blocks in found for block in blocks for value in block.outputs)
    assert any(graph.nodes[value.index].op in SIZES for graph, blocks in found for block in blocks for value in block.outputs)
    assert any(len(block.inputs) > 2 for _, blocks in found for block in blocks)
    assert any(len(graph.results) > 1 for graph, _ in found)
    assert any(len(set(graph.nodes)) < len(graph.nodes) for graph, _ in found)


# --- domains ----------------------------------------------------------------------------------------------------------

DOMAINS = ("", "a", "b")


def within(each: Bundle, domain: str) -> Bundle:
    return replace(each, name=qualified(each.name, domain), graph=in_domain(each.graph, domain))


def of_domain(made: FusedGraph, domain: str) -> list[str]:
    return [name for name in made if unqualified(name)[1] == domain]


@settings(deadline=None, max_examples=50)
@given(families(), st.data())
def test_domains_have_nothing_in_common_and_share_within_as_ever(family: list[Bundle], data: st.DataObject) -> None:
    places = [(each, domain) for each in family for domain in DOMAINS]
    order = data.draw(st.permutations(places))
    made = fused([within(each, domain) for each, domain in order])
    made.check_invariants()
    alone = fused(family)
    tree = alone.tree()
    assert made.tree()["unique_bytes"] == len(DOMAINS) * tree["unique_bytes"]  # type: ignore[operator]
    assert made.tree()["logical_bytes"] == len(DOMAINS) * tree["logical_bytes"]  # type: ignore[operator]
    assert len(made.blocks()) == len(DOMAINS) * len(alone.blocks())
    seen: set[object] = set()
    for domain in DOMAINS:
        names = of_domain(made, domain)
        own = {digest for name in names for digest in made.weights(name)}
        own_keys = {key for name in names for stage in made.staged(name).stages for key in (stage.id, stage.block, *stage.gives)}
        own_keys |= {key for name in names for key in made.staged(name).inputs}
        assert not (own | own_keys) & seen
        seen |= own | own_keys
        for name in names:
            model, _ = unqualified(name)
            assert made.sharers(name) == [qualified(each, domain) for each in alone.sharers(model)]
            assert (made.bytes_of(name), made.nodes_of(name)) == (alone.bytes_of(model), alone.nodes_of(model))


@settings(deadline=None, max_examples=50)
@given(families(), st.data())
def test_a_domain_that_goes_leaves_the_others_as_they_are(family: list[Bundle], data: st.DataObject) -> None:
    made = fused([within(each, domain) for domain in ("a", "b") for each in family])
    before = state(fused([within(each, "a") for each in family]))
    for each in data.draw(st.permutations(family)):
        # Some come back, and go again.
        if data.draw(st.booleans()):
            made.remove(f"{each.name}@b")
            made.add(within(each, "b"))
        made.remove(f"{each.name}@b")
    assert state(made) == before
    for each in family:
        made.remove(f"{each.name}@a")
    assert state(made) == state(FusedGraph())
    assert not ids(made)


def read_anew(each: Bundle) -> Bundle:
    return replace(each, graph=replace(each.graph, nodes=(*each.graph.nodes[:1], *each.graph.nodes[1:])))


@settings(deadline=None, max_examples=50)
@given(families())
def test_a_model_of_another_domain_is_known_without_a_look_at_it(family: list[Bundle]) -> None:
    """What is found so is what a look at all of it finds."""
    assert all(read_anew(each).graph.nodes is not each.graph.nodes for each in family)
    known = fused([within(each, domain) for domain in DOMAINS for each in family])
    looked_at = fused([within(read_anew(each), domain) for domain in DOMAINS for each in family])
    assert state(known) == state(looked_at)
    assert [known.staged(name) for name in known] == [looked_at.staged(name) for name in looked_at]


@settings(deadline=None, max_examples=25)
@given(st.lists(SEEDS, min_size=1, max_size=4), SEEDS)
def test_a_program_computes_the_same_in_every_domain(device: TorchDevice, seeds: list[int], seed: int) -> None:
    graph = program(*seeds)
    x = torch.rand((BATCH, WIDTH), generator=torch.Generator().manual_seed(seed)) - 0.5
    wanted = whole(device, graph, x)
    made = fused([within(bundle("m", graph), domain) for domain in DOMAINS])
    for domain in DOMAINS:
        staged = made.staged(qualified("m", domain))
        values: dict[Key, torch.Tensor] = {staged.inputs[0]: x}
        for stage in staged.stages:
            weights = [tensor_of(replace(weight, digest=weight.blob)) for weight in stage.graph.weights]
            given = device.run(device.prepare(stage.graph), weights, [values[key] for key in stage.takes])
            values.update(zip(stage.gives, given, strict=True))
        assert all(torch.equal(values[key], each) for key, each in zip(staged.results, wanted, strict=True))


# --- collisions -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(families(), SEEDS)
def test_a_collision_is_told_and_changes_nothing(family: list[Bundle], seed: int) -> None:
    """Ids of a few bits: some model collides with what is there. It is refused whole, and all others stay as they are."""
    made = FusedGraph()
    made._tokens = Tokens(lambda token: hashlib.sha256(token + b"%d" % seed).digest()[:1])
    accepted: list[Bundle] = []
    for each in family:
        before = state(made)
        try:
            made.add(each)
        except BundleError as error:
            assert each.name in error.message
            assert state(made) == before
        else:
            accepted.append(each)
    assert list(made) == [each.name for each in accepted]
    for each in accepted:
        assert made.bundle(each.name) is each
        # Nothing is counted as common that is not.
        honest = fused(accepted)
        assert made.nodes_of(each.name) == honest.nodes_of(each.name)
        assert made.bytes_of(each.name) == honest.bytes_of(each.name)


def test_a_version_that_collides_does_not_take_the_one_before_it_away() -> None:
    first, second = bundle("m", program(1)), bundle("m", program(2))
    real = {identity.value for identity in Tokens().identify(first.graph).nodes}
    made = FusedGraph()
    made.add(first)
    made.add(bundle("other", program(1, 5)))
    before = state(made)
    seen: set[bytes] = set()

    def colliding(token: bytes) -> bytes:
        seen.add(token)
        found = hashlib.sha256(token).digest()
        return found if found in ids(made) else min(real)

    made._tokens._digest = colliding
    with pytest.raises(BundleError, match="m is not told apart"):
        made.add(second)
    assert seen
    assert state(made) == before
