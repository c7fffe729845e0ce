"""The tensors in a pickle of `torch.save`: the functions and classes of PyTorch that it names, as data.

`CALLS` is the table of `pickle_program.evaluate`. A tensor is a call of a function with a storage, an offset,
a shape and strides, all of which are checked. Does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ascendit.checkpoint.pickle_program import ConvertibleError, Opaque, PickleDataError
from ascendit.checkpoint.tensor_info import DTYPE_BITS, TORCH_DTYPES

_MAX_AXES = 8
_STORAGES = {
    "Double": "F64",
    "Float": "F32",
    "Half": "F16",
    "BFloat16": "BF16",
    "ComplexFloat": "C64",
    "Long": "I64",
    "Int": "I32",
    "Short": "I16",
    "Char": "I8",
    "Byte": "U8",
    "Bool": "BOOL",
}
"""`torch.<key>Storage` -> safetensors dtype of its elements."""
_DTYPES = {torch: dtype for dtype, torch in TORCH_DTYPES.items()}
_OPAQUE = (
    *("builtins.set", "builtins.frozenset", "builtins.complex", "builtins.bytearray", "_codecs.encode"),
    *(
        "collections.Counter",
        "torch.device",
        "torch.serialization._get_layout",
        "torch_npu.npu._format.Format",
    ),
)
"""Functions of values that are no part of a tensor."""


@dataclass(frozen=True)
class Storage:
    """The bytes of one storage in the file."""

    dtype: str | None
    """None: untyped bytes."""
    start: int
    nbytes: int


@dataclass(frozen=True)
class PickledTensor:
    """A tensor in the pickle, checked against its storage. `start`, `end`: bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    strides: tuple[int, ...] | None
    """None: contiguous."""


def storages(members: Mapping[str, tuple[int, int]]) -> Callable[[object], Storage]:
    """A function of the persistent id of a storage. `members`: name -> (start, end) of its bytes in the file.

    The function raises PickleDataError for a storage that is missing, or of another size.
    """

    def storage(key: object) -> Storage:
        match key:
            case ("storage", _Type() as kind, str(name), str(), int(count)):
                start, end = members.get(f"data/{name}", (0, -1))
                bits = 8 if kind.dtype is None else DTYPE_BITS[kind.dtype]
                if end - start != count * bits // 8:
                    raise PickleDataError(f"the storage {name!r:.40} is missing, or has another size")
                return Storage(kind.dtype, start, end - start)
        raise PickleDataError("a reference that is no storage of a tensor")

    return storage


@dataclass(frozen=True)
class _Type:
    """A class of storages, or a dtype. `dtype`: of safetensors; None: untyped storage."""

    dtype: str | None


def _calls() -> dict[str, Any]:
    calls: dict[str, Any] = {
        "collections.OrderedDict": _empty_dict,
        "torch.Size": _naturals,
        "torch.Tensor": _Type(None),
        "torch.nn.parameter.Parameter": _Type(None),
        "torch.storage.UntypedStorage": _Type(None),
        "torch._utils._rebuild_tensor": _typed,
        "torch._utils._rebuild_tensor_v2": _typed,
        "torch._utils._rebuild_tensor_v3": _untyped,
        "torch._utils._rebuild_parameter": lambda tensor, *_: _is_tensor(tensor),
        "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: _is_tensor(tensor),
        "torch._tensor._rebuild_from_type_v2": _with_attributes,
        "torch_npu.utils.storage._rebuild_npu_tensor": _from_npu,
    }
    calls |= {f"torch.{name}Storage": _Type(dtype) for name, dtype in _STORAGES.items()}
    calls |= {f"torch.{name}": _Type(dtype) for name, dtype in _DTYPES.items()}
    calls |= dict.fromkeys(_OPAQUE, lambda *_: Opaque())
    return calls


def _empty_dict() -> dict[Any, Any]:
    return {}


