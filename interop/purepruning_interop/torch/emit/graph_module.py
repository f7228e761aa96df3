"""The modules that a smaller graph is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.graph import _PyTreeCodeGen

aten = torch.ops.aten


class OpenSize(Exception):
    """An axis of open size is cut by position: the program must be of fixed sizes."""


class Shrunk(fx.GraphModule):
    """A graph module whose copies share the description of its arguments."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        info = self.graph._codegen.pytree_info  # type: ignore[attr-defined]
        for spec in (info.in_spec, info.out_spec):
            memo[id(spec)] = spec
        return super().__deepcopy__(memo)


class Constant(torch.nn.Module):
    """Returns a tensor that moves with the model and is not in its state dict."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("tensor", tensor, persistent=False)

    def forward(self) -> torch.Tensor:
        """Returns the tensor."""
        return self.tensor  # type: ignore[return-value]


class Called(torch.nn.Module):
    """A layer of a graph, an operator with its weight and bias, whose calls hooks can see."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, operator: str, settings: tuple[Any, ...]) -> None:
        super().__init__()
        self.operator, self.settings = operator, settings

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the layer's output."""
        operator = getattr(aten, self.operator).default
        return operator(x, self.weight, self.bias, *self.settings)

    def extra_repr(self) -> str:
        """Returns the operator, and the shape of the weight."""
        return f"{self.operator}, weight={tuple(self.weight.shape)}"


def call_layers(root: torch.nn.Module, graph: fx.Graph) -> None:
    """Makes modules of operators that read a weight and bias of one module, and of no other.

    So the layers of a graph can be captured and replaced as those of the module that it is of.
    """
    for node in list(graph.nodes):
        name = _layer(node)
        owner = root.get_submodule(name) if name else None
        if owner is None or set(owner._parameters) - {"weight", "bias"} or owner._modules:
            continue
        if type(owner) is torch.nn.Module:
            layer = Called(node.target._schema.name.split("::")[1], tuple(node.args[3:]))
            layer.register_parameter("weight", owner.weight)  # type: ignore[arg-type]
            layer.register_parameter("bias", owner._parameters.get("bias"))
            for key, buffer in owner._buffers.items():
                layer.register_buffer(key, buffer)
            root.set_submodule(name, layer)
        elif not isinstance(owner, Called) or owner.settings != tuple(node.args[3:]):
            continue
        with graph.inserting_before(node):
            called = graph.call_module(name, (node.args[0],))
        node.replace_all_uses_with(called)
        graph.erase_node(node)


def _layer(node: fx.Node) -> str:
    """Returns the name of the module whose weight and bias a node reads; empty for none."""
    if node.target not in _LAYERS or node.kwargs or len(node.args) < 2:
        return ""
    weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
    reads = [x for x in (weight, bias) if isinstance(x, fx.Node)]
    if not reads or weight is not reads[0] or any(x.op != "get_attr" for x in reads):
        return ""
    name = str(reads[0].target).removesuffix(".weight")
    plain = [str(x.target) for x in reads] == [f"{name}.weight", f"{name}.bias"][: len(reads)]
    settings = any(isinstance(x, fx.Node) for x in torch.utils._pytree.tree_leaves(node.args[3:]))
    return name if plain and not settings else ""


_LAYERS = frozenset(
    getattr(aten, name).default for name in ("linear", "convolution", "conv1d", "conv2d", "conv3d")
)


class Mode(torch.nn.Module):
    """Returns whether train() was called last."""

    def forward(self) -> bool:
        """Returns the mode."""
        return self.training


class Sizes(torch.nn.Module):
    """Refuses an input of other sizes than the graph was made for."""

    def __init__(self, name: str, sizes: Mapping[int, int]) -> None:
        super().__init__()
        self.name, self.sizes = name, dict(sizes)

    def forward(self, x: torch.Tensor) -> None:
        """Raises ValueError for other sizes."""
        if x.ndim <= max(self.sizes):
            raise ValueError(f"{self.name} must have more than {max(self.sizes)} axes")
        for axis, size in self.sizes.items():
            if x.shape[axis] != size:
                raise ValueError(
                    f"this graph takes {self.name} of size {size} along axis {axis}, got "
                    f"{x.shape[axis]}; shrink the model with an example of that size"
                )


class Packing(_PyTreeCodeGen):
    """How arguments and results are packed; copies of a graph share it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Packing:
        return self
