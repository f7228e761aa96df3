"""The user's own modules with smaller layers: parameters cut, attributes corrected."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from purepruning.coupling.coupling import Coupling
from purepruning.coupling.plan import Plan
from purepruning_interop.torch.norms import with_divisor
from purepruning_interop.torch.uses import Uses

#: Attributes by which classes that torch does not define remember what they are made of: numbers
#: of heads, sizes of heads, widths.
HEADS = frozenset(
    [
        "num_heads",
        "n_heads",
        "n_head",
        "nhead",
        "heads",
        "num_attention_heads",
        "num_head",
        "h",
        "num_key_value_heads",
        "num_kv_heads",
        "n_kv_heads",
        "kv_heads",
        "n_kv_head",
    ]
)


_HEAD_SIZES = frozenset(
    [
        "head_dim",
        "d_head",
        "head_size",
        "attention_head_size",
        "d_kv",
        "key_value_proj_dim",
        "dim_head",
        "dim_per_head",
        "qkv_head_dim",
    ]
)


_WIDTHS = frozenset(
    [
        "embed_dim",
        "all_head_size",
        "inner_dim",
        "split_size",
        "attn_dim",
        "hidden_size",
        "d_model",
        "dim",
        "width",
        "channels",
        "num_features",
        "in_features",
        "out_features",
        "in_channels",
        "out_channels",
        "inner_size",
        "d_inner",
        "intermediate_size",
        "dim_out",
        "dim_in",
        "out_dim",
        "in_dim",
        "nf",
        "hidden_dim",
        "kdim",
        "vdim",
        "c",
        "out_c",
        "in_c",
        "planes",
        "inplanes",
        "groups",
        "num_groups",
        "intermediate_channels",
        "conv_dim",
        "expand_dim",
        "q_dim",
        "kv_dim",
        "channel",
    ]
)


def cut_modules(
    model: nn.Module,
    plan: Plan,
    state: Mapping[str, torch.Tensor],
    names: Mapping[str, str],
    coupling: Coupling,
    uses: Uses,
) -> nn.Module:
    """Returns a copy of the model with cut parameters and corrected attributes.

    Args:
        model: stays as it is.
        plan: what stays of every parameter.
        state: the cut parameters and buffers, by path.
        names: every name of the state dict, and the path of its leaf.
        coupling: for the numbers of heads.
        uses: what modules have to know.
    """
    small = _copied(model, state, names, uses.tables)
    for name, module in small.named_modules():
        _correct(name, module, plan, names, uses)
    _correct_others(small, plan, names, coupling, uses)
    return small


def with_divisors(model: nn.Module, means: Mapping[str, tuple[int, int]]) -> str:
    """Replaces norms of a cut model by such as divide by as many positions as there were.

    Args:
        model: the cut model; the root stays.
        means: by the name of the module that takes it, the number of positions of a mean before and
            after.

    Returns why it cannot be done, or an empty string.
    """
    for name, (before, after) in means.items():
        old = model.get_submodule(name)
        new = with_divisor(old, before, after) if name else None
        if new is None:
            return f"a mean over what is pruned in {name or 'its forward'} ({type(old).__name__})"
        for module in model.modules():
            for key, child in module._modules.items():
                if child is old:
                    module._modules[key] = new
                    if isinstance(module, nn.TransformerEncoderLayer):
                        module.activation_relu_or_gelu = 0  # no fused kernel, which has own norms
    return ""


def _copied(
    model: nn.Module,
    state: Mapping[str, torch.Tensor],
    names: Mapping[str, str],
    tables: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> nn.Module:
    """Returns a deep copy in which other tensors take the place of the whole ones, aliases too."""
    full = model.state_dict(keep_vars=True)
    memo: dict[int, Any] = {}
    cut = {(x.data_ptr(), x.shape): small for x, small in tables}
    for module in model.modules():
        for x in (*vars(module).values(), *module._buffers.values()):
            if not isinstance(x, torch.Tensor):
                continue
            if (found := cut.get((x.data_ptr(), x.shape))) is not None:
                memo[id(x)] = found
            elif not x.is_leaf:  # of which torch makes no copies: results of operations
                memo[id(x)] = x.detach().clone()
    for name, path in names.items():
        if path in state:
            memo[id(full[name])] = state[path]
    return copy.deepcopy(model, memo)


def _sizes(name: str, plan: Plan, names: Mapping[str, str], key: str) -> tuple[int, ...] | None:
    """Returns the shape of a module's parameter, if it is cut."""
    under = f"{name}." if name else ""
    raw = f"parametrizations.{key}.original"
    held = (key, f"{key}_orig", f"{key}_v", raw, f"{raw}1")  # whole, pruned, or with its norm apart
    path = next((names[under + k] for k in held if under + k in names), None)
    return plan.shape(path) if path is not None and path in plan.cuts else None


