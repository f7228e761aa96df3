"""Where the two frameworks differ, and what the differences are."""

import dataclasses
import functools
import math
import subprocess
import sys
from typing import NamedTuple

import array_api_compat.torch
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from purepruning.arrays import (
    NUMPY,
    bits_float,
    by_numpy,
    chosen,
    compiled,
    empty,
    float_bits,
    int32,
    iota,
    is_batched,
    is_concrete,
    is_on_host,
    is_torch,
    namespace,
    replicated,
    spans_devices,
)
from purepruning.linear_algebra import matmul
from purepruning.random_bits import key_words
from purepruning.trees import flatten, leaf_paths
from tests.messages import raises

TORCH = array_api_compat.torch


def test_which_namespace():
    assert namespace(jnp.ones(2)) is namespace(3.0) is jnp
    assert namespace(np.ones(2)) is namespace(np.float32(1)) is NUMPY
    assert namespace(torch.ones(2)) is TORCH
    assert is_torch(torch.ones(2))
    assert not is_torch(np.ones(2))
    assert namespace(torch.nn.Parameter(torch.ones(2))) is TORCH


def test_numpy_and_jax_do_without_torch():
    code = (
        "import sys, numpy, purepruning.arrays as n; "
        "assert not n.is_torch(numpy.ones(2)); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_can_be_looked_at():
    seen = []

    def note(x):
        seen.append((is_concrete(x), is_batched(x)))
        return x

    note(jnp.ones(2))
    jax.jit(note)(jnp.ones(2))
    jax.vmap(note)(jnp.ones(2))
    note(torch.ones(2))
    torch.func.vmap(note)(torch.ones(2))
    note(3)
    assert seen == [(1, 0), (0, 0), (0, 0), (1, 0), (0, 1), (1, 0)]


# Calls that NumPy can do.


def test_what_numpy_can_read():
    seen = []

    def note(x):
        seen.append(is_on_host(x))
        return x

    jax.jit(note)(jnp.ones(2))
    jax.vmap(note)(jnp.ones(2))
    torch.func.vmap(note)(torch.ones(2))
    torch.func.grad(lambda x: note(x).sum())(torch.ones(2))
    trained = torch.ones(2, requires_grad=True)
    note(trained)
    for x in (jax.random.key(0), torch.ones(2).to_sparse(), torch.ones(2, device="meta"), "x"):
        note(x)
    assert not any(seen)
    assert torch.compile(lambda x: x + is_on_host(x), backend="eager")(torch.ones(2))[0] == 1
    with torch.no_grad():
        assert is_on_host(trained)
    for x in (jnp.ones(2), torch.nn.Parameter(torch.ones(2), False), np.ones(2), np.float32(1), 3):
        assert is_on_host(x)


def addresses(x):
    if isinstance(x, jax.Array):
        return x.unsafe_buffer_pointer()
    return x.data_ptr() if is_torch(x) else x.ctypes.data


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn", "bool"])
@pytest.mark.parametrize("framework", [jnp, torch])
def test_nothing_is_copied_on_the_way_to_numpy_and_back(framework, dtype):
    x = framework.ones((3, 1000), dtype=getattr(framework, dtype))
    inside = []

    def zeros(x):
        assert type(x) is np.ndarray
        result = empty(x.shape, x.dtype)
        result.view(np.uint8)[:] = 0
        inside.append((addresses(x), addresses(result)))
        return {"zeros": result, "three": 3}

    result = by_numpy(zeros, x)
    assert result["three"] == 3
    assert type(result["zeros"]) is type(x)
    assert result["zeros"].dtype == x.dtype
    assert inside == [(addresses(x), addresses(result["zeros"]))]
    assert [float(a[2, 999]) for a in (x, result["zeros"])] == [1, 0]


def test_results_of_numpy_can_be_written_to_where_arrays_can():
    x = torch.ones(4)
    for result in (
        by_numpy(lambda x: np.broadcast_to(x[:1], (2, 3)), x),
        by_numpy(lambda x: x.sum(), x),
    ):
        result += 1
    assert x.tolist() == [1] * 4


def test_strided_tensors_are_read_where_they_lie():
    x, inside = torch.arange(6.0).reshape(2, 3).T, []
    result = by_numpy(lambda x: inside.append(addresses(x)) or x + 1, x)
    assert inside == [addresses(x)]
    assert torch.equal(result, x + 1)


def test_numpy_stays_numpy():
    assert type(by_numpy(lambda x: x + 1, np.ones(2))) is np.ndarray


def test_committed_arrays_stay_where_they_are():
    for place in (None, jax.devices()[0]):
        x = jax.device_put(jnp.ones(2), place)
        result = by_numpy(lambda x: x + 1, x)
        assert result.committed == x.committed
        assert result.sharding == x.sharding
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    x = jax.device_put(jnp.ones(2), jax.NamedSharding(mesh, jax.sharding.PartitionSpec("x")))
    assert by_numpy(lambda x: x.reshape(2, 1) + 1, x).sharding.mesh == mesh


def test_numpy_does_nothing_that_it_cannot():
    """What is traced, batched, tracked or of two frameworks is handed on as it is."""
    double = functools.partial(by_numpy, lambda x, y: x * y)
    given = []

    def kinds(*xs):
        given.append([type(x) for x in xs])
        return xs[0]

    jax.jit(lambda x: by_numpy(kinds, x, np.ones(2)))(jnp.ones(2))
    by_numpy(kinds, jnp.ones(2), torch.ones(2))
    assert np.ndarray not in [kind for some in given for kind in some[:1]]
    assert jax.grad(lambda x: double(x, x))(3.0) == 6
    x = torch.tensor(3.0, requires_grad=True)
    double(x, x).backward()
    assert x.grad == 6
    assert torch.func.grad(lambda x: double(x, x))(torch.tensor(3.0)) == 6
    assert torch.func.vmap(double)(torch.ones(3), torch.full((3,), 2.0)).tolist() == [2, 2, 2]
    assert torch.compile(double, backend="eager")(torch.ones(2), torch.ones(2)).tolist() == [1, 1]


def test_numpy_warns_of_nothing():
    big = jnp.asarray([3e38, -1, 0], jnp.float32)
    assert not np.isfinite(by_numpy(lambda x: np.sqrt(x * 10 / x), big)).all()


@pytest.mark.parametrize("rest", [0, -math.inf, 5])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "bool", "complex64"])
def test_what_is_chosen_is_what_where_chooses(dtype, rest):
    dtype = jnp.dtype(dtype)
    if not np.isfinite(rest) and dtype.kind in "ib":
        return
    x = np.asarray([[1, -2, 3], [4, 5, 6]]).astype(dtype)
    if dtype.kind not in "ib":
        x[0, :2] = np.nan, np.inf
    mask = np.asarray([[True, False, True], [False, False, True]])
    expected = np.where(mask, x, np.asarray(rest, dtype))
    for asarray, other in (
        (np.asarray, rest),
        (jnp.asarray, rest),
        (np.asarray, np.full_like(x, rest)),
        (jnp.asarray, jnp.full_like(x, rest)),
    ):
        got = chosen(mask, asarray(x), other)
        assert got.dtype == dtype
        np.testing.assert_array_equal(
            np.asarray(got).astype("complex64"), expected.astype("complex64")
        )


