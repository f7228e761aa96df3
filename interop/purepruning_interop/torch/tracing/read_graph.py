"""A graph of ATen operations becomes a program.

In-place operations turn into their functional twins, and regions without gradients are entered.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Collection
from typing import Any

import torch

from purepruning_interop.torch.program import VIEWS, Aval, Op, Program, Size, Sym, Var, base_name


@dataclasses.dataclass
class Source:
    """A graph, and what its placeholders and results are.

    Attributes:
        root: what holds the graph, and regions by name.
        given: the placeholders that are arguments, in order.
        state: placeholders of parameters and buffers, with the path in the state dict.
        constants: placeholders of other tensors, with the tensor.
        outputs: which results are the module's.
        mutations: which result a buffer is overwritten with, by path.
        in_spec, out_spec: how arguments and results are packed.
    """

    root: Any
    given: list[Any]
    state: dict[Any, str]
    constants: dict[Any, torch.Tensor]
    outputs: list[int]
    mutations: dict[str, int]
    in_spec: Any = None
    out_spec: Any = None


def read(source: Source, dynamic: bool = False) -> Program:
    """Returns the program of a graph.

    Args:
        source: the graph; :func:`hidden_writes` is false of it, and its regions.
        dynamic: whether sizes are open.
    """
    return _Reader(source, dynamic).program


#: Operations that may return their argument itself, though their schema does not say so.
_MAY_RETURN_ARGUMENT = {
    "dropout",
    "feature_dropout",
    "alpha_dropout",
    "feature_alpha_dropout",
    "type_as",
    "lift_fresh",
    "pad",
}


#: Regions that only switch something on or off, and the place of the inner graph.
REGIONS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}


def _functional(target: Any) -> Any:
    """Returns the operator that computes what an in-place one writes, or None."""
    if target is torch.ops.aten.bernoulli_.float:  # whose twin has another overload's name
        return torch.ops.aten.bernoulli.p
    namespace, _, name = target._schema.name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    overload = getattr(packet, target._overloadname, None) if packet is not None else None
    if overload is None or overload._schema.is_mutable:
        return None
    mine, theirs = target._schema.arguments, overload._schema.arguments
    return overload if len(mine) == len(theirs) else None


def readable(target: Any, known: Collection[str]) -> bool:
    """Whether an operation has a rule, or a meaning of its own."""
    if isinstance(target, torch._ops.OpOverload):
        return base_name(target) in known
    return True  # arithmetic of sizes, regions; other higher-order operators have no decomposition


def hidden_writes(graph: Any) -> bool:
    """Whether an operation writes to memory that is read under another name later."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    owner: dict[Any, Any] = {}

    def root(node: Any) -> Any:
        while owner.get(node, node) is not node:
            node = owner[node]
        return node

    writes: list[tuple[Any, Any]] = []
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        name = base_name(node.target)
        if isinstance(node.target, torch._ops.OpOverload):
            schema = node.target._schema
            given = _named(node)
            for argument in schema.arguments:
                alias, value = argument.alias_info, given[argument.name]
                if alias is None or not isinstance(value, torch.fx.Node):
                    continue
                if alias.is_write:
                    writes.append((node, value))
                    if _functional(node.target) is None:
                        return True
                owner[root(node)] = root(value)
        if name in _MAY_RETURN_ARGUMENT or node.target is operator.getitem:
            owner[root(node)] = root(node.args[0])
    groups: dict[Any, list[Any]] = {}
    for node in order if writes else ():
        groups.setdefault(root(node), []).append(node)
    written = {node for node, _ in writes}
    for node, value in writes:
        group = groups[root(value)]
        if any(n.op == "placeholder" for n in group):
            return True
        # Views that are made before and read after have to be made again: plain ones can be.
        hidden = any(
            order[n] < order[node]
            and n is not value
            and n not in written
            and any(order[user] > order[node] for user in n.users)
            for n in group
        )
        if hidden:
            made = [n for n in group if n not in written and n is not root(n)]
            before = [n for n in made if order[n] < order[node]]
            if any(base_name(n.target) not in VIEWS for n in before):
                return True
    return False


