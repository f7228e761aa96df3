"""The one module that knows three namespaces: those of JAX, torch and NumPy.

Everything else is written once: ``xp = namespace(x)`` at the edge, array-API calls inside. Here
stand the few things that cannot be: which namespace an array belongs to, what is handed to NumPy,
and the operations whose best native form differs.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils


def is_torch(x: Any) -> bool:
    """Whether ``x`` is a torch tensor; never imports torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


class _NumPy:
    """NumPy as an array-API namespace: also before 2.1, and for bfloat16, which is of ml_dtypes."""

    isdtype = staticmethod(jnp.isdtype)

    def __getattr__(self, name: str) -> Any:
        found = getattr(np, name)
        setattr(self, name, found)
        return found

    @staticmethod
    def astype(x: Any, dtype: Any, *, copy: bool = True) -> Any:
        return x.astype(dtype, copy=copy)

    @staticmethod
    def clip(x: Any, min: Any = None, max: Any = None) -> Any:
        return np.clip(x, min, max)

    @staticmethod
    def cumulative_sum(
        x: Any, *, axis: int, dtype: Any = None, include_initial: bool = False
    ) -> Any:
        found = np.cumsum(x, axis=axis, dtype=dtype or x.dtype)
        return np.insert(found, 0, 0, axis=axis) if include_initial else found


NUMPY: Any = _NumPy()


def namespace(x: Any) -> Any:
    """Returns the array-API namespace of ``x``: ``jax.numpy``, array-api-compat's torch, or NumPy.

    Python scalars belong to ``jax.numpy``.
    """
    if is_torch(x):
        # torch.compile can look a module up, but not import it.
        name = "array_api_compat.torch"
        return sys.modules.get(name) or importlib.import_module(name)
    return NUMPY if is_numpy(x) else jnp


def is_numpy(x: Any) -> bool:
    """Whether ``x`` is an array or a scalar of NumPy."""
    return isinstance(x, np.ndarray | np.generic)


def is_array(x: Any) -> bool:
    """Whether ``x`` is an array of numbers, a dense tensor, or a shape in the place of one."""
    if is_torch(x):
        return is_dense(x)
    if is_numpy(x):
        return x.dtype.kind == "b" or jnp.issubdtype(x.dtype, jnp.number)  # no objects, no strings
    known = isinstance(x, jax.Array | jax.ShapeDtypeStruct | jax.core.ShapedArray)
    return known and not jnp.issubdtype(x.dtype, jax.dtypes.extended)  # no random keys


def is_dense(x: Any) -> bool:
    """Whether a torch tensor holds every number, at a place of its own."""
    return str(x.layout) == "torch.strided"


def has_values(x: Any) -> bool:
    """Whether an array has numbers: a shape has none, nor a tensor on torch's meta device."""
    if is_torch(x):
        return not x.is_meta
    return not isinstance(x, jax.ShapeDtypeStruct)


def compiled(x: Any, function: Callable[..., Any], *static: str) -> Callable[..., Any]:
    """Returns ``function`` compiled for the framework of ``x``: jitted in JAX, else itself."""
    return function if is_torch(x) or is_numpy(x) else _jitted(function, static)


@functools.cache
def _jitted(function: Callable[..., Any], static: tuple[str, ...]) -> Callable[..., Any]:
    return jax.jit(function, static_argnames=static)


def copied(x: Any) -> Any:
    """Returns a copy of one leaf that shares no memory and no gradient history with it."""
    if is_torch(x):
        return x.detach().clone()
    if isinstance(x, jax.core.Tracer) or not is_on_this_process(x):
        return jnp.array(x, copy=True)
    # Unlike jnp.array, this compiles nothing.
    return jax.device_put(x, may_alias=False) if isinstance(x, jax.Array) else copy.deepcopy(x)


def jax_array(x: Any) -> Any:
    """Returns ``x`` as an array of JAX; unlike ``jnp.asarray``, this compiles nothing."""
    return x if isinstance(x, jax.Array) else jax.device_put(np.asarray(x))


