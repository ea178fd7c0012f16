"""The operators a bundle may use. A name that is not written here is refused.

Listed are ATen operators that compute a result and nothing else: no mutation, no randomness, no file, no memory beyond
the tensors they are given, no assertion that ends a process. Deliberately absent, even where torch calls them core:
``empty*``, ``new_empty*``, ``empty_like`` (uninitialised memory), ``as_strided*``, ``_reshape_alias`` (views beyond a
tensor), ``set*``, ``resize*``, ``from_file``, ``_unsafe_*``, ``item``, ``nonzero``, ``masked_select``, ``unique*``
(results whose size depends on values), ``rand*``, ``dropout``, every operator that writes to an argument, and the inner
halves of operators that check their arguments only in the outer half, such as ``native_group_norm``.
Some listed operators turn random or stateful by an argument; ``check_node`` refuses that argument.
Pure, callable from any thread. Must not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sidecar.errors import BundleError

if TYPE_CHECKING:
    from sidecar.ir import Argument, Node

# One line per name: the overloads that are allowed.
_GROUPS: dict[str, dict[str, str]] = {
    "arithmetic of two": {
        "add sub mul": "Tensor Scalar",
        "div": "Tensor Scalar Tensor_mode Scalar_mode",
        "true_divide": "Tensor Scalar",
        "floor_divide": "default Scalar",
        "remainder fmod": "Tensor Scalar",
        "rsub": "Tensor Scalar",
        "pow": "Tensor_Tensor Tensor_Scalar Scalar",
        "maximum minimum fmax fmin atan2 logaddexp logaddexp2 hypot": "default",
        "bitwise_and bitwise_or bitwise_xor": "Tensor Scalar",
        "bitwise_left_shift bitwise_right_shift": "Tensor Tensor_Scalar",
        "logical_and logical_or logical_xor": "default",
        "eq ne lt le gt ge": "Tensor Scalar",
        "lerp": "Tensor Scalar",
        "addcmul addcdiv": "default",
    },
    "arithmetic of one": {
        "abs neg sign sgn reciprocal sqrt rsqrt square exp exp2 expm1 log log2 log10 log1p": "default",
        "sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh erf erfc": "default",
        "ceil floor trunc frac isnan isinf isfinite logical_not bitwise_not": "default",
        "round": "default decimals",
        "nan_to_num": "default",
        "clamp": "default Tensor",
        "clamp_min clamp_max": "default Tensor",
        "sigmoid": "default",
    },
    "activations": {
        "relu relu6 elu selu celu gelu silu mish leaky_relu prelu hardtanh hardsigmoid hardswish": "default",
        "softplus log_sigmoid hardshrink softshrink glu": "default",
        "threshold": "default",
        "softmax log_softmax": "int",
    },
    "matrix products": {
        "linear matmul mm bmm mv dot addmm baddbmm addmv outer bilinear": "default",
        "scaled_dot_product_attention": "default",
        "cdist": "default",
        "cosine_similarity": "default",
        "linalg_vector_norm": "default",
        "norm": "Scalar ScalarOpt_dim ScalarOpt_dim_dtype",
    },
    "convolutions": {
        "conv1d conv2d conv3d": "default padding",
        "conv_transpose1d": "default",
        "conv_transpose2d conv_transpose3d": "input",
        "convolution": "default",
    },
    "normalisation": {
        "batch_norm layer_norm group_norm instance_norm rms_norm": "default",
    },
    "recurrence": {
        "lstm gru rnn_tanh rnn_relu": "input",
    },
    "pooling and resampling": {
        "avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d": "default",
        "max_pool2d_with_indices max_pool3d_with_indices": "default",
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d": "default",
        "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d": "default",
        "upsample_nearest1d upsample_nearest2d upsample_nearest3d": "vec",
        "_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d": "vec",
        "upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d": "vec",
        "_upsample_bilinear2d_aa _upsample_bicubic2d_aa": "vec",
        "grid_sampler grid_sampler_2d grid_sampler_3d affine_grid_generator": "default",
        "pixel_shuffle pixel_unshuffle channel_shuffle im2col col2im": "default",
        "pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d": "default",
        "replication_pad1d replication_pad2d replication_pad3d": "default",
    },
    "reductions": {
        "sum": "default dim_IntList",
        "mean": "default dim",
        "prod": "default dim_int",
        "amax amin aminmax": "default",
        "max min": "default dim other",
        "argmax argmin": "default",
        "all any": "default dim dims",
        "var std": "default dim correction",
        "var_mean std_mean": "correction",
        "logsumexp cumsum cumprod logcumsumexp": "default",
        "count_nonzero": "default dim_IntList",
        "cummax cummin": "default",
        "median": "default dim",
    },
    "order": {
        "sort": "default stable",
        "argsort": "default stable",
        "topk kthvalue": "default",
        "searchsorted bucketize": "Tensor",
    },
    "shape": {
        "reshape view view_as reshape_as expand expand_as permute t unsqueeze": "default",
        "transpose": "int",
        "flatten": "using_ints",
        "unflatten": "int",
        "squeeze": "default dim dims",
        "movedim": "int intlist",
        "swapaxes narrow": "default",
        "select": "int",
        "slice": "Tensor",
        "split": "Tensor sizes",
        "split_with_sizes chunk unfold diagonal": "default",
        "unbind": "int",
        "contiguous clone alias detach": "default",
        "cat stack hstack vstack": "default",
        "repeat tile flip roll rot90": "default",
        "repeat_interleave": "self_int",
        "broadcast_to": "default",
        "meshgrid": "default indexing",
        "tril triu diag_embed": "default",
        "sym_size": "int",
        "sym_numel": "default",
    },
    "choice and indexing": {
        "where": "self ScalarSelf ScalarOther Scalar",
        "masked_fill": "Scalar Tensor",
        "index": "Tensor",
        "index_select gather take_along_dim embedding one_hot": "default",
        "index_put masked_scatter": "default",
        "index_fill": "int_Scalar int_Tensor",
        "index_add index_copy": "default",
        "scatter": "src value",
        "scatter_add": "default",
        "scatter_reduce": "two",
        "select_scatter slice_scatter diagonal_scatter": "default",
        "copy": "default",
        "fill": "Scalar Tensor",
    },
    "making tensors": {
        "arange": "default start start_step",
        "full zeros ones eye linspace": "default",
        "scalar_tensor": "default",
        "full_like zeros_like ones_like new_full new_zeros new_ones": "default",
    },
    "change of dtype": {
        "_to_copy": "default",
        "to": "dtype",
        "type_as": "default",
    },
}


def _expand(lines: dict[str, str]) -> frozenset[str]:
    return frozenset(
        f"aten.{base}.{overload}"
        for bases, overloads in lines.items()
        for base in bases.split()
        for overload in overloads.split()
    )


# Arithmetic on sizes, on Python integers.
SYMBOLIC = frozenset({"sym.add", "sym.sub", "sym.mul", "sym.floordiv", "sym.mod", "sym.neg", "sym.max", "sym.min"})

# Operators that finish what the one before them began: they are run together with it, where that is possible.
FINISHING = _expand({"batch_norm layer_norm group_norm instance_norm rms_norm": "default"}) | _expand(_GROUPS["activations"])

# Operators that give a list of tensors, which share memory with their argument.
LISTS = _expand({"split": "Tensor sizes", "split_with_sizes chunk": "default", "unbind": "int", "meshgrid": "default indexing"})

# Everything whose result is a size, not a tensor.
SIZES = SYMBOLIC | {"aten.sym_size.int", "aten.sym_numel.default"}

ALLOWED: frozenset[str] = frozenset().union(*map(_expand, _GROUPS.values()), SYMBOLIC)

# The only strings an operator may be given.
ENUMS = frozenset(
    word
    for words in (
        "none tanh",  # forms of gelu
        "trunc floor",  # rounding of a quotient
        "mean sum prod amax amin",  # reductions
        "constant reflect replicate circular same valid",  # padding
        "ij xy left right",  # order of a mesh, side of a search
    )
    for word in words.split()
)

# Operators that take no tensor, so they must be told the engine's device.
FACTORIES = _expand(
    {"arange": "default start start_step", "full zeros ones eye linspace scalar_tensor": "default"},
)

# Operators that fail when a value they are given, rather than a shape, lies outside a range.
INDEXING = _expand(
    {
        "embedding index_select gather take_along_dim one_hot index_put index_add index_copy scatter_add": "default",
        "masked_scatter": "default",
        "index searchsorted": "Tensor",
        "index_fill": "int_Scalar int_Tensor",
        "scatter": "src value",
        "scatter_reduce": "two",
    }
)

# Arguments that must be one of some constants: operator -> (position, keyword, constants, may it be left out).
_MUST_BE: dict[str, tuple[int, str, tuple[object, ...], bool]] = {
    "aten.scaled_dot_product_attention.default": (4, "dropout_p", (0,), True),
    "aten.batch_norm.default": (5, "training", (False,), False),
    "aten.instance_norm.default": (3, "running_mean", (None,), False),  # it would be written to
    "aten.one_hot.default": (1, "num_classes", tuple(range(1, 4097)), False),  # -1 would look at the values
}
RECURRENT = _expand({"lstm gru rnn_tanh rnn_relu": "input"})
_MAX_LAYER_COUNT = 64
_MISSING = object()


def check_node(node: Node, index: int) -> None:
    """Refuse a node whose operator is not allowed, or is not allowed with its arguments.

    ``index`` is the node's place in the graph, for the message. Raises ``BundleError`` naming operator and node.
    """
    if node.op not in ALLOWED:
        raise BundleError(
            f"node {index}: operator {node.op[:80]!r} is not allowed in a bundle", node=index, operator=node.op[:80]
        )
    if node.op in SYMBOLIC:
        _check_symbolic(node, index)
    elif node.op in RECURRENT:
        _check_recurrent(node, index)
    elif node.op in _MUST_BE:
        position, keyword, allowed, optional = _MUST_BE[node.op]
        found: Argument | object = dict(node.kwargs).get(keyword, _MISSING)
        if len(node.args) > position:
            found = node.args[position]
        if not (optional if found is _MISSING else found in allowed):
            raise BundleError(
                f"node {index}: operator {node.op} is allowed only with a constant {keyword} that makes it a pure function",
                node=index,
                operator=node.op,
            )


def _check_recurrent(node: Node, index: int) -> None:
    """Refuse a recurrent layer whose list of weights has the wrong length, past whose end torch would read."""
    right = False
    if len(node.args) == 9 and not node.kwargs:
        _, state, weights, biases, layers, _, train, both_ways, batch_first = node.args
        right = (
            train is False
            and all(isinstance(flag, bool) for flag in (biases, both_ways, batch_first))
            and type(layers) is int
            and 1 <= layers <= _MAX_LAYER_COUNT
            and isinstance(weights, tuple)
            and len(weights) == layers * (2 if both_ways else 1) * (4 if biases else 2)
            and (isinstance(state, tuple) and len(state) == 2) == (node.op == "aten.lstm.input")
        )
    if not right:
        raise BundleError(
            f"node {index}: {node.op} needs constant settings, no training and all weights of its layers",
            node=index,
            operator=node.op,
        )


def _check_symbolic(node: Node, index: int) -> None:
    wanted = 1 if node.op == "sym.neg" else 2
    if len(node.args) != wanted or node.kwargs or not all(_is_size(argument) for argument in node.args):
        raise BundleError(f"node {index}: {node.op} takes {wanted} sizes", node=index, operator=node.op)


def _is_size(argument: Argument) -> bool:
    if isinstance(argument, (bool, float, tuple, str)) or argument is None:
        return False
    return isinstance(argument, int) or hasattr(argument, "index")
