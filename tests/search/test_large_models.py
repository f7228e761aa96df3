"""MobileNetV1 and ResNet-50 at full size: budgets met with depthwise and residual channels coupled.

Only shapes matter, so that nothing is computed but plans.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import purepruning as pp

pytestmark = pytest.mark.usefixtures("unoptimized")

DIMS = ("NHWC", "HWIO", "NHWC")
# Inputs of conv1, of every 1 x 1 convolution and of the classifier; AMC's published strategy.
DENSE = (3, 32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
AMC = (3, 24, 48, 96, 80, 192, 200, 328, 352, 368, 360, 328, 400, 736, 752)
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)


def conv(x, w, stride=1, groups=1):
    return jax.nn.relu(
        jax.lax.conv_general_dilated(
            x, w, (stride, stride), "SAME", dimension_numbers=DIMS, feature_group_count=groups
        )
    )


def mobilenet_shapes():
    shapes = {"conv1": (3, 3, 3, 32)}
    for i, (inputs, outputs) in enumerate(itertools.pairwise(DENSE[1:])):
        shapes[f"dw{i}"], shapes[f"pw{i}"] = (3, 3, 1, inputs), (1, 1, inputs, outputs)
    return {**shapes, "fc": (1024, 1000)}


def mobilenet(params, x):
    x = conv(x, params["conv1"], 2)
    for i, stride in enumerate(STRIDES):
        x = conv(x, params[f"dw{i}"], stride, x.shape[-1])
        x = conv(x, params[f"pw{i}"])
    return x.mean((1, 2)) @ params["fc"]


STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))


def resnet_shapes():
    shapes, inputs = {"conv1": (7, 7, 3, 64)}, 64
    for s, (width, blocks, _) in enumerate(STAGES):
        for b in range(blocks):
            name = f"s{s}b{b}"
            shapes[f"{name}a"] = (1, 1, inputs, width)
            shapes[f"{name}b"] = (3, 3, width, width)
            shapes[f"{name}c"] = (1, 1, width, 4 * width)
            if b == 0:
                shapes[f"{name}d"] = (1, 1, inputs, 4 * width)
            inputs = 4 * width
    return {**shapes, "fc": (2048, 1000)}


def resnet(params, x):
    x = conv(x, params["conv1"], 2)
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
    for s, (_, blocks, stride) in enumerate(STAGES):
        for b in range(blocks):
            name, step = f"s{s}b{b}", stride if b == 0 else 1
            y = conv(conv(x, params[f"{name}a"]), params[f"{name}b"], step)
            y = conv(y, params[f"{name}c"])
            x = y + (conv(x, params[f"{name}d"], step) if b == 0 else x)
    return x.mean((1, 2)) @ params["fc"]


@functools.cache
def config_of(name):
    shapes, fn = {
        "mobilenet": (mobilenet_shapes(), mobilenet),
        "resnet": (resnet_shapes(), resnet),
    }[name]
    params = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    coupling = pp.couple(fn, params, image)
    layers = [
        pp.Layer(n, "Conv2d", n, s, (3,), (2,), groups=s[3] if n.startswith("dw") else 1)
        for n, s in shapes.items()
        if n != "fc"
    ]
    return pp.resolve(
        [{"op_types": ["Conv2d"]}], layers, coupling=coupling, round_to=8, extra="none"
    )


def test_the_strategy_that_amc_published():
    of = pp.search.problem(config_of("mobilenet"), {"macs": 0.52})
    plan = {}
    for dense, kept, i in zip(DENSE[1:], AMC[1:], range(14), strict=True):
        source = "conv1" if i == 0 else f"pw{i - 1}"
        name = next(n for n in of.names if source in n.split(" + "))
        plan[name] = dense - kept
    assert len(plan) == len(of.names) == 14
    assert of.dense()["macs"] == 568_740_352
    found = of.measure(plan)["macs"]
    assert found == pytest.approx(293_870_000, abs=5_000)
    assert found / of.dense()["macs"] == pytest.approx(0.5167, abs=1e-4)


def smooth(of):
    """A traceable score: what is lost grows with the square of the share that goes, unevenly."""
    sizes = np.asarray([pool.size for pool in of.config.pools], np.float32)
    worth = np.random.default_rng(0).uniform(0.5, 2.0, len(sizes)).astype(np.float32)

    def score(counts):
        x = jnp.stack([counts[n] for n in of.names]).astype(jnp.float32) / sizes
        return 1.0 - jnp.mean(worth * jnp.square(x))

    return score


METHODS = {
    "netadapt": lambda of: pp.search.netadapt(of, step=0.1, decay=1.0),
    "amc": lambda of: pp.search.amc(of, episodes=40, hyper={"warmup": 20, "hidden": 32}),
}
CASES = [(m, k) for m in ("mobilenet", "resnet") for k in ("allocate", *METHODS)]


@pytest.mark.parametrize(
    ("model", "method"),
    [
        c if c == ("mobilenet", "allocate") else pytest.param(*c, marks=pytest.mark.full)
        for c in CASES
    ],
)
def test_half_of_the_multiply_adds_are_left(model, method):
    of = pp.search.problem(config_of(model), {"macs": 0.5})
    score = smooth(of)
    if method == "allocate":
        errors = {
            pool.name: np.square(options / pool.size)
            for pool, options in zip(of.config.pools, of.options, strict=True)
        }
        plan = pp.search.allocate(of, errors).plan
    else:
        search = METHODS[method](of)
        run = jax.jit(lambda key: pp.search.scan_search(search, key, score, 40)[0])
        best = search.best(run(jax.random.key(0)))
        plan = {name: int(count) for name, count in best.items()}
    left = of.measure(plan)["macs"] / of.dense()["macs"]
    assert 0.49 <= left <= 0.5
    kept = [pool.size - plan[pool.name] for pool in of.config.pools]
    assert all(k % 8 == 0 and k > 0 for k in kept)
    # Depthwise and residual channels are in the groups of what makes them.
    joined = max(len(pool.layers) for pool in of.config.pools)
    assert joined == {"mobilenet": 2, "resnet": 7}[model]