def is_concrete(x: Any) -> bool:
    """Whether the numbers in ``x`` can be looked at now: no tracer, not under a torch transform."""
    if is_torch(x):
        return not is_batched(x)
    return not isinstance(x, jax.core.Tracer)


def is_on_this_process(x: Any) -> bool:
    """Whether all parts of ``x``, which is no tracer, lie on devices of this process."""
    return not isinstance(x, jax.Array) or x.is_fully_addressable


def as_known(x: Any) -> np.ndarray:
    """Returns an array of JAX or NumPy, which is no tracer, as NumPy's.

    One that lies over several processes is gathered: all of them have to call this.
    """
    if is_on_this_process(x) or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def is_on_host(x: Any) -> bool:
    """Whether NumPy can read ``x`` where it lies: numbers that are known, on one CPU device."""
    if isinstance(x, jax.Array):
        if not is_concrete(x) or jnp.issubdtype(x.dtype, jax.dtypes.extended):
            return False
        if not x.is_fully_addressable:
            return False
        devices = x.devices()
        return len(devices) == 1 and next(iter(devices)).platform == "cpu"
    if not is_torch(x):
        return is_numpy(x) or isinstance(x, bool | int | float)
    torch = sys.modules["torch"]
    # Subclasses stand for other things than their numbers, and gradients have to be seen.
    return (
        not torch.compiler.is_compiling()
        and type(x) in (torch.Tensor, torch.nn.Parameter)
        and x.device.type == "cpu"
        and x.layout == torch.strided
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def by_numpy(function: Callable[..., Any], *trees: Any) -> Any:
    """Returns ``function(*trees)``, computed by NumPy where all leaves are on one CPU and known.

    Nothing is compiled there, where XLA would compile for every shape. ``function`` is given the
    memory of the leaves as NumPy arrays, and must neither write to them nor return them. What it
    returns becomes arrays of their framework and device, without a copy where JAX allows it
    (:func:`empty`); where all leaves are NumPy's, it stays so. Elsewhere ``function`` is given the
    leaves as they are.
    """
    if is_compiling():
        return function(*trees)
    leaves = jax.tree.leaves(trees)
    arrays = [x for x in leaves if isinstance(x, jax.Array) or is_torch(x)]
    if not all(map(is_on_host, leaves)) or not _are_together(arrays):
        with _mesh_of(leaves):
            return function(*trees)
    with np.errstate(all="ignore"):
        result = function(*jax.tree.map(_as_numpy, trees))
    if not arrays:
        return result
    return jax.tree.map(functools.partial(_handed_back, arrays[0]), result)


def _mesh_of(leaves: list[Any]) -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which what is called eagerly knows the explicit mesh of its arguments.

    Compiled code looks for it there, where it does not read the arguments that say it.
    """
    arrays = [x for x in leaves if isinstance(x, jax.Array)]
    if all(map(is_concrete, arrays)) and jax.sharding.get_abstract_mesh().empty:
        for mesh in (getattr(x.sharding, "mesh", None) for x in arrays):
            if jax.sharding.AxisType.Explicit in getattr(mesh, "axis_types", ()):
                return _set_mesh(mesh)
    return contextlib.nullcontext()


def _set_mesh(mesh: Any) -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which a mesh is JAX's; under ``jit``, where none can be set, none."""
    with contextlib.suppress(ValueError):
        return jax.set_mesh(mesh)
    return contextlib.nullcontext()


def is_compiling() -> bool:
    """Whether this is seen by ``torch.compile``."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.compiler.is_compiling()


def _are_together(arrays: list[Any]) -> bool:
    """Whether arrays are of one framework, and on one device."""
    if any(map(is_torch, arrays)):
        return all(map(is_torch, arrays))
    return len({device for x in arrays for device in x.devices()}) <= 1


def _as_numpy(x: Any) -> Any:
    """Returns an array that is on the host as NumPy's, without a copy; anything else as it is."""
    if isinstance(x, jax.Array):
        return np.asarray(x)
    if not is_torch(x):
        return x
    x, torch = x.detach().resolve_conj().resolve_neg(), sys.modules["torch"]
    name = str(x.dtype).removeprefix("torch.")
    if not _is_of_ml_dtypes(name):
        return x.numpy()
    return x.view({1: torch.int8, 2: torch.int16}[x.itemsize]).numpy().view(jnp.dtype(name))


def _is_of_ml_dtypes(dtype: str) -> bool:
    """Whether a dtype is one that JAX adds to NumPy."""
    return dtype == "bfloat16" or dtype.startswith("float8")


def _handed_back(like: Any, x: Any) -> Any:
    """Returns a NumPy array in the framework, and on the device, of ``like``."""
    if not is_numpy(x):
        return x
    x = np.require(x, requirements=["C", "W"])
    if is_torch(like):
        return _as_torch(x)
    place = next(iter(like.devices()))
    with jax.default_device(place):
        if isinstance(like.sharding, jax.sharding.NamedSharding):
            place = jax.sharding.NamedSharding(like.sharding.mesh, jax.sharding.PartitionSpec())
        # A step whose first call gets some committed arrays and others is compiled a second time.
        return jax.device_put(x, place if like.committed else None)


def _as_torch(x: np.ndarray) -> Any:
    """Returns a tensor that shares memory with an array that can be written to."""
    torch, name = sys.modules["torch"], str(x.dtype)
    if not _is_of_ml_dtypes(name):
        return torch.from_numpy(x)
    return torch.from_numpy(x.view(f"i{x.itemsize}")).view(getattr(torch, name))


def in_framework(framework: str, x: Any) -> Any:
    """Returns an array of NumPy as one of ``"torch"`` or ``"jax"`` on the CPU; others as they are.

    It may share memory, which is not to be written to.
    """
    if not is_numpy(x) or framework == "numpy":
        return x
    if framework == "torch":
        return _as_torch(np.require(x, requirements=["C", "W"]))
    return jax.device_put(x, jax.local_devices(backend="cpu")[0])


def as_numpy(x: Any) -> Any:
    """Returns a known array of any framework on the CPU as NumPy's; anything else as it is."""
    return _as_numpy(x) if is_on_host(x) else x


def empty(shape: tuple[int, ...], dtype: Any) -> Any:
    """Returns an array of NumPy to be filled, whose memory JAX takes as its own."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def chosen(mask: Any, x: Any, rest: Any) -> Any:
    """Returns ``x`` where ``mask``, of its shape, is True, and elsewhere ``rest``.

    ``rest`` is a number, or an array of the same shape and dtype.
    """
    xp = namespace(x)
    is_number = isinstance(rest, int | float)
    if xp is not NUMPY or x.dtype.kind == "c":
        return xp.where(mask, x, xp.full_like(x, rest) if is_number else rest)
    # Products of bits, which clear NaN too, take a fraction of the time of np.where.
    bits = x.view(f"i{x.dtype.itemsize}")
    found = np.multiply(bits, mask, out=empty(x.shape, bits.dtype))
    if not is_number or rest:
        found += ~mask * np.asarray(rest, x.dtype).view(bits.dtype)
    return found.view(x.dtype)


_ALIGNMENT = 64  # bytes, of the memory that XLA does not copy


def is_batched(x: Any) -> bool:
    """Whether ``x`` is under ``torch.func.vmap``, where shapes cannot depend on data."""
    if not is_torch(x):
        return False
    functorch = sys.modules["torch"]._C._functorch
    # Under vmap of grad the batch is inside what tracks the gradient.
    while functorch.is_gradtrackingtensor(x):
        x = functorch.get_unwrapped(x)
    return functorch.is_batchedtensor(x)


def float_bits(xp: Any, x: Any) -> Any:
    """Returns the bit patterns of float32 ``x`` as int32."""
    return jax.lax.bitcast_convert_type(x, jnp.int32) if xp is jnp else x.view(xp.int32)


def bits_float(xp: Any, bits: Any) -> Any:
    """Returns the float32 numbers whose bit patterns are int32 ``bits``."""
    return jax.lax.bitcast_convert_type(bits, jnp.float32) if xp is jnp else bits.view(xp.float32)


def iota(xp: Any, n: int, like: Any) -> Any:
    """Returns 0, 1, ..., n - 1 as int32, on the device of ``like``."""
    if xp is jnp:
        return jax.lax.iota(jnp.int32, n)
    return xp.arange(n, dtype=xp.int32, device=like.device)


def int32(xp: Any, values: Any, like: Any) -> Any:
    """Returns ``values`` as an int32 array on the device of ``like``."""
    if xp is jnp:
        return jnp.asarray(values, jnp.int32)
    if xp is NUMPY:
        return np.asarray(values, np.int32)
    if is_torch(values):
        return values.to(device=like.device, dtype=xp.int32)
    if isinstance(values, jax.core.Tracer):
        raise TypeError(
            "a count or a key that JAX traces cannot be used with torch tensors; give it the "
            "config or key outside of jit and vmap"
        )
    # A copy, since torch warns of arrays it may not write to, such as those of JAX.
    return xp.asarray(np.array(values), dtype=xp.int32, device=like.device)


def counted(xp: Any, index: Any, n: int) -> Any:
    """Returns how often each of 0, 1, ..., n - 1 occurs in an integer vector, as int32."""
    if xp is jnp:
        return jnp.zeros(n, jnp.int32).at[index].add(1)
    if xp is NUMPY:
        return np.bincount(index, minlength=n).astype(np.int32)
    zero = xp.zeros(n, dtype=xp.int32, device=index.device)
    return zero.scatter_add(0, index.to(xp.int64), xp.ones_like(index, dtype=xp.int32))


def part(x: Any, start: Any, size: int) -> Any:
    """Returns ``size`` elements of a vector from ``start`` on, which may be traced."""
    if is_torch(x) or is_numpy(x):
        return x[start : start + size]
    return jax.lax.dynamic_slice(x, (start,), (size,))


def sqrt(x: Any) -> Any:
    """Returns the correctly rounded roots of ``x``; on a CPU those of torch's float32 are not."""
    xp = namespace(x)
    if is_torch(x) and x.device.type == "cpu":
        return xp.astype(xp.sqrt(xp.astype(x, xp.float64)), x.dtype)
    return xp.sqrt(x)


def erfc(xp: Any, x: Any) -> Any:
    """Returns the complementary error function of ``x``."""
    return xp.special.erfc(x) if is_torch(x) else jax.scipy.special.erfc(x)


def framework_of(x: Any) -> str:
    """Returns ``"torch"``, ``"numpy"`` or ``"jax"``: where an array is from."""
    return "torch" if is_torch(x) else "numpy" if is_numpy(x) else "jax"


def stand_in(framework: str, dtype: str) -> Any:
    """Returns an array of a framework by its name, with nothing in it, on its default device.

    Raises:
        ValueError: there is no such framework or dtype, or torch is not imported.
    """
    if framework == "torch":
        torch = sys.modules.get("torch")
        if torch is None:
            raise ValueError("there are tensors of torch in it; import torch first")
        return torch.empty(0, dtype=getattr(torch, dtype), device="cpu")
    if framework not in ("numpy", "jax"):
        raise ValueError(f"framework must be 'torch', 'numpy' or 'jax', got {framework!r}")
    return (np if framework == "numpy" else jnp).empty(0, jnp.dtype(dtype))


def zeros(like: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """Returns zeros in the framework, and in torch on the device, of ``like``."""

    def made(like: Any) -> Any:
        xp = namespace(like)
        if is_torch(like):
            return xp.zeros(shape, dtype=getattr(xp, dtype), device=like.device)
        return xp.zeros(shape, dtype)

    return by_numpy(made, like)


def array_like(like: Any, x: Any) -> Any:
    """Returns ``x``; as a tensor on the device of ``like`` if that is a tensor."""
    if is_torch(x) or not is_torch(like):
        return x
    return namespace(like).asarray(np.array(x), device=like.device)


def stop_gradient(x: Any) -> Any:
    """Returns ``x`` as a constant: no gradient flows through, and none of its history is kept."""
    if is_torch(x):
        return x.detach()
    return jax.lax.stop_gradient(x) if isinstance(x, jax.core.Tracer) else x


def map_gradient(function: Callable[..., Any], x: Any, *args: Any) -> Any:
    """Returns ``x``; what flows back to it is ``function(gradient, *args)``."""
    if is_numpy(x):
        return x
    if is_torch(x):
        return _torch_map_gradient().apply(x, function, *args)

    @jax.custom_vjp
    def identity(x: Any, args: Any) -> Any:
        return x

    def backward(args: Any, gradient: Any) -> Any:
        return function(gradient, *args), None

    identity.defvjp(lambda x, args: (x, args), backward)
    return identity(x, args)


@functools.cache
def _torch_map_gradient() -> Any:
    torch: Any = sys.modules["torch"]

    class MapGradient(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: Any, function: Any, *args: Any) -> Any:
            return x.clone()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.function, ctx.args = inputs[1], inputs[2:]

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            return ctx.function(gradient, *ctx.args), None, *(None for _ in ctx.args)

    return MapGradient


def spans_devices(x: Any) -> bool:
    """Whether ``x`` may be laid out over several devices, which under ``jit`` cannot be seen.

    Along an axis of an explicit mesh, be it of one device, it is: no part may be sliced off there.
    """
    if is_torch(x) or is_numpy(x):
        return False
    return jax.device_count() > 1 or any(jax.typeof(x).sharding.spec)


def replicated(x: Any, axes: tuple[int, ...] | None = None) -> Any:
    """Returns ``x`` whole along ``axes``, or all, on every device of an explicit mesh.

    There, axes that lie over several devices cannot be split.
    """
    if is_torch(x) or is_numpy(x):
        return x
    sharding = getattr(jax.typeof(x), "sharding", None)
    old = tuple(sharding.spec) if sharding is not None else ()
    return laid_out_by(
        x, [None if axes is None or a in axes else names for a, names in enumerate(old)]
    )


def laid_out_by(x: Any, spec: Sequence[Any], like: Any = None) -> Any:
    """Returns an array of JAX laid out by ``spec`` over the explicit mesh of ``like``, or its own.

    On a mesh without explicit axes all specs are empty.
    """
    sharding = jax.typeof(x if like is None else like).sharding
    new = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*spec))
    return x if jax.typeof(x).sharding.spec == new.spec else jax.sharding.reshard(x, new)


