"""The exported program with other sizes, as a graph module.

Only operations that something was removed from are touched, and of those only what holds a size.
Parameters and buffers are attributes under their own names, so that state dicts keep their keys.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo

from purepruning.coupling.atoms import Axis
from purepruning.coupling.flow import Value, blocks
from purepruning.coupling.interpret import WITHOUT, Shrinking
from purepruning.coupling.plan import Plan
from purepruning_interop.torch.coupling import Analysis
from purepruning_interop.torch.program import Op, Sym, Var
from purepruning_interop.torch.rules import (
    SOURCES,
    dims_of,
    index_axes,
    known_places,
    pad_widths,
    roll_shifts,
    scatter_places,
    slice_of,
)

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


class Mode(torch.nn.Module):
    """Returns whether train() was called last."""

    def forward(self) -> bool:
        """Returns the mode."""
        return self.training


class Packing(_PyTreeCodeGen):
    """How arguments and results are packed; copies of a graph share it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Packing:
        return self


_DROPOUTS = {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"}


def emit(
    found: Analysis,
    dead: np.ndarray,
    plan: Plan,
    state: Mapping[str, torch.Tensor],
    names: Mapping[str, str],
    norms: str,
) -> fx.GraphModule:
    """Returns the program as a module with fewer units.

    Args:
        found: the program and the values of its tensors.
        dead: boolean by unit number.
        plan: the cuts that belong to ``dead``.
        state: the cut parameters and buffers, by path.
        names: every name of the state dict and the path of its leaf.
        norms: ``"original"`` or ``"kept"``.

    Raises:
        OpenSize: the program is dynamic, and one of its open axes loses positions.
    """
    return _Emitter(found, dead, plan, state, names, norms).module()


class _Emitter:
    """One emission: nodes by tensor, made in order."""

    def __init__(
        self,
        found: Analysis,
        dead: np.ndarray,
        plan: Plan,
        state: Mapping[str, torch.Tensor],
        names: Mapping[str, str],
        norms: str,
    ) -> None:
        self.found, self.plan, self.state, self.names = found, plan, state, names
        self.program, self.values = found.program, found.values
        self.s = Shrinking(found.flow, dead[found.numbers], norms)
        self.norms = norms
        self.graph = fx.Graph()
        self.root = torch.nn.Module()
        self.nodes: dict[int, fx.Node] = {}
        self.symbols: dict[int, fx.Node] = {}
        self.makers: dict[int, Op] = {}
        self.index = 0
        self.extras = 0
        self._mode: fx.Node | None = None

    def module(self) -> fx.GraphModule:
        program = self.program
        self._attach_state()
        for name, number in zip(program.names, program.inputs, strict=True):
            node = self.graph.placeholder(name)
            if number is not None:
                self.nodes[number] = node
        for number, path in program.leaves.items():
            self.nodes[number] = self.graph.get_attr(path)
        for index, op in enumerate(program.ops):
            self.index = index
            self.op(op)
        for number, new in program.mutations.items():
            self.call(aten.copy_.default, self.nodes[number], self.nodes[new.number])
        self.graph.output(tuple(self.small(x) for x in program.outputs))
        self.graph.eliminate_dead_code(_stays)
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
        if number not in self.nodes:
            tensor = self.program.constants[number]
            self.nodes[number] = self.constant(self.cut(tensor, self.values[number]))
        return self.nodes[number]

    def cut(self, tensor: torch.Tensor, value: Value) -> torch.Tensor:
        for a, axis in enumerate(value.axes):
            kept = self.s.kept(axis)
            if kept is not None:
                tensor = tensor.index_select(a, torch.as_tensor(kept, device=tensor.device))
        return tensor

    def value(self, x: Var) -> Value:
        return self.values[x.number]

    def open(self, number: int, axis: int) -> bool:
        """Whether the size of an axis depends on the inputs."""
        return self.program.avals[number].symbolic[axis]

    def closed(self, number: int, axis: int) -> None:
        if self.open(number, axis):
            raise OpenSize

    def shape(self, number: int) -> tuple[Any, ...]:
        return self.s.shape(self.values[number])

    # Operations.

    def op(self, op: Op) -> None:
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
            if op.name in EMIT:
                made = EMIT[op.name](self, op)
            elif op.name in SOURCES:
                made = _source(self, op)
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
        numbers = [v.number for v in op.tensors] + [n for n in op.outputs if n is not None]
        return any(self.s.touched(self.values[n]) for n in numbers)

    def as_is(self, op: Op, /, **changes: Any) -> fx.Node:
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
        left = 1
        for n, axis in zip(mean.lengths, mean.axes, strict=True):
            kept = self.s.kept(axis)
            left *= n if kept is None else len(kept)
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
        if np.array_equal(index, np.arange(n)):
            return node
        steps = np.diff(index)
        if len(index) and (not len(steps) or (steps[0] > 0 and (steps == steps[0]).all())):
            step = int(steps[0]) if len(steps) else 1
            return self.call(aten.slice.Tensor, node, axis, int(index[0]), int(index[-1]) + 1, step)
        return self.call(
            aten.index_select.default, node, axis, self.constant(torch.as_tensor(index))
        )

    # What masked models hold at removed positions, for statistics.

    def ghost(self, number: int, axis: int) -> fx.Node:
        """Returns what the masked model holds at removed positions of an axis.

        The node has all axes of the tensor, or broadcasts to them; along ``axis`` it has one
        position for each removed one, or a single one for all of them.
        """
        value = self.values[number]
        return self.ghost_of(value, axis, self.program.avals[number], number)

    def ghost_of(self, value: Value, axis: int, aval: Any, number: int | None) -> fx.Node:
        kept = self.s.kept(value.axes[axis])
        assert kept is not None
        gone = np.setdiff1d(np.arange(value.shape[axis]), kept)
        dead = np.atleast_1d(np.asarray(value.dead[axis], float))
        dead = dead if len(dead) == 1 else dead[gone]
        if np.isfinite(dead).all():
            shape = [1] * value.ndim
            shape[axis] = len(dead)
            return self.constant(torch.as_tensor(dead.reshape(shape)).to(aval.dtype))
        assert number is not None
        op = self.makers[number]
        source = op.tensors[0]
        old = self.value(source)
        if op.name in _MOVED:
            order = _order(op, old, value)
            if order is None:
                raise NotImplementedError(
                    f"no value at removed positions through {op.name}; {WITHOUT}"
                )
            return self.call(aten.permute.default, self.ghost(source.number, order[axis]), order)
        if op.name in ("expand", "expand_as", "broadcast_to", "copy"):
            return self._ghost_spread(op, value, axis)
        if op.name in _RESHAPES:
            place = _same_place(old.shape, value.shape, axis)
            part = self.ghost(source.number, place)
            whole = [-1] * old.ndim
            return self._reshaped_ghost(part, whole, place, axis, value, source.number)
        return self._ghost_elementwise(op, axis, value)

    def _reshaped_ghost(
        self, part: fx.Node, _: Any, place: int, axis: int, value: Value, number: int
    ) -> fx.Node:
        shape: list[Any] = list(self.shape(number))
        full = self.call(
            aten.expand.default,
            part,
            [-1 if d == place else self.size(number, d) for d in range(len(shape))],
        )
        out: list[Any] = list(self.s.shape(value))
        out[axis] = -1
        return self.call(aten.reshape.default, full, out)

    def size(self, number: int, axis: int) -> Any:
        if self.open(number, axis):
            return self.call(aten.sym_size.int, self.node(number), axis)
        return self.shape(number)[axis]

    def _ghost_spread(self, op: Op, value: Value, axis: int) -> fx.Node:
        source = op.args["src"] if op.name == "copy" else op.args["self"]
        old = self.value(source)
        lead = value.ndim - old.ndim
        a = axis - lead
        if a < 0 or old.shape[a] == 1:
            part = self.node(source.number)
        else:
            part = self.ghost(source.number, a)
        for _ in range(lead):
            part = self.call(aten.unsqueeze.default, part, 0)
        return part

    def _ghost_elementwise(self, op: Op, axis: int, value: Value) -> fx.Node:
        changes = {}
        for key, x in op.args.items():
            if not isinstance(x, Var):
                continue
            mine = self.value(x)
            a = axis - (value.ndim - mine.ndim)
            if a < 0 or mine.shape[a] == 1 or mine.axes[a] is None:
                changes[key] = self.node(x.number)
            else:
                changes[key] = self.ghost(x.number, a)
        return self.as_is(op, **changes)

    def moments(
        self,
        node: fx.Node,
        value: Value,
        axes: Sequence[int],
        fewer: int,
        aval: Any,
        number: int | None,
        sizes: Sequence[Any],
    ) -> tuple[fx.Node, fx.Node, fx.Node]:
        """Returns mean, variance and what is left, as over all positions there were."""
        n = math.prod(value.shape[a] for a in axes)
        ghost, axis, gone = self.ghost_over(value, axes, aval, number)
        mean = self.call(aten.div.Scalar, self.total(node, ghost, axes, axis, gone, sizes), n)
        centred = self.call(aten.sub.Tensor, node, mean)
        squares = self.call(aten.mul.Tensor, centred, centred)
        away = None
        touched = [a for a in axes if self.s.kept(value.axes[a]) is not None]
        if touched:
            axis = touched[0]
            kept = self.s.kept(value.axes[axis])
            assert kept is not None
            gone = value.shape[axis] - len(kept)
            off = (
                self.call(aten.neg.default, mean)
                if ghost is None
                else self.call(aten.sub.Tensor, ghost, mean)
            )
            away = self.call(aten.mul.Tensor, off, off)
        variance = self.call(
            aten.div.Scalar, self.total(squares, away, axes, axis, gone, sizes), n - fewer
        )
        return mean, variance, centred

    def ghost_over(
        self, value: Value, axes: Sequence[int], aval: Any, number: int | None
    ) -> tuple[fx.Node | None, int, int]:
        """Returns what is missing from a sum over some axes: its ghost, the axis, how many."""
        for a in axes:
            kept = self.s.kept(value.axes[a])
            if kept is not None and not (np.asarray(value.dead[a]) == 0.0).all():
                return self.ghost_of(value, a, aval, number), a, value.shape[a] - len(kept)
        return None, -1, 0

    def total(
        self,
        node: fx.Node,
        ghost: fx.Node | None,
        axes: Sequence[int],
        axis: int,
        gone: int,
        sizes: Sequence[Any],
        keepdim: bool = True,
    ) -> fx.Node:
        """Returns a sum over some axes, removed positions included."""
        total = self.call(aten.sum.dim_IntList, node, list(axes), keepdim)
        if ghost is None:
            return total
        whole = [gone if a == axis else sizes[a] if a in axes else -1 for a in range(len(sizes))]
        spread = self.call(aten.expand.default, ghost, whole)
        missing = self.call(aten.sum.dim_IntList, spread, list(axes), keepdim)
        return self.call(aten.add.Tensor, total, missing)

    def sizes(self, number: int) -> list[Any]:
        return [self.size(number, a) for a in range(len(self.shape(number)))]


def _stays(node: fx.Node) -> bool:
    """Whether a node matters though nothing reads it."""
    return node.op in ("placeholder", "output") or node.target is aten.copy_.default


_MOVED = {"permute", "transpose", "t", "movedim", "swapaxes", "mT", "numpy_T"}
_RESHAPES = {
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as",
    "reshape_as",
}  # fmt: skip


def _order(op: Op, old: Value, value: Value) -> list[int] | None:
    """Returns which axis of the operand each axis is."""
    n = old.ndim
    if op.name == "permute":
        return [d % n for d in op.args["dims"]]
    order = list(range(n))
    if op.name == "transpose":
        a, b = op.args["dim0"] % n, op.args["dim1"] % n
    elif op.name in ("t", "mT", "numpy_T") and n == 2:
        a, b = 0, 1
    else:
        return None
    order[a], order[b] = order[b], order[a]
    return order


def _same_place(old: Sequence[Any], new: Sequence[Any], axis: int) -> int:
    for left, right in blocks(old, new):
        if right == [axis] and len(left) == 1:
            return left[0]
    raise NotImplementedError(f"a statistic over an axis that a reshape made; {WITHOUT}")


# Operations that hold sizes. Each returns a node, a list of nodes, or None for as it is.


def _sized(e: _Emitter, op: Op, given: Sequence[Any] | None, spare: bool) -> list[Any]:
    """Returns the sizes of a result; ``given`` are those the program was written with."""
    number = op.outputs[0]
    assert number is not None
    found: list[Any] = []
    for d, n in enumerate(e.shape(number)):
        if not e.open(number, d):
            found.append(n)
        elif e.s.kept(e.values[number].axes[d]) is not None:
            found.append(-1)
        elif given is not None:
            found.append(e.small(given[d]))
        else:
            found.append(-1)
    if found.count(-1) > spare:
        raise OpenSize
    return found


def _reshape(e: _Emitter, op: Op) -> Any:
    if op.name == "flatten" or op.name == "ravel":
        return None
    source = e.small(op.tensors[0])
    if op.name == "unflatten":
        number = op.outputs[0]
        assert number is not None
        dim = op.args["dim"] % e.value(op.tensors[0]).ndim
        sizes = [
            n if not e.open(number, dim + i) else -1
            for i, n in enumerate(e.shape(number)[dim : dim + len(op.args["sizes"])])
        ]
        return e.as_is(op, sizes=sizes)
    given = op.args.get("size", op.args.get("shape"))
    return e.call(aten.reshape.default, source, _sized(e, op, given, True))


def _expand(e: _Emitter, op: Op) -> Any:
    number = op.outputs[0]
    assert number is not None
    given = op.args.get("size")
    other = op.args.get("other")
    sizes = []
    for d, n in enumerate(e.shape(number)):
        if not e.open(number, d):
            sizes.append(n)
        elif given is not None:
            sizes.append(e.small(given[d]))
        else:
            sizes.append(e.call(aten.sym_size.int, e.small(other), d))
        if e.open(number, d) and e.s.kept(e.values[number].axes[d]) is not None:
            raise OpenSize
    return e.call(aten.expand.default, e.small(op.args["self"]), sizes)


def _copy(e: _Emitter, op: Op) -> Any:
    number = op.outputs[0]
    assert number is not None
    source, into = op.args["src"], op.args["self"]
    node = e.small(source)
    if e.program.avals[source.number].dtype != e.program.avals[number].dtype:
        node = e.call(aten._to_copy.default, node, dtype=e.program.avals[number].dtype)
    sizes = [
        e.call(aten.sym_size.int, e.small(into), d) if e.open(number, d) else n
        for d, n in enumerate(e.shape(number))
    ]
    return e.call(aten.expand.default, node, sizes)


def _squeeze(e: _Emitter, op: Op) -> Any:
    """Squeezes what had size 1, not what has it now."""
    value = e.value(op.args["self"])
    dims = op.args.get("dim")
    dims = range(value.ndim) if dims is None else [dims] if isinstance(dims, int) else dims
    axes = [d % value.ndim for d in dims if value.shape[d % value.ndim] == 1]
    return e.call(aten.squeeze.dims, e.small(op.args["self"]), axes)


def _slice(e: _Emitter, op: Op) -> Any:
    source, number = op.args["self"], op.outputs[0]
    assert number is not None
    value, out = e.value(source), e.values[number]
    axis = op.args.get("dim", 0) % value.ndim
    if e.s.kept(value.axes[axis]) is None and e.s.kept(out.axes[axis]) is None:
        return None
    if value.shape[axis] == out.shape[axis] and value.axes[axis] is out.axes[axis]:
        return e.small(source)
    e.closed(source.number, axis)
    if op.name == "narrow":
        start, step = op.args["start"] % value.shape[axis], 1
    else:
        start, step = slice_of(op, value.shape[axis])
    places = start + step * np.arange(out.shape[axis])
    return e.pick(
        e.small(source), value.axes[axis], out.axes[axis], places, axis, value.shape[axis]
    )


def _split(e: _Emitter, op: Op) -> Any:
    source = op.tensors[0]
    axis = op.args.get("dim", 0) % e.value(source).ndim
    if e.s.kept(e.value(source).axes[axis]) is None:
        return None
    e.closed(source.number, axis)
    sizes = [e.shape(n)[axis] for n in op.outputs if n is not None]
    return e.call(aten.split_with_sizes.default, e.small(source), sizes, axis)


def _slice_scatter(e: _Emitter, op: Op) -> Any:
    into, source, number = op.args["self"], op.args["src"], op.outputs[0]
    assert number is not None
    value, other, out = e.value(into), e.value(source), e.values[number]
    axis = op.args.get("dim", 0) % value.ndim
    node, other_axes, other_size = e.small(source), list(other.axes), None
    if op.name == "select_scatter":
        node = e.call(aten.unsqueeze.default, node, axis)
        other_axes.insert(axis, None)
        other_size = 1
    else:
        other_size = other.shape[axis]
    n = value.shape[axis]
    places = scatter_places(op, n, other_size)
    assert places is not None
    if (places >= n).all():
        return e.pick(node, other_axes[axis], out.axes[axis], places - n, axis, other_size)
    if all(e.s.kept(x) is None for x in (value.axes[axis], other_axes[axis], out.axes[axis])):
        return None
    e.closed(into.number, axis)
    left, right = e.s.kept(value.axes[axis]), e.s.kept(other_axes[axis])
    left = np.arange(n) if left is None else left
    right = n + (np.arange(other_size) if right is None else right)
    there = np.concatenate([left, right])
    chosen = e.s.kept(out.axes[axis])
    places = places if chosen is None else places[chosen]
    joined = e.call(aten.cat.default, [e.small(into), node], axis)
    return e.by_index(joined, np.searchsorted(there, places), axis, len(there))


def _pad(e: _Emitter, op: Op) -> Any:
    source, number = op.args["self"], op.outputs[0]
    assert number is not None
    value, out = e.value(source), e.values[number]
    node = e.small(source)
    pairs = []
    changed = False
    for axis, low, high in pad_widths(op, value.ndim):
        kept, chosen = e.s.kept(value.axes[axis]), e.s.kept(out.axes[axis])
        if kept is None and chosen is None:
            pairs.append((e.small(low), e.small(high)))
            continue
        e.closed(source.number, axis)
        changed = True
        n = value.shape[axis]
        left = np.arange(n) if kept is None else kept
        inner = left[(left >= max(-low, 0)) & (left < n - max(-high, 0))]
        node = e.by_index(node, np.searchsorted(left, inner), axis, len(left))
        before, total = max(low, 0), out.shape[axis]
        chosen = np.arange(total) if chosen is None else chosen
        behind = total - max(high, 0)
        pairs.append((int((chosen < before).sum()), int((chosen >= behind).sum())))
    if not changed:
        return None
    value_of = op.args.get("value")
    fill = 0 if value_of is None else value_of
    flat = [n for pair in pairs for n in pair]
    return e.call(aten.constant_pad_nd.default, node, flat, fill)


def _roll(e: _Emitter, op: Op) -> Any:
    source, number = op.args["self"], op.outputs[0]
    assert number is not None
    value, out = e.value(source), e.values[number]
    node, rest = e.small(source), []
    shifts = roll_shifts(op, value.shape)
    assert shifts is not None
    for axis, by in shifts:
        if e.s.kept(value.axes[axis]) is None:
            rest.append((axis, e.small(by)))
            continue
        e.closed(source.number, axis)
        places = np.roll(np.arange(value.shape[axis]), by)
        node = e.pick(node, value.axes[axis], out.axes[axis], places, axis, value.shape[axis])
    if rest:
        node = e.call(aten.roll.default, node, [by for _, by in rest], [a for a, _ in rest])
    return node


def _repeat_interleave(e: _Emitter, op: Op) -> Any:
    return e.as_is(op, output_size=None) if "output_size" in op.args else None


def _convolution(e: _Emitter, op: Op) -> Any:
    groups = op.args["groups"]
    if groups == 1:
        return None
    weight, number = op.args["weight"], op.outputs[0]
    assert number is not None
    value = e.value(weight)
    shape = e.s.shape(value)
    if value.leaf is not None:
        path, order = value.leaf
        full = e.plan.shape(path)
        shape = tuple(full[a] for a in order)
    transposed = "transpose" in op.name or op.args.get("transposed", False)
    rank = len(shape) - 2
    if transposed:
        channels = e.shape(number)[-1 - rank]
    else:
        channels = e.shape(op.args["input"].number)[-1 - rank]
    return e.as_is(op, groups=channels // shape[1])


def _layer_norm(e: _Emitter, op: Op) -> Any:
    x, k = op.args["input"], len(op.args["normalized_shape"])
    value = e.value(x)
    axes = list(range(value.ndim - k, value.ndim))
    if all(e.s.kept(value.axes[a]) is None for a in axes):
        return None
    if e.norms == "kept":
        return e.as_is(op, normalized_shape=list(e.shape(x.number)[-k:]))
    aval = e.program.avals[x.number]
    if op.name.endswith("rms_norm"):
        n = math.prod(value.shape[a] for a in axes)
        node = e.small(x)
        ghost, axis, gone = e.ghost_over(value, axes, aval, x.number)
        square = None if ghost is None else e.call(aten.mul.Tensor, ghost, ghost)
        squares = e.call(aten.mul.Tensor, node, node)
        total = e.total(squares, square, axes, axis, gone, e.sizes(x.number))
        variance = e.call(aten.div.Scalar, total, n)
        eps = op.args["eps"]
        eps = torch.finfo(aval.dtype).eps if eps is None else eps
        found = _normalised(e, node, variance, eps)
        return [_scaled(e, found, op.args["weight"], None)]
    _, variance, centred = e.moments(e.small(x), value, axes, 0, aval, x.number, e.sizes(x.number))
    found = _normalised(e, centred, variance, op.args["eps"])
    return [_scaled(e, found, op.args["weight"], op.args["bias"])]


def _normalised(e: _Emitter, centred: fx.Node, variance: fx.Node, eps: float) -> fx.Node:
    inverse = e.call(aten.rsqrt.default, e.call(aten.add.Scalar, variance, eps))
    return e.call(aten.mul.Tensor, centred, inverse)


def _scaled(
    e: _Emitter, node: fx.Node, weight: Var | None, bias: Var | None, lift: int = 0
) -> fx.Node:
    """Returns a normalised tensor scaled and shifted; ``lift`` axes come behind the channels."""

    def lifted(x: Var) -> fx.Node:
        found = e.small(x)
        return e.call(aten.reshape.default, found, [-1] + [1] * lift) if lift else found

    if weight is not None:
        node = e.call(aten.mul.Tensor, node, lifted(weight))
    if bias is not None:
        node = e.call(aten.add.Tensor, node, lifted(bias))
    return node


def _group_norm(e: _Emitter, op: Op) -> Any:
    split, x = e.found.parts[e.index], op.args["input"]
    groups, positions = e.s.kept(split.axes[1]), e.s.kept(split.axes[2])
    count = split.shape[1] if groups is None else len(groups)
    if groups is None and positions is None:
        return None
    if positions is None or e.norms == "kept":
        return e.as_is(op, num_groups=count)
    ndim = len(e.shape(x.number))
    sizes = e.sizes(x.number)
    shape = [sizes[0], count, len(positions), *sizes[2:]]
    node = e.call(aten.reshape.default, e.small(x), shape)
    _, variance, centred = e.moments(
        node, split, list(range(2, split.ndim)), 0, e.program.avals[x.number], None, shape
    )
    found = _normalised(e, centred, variance, op.args["eps"])
    found = e.call(aten.reshape.default, found, [sizes[0], count * len(positions), *sizes[2:]])
    return [_scaled(e, found, op.args["weight"], op.args["bias"], ndim - 2)]


def _batch_norm(e: _Emitter, op: Op) -> Any:
    x = op.args["input"]
    value = e.value(x)
    own = op.args.get("use_input_stats", op.args.get("training", False))
    if not own and op.args.get("running_mean") is not None:
        return None
    axes = [a for a in range(value.ndim) if a > 1 or (a == 0 and op.name != "instance_norm")]
    if all(e.s.kept(value.axes[a]) is None for a in axes) or e.norms == "kept":
        return None
    _, variance, centred = e.moments(
        e.small(x), value, axes, 0, e.program.avals[x.number], x.number, e.sizes(x.number)
    )
    found = _normalised(e, centred, variance, op.args["eps"])
    return [_scaled(e, found, op.args["weight"], op.args["bias"], value.ndim - 2)]


def _mean(e: _Emitter, op: Op) -> Any:
    x = op.args["self"]
    value = e.value(x)
    axes = dims_of(op, value.ndim)
    if e.norms == "kept" or all(e.s.kept(value.axes[a]) is None for a in axes):
        return None
    ghost, axis, gone = e.ghost_over(value, axes, e.program.avals[x.number], x.number)
    if op.name == "sum" and ghost is None:
        return None
    keep = bool(op.args.get("keepdim"))
    total = e.total(e.small(x), ghost, axes, axis, gone, e.sizes(x.number), keep)
    if op.name == "mean":
        total = e.call(aten.div.Scalar, total, math.prod(value.shape[a] for a in axes))
    dtype = op.args.get("dtype")
    return total if dtype is None else e.call(aten._to_copy.default, total, dtype=dtype)


def _var(e: _Emitter, op: Op) -> Any:
    x = op.args["self"]
    value = e.value(x)
    axes = dims_of(op, value.ndim)
    if e.norms == "kept" or all(e.s.kept(value.axes[a]) is None for a in axes):
        return None
    correction = int(op.args["unbiased"]) if "unbiased" in op.args else op.args.get("correction")
    mean, variance, _ = e.moments(
        e.small(x),
        value,
        axes,
        1 if correction is None else correction,
        e.program.avals[x.number],
        x.number,
        e.sizes(x.number),
    )
    if "std" in op.name:
        variance = e.call(aten.sqrt.default, variance)
    found = [variance, mean] if "mean" in op.name else [variance]
    if not op.args.get("keepdim"):
        found = [e.call(aten.squeeze.dims, node, axes) for node in found]
    return found


def _attention(e: _Emitter, op: Op) -> Any:
    query = e.value(op.args["query"])
    if e.s.kept(query.axes[-1]) is None or op.args.get("scale") is not None:
        return None
    return e.as_is(op, scale=query.shape[-1] ** -0.5)  # the temperature stays


def _index(e: _Emitter, op: Op) -> Any:
    source, number = op.args["self"], op.outputs[0]
    assert number is not None
    value, out = e.value(source), e.values[number]
    if op.name == "index_select":
        axis, index = op.args["dim"] % value.ndim, op.args["index"]
    else:
        axes = index_axes(op)
        if len(axes) != 1:
            return None
        axis, index = axes[0], op.args["indices"][axes[0]]
    if e.s.kept(value.axes[axis]) is None:
        return None
    e.closed(source.number, axis)
    places = known_places(e.found.folded.get(index.number), value.shape[axis])
    assert places is not None
    return e.pick(
        e.small(source), value.axes[axis], out.axes[axis], places, axis, value.shape[axis]
    )


def _channel_shuffle(e: _Emitter, op: Op) -> Any:
    x, split = op.args["self"], e.found.parts[e.index]
    groups, positions = e.s.kept(split.axes[1]), e.s.kept(split.axes[2])
    count = split.shape[1] if groups is None else len(groups)
    each = split.shape[2] if positions is None else len(positions)
    sizes = e.sizes(x.number)
    node = e.call(aten.reshape.default, e.small(x), [sizes[0], count, each, *sizes[2:]])
    node = e.call(aten.transpose.int, node, 1, 2)
    return e.call(aten.reshape.default, node, [sizes[0], count * each, *sizes[2:]])


def _source(e: _Emitter, op: Op) -> Any:
    """Makes a tensor of the new sizes, or makes the full one and cuts it."""
    number = op.outputs[0]
    assert number is not None
    value = e.values[number]
    if not e.s.touched(value) and not op.name.endswith("_like"):
        return None
    if "size" in op.args:
        sizes = [
            e.small(given) if e.open(number, d) else n
            for d, (given, n) in enumerate(zip(op.args["size"], e.shape(number), strict=True))
        ]
        if any(e.open(number, d) and e.s.kept(a) is not None for d, a in enumerate(value.axes)):
            raise OpenSize
        return e.as_is(op, size=sizes)
    if op.name.endswith("_like"):
        like = op.args["self"]
        sizes = [
            e.call(aten.sym_size.int, e.small(like), d) if e.open(number, d) else n
            for d, n in enumerate(e.shape(number))
        ]
        aval = e.program.avals[number]
        fill = {"zeros_like": 0, "ones_like": 1, "empty_like": 0}.get(op.name)
        fill = op.args["fill_value"] if fill is None else fill
        return e.call(aten.new_full.default, e.small(like), sizes, e.small(fill), dtype=aval.dtype)
    node = e.as_is(op)
    for a, axis in enumerate(value.axes):
        kept = e.s.kept(axis)
        if kept is not None:
            e.closed(number, a)
            node = e.by_index(node, kept, a, value.shape[a])
    return node


def _fill(e: _Emitter, op: Op) -> Any:
    number, into = op.outputs[0], op.args["self"]
    assert number is not None
    sizes = [
        e.call(aten.sym_size.int, e.small(into), d) if e.open(number, d) else n
        for d, n in enumerate(e.shape(number))
    ]
    value = op.args.get("value", 0)
    if isinstance(value, Var):
        return e.call(aten.expand.default, e.small(value), sizes)
    return e.call(aten.new_full.default, e.small(into), sizes, value)


EMIT: dict[str, Callable[[_Emitter, Op], Any]] = {}


def _fill_table() -> None:
    def add(rule: Callable[[_Emitter, Op], Any], names: str) -> None:
        EMIT.update(dict.fromkeys(names.split(), rule))

    add(
        _reshape,
        "view reshape _unsafe_view flatten ravel unflatten view_as reshape_as "
        "_reshape_alias view_copy",
    )
    add(_expand, "expand expand_as broadcast_to expand_copy")
    add(_copy, "copy")
    add(_squeeze, "squeeze")
    add(_fill, "fill zero")
    add(_slice, "slice narrow")
    add(_split, "split split_with_sizes chunk unsafe_split unsafe_chunk split_with_sizes_copy")
    add(_slice_scatter, "slice_scatter select_scatter")
    add(_pad, "pad constant_pad_nd")
    add(_roll, "roll")
    add(_repeat_interleave, "repeat_interleave")
    add(
        _convolution,
        "convolution conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
    )
    add(_layer_norm, "layer_norm native_layer_norm rms_norm _fused_rms_norm")
    add(_group_norm, "group_norm")
    add(_batch_norm, "batch_norm instance_norm _native_batch_norm_legit native_batch_norm")
    add(_mean, "mean sum")
    add(_var, "var std var_mean std_mean")
    add(_attention, "scaled_dot_product_attention")
    add(_index, "index index_select")
    add(_channel_shuffle, "channel_shuffle native_channel_shuffle")


_fill_table()
