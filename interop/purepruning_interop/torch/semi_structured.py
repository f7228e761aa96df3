"""2:4 sparse matrices in the layout of torch's semi-structured kernels."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.sparse import SparseSemiStructuredTensorCUTLASS as SemiStructured
from torch.sparse import _semi_structured_conversions as conversions

from purepruning.arguments import shown
from purepruning.masks import apply_masks, by_path
from purepruning_interop.torch.training import Masks

#: How many of how many consecutive inputs stay.
_GROUPS = {torch.float16: (2, 4), torch.bfloat16: (2, 4), torch.int8: (2, 4), torch.float32: (1, 2)}


class SemiStructuredParams(NamedTuple):
    """What :func:`to_semi_structured` returns.

    Attributes:
        params: the masked parameters by name, those that the layout can hold as
            ``torch.sparse.SparseSemiStructuredTensorCUTLASS``.
        dense: why the other masked parameters are dense, by name.
    """

    params: dict[str, torch.Tensor]
    dense: dict[str, str]


def to_semi_structured(
    params: Mapping[str, torch.Tensor],
    masks: Masks,
    *,
    device: torch.device | str | None = None,
) -> SemiStructuredParams:
    """Returns masked parameters in which 2:4 matrices are in torch's semi-structured layout.

    That is the layout of CUTLASS, made by torch's own conversion, which runs on a CPU too; the
    kernels that multiply by it need a GPU. A matrix ``(outputs, inputs)`` in float16, bfloat16 or
    int8 must keep at most 2 of every 4 consecutive inputs, in float32 1 of every 2, and have as
    many rows and columns as torch asks (multiples of 32 and 64 in 16 bits). All others come back
    dense, with the reason in ``dense``. The layout is a prototype in torch.

    A module takes the result by ``load_state_dict(result.params, strict=False, assign=True)``.

    Args:
        params: tensors by name, such as a state dict.
        masks: masks by name, such as those of ``NM(keep=2, of=4)``.
        device: where the sparse tensors go, since torch cannot move them afterwards; by default
            where their parameters are.

    Raises:
        KeyError, ValueError, TypeError: the masks do not fit, as in
            :func:`purepruning.apply_masks`.
        ValueError: none of the masked parameters can be in the layout.

    >>> import torch
    >>> w = torch.arange(32 * 64).reshape(32, 64).to(torch.bfloat16)
    >>> mask = (torch.arange(64) % 4 < 2).expand(32, 64)
    >>> found = to_semi_structured({"w": w}, {"w": mask}).params["w"]
    >>> tuple(found.packed.shape), torch.equal(found.to_dense(), w * mask)
    ((32, 32), True)
    """
    where = "to_semi_structured"
    if not isinstance(params, Mapping) or not all(
        isinstance(x, torch.Tensor) for x in params.values()
    ):
        raise TypeError(
            f"{where}: params must be a dict of tensors by name, got {shown(params)}; give "
            "model.state_dict()"
        )
    if not isinstance(device, torch.device | str | None):
        raise TypeError(f"{where}: device must be a device or its name, got {shown(device)}")
    try:
        to = None if device is None else torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"{where}: device {device!r} is none that torch knows") from error
    plain = {name: x.detach() for name, x in params.items()}
    named = by_path(masks, plain)
    found: dict[str, torch.Tensor] = dict(apply_masks(plain, masks))
    dense: dict[str, str] = {}
    for name, mask in named.items():
        reason = _reason(found[name], mask)
        if reason is None:
            found[name] = _converted(found[name], to)
        else:
            dense[name] = reason
    if len(dense) == len(named):
        reasons = "; ".join(f"{name!r}: {reason}" for name, reason in dense.items())
        raise ValueError(
            f"{where}: no parameter can be in the layout ({reasons or 'there are no masks'}); "
            "prune with granularity=NM(keep=2, of=4), and convert params to bfloat16 or float16"
        )
    return SemiStructuredParams(found, dense)


def _reason(x: torch.Tensor, mask: torch.Tensor) -> str | None:
    """Returns why a masked parameter cannot be in the layout, or None."""
    if x.ndim != 2:
        return f"it has {x.ndim} axes, and the layout is of matrices"
    if x.dtype not in _GROUPS:
        return f"its dtype is {x.dtype}"
    sizes = SemiStructured._DTYPE_SHAPE_CONSTRAINTS[x.dtype]
    rows, columns = sizes.sparse_min_rows, sizes.sparse_min_cols
    if not x.numel() or x.shape[0] % rows or x.shape[1] % columns:
        return f"its shape {tuple(x.shape)} is no multiple of ({rows}, {columns})"
    keep, of = _GROUPS[x.dtype]
    if bool((mask.broadcast_to(x.shape).reshape(-1, of).sum(1) > keep).any()):
        return f"it keeps more than {keep} of {of} consecutive inputs"
    return None


def _converted(x: torch.Tensor, device: torch.device | None) -> Any:
    packed, meta = conversions.sparse_semi_structured_from_dense_cutlass(x.contiguous())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a prototype
        return SemiStructured(
            x.shape,
            packed=packed.to(device),
            meta=meta.to(device),
            packed_t=None,
            meta_t=None,
            compressed_swizzled_bitmask=None,
        )