def spread_over(x: np.ndarray, like: Any) -> Any:
    """Returns an array of NumPy, the same in every process, laid out as an array of JAX is.

    One of another shape than ``like`` is whole on every device.
    """
    sharding = like.sharding
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return jax_array(x)
    if x.shape != like.shape:
        sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def layout_of(sharding: Any, shape: tuple[int, ...]) -> tuple[Any, tuple[int, ...]]:
    """Returns the sharding of an array that became of ``shape``, and axes it cannot have any more.

    An axis lies over the same devices where they divide its size; else it is whole on each.
    """
    names = [(*sharding.spec, *(None for _ in shape))[axis] for axis in range(len(shape))]
    lost = []
    for axis, name in enumerate(names):
        group = (name,) if isinstance(name, str) else name or ()
        if shape[axis] % math.prod(sharding.mesh.shape[n] for n in group):
            names[axis] = None
            lost.append(axis)
    spec = jax.sharding.PartitionSpec(*names)
    return jax.sharding.NamedSharding(sharding.mesh, spec), tuple(lost)


def is_spread(x: Any) -> bool:
    """Whether an array of JAX with known numbers is laid out over several devices of a mesh."""
    if not isinstance(x, jax.Array) or not is_concrete(x):
        return False
    return isinstance(x.sharding, jax.sharding.NamedSharding) and len(x.sharding.device_set) > 1