def _correct(
    name: str, module: nn.Module, plan: Plan, names: Mapping[str, str], uses: Uses
) -> None:
    """Corrects what a class of torch's remembers about its parameters."""
    weight = _sizes(name, plan, names, "weight")
    match module:
        case nn.Linear() if weight:
            module.out_features, module.in_features = weight
        case nn.modules.conv._ConvNd() if weight:
            transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
            if module.groups > 1:
                first = module.in_channels if transposed else module.out_channels
                groups = weight[0] if module.groups == first else module.groups  # depthwise or not
                module.groups = uses.channels.get(name, groups * weight[1]) // weight[1]
            sides = (weight[1] * module.groups, weight[0])
            module.in_channels, module.out_channels = sides[::-1] if transposed else sides
        case nn.modules.batchnorm._NormBase():
            size = weight or _sizes(name, plan, names, "running_mean")
            if size:
                module.num_features = size[0]
        case nn.LayerNorm() | nn.RMSNorm() if weight:
            module.normalized_shape = tuple(weight)
        case nn.GroupNorm():
            module.num_channels = weight[0] if weight else module.num_channels
            module.num_groups = uses.groups.get(name, module.num_groups)
        case nn.Embedding() | nn.EmbeddingBag() if weight:
            module.num_embeddings, module.embedding_dim = weight
        case nn.PReLU() if weight:
            module.num_parameters = weight[0]
        case nn.Bilinear() if weight:
            module.out_features, module.in1_features, module.in2_features = weight
        case nn.RNNBase() if weight_ih := _sizes(name, plan, names, "weight_ih_l0"):
            gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
            module.input_size, module.hidden_size = weight_ih[1], weight_ih[0] // gates
            if outer := _sizes(name, plan, names, "weight_hr_l0"):
                module.proj_size = outer[0]
        case nn.RNNCellBase() if weight_ih := _sizes(name, plan, names, "weight_ih"):
            hidden = _sizes(name, plan, names, "weight_hh")
            module.input_size = weight_ih[1]
            module.hidden_size = hidden[1] if hidden else module.hidden_size
        case _ if type(module).__name__ == "Conv1D" and weight:  # of transformers: (in, out)
            vars(module).update(nx=weight[0], nf=weight[1])
        case _:
            pass


def _correct_others(
    model: nn.Module, plan: Plan, names: Mapping[str, str], coupling: Coupling, uses: Uses
) -> None:
    """Corrects heads, head sizes and widths that other classes remember.

    An attribute is corrected where the module calls operations with its value, and that becomes
    another one; else where its name says what it is and exactly one new value is possible. Whether
    it was right is for a run of the model to show.
    """
    removed = set(plan.removed)
    for name, module in model.named_modules():
        under = f"{name}." if name else ""
        own = {p for n, p in names.items() if n.startswith(under)}
        near = {
            p for n, p in names.items() if n.startswith(under) and n[len(under) :].count(".") <= 1
        }
        if not own & set(plan.cuts) or (
            module.__class__.__module__.startswith("torch.nn.modules.")
            and not isinstance(module, nn.MultiheadAttention)
        ):
            continue
        widths: dict[int, set[int]] = {}
        for path in near:
            for old, new in zip(plan.shapes[path], plan.shape(path), strict=True):
                widths.setdefault(old, set()).add(new)
        heads: dict[int, set[int]] = {}
        sizes: dict[int, set[int]] = {}
        for family in coupling.families:
            if not any(m.path in near for m in family.axes):
                continue
            left = len(family) - len(removed & set(family.units.tolist()))
            if family.kind in ("head", "block"):
                heads.setdefault(len(family), set()).add(left)
            if family.kind in ("head_position", "position"):
                sizes.setdefault(len(family), set()).add(left)
        for key, value in list(vars(module).items()):
            if isinstance(value, bool) or not isinstance(value, int):
                continue
            table: Mapping[int, set[int]] = (
                heads
                if key in HEADS
                else sizes
                if key in _HEAD_SIZES
                else widths
                if key in _WIDTHS
                else {}
            )
            said = uses.sizes.get(name, {}).get(value, set())
            possible = said if len(said) == 1 and is_width(key) else table.get(value, set())
            if len(possible) == 1 and possible != {value}:
                setattr(module, key, min(possible))
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            _correct_attention(module)


def is_width(name: str) -> bool:
    """Whether an attribute may be a width, or a number of heads or groups, by its name."""
    return not any(part in name for part in _NO_WIDTHS)


#: Parts of names of numbers that may equal a width, and are none.
_NO_WIDTHS = (
    "kernel", "patch", "image", "img", "window", "vocab", "chunk", "stride", "pad", "dilation",
    "layer", "max", "min", "idx", "index", "len", "seq", "num_labels", "token", "resolution",
)  # fmt: skip


def _correct_attention(module: nn.MultiheadAttention) -> None:
    module.embed_dim = module.in_proj_weight.shape[1]
    module.out_proj.in_features = module.out_proj.weight.shape[1]
