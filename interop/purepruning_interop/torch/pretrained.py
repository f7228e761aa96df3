"""The config of a smaller model of transformers, by which ``from_pretrained`` builds it again.

Found by trying: a config is right if the class builds, from it, parameters of the small shapes. The
library is not imported: a model that is built from one argument, its ``config`` with ``to_dict``,
is of this kind.
"""

from __future__ import annotations

import contextlib
import copy
import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from purepruning.coupling.coupling import Coupling
from purepruning.coupling.plan import Plan
from purepruning_interop.torch.surgery import HEADS, is_width

#: How many configs are tried: a model is built for each, without its parameters.
MOST = 24


class Candidate(NamedTuple):
    """A small model, and what its config says of it.

    Attributes:
        model: of the user's class.
        told: what the config says now, or why none does; empty for models without a config.
    """

    model: nn.Module
    told: str


def configured(
    small: nn.Module,
    plan: Plan,
    coupling: Coupling,
    divided: Mapping[str, Any],
) -> list[Candidate]:
    """Returns a small model as it may be, the best first: with a config of its own, and without.

    With it, it is a copy that shares parameters and has the attributes that its config gives it.

    Args:
        small: a cut model of the user's class.
        plan: what stays of every parameter.
        coupling: for the numbers of heads.
        divided: norms that divide by another number than their width.
    """
    config = getattr(small, "config", None)
    if not (hasattr(config, "to_dict") and hasattr(small, "save_pretrained")):
        return [Candidate(small, "")]
    if divided:
        few = ", ".join(sorted(divided)[:3])
        return [_without(small, f'{few} divide by the widths before; norms="kept" does not')]
    if uneven := _uneven(plan):
        return [_without(small, f"no number of it stands for {uneven}")]
    search = _Search(small, plan, coupling)
    why = ""
    for config, built in search.run():
        adopted, off = _adopted(small, config, built)
        if adopted is not None:
            without = _without(small, "its forward reads it, and gives something else")
            return [Candidate(adopted, f"config: {search.changes(config)}"), without]
        why = why or off
    return [_without(small, why or f"none that was tried has {search.off}")]


def _without(small: nn.Module, why: str) -> Candidate:
    return Candidate(small, f"its config cannot say what is left, so load it by rebuild: {why}")


def _uneven(plan: Plan) -> str:
    """Returns two parameters that differ in their layer's number only, and in what they lose."""
    alike: dict[Any, list[str]] = defaultdict(list)
    for path, shape in plan.shapes.items():
        alike[re.sub(r"\d+", "#", path), shape].append(path)
    for paths in alike.values():
        for path in paths[1:]:
            if plan.shape(path) != plan.shape(paths[0]):
                sizes = f"{plan.shape(paths[0])} and {plan.shape(path)}"
                return f"{paths[0]} and {path}, of shapes {sizes}"
    return ""


#: Where a number of a config stands: attributes and indices.
Place = tuple[Any, ...]


