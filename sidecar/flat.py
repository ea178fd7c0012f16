"""Packed weights as flat bytes, and back without a copy: what lies on disk is what the operators read.

A packed weight becomes *payload* and *meta*. The payload is its weight and its bias, each on a boundary of 64 bytes; the meta
says how to read them. Of a weight in blocks that includes oneDNN's own description of its layout, which oneDNN believes
without a check: a wrong one reads and writes anywhere. So a meta is for the very torch and processor it was made with, which it
names, and must come from a file that this node wrote and whose checksum was compared, never from a bundle.

torch has no Python function for this. Its C interface for compiled models does, which is called through ctypes; where it
is missing, or does not give back what it was given, packed weights stay in memory only. CPU only; callable from any thread.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgpack
import numpy as np
import torch

from sidecar.blocked import Blocked, Layout, over
from sidecar.packed import Packed, available, padded_bytes

SCHEME: Final = 1
_FLOAT_BYTES: Final = 4
_CONV2D: Final = "conv2d"
_BLOCKED: Final = "blocked linear"
_TRANSPOSED: Final = "transposed linear"
# In blocks of channels, which are no secret of oneDNN's: the meta has their layout.
_BLOCKS: Final = "blocks"


@dataclasses.dataclass(frozen=True, slots=True)
class Flat:
    """A packed weight to be written: ``meta``, and a payload of ``size_bytes`` that ``copy_to`` puts where it is wanted."""

    meta: bytes
    size_bytes: int
    _weight: torch.Tensor
    _bias: torch.Tensor | None

    def copy_to(self, target: memoryview) -> None:
        """Write the payload into ``target``, writable, of exactly ``size_bytes`` bytes."""
        assert target.nbytes == self.size_bytes, f"the payload has {self.size_bytes} bytes, its place {target.nbytes}"
        weight, bias = self._weight, self._bias
        weight_bytes = _weight_bytes(weight)
        target[:weight_bytes] = _bytes_of(weight, weight_bytes)
        target[weight_bytes : padded_bytes(weight_bytes)] = bytes(padded_bytes(weight_bytes) - weight_bytes)
        if bias is not None:
            target[padded_bytes(weight_bytes) :] = _bytes_of(bias, bias.nbytes)


@functools.cache
def facts() -> tuple[str, ...]:
    """Return what the layout of packed weights depends on: the versions of torch and oneDNN, and the processor's abilities.

    oneDNN counts these by itself, more finely than torch, and may be told to leave some out. So a digest of what it makes of
    a few weights here is one of the facts. Where ``can_flatten`` is false this may raise what that catches.
    """
    lines = torch.__config__.show().splitlines()
    version = next((line.strip(" -") for line in lines if "MKL-DNN" in line or "oneDNN" in line), "no version")
    layouts = hashlib.sha256()
    for shape, groups in (((64, 64, 3, 3), 1), ((64, 3, 7, 7), 1), ((64, 1, 3, 3), 64), ((64, 64), 0)):
        plain = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
        if groups:
            weight = torch.ops.mkldnn._reorder_convolution_weight(plain, [1, 1], [1, 1], [1, 1], groups)
        else:
            weight = torch.ops.mkldnn._reorder_linear_weight(plain)
        # The bytes themselves: the description has some that were never written, and differ at every start.
        layouts.update(_bytes_of(weight, _weight_bytes(weight)))
    return (torch.__version__, version, torch.backends.cpu.get_cpu_capability(), layouts.hexdigest())


@functools.cache
def can_flatten() -> bool:
    """Return whether this torch can do what this module needs, which is tried with one small convolution."""
    if not available():
        return False
    try:
        _library()
        weight = torch.arange(144, dtype=torch.float32).reshape(4, 4, 3, 3)
        steps = ([1, 1], [1, 1], [1, 1], 1)
        blocked = torch.ops.mkldnn._reorder_convolution_weight(weight, *steps)
        made = flatten(Packed((4, 4, 3, 3), (blocked, None, *steps), torch.ops.mkldnn._nbytes(blocked)))
        payload = memoryview(bytearray(made.size_bytes))
        made.copy_to(payload)
        again = unflatten(made.meta, payload)
        return isinstance(again, Packed) and torch.equal(again.rest[0].to_dense(), weight)
    except (OSError, AttributeError, RuntimeError, ValueError):
        return False


def flatten(packed: Packed | Blocked) -> Flat:
    """Return the flat form of a packed weight. It refers to the weight; nothing is copied yet."""
    if isinstance(packed, Blocked):
        fields = [SCHEME, _fingerprint(), _BLOCKS, list(dataclasses.astuple(packed.layout))]
        return Flat(msgpack.packb(fields, use_bin_type=True), packed.size_bytes, packed.weight, packed.bias)
    weight, bias, *steps = packed.rest
    weight_bytes = _weight_bytes(weight)
    blocked = weight.is_mkldnn
    kind = _CONV2D if steps else _BLOCKED if blocked else _TRANSPOSED
    layout = torch.ops.mkldnn._get_mkldnn_serialized_md(weight).numpy().tobytes() if blocked else b""
    bias_count = None if bias is None else bias.numel()
    fields = [SCHEME, _fingerprint(), kind, list(packed.shape), layout, weight_bytes, bias_count, steps]
    return Flat(msgpack.packb(fields, use_bin_type=True), packed.size_bytes, weight, bias)


def unflatten(meta: bytes, payload: memoryview) -> Packed | Blocked:
    """Return the packed weight whose bytes ``payload`` are, without a copy; the payload, writable, is held as long as needed.

    The payload begins on a boundary of 64 bytes. Raises ValueError when the meta is for another torch or processor, or does
    not fit the payload. What it says beyond that is believed.
    """
    form = _parsed(meta, _fingerprint())
    if isinstance(form, Layout):
        return over(form, payload)
    if payload.nbytes != form.size_bytes:
        raise ValueError(f"the packed weight has {form.size_bytes} bytes, {payload.nbytes} were read; make it anew")
    with torch.inference_mode():
        bias = None
        if form.bias_count is not None:
            bias = torch.frombuffer(payload, dtype=torch.float32, count=form.bias_count, offset=padded_bytes(form.weight_bytes))
        if form.kind == _TRANSPOSED:
            rows, columns = form.shape
            # By numpy, as in ``sidecar.devices``: torch's views let other threads run in between.
            numbers = np.frombuffer(payload, np.float32, rows * columns)
            weight = torch.from_numpy(numbers.reshape(columns, rows).T)
        else:
            weight = _blocked_over(torch.frombuffer(payload, dtype=torch.uint8), form.shape, form.layout)
    return Packed(form.shape, (weight, bias, *form.steps), form.size_bytes)


class _Form(NamedTuple):
    """What a meta says."""

    kind: str
    shape: tuple[int, ...]
    layout: bytes
    weight_bytes: int
    bias_count: int | None
    steps: tuple[Any, ...]
    size_bytes: int


@functools.lru_cache(maxsize=4096)
def _parsed(meta: bytes, fingerprint: bytes) -> _Form | Layout:
    """Return what a meta says, which is the same for every weight of its form. Raises ValueError as ``unflatten`` does."""
    fields = msgpack.unpackb(meta, use_list=True, strict_map_key=True)
    if not isinstance(fields, list) or fields[:2] != [SCHEME, fingerprint]:
        raise ValueError("the packed weight was laid out by another torch or for another processor; make it anew")
    if fields[2] == _BLOCKS:
        blocks: list[Any] = [tuple(field) if isinstance(field, list) else field for field in fields[3]]
        return Layout(*blocks)
    kind, shape, layout, weight_bytes, bias_count, steps = fields[2:]
    if kind != _TRANSPOSED:
        # Nothing is read or written there, so it takes no memory.
        found_bytes = _weight_bytes(_blocked_over(torch.empty(weight_bytes, dtype=torch.uint8), shape, layout))
        if found_bytes != weight_bytes:
            raise ValueError(f"a layout of {found_bytes} bytes is given as one of {weight_bytes}")
    size_bytes = weight_bytes if bias_count is None else padded_bytes(weight_bytes) + bias_count * _FLOAT_BYTES
    return _Form(kind, tuple(shape), layout, weight_bytes, bias_count, tuple(steps), size_bytes)


def _weight_bytes(weight: torch.Tensor) -> int:
    return int(torch.ops.mkldnn._nbytes(weight)) if weight.is_mkldnn else weight.nbytes


@functools.cache
def _fingerprint() -> bytes:
    return hashlib.sha256("\n".join(facts()).encode()).digest()[:8]


# --- torch's C interface ----------------------------------------------------------------------------------------------

_Sizes = ctypes.POINTER(ctypes.c_int64)
_Handle = ctypes.POINTER(ctypes.c_void_p)


@functools.cache
def _library() -> Any:
    """Return torch's library with the types of what is called. Raises OSError, AttributeError where it has no such thing."""
    # The calls are short: to let other threads run meanwhile, and then wait for one's turn, would take a hundred times as long.
    library: Any = ctypes.PyDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    library.aoti_torch_get_data_ptr.argtypes = [ctypes.c_void_p, _Handle]
    library.aoti_torch_delete_tensor_object.argtypes = [ctypes.c_void_p]
    library.aoti_torch_create_tensor_from_blob_v2.argtypes = [
        ctypes.c_void_p,  # the bytes
        ctypes.c_int64,  # dimensions
        _Sizes,
        _Sizes,  # strides, which blocks do not have
        ctypes.c_int64,  # where in the bytes it begins
        ctypes.c_int32,  # dtype
        ctypes.c_int32,  # kind of device
        ctypes.c_int32,  # number of the device
        _Handle,  # the result
        ctypes.c_int32,  # layout
        ctypes.c_void_p,  # oneDNN's description of it
        ctypes.c_int64,  # and its length
    ]
    names = ("aoti_torch_dtype_float32", "aoti_torch_device_type_cpu", "aoti_torch_layout__mkldnn")
    library.float32, library.cpu, library.mkldnn = (getattr(library, name)() for name in names)
    return library


