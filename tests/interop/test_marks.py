"""Values marked inside JAX programs: where they are found, stacked how, and where refused."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purepruning_interop._marks import collect, mark, marking

XS = jnp.arange(3.0)


def taken(function, *args):
    """The result of a function of marks, and each marked value, or the list where several."""
    result, values = collect("capture", None, function, *args)
    return result, {k: v[0] if len(v) == 1 else v for k, v in values.items()}


def test_result_and_marked_pytrees_come_back_with_what_is_no_array():
    def function(x, name):
        mark("a", {"twice": 2 * x, "name": name, "none": None})
        return x + 1, name, None

    result, values = taken(function, jnp.ones(2), "text")
    assert result[1:] == ("text", None)
    np.testing.assert_array_equal(result[0], [2, 2])
    np.testing.assert_array_equal(values["a"].pop("twice"), [2, 2])
    assert values == {"a": {"name": "text", "none": None}}


def test_calls_are_in_the_order_of_the_program():
    _, values = taken(lambda x: mark("a", mark("b", mark("a", x) + 1) + 1), jnp.zeros(()))
    assert [float(v) for v in values["a"]] == [0, 2]
    assert float(values["b"]) == 1


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint, jax.jit, lambda f: jax.jit(f)])
def test_scan_stacks_on_the_leading_axis(wrap, reverse):
    def step(carry, x):
        return mark("sum", carry + x), mark("slice", 10 * x)

    def function(x):
        return jax.lax.scan(wrap(step), x, XS, reverse=reverse)

    (carry, ys), values = taken(function, jnp.zeros(()))
    assert float(carry) == 3
    np.testing.assert_array_equal(ys, [0, 10, 20])
    np.testing.assert_array_equal(values["slice"], [0, 10, 20])
    np.testing.assert_array_equal(values["sum"], [3, 3, 2] if reverse else [0, 1, 3])


def test_axes_of_scans_in_order_then_those_of_vmaps():
    def inner(carry, x):
        return carry, mark("a", x * jnp.ones(5))

    def outer(carry, x):
        return jax.lax.scan(inner, carry, x)

    def function(xs):  # 7 examples of 2 x 3 steps
        return jax.vmap(lambda x: jax.lax.scan(outer, 0.0, x), in_axes=2, out_axes=(0, 1))(xs)

    xs = jnp.arange(42.0).reshape(2, 3, 7)
    (_, ys), values = taken(function, xs)
    assert ys.shape == (2, 7, 3, 5)  # vmap puts its axis where it was told
    np.testing.assert_array_equal(values["a"], np.asarray(xs)[..., None] * np.ones(5))


def test_what_is_not_mapped_stays_so():
    def example(x, state):
        return mark("a", (x, state))

    def function(xs):
        return jax.vmap(example, in_axes=(1, None), out_axes=(0, None))(xs, jnp.ones(4))

    _, values = taken(function, jnp.arange(6.0).reshape(2, 3))
    x, state = values["a"]
    np.testing.assert_array_equal(x, [[0, 3], [1, 4], [2, 5]])
    assert state.shape == (4,)


def step_of_cond(x):
    return jax.lax.cond(x > 0, lambda x: mark("a", x), lambda x: x, x)


def step_of_while(x):
    return jax.lax.while_loop(lambda x: x < 3, lambda x: mark("a", x + 1), x)


def step_of_custom_vjp(x):
    function = jax.custom_vjp(lambda x: mark("a", x))
    function.defvjp(lambda x: (mark("a", x), None), lambda _, g: (g,))
    return function(x)


def step_of_custom_jvp(x):
    function = jax.custom_jvp(lambda x: mark("a", x))
    function.defjvps(lambda g, y, x: g)
    return function(x)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (step_of_cond, "cond or switch, where only one branch runs"),
        (step_of_while, "while_loop"),
        (step_of_custom_vjp, "jax.custom_vjp"),
        (step_of_custom_jvp, "jax.custom_jvp"),
        (lambda x: jax.jit(step_of_cond)(x), "cond or switch"),
        (lambda x: jax.lax.scan(lambda c, _: (step_of_while(c), None), x, XS), "while_loop"),
    ],
)
def test_refused(step, message):
    with pytest.raises(ValueError, match=f"capture: layer 'a' is called inside.*{message}"):
        taken(step, jnp.ones(()))


def test_loops_and_branches_without_marks_are_run_as_they_are():
    def function(x):
        x = jax.lax.cond(x > 0, lambda x: x + 1, lambda x: x, mark("a", x))
        return jax.lax.while_loop(lambda x: x < 9, lambda x: x * 2, x)

    result, values = taken(function, jnp.ones(()))
    assert float(result) == 16
    assert float(values["a"]) == 1


def test_gradient_through_scan_and_checkpoint_equals_the_one_by_hand():
    def loss(w):
        def step(carry, x):
            return carry, mark("a", w * w * x)

        _, values = collect("", None, lambda: jax.lax.scan(jax.checkpoint(step), 0.0, XS))
        return jnp.sum(values["a"][0])

    # sum of w^2 x over x = 0, 1, 2
    assert float(jax.grad(loss)(5.0)) == 2 * 5 * 3
    assert float(jax.jit(jax.vmap(jax.grad(loss)))(jnp.array([1.0, 5.0]))[1]) == 30


def test_checkpoint_is_still_one():
    def function(x):
        return collect("", None, jax.checkpoint(lambda x: jnp.sin(mark("a", x * x))), x)

    assert "remat" in str(jax.make_jaxpr(function)(1.0))


def test_inside_shard_map():
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("batch")

    @jax.jit
    @partial(
        jax.shard_map, mesh=mesh, in_specs=spec, out_specs=(jax.sharding.PartitionSpec(), spec)
    )
    def function(x):
        result, values = taken(lambda x: jax.lax.psum(mark("a", 2 * x).sum(), "batch"), x)
        return result, values["a"]

    result, a = function(XS)
    assert float(result) == 6
    np.testing.assert_array_equal(a, [0, 2, 4])


def test_around_shard_map_is_refused():
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("batch")
    function = jax.shard_map(lambda x: mark("a", x), mesh=mesh, in_specs=spec, out_specs=spec)
    with pytest.raises(ValueError, match=r"called inside jax\.shard_map; call capture"):
        taken(function, XS)


def test_a_named_axis_around_it_is_the_one_inside():
    def example(x):
        return taken(lambda x: mark("a", x - jax.lax.pmean(x, "batch")), x)[1]["a"]

    np.testing.assert_array_equal(jax.vmap(example, axis_name="batch")(XS), [-1, 0, 1])


def test_traces_of_inner_functions_are_not_mixed_up():
    keys = []

    @jax.jit
    def inner(x):
        return mark(keys[-1], x) if keys else x

    def values(key):
        return collect("", key, inner, XS)[1]

    assert values("plain") == {}  # traced without a mark
    keys.append("a")
    assert list(values("a")) == ["a"]
    keys.append("b")
    assert list(values("b")) == ["b"]
    assert list(values("a")) == ["a"]  # from the cache
    keys.clear()
    np.testing.assert_array_equal(inner(XS), XS)
    with marking("c"):
        np.testing.assert_array_equal(inner(XS), XS)


def test_a_trace_with_marks_runs_without_collect():
    np.testing.assert_array_equal(jax.jit(lambda x: mark("a", x) + 1)(XS), [1, 2, 3])
    assert float(jax.grad(lambda x: mark("a", x) ** 2)(3.0)) == 6
