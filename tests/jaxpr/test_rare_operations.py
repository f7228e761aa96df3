"""Operations that few models have: exact, or whole with a reason that names them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.scipy import linalg

import purepruning as pp

pytestmark = pytest.mark.usefixtures("unoptimized")
CHANNELS = 8


def whole(call, reason):
    return pytest.param(call, reason, id=call.__name__)


def exact(call):
    return pytest.param(call, None, id=call.__name__)


def empty_strided_slice(h):
    return jnp.concatenate([h[4::2], h[1::2]])


def associative_scan_of_two(h):
    return lax.associative_scan(jnp.add, h[:2])


def associative_scan_of_five(h):
    return lax.associative_scan(jnp.add, jnp.concatenate([h, h[:1]]))


def triangular_solve(h):
    matrix = jnp.tril(jnp.ones((4, 4))) + jnp.eye(4)
    return lax.linalg.triangular_solve(matrix, h, left_side=True, lower=True)


def sinusoids_without_a_norm(h):
    return jax.nn.relu(h + jnp.sin(jnp.arange(32.0)).reshape(4, 8))


def sinusoids_before_a_norm(h):
    h = h + jnp.sin(jnp.arange(32.0)).reshape(4, 8)
    return h * lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-5)


def factors_of_a_gram_matrix(h):
    gram = h.T @ h + jnp.eye(CHANNELS)
    return linalg.lu_solve(linalg.lu_factor(gram), h.T).T


def solve(h):
    return jnp.linalg.solve(jnp.eye(4) + jnp.tril(jnp.ones((4, 4))), h)


def custom_linear_solve(h):
    return lax.custom_linear_solve(lambda v: 2.0 * v, h, lambda _, b: b / 2.0, symmetric=True)


def qr(h):
    return jnp.linalg.qr(h)[1]


def pure_callback(h):
    return jax.pure_callback(np.tanh, jax.ShapeDtypeStruct(h.shape, h.dtype), h)


def groups_of_the_batch(h):
    kernel = jnp.ones((2, CHANNELS, 1))
    return lax.conv_general_dilated(h[..., None], kernel, (1,), "SAME", batch_group_count=2)[..., 0]


CASES = [
    exact(empty_strided_slice),
    exact(associative_scan_of_two),
    exact(associative_scan_of_five),
    exact(triangular_solve),
    exact(sinusoids_without_a_norm),
    whole(sinusoids_before_a_norm, "summed, and not zero where it is masked"),
    whole(factors_of_a_gram_matrix, "operand of lu, for which there is no rule"),
    whole(solve, "operand of custom_linear_solve, for which there is no rule"),
    whole(custom_linear_solve, "operand of custom_linear_solve, for which there is no rule"),
    whole(qr, "operand of qr, for which there is no rule"),
    whole(pure_callback, "operand of pure_callback, for which there is no rule"),
    whole(groups_of_the_batch, "operand of conv_general_dilated, for which there is no rule"),
]


@pytest.mark.parametrize(("call", "reason"), CASES)
def test_rare_operations_are_exact_or_whole_with_a_reason(call, reason):
    shapes = {"one": (6, CHANNELS), "two": (6, 10), "head": (10, 3)}
    params = {
        name: jax.random.normal(jax.random.key(i), shape)
        for i, (name, shape) in enumerate(shapes.items())
    }
    x = jax.random.normal(jax.random.key(9), (4, 6))
    width = jax.eval_shape(call, jnp.ones((4, CHANNELS))).shape[-1]
    params["last"] = jax.random.normal(jax.random.key(8), (width, 3))

    def fn(p, x):
        return call(x @ p["one"]) @ p["last"], jax.nn.relu(x @ p["two"]) @ p["head"]

    coupling = pp.couple(fn, params, x)
    reasons = {(axis.path, axis.axis): axis.reason for axis in coupling.frozen}
    assert reasons.get(("one", 1)) == reason
    assert coupling.n_units == 10 + (CHANNELS if reason is None else 0)
    units = coupling.lowest(np.random.default_rng(0).random(coupling.n_units), 0.5)
    masks = coupling.masks(units, params)
    small = pp.shrink(fn, params, masks, coupling, x)
    assert small.params["two"].shape == (6, 5)
    assert small.params["one"].shape == (6, 4 if reason is None else CHANNELS)
    expected = fn(pp.apply_masks(params, masks), x)
    for a, b in zip(expected, small.fn(small.params, x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def experts(p, x):
    """Two of four experts for each token, by their share of a softmax."""
    share, chosen = lax.top_k(jax.nn.softmax(x @ p["router"]), 2)
    share = (jax.nn.one_hot(chosen, 4) * share[..., None]).sum(-2)
    if "up" in p:
        h = jax.nn.relu(jnp.einsum("td,edf->tef", x, p["up"]))
        return jnp.einsum("tef,efd,te->td", h, p["down"], share)
    return sum(
        share[:, i : i + 1] * (jax.nn.relu(x @ e["up"]) @ e["down"])
        for i, e in enumerate(p["experts"])
    )


@pytest.mark.parametrize("stacked", [True, False])
def test_an_expert_goes_whole_and_its_share_of_tokens_stays(stacked):
    draw = iter(jax.random.split(jax.random.key(1), 20))
    up, down = (jax.random.normal(next(draw), s) for s in ((4, 6, 5), (4, 5, 6)))
    moe = {"router": jax.random.normal(next(draw), (6, 4))}
    if stacked:
        moe |= {"up": up, "down": down}
    else:
        moe["experts"] = [{"up": up[i], "down": down[i]} for i in range(4)]
    ends = {"stem": (3, 6), "head": (6, 3)}
    ends = {name: jax.random.normal(next(draw), shape) for name, shape in ends.items()}
    params = ends | {"moe": moe}
    x = jax.random.normal(next(draw), (7, 3))

    def fn(p, x):
        h = x @ p["stem"]
        return (h + experts(p["moe"], h)) @ p["head"]

    coupling = pp.couple(fn, params, x)
    if stacked:
        (family,) = (f for f in coupling.families if len(f) == 4)
        assert {(a.path, a.axis) for a in family.axes} == {("moe.up", 0), ("moe.down", 0)}
        gone = family.units[1:2]
    else:
        (branch,) = (b for b in coupling.branches if "experts.1" in b.name)
        gone = branch.units
    masks = coupling.masks(gone, params)
    small = pp.shrink(fn, params, masks, coupling, x)
    assert small.params["moe"]["router"].shape == (6, 4)
    if stacked:
        assert small.params["moe"]["up"].shape == (3, 6, 5)
    else:
        assert small.params["moe"]["experts"][1]["up"].shape == (6, 0)
    expected = fn(pp.apply_masks(params, masks), x)
    assert jnp.abs(expected - fn(params, x)).max() > 0.1
    np.testing.assert_allclose(small.fn(small.params, x), expected, rtol=1e-5, atol=1e-5)
