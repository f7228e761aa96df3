"""The emission of one smaller graph: nodes by tensor, made in order."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.fx.graph import _PyTreeInfo

from purepruning.coupling.atoms import Axis
from purepruning.coupling.plan import Plan
from purepruning.coupling.removal import Removal
from purepruning.coupling.value import Value
from purepruning_interop.torch.couple import Analysis
from purepruning_interop.torch.emit.graph_module import (
    Constant,
    Mode,
    OpenSize,
    Packing,
    Shrunk,
    Sizes,
    aten,
    call_layers,
)
from purepruning_interop.torch.program import Op, Sym, Var

_DROPOUTS = {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"}

#: Writes one operator with other sizes: a node, a list of nodes, or None for as it is.
Writer = Callable[["Emitter", Op], Any]


class Emitter:
    """One emission: nodes by tensor, made in order."""

    def __init__(
        self,
        found: Analysis,
        removed: np.ndarray,
        plan: Plan,
        state: Mapping[str, torch.Tensor],
        names: Mapping[str, str],
        norms: str,
        writers: Mapping[str, Writer],
    ) -> None:
        self.writers = writers
        self.found, self.plan, self.state, self.names = found, plan, state, names
        self.program, self.values = found.program, found.values
        self.s = Removal(found.flow, removed[found.numbers], norms)
        self.norms = norms
        self.graph = fx.Graph()
        self.root = torch.nn.Module()
        self.nodes: dict[int, fx.Node] = {}
        self.symbols: dict[int, fx.Node] = {}
        self.makers: dict[int, Op] = {}
        self.index = 0
        self.extras = 0
        self._mode: fx.Node | None = None

    def module(self, closed: frozenset[tuple[int, int]]) -> fx.GraphModule:
        """Returns the whole program as a module that checks sizes which are not open."""
        program = self.program
        self._attach_state()
        for i, (name, number) in enumerate(zip(program.names, program.inputs, strict=True)):
            node = self.graph.placeholder(name)
            if number is not None:
                self.nodes[number] = node
                shape = program.avals[number].shape
                fixed = {a: n for a, n in enumerate(shape) if (i, a) in closed}
                if fixed:
                    self.extra(Sizes(name, fixed), "sizes", node)
        for number, path in program.leaves.items():
            self.nodes[number] = self.graph.get_attr(path)
        for index, op in enumerate(program.ops):
            self.index = index
            self.op(op)
        for number, new in program.mutations.items():
            self.call(aten.copy_.default, self.nodes[number], self.nodes[new.number])
        self.graph.output(tuple(self.small(x) for x in program.outputs))
        self.graph.eliminate_dead_code(_stays)
        call_layers(self.root, self.graph)
        self._name_all_state()
        names = [f"arg_{i}" for i in range(program.in_spec.child(0).num_children)]
        names += list(program.in_spec.child(1).context)
        self.graph._codegen = Packing(_PyTreeInfo(names, program.in_spec, program.out_spec))
        return Shrunk(self.root, self.graph, "Shrunk")

    def _name_all_state(self) -> None:
        """Reads all of the state first: copies keep all keys of the state dict, in its order."""
        reads = [n for n in self.graph.nodes if n.op == "get_attr"]
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            nodes = {name: self.graph.get_attr(name) for name in self.names}
        for old in reads:
            old.replace_all_uses_with(nodes[old.target])
            self.graph.erase_node(old)

    def _attach_state(self) -> None:
        made: dict[str, torch.Tensor] = {}
        for name, path in self.names.items():
            owner = self.root
            *parents, last = name.split(".")
            for part in parents:
                if part not in owner._modules:
                    owner.add_module(part, torch.nn.Module())
                owner = owner.get_submodule(part)
            tensor = made.setdefault(path, self.state[path])
            if isinstance(tensor, torch.nn.Parameter):
                owner.register_parameter(last, tensor)
            else:
                owner.register_buffer(last, tensor)

    # Nodes.

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Returns the node that calls an operator."""
        return self.graph.call_function(target, args, kwargs)

    def extra(self, module: torch.nn.Module, name: str, *args: Any) -> fx.Node:
        """Returns the call of a module without parameters that is added to the model."""
        self.extras += 1
        name = f"_{name}_{self.extras}"
        module.train(False)
        self.root.add_module(name, module)
        return self.graph.call_module(name, args)

    def mode(self) -> fx.Node:
        """Returns whether the model is in training, for what depends on it."""
        if self._mode is None:
            self._mode = self.extra(Mode(), "mode")
        return self._mode

    def constant(self, tensor: torch.Tensor) -> fx.Node:
        """Returns a node that gives a tensor, which moves with the model."""
        return self.extra(Constant(tensor), "constant")

    def small(self, x: Any) -> Any:
        """Returns an argument with nodes for tensors and sizes."""
        if isinstance(x, Var):
            return self.node(x.number)
        if isinstance(x, Sym):
            return self.symbols[x.number]
        if isinstance(x, (list, tuple)):
            return [self.small(y) for y in x]
        return x

    def node(self, number: int) -> fx.Node:
        """Returns the node of a small tensor."""
        if number not in self.nodes:
            tensor = self.program.constants[number]
            self.nodes[number] = self.constant(self.cut(tensor, self.values[number]))
        return self.nodes[number]

    def cut(self, tensor: torch.Tensor, value: Value) -> torch.Tensor:
        """Returns what is left of a full tensor."""
        for a, axis in enumerate(value.axes):
            kept = self.s.kept(axis)
            if kept is not None:
                tensor = tensor.index_select(a, torch.as_tensor(kept, device=tensor.device))
        return tensor

    def value(self, x: Var) -> Value:
        """Returns what is known of a tensor."""
        return self.values[x.number]

    def open(self, number: int, axis: int) -> bool:
        """Whether the size of an axis depends on the inputs."""
        return self.program.avals[number].symbolic[axis]

    def closed(self, number: int, axis: int) -> None:
        """Raises OpenSize if the size of an axis depends on the inputs."""
        if self.open(number, axis):
            raise OpenSize

    def shape(self, number: int) -> tuple[Any, ...]:
        """Returns the shape of a small tensor."""
        return self.s.shape(self.values[number])

    def size(self, number: int, axis: int) -> Any:
        """Returns one size of a small tensor: a number, or a node where it is open."""
        if self.open(number, axis):
            return self.call(aten.sym_size.int, self.node(number), axis)
        return self.shape(number)[axis]

    def sizes(self, number: int) -> list[Any]:
        """Returns all sizes of a small tensor."""
        return [self.size(number, a) for a in range(len(self.shape(number)))]

    # Operations.

    def op(self, op: Op) -> None:
        """Writes one operation."""
        if op.symbol is not None:
            self.symbols[op.symbol] = self.as_is(op)
            return
        for number in op.outputs:
            if number is not None:
                self.makers[number] = op
        made: Any = None
        if op.name in _DROPOUTS and not op.args["train"]:
            made = self.as_is(op, train=self.mode())
        elif op.name == "batch_norm" and not op.args["training"]:
            made = self.as_is(op, training=self.mode())
        elif self.touched(op):
            writer = self.writers.get(op.name)
            made = None if writer is None else writer(self, op)
        if (mean := self.mean(op)) is not None:
            made = self.call(aten.div.Scalar, self.as_is(op), mean)
        if made is None:
            made = self.as_is(op)
        if op.single and isinstance(made, list):
            made = made[0]
        if isinstance(made, list):
            for number, node in zip(op.outputs, made, strict=False):
                if number is not None and node is not None:
                    self.nodes[number] = node
        elif op.single:
            assert op.outputs[0] is not None
            self.nodes[op.outputs[0]] = made
        else:
            for i, number in enumerate(op.outputs):
                if number is not None:
                    self.nodes[number] = self.call(operator.getitem, made, i)

    def touched(self, op: Op) -> bool:
        """Whether anything is removed from what the operation reads or makes."""
        numbers = [v.number for v in op.tensors] + [n for n in op.outputs if n is not None]
        return any(self.s.touched(self.values[n]) for n in numbers)

    def as_is(self, op: Op, /, **changes: Any) -> fx.Node:
        """Returns the operation on small tensors, with some arguments changed."""
        args = {k: changes.get(k, self.small(v)) for k, v in op.args.items()}
        return self.graph.call_function(
            op.target,
            tuple(v for k, v in args.items() if k not in op.keywords),
            {k: v for k, v in args.items() if k in op.keywords},
        )

    def mean(self, op: Op) -> float | None:
        """Returns by how much more a mean over what is kept would divide."""
        if self.norms != "kept" or op.name not in ("div", "mul", "divide", "true_divide"):
            return None
        mean = self.found.flow.means.get((self.index, ""))
        if mean is None:
            return None
        left = math.prod(self.s.sizes(mean.lengths, mean.axes))
        return left / mean.size if left != mean.size else None

    # Parts of axes.

    def pick(
        self, node: fx.Node, old: Axis, new: Axis, places: np.ndarray, axis: int, n: int
    ) -> fx.Node:
        """Returns positions of an axis, given as those of the full one, of what is left of it."""
        kept, chosen = self.s.kept(old), self.s.kept(new)
        places = places if chosen is None else places[chosen]
        index = places if kept is None else np.searchsorted(kept, places)
        return self.by_index(node, index, axis, n if kept is None else len(kept))

    def by_index(self, node: fx.Node, index: np.ndarray, axis: int, n: int) -> fx.Node:
        """Returns the positions of an axis of size ``n``, as a slice where one will do."""
        if np.array_equal(index, np.arange(n)):
            return node
        steps = np.diff(index)
        if len(index) and (not len(steps) or (steps[0] > 0 and (steps == steps[0]).all())):
            step = int(steps[0]) if len(steps) else 1
            return self.call(aten.slice.Tensor, node, axis, int(index[0]), int(index[-1]) + 1, step)
        return self.call(
            aten.index_select.default, node, axis, self.constant(torch.as_tensor(index))
        )


def _stays(node: fx.Node) -> bool:
    """Whether a node matters though nothing reads it."""
    checks = node.op == "call_module" and str(node.target).startswith("_sizes_")
    return checks or node.op in ("placeholder", "output") or node.target is aten.copy_.default
