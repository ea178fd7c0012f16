"""The list of operators, as far as it can be judged without torch; ``test_devices`` holds it against torch's own."""

from __future__ import annotations

import re

import pytest

from sidecar import operators
from sidecar.errors import BundleError
from sidecar.ir import Node, Value

X = Value("input", 0)
W = Value("weight", 0)


@pytest.mark.parametrize(
    "banned",
    [
        r"empty",
        r"new_empty",
        r"as_strided",
        r"from_file",
        r"set",
        r"resize",
        r"_reshape_alias",
        r"_unsafe_",
        r"item",
        r"_local_scalar",
        r"nonzero",
        r"masked_select",
        r"unique",
        r"rand",
        r"dropout",
        r"bernoulli",
        r"normal\.",
        r"multinomial",
        r"_assert",
        r"native_group_norm",
        r"native_batch_norm",
        r"_embedding_bag",
        r"einsum",
    ],
)
def test_what_reads_beyond_its_arguments_or_draws_lots_is_not_listed(banned: str) -> None:
    assert not [name for name in operators.ALLOWED if re.match(rf"aten\.{banned}", name)]


def test_no_listed_operator_writes_to_an_argument_by_its_name() -> None:
    for name in operators.ALLOWED:
        kind, *rest = name.split(".")
        assert kind in ("aten", "sym")
        assert not rest[0].endswith("_"), name
        assert "out" not in rest[1:], name


def test_the_special_sets_are_part_of_the_list() -> None:
    for names in (operators.SYMBOLIC, operators.FACTORIES, operators.INDEXING, operators.RECURRENT):
        assert names <= operators.ALLOWED


def test_an_unknown_operator_is_refused_by_name_and_node() -> None:
    with pytest.raises(BundleError, match=r"node 7: operator 'aten.rand.default' is not allowed") as caught:
        operators.check_node(Node("aten.rand.default", ((2, 3),)), 7)
    assert caught.value.details == {"node": 7, "operator": "aten.rand.default"}


RNN = (X, (W, W), (W, W, W, W), True, 1, 0.0, False, False, True)


def changed(position: int, value: object) -> tuple[object, ...]:
    return (*RNN[:position], value, *RNN[position + 1 :])


@pytest.mark.parametrize(
    "node",
    [
        Node("aten.scaled_dot_product_attention.default", (X, X, X)),
        Node("aten.scaled_dot_product_attention.default", (X, X, X, None, 0.0, True)),
        Node("aten.scaled_dot_product_attention.default", (X, X, X), (("dropout_p", 0.0),)),
        Node("aten.batch_norm.default", (X, W, W, W, W, False, 0.1, 1e-5, True)),
        Node("aten.instance_norm.default", (X, W, W, None, None, True, 0.1, 1e-5, True)),
        Node("aten.one_hot.default", (X, 10)),
        Node("aten.lstm.input", RNN),
        Node("aten.gru.input", changed(1, W)),  # type: ignore[arg-type]
        Node("sym.add", (Value("node", 0), 3)),
        Node("sym.neg", (3,)),
    ],
    ids=lambda node: f"{node.op} {len(node.args)}",
)
def test_a_pure_use_is_allowed(node: Node) -> None:
    operators.check_node(node, 0)


@pytest.mark.parametrize(
    "node",
    [
        Node("aten.scaled_dot_product_attention.default", (X, X, X, None, 0.1)),
        Node("aten.scaled_dot_product_attention.default", (X, X, X, None, Value("node", 0))),
        Node("aten.scaled_dot_product_attention.default", (X, X, X), (("dropout_p", 0.5),)),
        Node("aten.scaled_dot_product_attention.default", (X, X, X, None, 0.5), (("dropout_p", 0.0),)),
        Node("aten.batch_norm.default", (X, W, W, W, W, True, 0.1, 1e-5, True)),
        Node("aten.batch_norm.default", (X, W, W, W, W)),
        Node("aten.instance_norm.default", (X, W, W, W, W, True, 0.1, 1e-5, True)),
        Node("aten.one_hot.default", (X,)),
        Node("aten.one_hot.default", (X, -1)),
        Node("aten.lstm.input", changed(6, True)),  # type: ignore[arg-type]
        Node("aten.lstm.input", changed(6, Value("node", 0))),  # type: ignore[arg-type]
        Node("aten.lstm.input", changed(2, (W, W))),  # type: ignore[arg-type]
        Node("aten.lstm.input", changed(4, 3)),  # type: ignore[arg-type]
        Node("aten.lstm.input", changed(4, True)),  # type: ignore[arg-type]
        Node("aten.lstm.input", changed(4, -1)),  # type: ignore[arg-type]
        Node("aten.lstm.input", changed(7, True)),  # type: ignore[arg-type]
        Node("aten.lstm.input", changed(1, (W,))),  # type: ignore[arg-type]
        Node("aten.gru.input", RNN),
        Node("aten.rnn_tanh.input", RNN[:8]),
        Node("sym.add", (3,)),
        Node("sym.add", (3, None)),
        Node("sym.add", (3, 4.0)),
        Node("sym.add", (3, True)),
        Node("sym.neg", (3,), (("x", 1),)),
    ],
    ids=lambda node: f"{node.op} {len(node.args)}",
)
def test_an_impure_or_malformed_use_is_refused(node: Node) -> None:
    with pytest.raises(BundleError, match="node 3: "):
        operators.check_node(node, 3)