def in_layout(function: Callable[..., Any], x: Any, shape: tuple[int, ...], *others: Any) -> Any:
    """Returns ``function(x, *others)``, of ``shape``, laid out over the devices of ``x``.

    See :func:`layout_of`. The compiler divides the work, on meshes of explicit axes too; it is
    called once for all arrays of one shape and layout that are given to the same function.
    """
    sharding, mesh = x.sharding, x.sharding.mesh
    auto = jax.sharding.Mesh(mesh.devices, mesh.axis_names)

    def seen(x: Any, mesh: Any, spec: Any) -> Any:
        parts = [part.data for part in x.addressable_shards]
        new = jax.sharding.NamedSharding(mesh, spec)
        return jax.make_array_from_single_device_arrays(x.shape, new, parts)

    layout, _ = layout_of(sharding, shape)
    inside = jax.sharding.NamedSharding(auto, layout.spec)
    with _set_mesh(auto):
        found = jax.jit(function, out_shardings=inside)(seen(x, auto, sharding.spec), *others)
    return seen(found, mesh, layout.spec)


def has_whole_groups(x: Any, axis: int, size: int) -> bool:
    """Whether every device of an explicit mesh has whole groups of ``size`` along an axis."""
    if is_torch(x) or is_numpy(x):
        return True
    sharding = jax.typeof(x).sharding
    names = sharding.spec[axis] or ()
    names = (names,) if isinstance(names, str) else names
    return (x.shape[axis] // math.prod(sharding.mesh.shape[n] for n in names)) % size == 0


def split_axis(x: Any, axis: int, many: int, size: int) -> Any:
    """Returns ``x`` with ``many`` axes from ``axis`` on as two: groups, and ``size`` in each.

    On an explicit mesh groups lie where they lay: one axis, in whole groups, or no mesh axis at it.
    """
    shape = (*x.shape[:axis], -1, size, *x.shape[axis + many :])
    if is_torch(x) or is_numpy(x):
        return namespace(x).reshape(x, shape)
    spec = jax.typeof(x).sharding.spec
    spec = (*spec[:axis], spec[axis], None, *spec[axis + many :])
    shape = (*shape[:axis], math.prod(x.shape[axis : axis + many]) // size, *shape[axis + 1 :])
    return _reshaped(x, shape, spec)


def merge_axes(x: Any, axis: int, shape: tuple[int, ...]) -> Any:
    """Returns ``x`` in a shape in which ``axis`` and the next, of :func:`split_axis`, are one."""
    if is_torch(x) or is_numpy(x):
        return namespace(x).reshape(x, shape)
    spec = jax.typeof(x).sharding.spec
    return _reshaped(x, shape, (*spec[: axis + 1], *spec[axis + 2 :]))


def _reshaped(x: Any, shape: tuple[int, ...], spec: Sequence[Any]) -> Any:
    sharding = jax.typeof(x).sharding
    if not any(spec):
        return jnp.reshape(x, shape)
    new = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*spec))
    return jax.lax.reshape(x, shape, out_sharding=new)


def grad(params: Any) -> Callable[..., Any]:
    """Returns ``grad`` of the framework that ``params`` are of."""
    torch = any(map(is_torch, jax.tree.leaves(params)))
    return sys.modules["torch"].func.grad if torch else jax.grad


def along(slope: Callable[[Any], Any], params: Any, direction: Any) -> Any:
    """Returns the derivative of a gradient, whose matrix is symmetric, along a direction.

    Forward over reverse in JAX; in torch, whose forward mode warns of what it is made of, reverse.
    """
    if any(map(is_torch, jax.tree.leaves(params))):
        return sys.modules["torch"].func.vjp(slope, params)[1](direction)[0]
    return jax.jvp(slope, (params,), (direction,))[1]