def test_bits_there_and_back():
    values = np.asarray([0.0, -0.0, 1.5, -np.inf, 1e-45, np.nan], np.float32)
    expected = values.view(np.int32)
    for x, xp in ((jnp.asarray(values), jnp), (torch.tensor(values), TORCH), (values, NUMPY)):
        bits = float_bits(xp, x)
        np.testing.assert_array_equal(np.asarray(bits), expected)
        np.testing.assert_array_equal(np.asarray(bits_float(xp, bits)).view(np.int32), expected)


def test_integers():
    for like, xp in ((jnp.ones(1), jnp), (torch.ones(1), TORCH), (np.ones(1), NUMPY)):
        for values in (5, [1, 2], np.asarray([1, 2]), xp.asarray([3, 4])):
            assert int32(xp, values, like).dtype == xp.int32
        np.testing.assert_array_equal(np.asarray(iota(xp, 4, like)), [0, 1, 2, 3])
        assert iota(xp, 4, like).dtype == xp.int32


def test_jax_functions_are_compiled_once_and_torch_ones_are_called():
    calls = []

    def double(x, *, by):
        calls.append(by)
        return x * by

    for _ in range(3):
        assert compiled(jnp.ones(1), double, "by")(jnp.float32(2), by=2) == 4
    assert calls == [2]
    for _ in range(3):
        assert compiled(torch.ones(1), double, "by")(torch.tensor(2.0), by=3) == 6
    assert calls == [2, 3, 3, 3]