class _Search:
    """A search for the config that builds the small shapes.

    Attributes:
        places: the widths and numbers of heads of the config, and their values.
        off: the name and shape of a parameter that no config had.
    """

    def __init__(self, small: nn.Module, plan: Plan, coupling: Coupling) -> None:
        config: Any = small.config
        self.small, self.config, self.off = small, config, ""
        self.fewest = math.inf
        state = small.state_dict(keep_vars=True)
        self.shapes = {name: tuple(x.shape) for name, x in state.items()}
        sizes = _new_sizes(plan, coupling)
        # Of four heads with two pairs of keys and values, half of the pairs are two.
        heads = _left(plan, coupling, ("head", "block"))
        every = {n for path in plan.cuts for n in plan.shape(path)}
        self.places: dict[Place, int | None] = {}
        self.options: dict[Place, list[int]] = {}
        for place, value in _numbers(self.config):
            options = every if value is None else set(sizes.get(value, ()))
            if value is None and place[-1] == "head_dim":
                size = _head_size(_read(self.config, place[:-1]))
                options = {size, *sizes.get(size, ())} if size else set()
            if value is not None and any(key in HEADS for key in place):
                for _ in range(2):  # groups of heads go, and heads of every group
                    some = {value, *options}
                    options |= {v // n * left for v in some for n, left in heads if v % n == 0}
            if options:
                self.places[place], self.options[place] = value, sorted(options)
        self.tried: dict[Any, tuple[int, Any]] = {}

    def changes(self, config: Any) -> str:
        """Returns which numbers differ in a config that was found."""
        pairs = ((p, before, _read(config, p)) for p, before in self.places.items())
        told = (f"{'.'.join(map(str, p))} {x} -> {y}" for p, x, y in pairs if x != y)
        return ", ".join(sorted(told)) or "as it was"

    def run(self) -> Iterator[tuple[Any, nn.Module]]:
        """Yields configs that build the small shapes, and what they build.

        From all numbers changed, and from none, the one change is made that leaves the fewest
        parameters of other shapes, then the next; a pair where no single one helps, as of a width
        that a number of heads must divide. Where there are several, as two heads of 16 are as wide
        as four of 8, they are one or two changes apart.
        """
        new = {p: o[0] for p, o in self.options.items() if self.places[p] is not None}
        for chosen in ({**self.places, **new}, dict(self.places)):
            while (attempt := self.wrong(chosen))[0]:
                wrong = attempt[0]
                better = next((c for c in self.near(chosen) if self.wrong(c)[0] < wrong), None)
                if better is None:
                    break
                chosen = better
            if attempt[0] == 0:
                yield attempt[1]
                alike = ((c, self.wrong(c)) for c in self.near(chosen))
                yield from (other for _, (off, other) in alike if off == 0)
                return

    def near(self, chosen: dict[Place, Any]) -> Iterator[dict[Place, Any]]:
        """Yields choices that differ in one number, then in two."""
        single = [
            (place, value)
            for place, options in sorted(self.options.items(), key=lambda o: self.places[o[0]] or 0)
            for value in (self.places[place], *options)
            if value != chosen[place]
        ]
        yield from ({**chosen, place: value} for place, value in single)
        for i, (a, x) in enumerate(single):
            yield from ({**chosen, a: x, b: y} for b, y in single[i + 1 :] if a != b)

    def wrong(self, chosen: Mapping[Place, Any]) -> tuple[int, Any]:
        """Returns how many parameters a config gives other shapes, it and what it builds."""
        key = tuple(chosen.values())
        if key not in self.tried:
            if len(self.tried) >= MOST:
                return len(self.shapes) + 1, None
            self.tried[key] = self._wrong(chosen)
        return self.tried[key]

    def _wrong(self, chosen: Mapping[Place, Any]) -> tuple[int, Any]:
        try:
            config = copy.deepcopy(self.config)
            for place, value in chosen.items():
                _write(config, place, value)
            config = type(config).from_dict(config.to_dict())  # as it will be read from a file
            built = _built(self.small, config)
        except Exception:  # of the library's checks: a width that heads do not divide
            return len(self.shapes) + 1, None
        found = {name: tuple(x.shape) for name, x in built.state_dict().items()}
        off = [n for n in self.shapes if found.get(n) != self.shapes[n]]
        wrong = len(off) + len(found.keys() - self.shapes.keys())
        if off and wrong < self.fewest:
            self.fewest, self.off = wrong, f"{off[0]} of shape {self.shapes[off[0]]}"
        return wrong, (config, built)


def _new_sizes(plan: Plan, coupling: Coupling) -> dict[int, set[int]]:
    """Returns what became of every size that got smaller: of axes, and of their factors."""
    sizes: dict[int, set[int]] = defaultdict(set)
    for path in plan.cuts:
        for old, new in zip(plan.shapes[path], plan.shape(path), strict=True):
            if old != new:
                sizes[old].add(new)
    for n, left in _left(plan, coupling, ("position", "head_position", "block", "head")):
        sizes[n].add(left)
    return sizes


def _left(plan: Plan, coupling: Coupling, kinds: Collection[str]) -> set[tuple[int, int]]:
    """Returns the sizes of families that lose something, before and after."""
    removed = set(plan.removed)
    families = [f for f in coupling.families if f.kind in kinds]
    pairs = {(len(f), len(f) - len(removed & set(f.units.tolist()))) for f in families}
    return {(n, left) for n, left in pairs if left < n}


def _numbers(config: Any, under: Place = ()) -> Iterator[tuple[Place, int | None]]:
    """Yields the places of the numbers of a config that may be widths, those inside it too."""
    for key, value in vars(config).items():
        place = (*under, key)
        if key.startswith("_") or not is_width(key):
            continue
        if hasattr(value, "to_dict"):
            yield from _numbers(value, place)
        elif isinstance(value, list | tuple):
            yield from (((*place, i), n) for i, n in enumerate(value) if type(n) is int and n > 1)
        elif type(value) is int and value > 1:
            yield place, value
        elif value is None and key in ("n_inner", "head_dim"):  # from other numbers, by default
            yield place, None
    if "num_attention_heads" in vars(config) and not hasattr(config, "head_dim"):
        yield (*under, "head_dim"), None  # classes read it, and take the quotient where it is not


def _head_size(config: Any) -> int:
    """Returns the size of a head that follows from other numbers, 0 where those are not there."""
    width, heads = (getattr(config, k, 0) for k in ("hidden_size", "num_attention_heads"))
    return width // heads if type(width) is type(heads) is int and heads else 0


def _read(config: Any, place: Place) -> Any:
    for key in place:
        config = config[key] if isinstance(key, int) else getattr(config, key, None)
    return config


def _write(config: Any, place: Place, value: Any) -> None:
    *way, last = place
    if not isinstance(last, int):
        holder = _read(config, tuple(way))
        if value is not None or hasattr(holder, last):
            setattr(holder, last, value)
        return
    old = _read(config, tuple(way))
    new = [*old[:last], value, *old[last + 1 :]]
    setattr(_read(config, tuple(way[:-1])), way[-1], type(old)(new))


class _NoMemory(TorchFunctionMode):
    """Makes what is created without numbers, as parameters are, without memory; the rest as is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.empty, torch.randn, torch.rand):
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _built(model: nn.Module, config: Any) -> nn.Module:
    """Returns a model of the same class, with the buffers that its config makes."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_NoMemory())
        return type(model)(copy.deepcopy(config)).train(model.training)


def _adopted(small: nn.Module, config: Any, built: nn.Module) -> tuple[nn.Module | None, str]:
    """Returns a small model with the numbers of one that is built from a config, or why not.

    Whole numbers and configs become those of the other; everything else that a forward may read has
    to be the same already, buffers that are in no state dict too.
    """
    theirs = dict(built.named_modules())
    if dict(small.named_modules()).keys() != theirs.keys():
        return None, "a model that is built from it has other modules"
    adopted = copy.deepcopy(small, {id(p): p for p in small.parameters()})
    adopted.config = config
    for name, module in adopted.named_modules():
        other = theirs[name]
        if type(other) is not type(module):
            return None, f"{name} is a {type(module).__name__}, not a {type(other).__name__}"
        held = module._non_persistent_buffers_set
        tensors = ((k, module._buffers[k], other._buffers.get(k)) for k in held)
        if off := next((k for k, x, y in tensors if not _same(x, y)), None):
            return None, f"{name}.{off} would be another table"
        for key, value in vars(module).items():
            new = vars(other).get(key)
            if key.startswith("_") or key == "training" or type(new) is not type(value):
                continue
            if hasattr(value, "to_dict") or type(value) is int:
                setattr(module, key, new)
            elif isinstance(value, float | tuple) and new != value:
                return None, f"{name}.{key} is {value}, and would be {new}"
    return adopted, ""


def _same(x: Any, y: Any) -> bool:
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
        return x is y
    return x.device == y.device and torch.equal(x, y)