def _is_tensor(value: object) -> PickledTensor:
    if not isinstance(value, PickledTensor):
        raise PickleDataError("a parameter that is no tensor")
    return value


def _with_attributes(function: object, kind: object, arguments: object, *_: object) -> PickledTensor:
    """A tensor or parameter with attributes of its own, which are ignored."""
    if function not in (_typed, _untyped) or kind != _Type(None) or type(arguments) is not tuple:
        raise PickleDataError("a tensor of a class of its own")
    return function(*arguments[:9])


def _typed(
    storage: object, offset: object, shape: object, strides: object, *options: object
) -> PickledTensor:
    """`_rebuild_tensor_v2`. `options`: requires_grad, hooks, metadata."""
    if not isinstance(storage, Storage) or storage.dtype is None:
        raise PickleDataError("a tensor with an unknown storage")
    _check_metadata(options[2:])
    return _tensor(storage, storage.dtype, offset, shape, strides)


def _from_npu(*arguments: object) -> PickledTensor:
    """A tensor that torch_npu saved. Its numbers are in the order of PyTorch; the last argument is the format
    of its copy on an NPU.
    """
    return _typed(*arguments[:6])


def _untyped(
    storage: object, offset: object, shape: object, strides: object, *options: object
) -> PickledTensor:
    """`_rebuild_tensor_v3`. `options`: requires_grad, hooks, dtype, metadata."""
    dtype = options[2].dtype if len(options) > 2 and isinstance(options[2], _Type) else None
    if not isinstance(storage, Storage) or dtype is None:
        raise PickleDataError("a tensor with an unknown storage or dtype")
    _check_metadata(options[3:])
    return _tensor(storage, dtype, offset, shape, strides)


def _check_metadata(metadata: tuple[object, ...]) -> None:
    """Raise ConvertibleError for metadata such as the negative bit, which changes the numbers."""
    match metadata:
        case ({"neg": True} | {"conj": True},):
            raise ConvertibleError("a tensor that is stored negated or conjugated, such as a view of torch")
    if any(metadata):
        raise PickleDataError("a tensor with unknown metadata")


def _tensor(storage: Storage, dtype: str, offset: object, shape: object, strides: object) -> PickledTensor:
    """Check a tensor against its storage: its elements are inside, and each is there once."""
    shape, strides = _naturals(shape), _naturals(strides)
    (first,) = _naturals((offset,))
    if len(shape) != len(strides):
        raise PickleDataError("a tensor with another number of strides than of axes")
    nbytes, count = DTYPE_BITS["U8" if dtype == "F4" else dtype] // 8, math.prod(shape)
    last = (
        first + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if count
        else first - 1
    )
    if (last + 1) * nbytes > storage.nbytes:
        raise PickleDataError(f"a tensor of shape {list(shape)}, larger than its storage")
    if count * nbytes > storage.nbytes:
        raise ConvertibleError(f"a tensor of shape {list(shape)} that repeats elements of its storage")
    start, end = (storage.start + index * nbytes for index in (first, last + 1))
    strided = count > 0 and not _contiguous(shape, strides)
    if dtype == "F4":
        if not shape or strided:
            raise PickleDataError("an FP4 tensor that is not contiguous")
        shape = (*shape[:-1], 2 * shape[-1])
    return PickledTensor(dtype, shape, start, end, strides if strided else None)


def _contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    size = 1
    for n, stride in zip(shape[::-1], strides[::-1], strict=True):
        if n != 1 and stride != size:
            return False
        size *= n
    return True


def _naturals(values: object) -> tuple[int, ...]:
    correct = type(values) is tuple and len(values) <= _MAX_AXES
    if not correct or not all(type(v) is int and 0 <= v < 2**48 for v in values):  # type: ignore[attr-defined]
        raise PickleDataError("a tensor with an invalid shape, stride or offset")
    return values  # type: ignore[return-value]


CALLS = _calls()
"""The names that a pickle of tensors may have; only functions are called."""