@functools.cache
def _capsules() -> Any:
    import torch._C._aoti as capsules

    return capsules


def _blocked_over(held: torch.Tensor, shape: Sequence[int], layout: bytes) -> torch.Tensor:
    """Return a tensor in oneDNN's layout over the first bytes of ``held``, which it holds on to."""
    library = _library()
    sizes = (ctypes.c_int64 * len(shape))(*shape)
    made = ctypes.c_void_p()
    failed = library.aoti_torch_create_tensor_from_blob_v2(
        held.data_ptr(),
        len(shape),
        sizes,
        sizes,
        0,
        library.float32,
        library.cpu,
        0,
        ctypes.byref(made),
        library.mkldnn,
        layout,
        len(layout),
    )
    if failed:
        raise RuntimeError(f"torch made no tensor of {shape} over {held.nbytes} bytes")
    # The function for a single handle would leave it, and with it the weight, alive for ever.
    (weight,) = _capsules().alloc_tensors_by_stealing_from_void_ptrs([_new_capsule(made.value, None, None)])
    assert isinstance(weight, torch.Tensor)
    # torch itself does not know that these bytes must stay. An attribute lives as long as the tensor, whoever else holds it.
    weight._held = held  # type: ignore[attr-defined]
    return weight


def _bytes_of(tensor: torch.Tensor, size_bytes: int) -> memoryview:
    """Return the bytes of a tensor of any layout as they lie in memory. Valid while the tensor lives."""
    library = _library()
    capsule = _capsules().unsafe_alloc_void_ptr_from_tensor(tensor)
    handle, address = _capsule_pointer(capsule, _capsule_name(capsule)), ctypes.c_void_p()
    failed = library.aoti_torch_get_data_ptr(handle, ctypes.byref(address))
    library.aoti_torch_delete_tensor_object(handle)
    if failed or not address.value:
        raise RuntimeError(f"torch does not tell where a tensor of {size_bytes} bytes lies")
    return memoryview((ctypes.c_ubyte * size_bytes).from_address(address.value)).cast("B")


_new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)
_capsule_name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", ctypes.pythonapi))
_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