class _Reader:
    """Reads one graph."""

    def __init__(self, source: Source, dynamic: bool) -> None:
        self.avals: list[Aval] = []
        self.ops: list[Op] = []
        self.constants: dict[int, torch.Tensor] = {}
        self.symbols = 0
        self.same: dict[Any, Any] = {}  # results of in-place operations, and what they wrote to
        self.views: dict[Any, tuple[Any, Var, Op]] = {}
        env: dict[Any, Any] = {}
        inputs: list[int | None] = []
        by_path: dict[str, Var] = {}
        for node in source.root.graph.nodes:
            if node.op != "placeholder":
                continue
            value = node.meta.get("val")
            if node in source.state:
                path = source.state[node]
                if path not in by_path:
                    by_path[path] = self.new(value)
                env[node] = by_path[path]
            elif node in source.constants:
                env[node] = self.constant(source.constants[node], value)
            elif node in source.given:
                found = self.new(value) if isinstance(value, torch.Tensor) else self._plain(value)
                env[node] = found
                inputs.append(found.number if isinstance(found, Var) else None)
            else:
                env[node] = None
        outputs = self.inline(source.root, env)
        written = {path: outputs[i] for path, i in source.mutations.items()}
        self.program = Program(
            self.ops,
            self.avals,
            inputs,
            [node.name for node in source.given],
            {v.number: path for path, v in by_path.items()},
            self.constants,
            [outputs[i] for i in source.outputs],
            {by_path[p].number: v for p, v in written.items() if isinstance(v, Var)},
            source.in_spec,
            source.out_spec,
            dynamic,
        )

    def new(self, value: torch.Tensor) -> Var:
        shape = tuple(_hint(n) for n in value.shape)
        symbolic = tuple(not isinstance(n, int) for n in value.shape)
        self.avals.append(Aval(shape, value.dtype, value.device, symbolic))
        return Var(len(self.avals) - 1)

    def constant(self, tensor: torch.Tensor, value: Any) -> Var:
        found = self.new(value if isinstance(value, torch.Tensor) else tensor)
        self.constants[found.number] = tensor.detach()
        return found

    def _plain(self, value: Any) -> Any:
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            self.symbols += 1
            return Sym(self.symbols, _hint(value))
        return value

    def inline(self, module: Any, env: dict[Any, Any]) -> list[Any]:
        for node in module.graph.nodes:
            if node.op == "get_attr":
                found = attribute(module, node.target)
                env[node] = (
                    self.constant(found, found) if isinstance(found, torch.Tensor) else found
                )
            elif node.op == "call_function":
                self.call(node, env)
            elif node.op == "output":
                return list(self.lookup(tuple(node.args[0]), env))
        return []

    def call(self, node: Any, env: dict[Any, Any]) -> None:
        target = node.target
        if target is operator.getitem:
            env[node] = env[node.args[0]][node.args[1]]
            return
        name = base_name(target)
        if name in REGIONS:
            place = REGIONS[name]
            inner = env[node.args[place]]
            given = [self.lookup(x, env) for x in node.args[place + 1 :]]
            places = [n for n in inner.graph.nodes if n.op == "placeholder"]
            found = self.inline(inner, dict(zip(places, given, strict=True)))
            if name == "wrap_with_set_grad_enabled" and not node.args[0]:
                found = [self.detached(x, node) for x in found]
            env[node] = found
            return
        value = node.meta.get("val")
        args = {k: self.lookup(v, env) for k, v in _named(node).items()}
        if value is None:
            env[node] = None  # an assertion
            return
        keywords = frozenset(node.kwargs)
        written = None
        if isinstance(target, torch._ops.OpOverload):
            schema = target._schema
            keywords = frozenset(a.name for a in schema.arguments if a.kwarg_only)
            if schema.is_mutable:
                written = next(
                    node.args[i]
                    for i, a in enumerate(schema.arguments)
                    if a.alias_info is not None and a.alias_info.is_write
                )
                target = _functional(target)
                renamed = [a.name for a in target._schema.arguments]
                args = dict(zip(renamed, args.values(), strict=True))
                keywords = frozenset(a.name for a in target._schema.arguments if a.kwarg_only)
        values = value if isinstance(value, (tuple, list)) else (value,)
        if not isinstance(values[0], torch.Tensor) and len(values) == 1:
            symbol = self._plain(value)
            env[node] = symbol
            if isinstance(symbol, Sym):
                self.ops.append(
                    Op(name, target, args, keywords, (), True, symbol.number, _scope(node))
                )
            return
        outputs = [self.new(v) if isinstance(v, torch.Tensor) else None for v in values]
        single = not isinstance(value, (tuple, list))
        self.ops.append(
            Op(
                name,
                target,
                args,
                keywords,
                tuple(None if v is None else v.number for v in outputs),
                single,
                None,
                _scope(node),
            )
        )
        env[node] = outputs[0] if single else outputs
        if written is not None:
            owner = self.owner(written)
            self.same[node] = owner
            self.overwrite(owner, env[node], env)
        elif name in VIEWS and single:
            parent = self.owner(next(x for x in node.args if isinstance(x, torch.fx.Node)))
            self.views[node] = (parent, env[parent], self.ops[-1])

    def owner(self, node: Any) -> Any:
        """Returns the node that names the same tensor without in-place operations."""
        while node in self.same:
            node = self.same[node]
        return node

    def overwrite(self, node: Any, value: Var, env: dict[Any, Any]) -> None:
        """Makes a node mean what was written to it, and what it is a view of as well."""
        env[node] = value
        if node in self.views:
            parent, _, op = self.views[node]
            new = self.through(self.read(parent, env), value, op)
            self.overwrite(parent, new, env)
            self.views[node] = (parent, new, op)

    def read(self, node: Any, env: dict[Any, Any]) -> Any:
        """Returns what a node means now; a view of what was written to is made again."""
        node = self.owner(node)
        if node in self.views:
            parent, seen, op = self.views[node]
            now = self.read(parent, env)
            if now != seen:
                first = next(k for k, v in op.args.items() if isinstance(v, Var))
                env[node] = self.again(op, {**op.args, first: now})
                self.views[node] = (parent, now, op)
        return env[node]

    def again(self, op: Op, args: dict[str, Any]) -> Var:
        assert op.outputs[0] is not None
        self.avals.append(self.avals[op.outputs[0]])
        out = Var(len(self.avals) - 1)
        self.ops.append(dataclasses.replace(op, args=args, outputs=(out.number,)))
        return out

    def through(self, parent: Var, value: Var, view: Op) -> Var:
        """Returns the parent of a view after the view was overwritten."""
        aten = torch.ops.aten
        ndim = len(self.avals[parent.number].shape)
        args = view.args
        if view.name == "slice":
            keys = ("dim", "start", "end", "step")
            target, given = aten.slice_scatter.default, {k: args[k] for k in keys}
        elif view.name == "select":
            target = aten.select_scatter.default
            given = {k: args[k] for k in ("dim", "index")}
        elif view.name in ("alias", "detach"):
            return value
        else:
            if view.name == "permute":
                order = [d % ndim for d in args["dims"]]
            elif view.name in ("transpose", "t") and ndim > 1:
                order = list(range(ndim))
                one = args.get("dim0", 0) % ndim
                other = args.get("dim1", 1) % ndim
                order[one], order[other] = other, one
            else:
                return self.made(
                    "reshape_as", aten.reshape_as.default, {"self": value, "other": parent}, parent
                )
            back = [order.index(d) for d in range(ndim)]
            return self.made("permute", aten.permute.default, {"self": value, "dims": back}, parent)
        return self.made(base_name(target), target, {"self": parent, "src": value, **given}, parent)

    def made(self, name: str, target: Any, args: dict[str, Any], like: Var) -> Var:
        self.avals.append(self.avals[like.number])
        out = Var(len(self.avals) - 1)
        self.ops.append(Op(name, target, args, frozenset(), (out.number,)))
        return out

    def lookup(self, x: Any, env: dict[Any, Any]) -> Any:
        """Returns an argument with tensors for nodes."""
        if isinstance(x, torch.fx.Node):
            return self.read(x, env)
        if isinstance(x, (list, tuple)):
            return [self.lookup(y, env) for y in x]
        if isinstance(x, slice):
            return slice(*(self.lookup(y, env) for y in (x.start, x.stop, x.step)))
        return x

    def detached(self, value: Any, node: Any) -> Any:
        if not isinstance(value, Var):
            return value
        out = Var(len(self.avals))
        self.avals.append(self.avals[value.number])
        self.ops.append(
            Op(
                "detach",
                torch.ops.aten.detach.default,
                {"self": value},
                frozenset(),
                (out.number,),
                scope=_scope(node),
            )
        )
        return out


def _named(node: Any) -> dict[str, Any]:
    if not isinstance(node.target, torch._ops.OpOverload):
        return {str(i): a for i, a in enumerate(node.args)} | dict(node.kwargs)
    found = {}
    for i, argument in enumerate(node.target._schema.arguments):
        if i < len(node.args):
            found[argument.name] = node.args[i]
        elif argument.name in node.kwargs:
            found[argument.name] = node.kwargs[argument.name]
        else:
            found[argument.name] = argument.default_value
    return found


def _scope(node: Any) -> str:
    stack = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]) if stack else ""


def attribute(root: Any, path: str) -> Any:
    """Returns what a dotted path leads to."""
    for part in path.split("."):
        root = getattr(root, part)
    return root


def _hint(n: Any) -> Any:
    if isinstance(n, (int, float, bool)):
        return n
    hint = getattr(n.node, "hint", None)
    if hint is None:
        return Size()
    return hint if isinstance(hint, (bool, float)) else int(hint)
