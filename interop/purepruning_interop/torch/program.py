"""A torch module as a flat program of ATen operations: the data."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from purepruning.arguments import wrong_model
from purepruning.shards import refuse_sharded


class Var(NamedTuple):
    """A tensor of the program, by number."""

    number: int


class Sym(NamedTuple):
    """A size that is computed when the program runs, by number; ``hint`` is its value here."""

    number: int
    hint: Any


class Size:
    """A size that depends on data: like no other size."""

    def __mul__(self, other: object) -> Size:
        return self if isinstance(other, int) and other == 1 else Size()

    __rmul__ = __mul__

    def __add__(self, other: object) -> Size:
        return self if isinstance(other, int) and other == 0 else Size()

    __radd__ = __add__


@dataclasses.dataclass(frozen=True)
class Aval:
    """Shape and dtype of a tensor; ``symbolic`` says which sizes depend on the inputs."""

    shape: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device
    symbolic: tuple[bool, ...]


@dataclasses.dataclass
class Op:
    """One operation.

    Attributes:
        name: name of the operator without namespace and overload; a region that is entered leaves
            ``"detach"`` behind.
        target: what is called.
        args: arguments by the names of the schema, with defaults; tensors are :class:`Var`.
        keywords: names of the arguments that are passed by keyword.
        outputs: numbers of the tensors it returns, None for what is no tensor.
        single: whether it returns a tensor rather than a tuple.
        symbol: number of the size it returns, for arithmetic of sizes.
        scope: name of the module it belongs to.
    """

    name: str
    target: Any
    args: dict[str, Any]
    keywords: frozenset[str]
    outputs: tuple[int | None, ...]
    single: bool = True
    symbol: int | None = None
    scope: str = ""

    @property
    def tensors(self) -> list[Var]:
        """All tensors it reads, in order."""
        return [x for x in pytree.tree_leaves(self.args, is_leaf=_is_var) if isinstance(x, Var)]


def _is_var(x: Any) -> bool:
    return isinstance(x, (Var, Sym))


@dataclasses.dataclass
class Program:
    """Operations in order.

    Attributes:
        inputs: numbers of the tensors that are given, in the order of the placeholders; None for
            arguments that are no tensors.
        names: names of the placeholders.
        leaves: path in the state dict of every parameter and buffer, by number.
        constants: tensors the program holds that are not in the state dict, by number.
        outputs: what it returns: :class:`Var`, :class:`Sym` or constants.
        mutations: what a buffer is overwritten with.
        in_spec, out_spec: how arguments and results are packed.
    """

    ops: list[Op]
    avals: list[Aval]
    inputs: list[int | None]
    names: list[str]
    leaves: dict[int, str]
    constants: dict[int, torch.Tensor]
    outputs: list[Any]
    mutations: dict[int, Var]
    in_spec: Any
    out_spec: Any
    dynamic: bool


#: Views that can be made again, and written through.
VIEWS = {
    "slice", "select", "unsqueeze", "squeeze", "transpose", "permute", "t", "alias", "detach",
    "view",
}  # fmt: skip


def check(where: str, model: Any) -> None:
    """Raises TypeError for what is no model of this framework, ValueError for one that is flat."""
    if not isinstance(model, torch.nn.Module):
        raise wrong_model(where, model, "torch", "a torch.nn.Module instance")
    _refuse_flat(where, model)


def _refuse_flat(where: str, model: torch.nn.Module) -> None:
    """Raises ValueError where ``FullyShardedDataParallel`` joined parameters into flat ones."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    for name, module in model.named_modules():
        if isinstance(module, fsdp.FullyShardedDataParallel):
            raise ValueError(
                f"{where}: {repr(name) if name else 'the model'} is a FullyShardedDataParallel, "
                "which joins parameters of several layers into flat ones; shard the model by "
                "torch.distributed.fsdp.fully_shard, which leaves every parameter its shape"
            )


def check_whole(where: str, model: Any) -> None:
    """Raises for what is no model, and for one whose parameters lie over processes."""
    check(where, model)
    refuse_sharded(where, dict(model.named_parameters()))


def is_fully_sharded(module: torch.nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to a module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def leaf_names(model: torch.nn.Module) -> dict[str, str]:
    """Returns for every name in the state dict the first name of that tensor."""
    first: dict[int, str] = {}
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor):
            found[name] = first.setdefault(id(tensor), name)
    return found


def base_name(target: Any) -> str:
    """Returns the name of an operator without namespace, overload and the mark of in-place."""
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.split("::")[1]
        if name.endswith("_") and not name.startswith("__") and mutates(target):
            name = name[:-1]
        return name
    if isinstance(target, torch._ops.HigherOrderOperator):
        return target.name()
    return getattr(target, "__name__", str(target))


def mutates(target: Any) -> bool:
    """Whether an operator writes to an argument."""
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def numel(shape: Sequence[Any]) -> Any:
    """Returns the number of elements, or None where a size is not known."""
    return math.prod(shape) if all(isinstance(n, int) for n in shape) else None
