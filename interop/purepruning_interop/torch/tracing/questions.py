"""What a module asks its tensors while it is recorded, and what it does past the operations."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from purepruning_interop.torch.tracing.shapes import Unusual


class Questions(TorchFunctionMode):
    """Answers where tensors are; refuses what is asked or done past the operations."""

    def __init__(self, recorder: Any) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls a function."""
        recorder = self.recorder
        if func in _ASKS_FOR_VALUES and recorder.knows(args[0]):
            return func(*args, **(kwargs or {}))
        past = func in _PAST_THE_OPERATIONS and not isinstance(_asked(args, kwargs), torch.dtype)
        if past or (func in _OF_GRADIENTS and args[0].is_meta):
            recorder.failed = True
            raise Unusual(f"{func} is no operation")
        if torch.is_autocast_enabled(recorder.device.type):
            recorder.failed = True
            raise Unusual("types that depend on the device")
        if func in _PLACES and args[0].is_meta:
            return _PLACES[func](recorder.device)
        if func is _Tensor.type and isinstance(_asked(args, kwargs), torch.dtype):
            return args[0].to(_asked(args, kwargs))
        if func in _INDEXING:
            args = (args[0], _with_values(args[1]), *args[2:])
        return func(*args, **(kwargs or {}))


_Tensor: Any = torch.Tensor  # its attributes are descriptors, which type checkers do not know


_PLACES: dict[Any, Any] = {
    _Tensor.device.__get__: lambda device: device,
    _Tensor.is_cpu.__get__: lambda device: device.type == "cpu",
    _Tensor.is_cuda.__get__: lambda device: device.type == "cuda",
    _Tensor.is_meta.__get__: lambda device: device.type == "meta",
}


def _asked(args: Any, kwargs: Any) -> Any:
    """Returns the second argument of ``Tensor.type``."""
    return args[1] if len(args) > 1 else (kwargs or {}).get("dtype")


_INDEXING = {_Tensor.__getitem__, _Tensor.__setitem__}


def _with_values(index: Any) -> Any:
    """Returns an index with tensors for lists, which torch would make tensors without values of."""
    if isinstance(index, tuple):
        return tuple(_with_values(part) for part in index)
    if isinstance(index, list) and all(isinstance(n, (int, bool)) for n in index):
        with _disable_current_modes():
            return torch.tensor(index)
    return index


_OF_GRADIENTS = {
    _Tensor.requires_grad.__get__,
    _Tensor.grad_fn.__get__,
    _Tensor.is_leaf.__get__,
    _Tensor.is_inference,
}


_ASKS_FOR_VALUES = {_Tensor.tolist, _Tensor.numpy, _Tensor.__array__}


_PAST_THE_OPERATIONS = {
    _Tensor._base.__get__,
    _Tensor._is_view,
    _Tensor.__array__,
    _Tensor.__dlpack__,
    _Tensor.data.__set__,
    _Tensor.data_ptr,
    _Tensor.grad.__set__,
    _Tensor.numpy,
    _Tensor.requires_grad.__set__,
    _Tensor.requires_grad_,
    _Tensor.storage,
    _Tensor.tolist,
    _Tensor.type,
    _Tensor.untyped_storage,
}