def test_matrix_products_are_of_full_precision():
    jaxpr = str(jax.make_jaxpr(lambda a: matmul(jnp, a, a))(jnp.ones((2, 2))))
    assert "HIGHEST" in jaxpr
    product = matmul(TORCH, torch.eye(2), torch.ones(2, 3))
    assert product.tolist() == [[1, 1, 1], [1, 1, 1]]


def test_one_device_is_nothing_special():
    assert not spans_devices(jnp.ones(2))
    assert not spans_devices(torch.ones(2))
    for x in (jnp.ones(2), torch.ones(2)):
        assert replicated(x) is x


# Random keys.


def words(key):
    return tuple(int(np.asarray(w).astype(np.int32)) for w in key_words(key))


@pytest.mark.parametrize("seed", [0, 5, 2**31, 2**32 - 1])
def test_a_seed_is_the_same_as_its_key(seed):
    low = int(np.asarray([seed], np.uint32).view(np.int32)[0])
    assert words(seed) == (0, low)
    assert words(np.int64(seed)) == (0, low)
    assert words(jax.random.key(seed)) == (0, low)
    assert words(jax.random.PRNGKey(seed)) == (0, low)
    assert words(np.asarray(seed, np.uint32)) == (0, low)
    assert words(torch.tensor(seed, dtype=torch.int64)) == (0, low)
    assert words(np.asarray([0, seed], np.uint32)) == (0, low)
    assert words(torch.tensor([0, seed])) == (0, low)


def test_other_seeds_give_other_words():
    assert words(torch.tensor([7, 8], dtype=torch.int32)) == (7, 8)
    split = jax.random.split(jax.random.key(0), 3)
    assert len({words(key) for key in split}) == 3


@pytest.mark.parametrize("seed", [-1, 2**32, np.int64(-1)])
def test_a_seed_is_a_32_bit_number(seed):
    with raises(ValueError, str(seed), "2**32"):
        key_words(seed)


@pytest.mark.parametrize(
    "key",
    [None, 1.0, True, "5", jnp.ones(2), jnp.zeros(3, jnp.int32), torch.ones(2), [1, 2]],
    ids=str,
)
def test_things_that_are_no_key(key):
    with raises(TypeError, "random key"):
        key_words(key)
    with raises(TypeError, "random key"):
        key_words(jax.random.split(jax.random.key(0), 3))


# Trees.


class Pair(NamedTuple):
    first: object
    second: object


def test_paths_join_keys_with_dots():
    tree = {"b": Pair(1.0, [2.0, (3.0,)]), "a": {"0": 4.0}, "none": None}
    flat = flatten(tree)
    assert flat.leaves == {"a.0": 4.0, "b.first": 1.0, "b.second.0": 2.0, "b.second.1.0": 3.0}
    assert flat.rebuild({"b.second.0": "x"}) == {
        "b": Pair(None, ["x", (None,)]),
        "a": {"0": None},
        "none": None,
    }
    assert leaf_paths(5.0) == ("",)


def test_the_value_that_nnx_puts_under_every_variable_is_no_part_of_the_path():
    @functools.partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=[])
    @dataclasses.dataclass
    class Projections:
        value: object

    one, two, three = (jnp.full(1, float(i)) for i in (1, 2, 3))
    tree = {"layer": {"w": nnx.Param(one)}, "attn": Projections(two)}
    flat = flatten(tree)
    assert flat.leaves == {"layer.w": one, "attn.value": two}
    rebuilt = flat.rebuild({"layer.w": three})
    assert rebuilt["layer"]["w"][...] == three
    assert rebuilt["attn"] == Projections(None)


def test_two_leaves_of_one_path():
    with raises(ValueError, "'a.b'"):
        flatten({"a": {"b": 1.0}, "a.b": 2.0})


def test_a_flat_dict_of_tensors():
    params = {"b": torch.ones(1), "a": torch.zeros(1)}
    flat = flatten(params)
    assert list(flat.leaves) == ["a", "b"]
    assert flat.rebuild({"b": 1}) == {"b": 1}
    with raises(ValueError, "flat dict"):
        flatten({"a": {"b": torch.ones(1)}})
    with raises(ValueError, "flat dict"):
        flatten({"a": torch.ones(1), "b": jnp.ones(1)})
