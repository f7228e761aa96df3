"""The layer table of Linen modules; every expectation is written by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax.core import freeze

from purepruning_interop import linen
from tests.interop.table import assert_table, row

IMAGE = jax.ShapeDtypeStruct((2, 8, 8, 4), "float32")
SIGNAL = jax.ShapeDtypeStruct((2, 8, 4), "float32")
VOLUME = jax.ShapeDtypeStruct((2, 4, 4, 4, 4), "float32")
VECTOR = jax.ShapeDtypeStruct((2, 4), "float32")
TOKENS = jax.ShapeDtypeStruct((2, 5), "int32")


def init(module, *inputs, **kwargs):
    """Abstract variables: the tests of names and axes need no numbers."""
    return jax.eval_shape(partial(module.init, **kwargs), jax.random.key(0), *inputs)


class Compact(nn.Module):
    """A chain of modules, each under its automatic name."""

    parts: tuple = ()

    @nn.compact
    def __call__(self, x):
        for part in self.parts:
            x = part()(x)
        return x


def chain(*parts):
    return Compact(tuple(parts))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.LayerNorm()(nn.Dense(4)(x))


class ScanBlock(nn.Module):
    """One step of a scan: the carry goes through a block."""

    @nn.compact
    def __call__(self, x, _):
        return Block()(x), None


class Scanned(nn.Module):
    axis: int = 0
    length: int = 3

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            ScanBlock,
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=self.length,
        )
        return scan()(x, None)[0]


class Outer(nn.Module):
    axis: int = 0

    @nn.compact
    def __call__(self, x, _):
        return Scanned(self.axis)(x), None


class NestedScan(nn.Module):
    outer: int = 0
    inner: int = 0

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            Outer, variable_axes={"params": self.outer}, split_rngs={"params": True}, length=5
        )
        return scan(axis=self.inner)(x, None)[0]


class Setup(nn.Module):
    def setup(self):
        self.layers = [nn.Dense(4), nn.Dense(4)]
        self.head = Block()
        self.by_name = {"a": nn.Dense(2)}

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.by_name["a"](self.head(x))

    def encode(self, x):
        return self.layers[0](x)


class Shared(nn.Module):
    """Dense is called twice, and reached from a submodule as well."""

    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(4)
        return Inside(dense)(dense(dense(x)))


class Inside(nn.Module):
    dense: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.dense(x)


class Positions(nn.Module):
    """A module with its own parameters: one is a weight, one is no more than a scale."""

    @nn.compact
    def __call__(self, x):
        table = self.param("pos_embed", nn.initializers.zeros, x.shape[1:])
        scale = self.param("scale", nn.initializers.zeros, x.shape[-1:])
        return nn.Dense(3)(x + table[None] * scale[None, None])


class MyDense(nn.Dense):
    """A user's subclass of a known class."""


class WithExtra(nn.Dense):
    """A known class that the user gave a further parameter."""

    @nn.compact
    def __call__(self, x):
        self.param("extra", nn.initializers.zeros, (3, 3))
        return super().__call__(x)


def attention(path, bias=True):
    def b(name):
        return f"{path}.{name}.bias" if bias else None

    def qkv(n):
        return row("Linear", f"{path}.{n}.kernel", (1, 2), (0,), bias=b(n))

    return {
        **{f"{path}.{n}": qkv(n) for n in ("query", "key", "value")},
        f"{path}.out": row("Linear", f"{path}.out.kernel", (2,), (0, 1), bias=b("out")),
    }


def cell(path, inputs, hidden, biased):
    return {
        f"{path}.{n}": row(
            "Linear",
            f"{path}.{n}.kernel",
            (1,),
            (0,),
            bias=f"{path}.{n}.bias" if n in biased else None,
        )
        for n in [*inputs, *hidden]
    }


def dense(name, bias=True):
    return {
        name: row("Linear", f"{name}.kernel", (1,), (0,), bias=f"{name}.bias" if bias else None)
    }


CASES = {
    "dense": (chain(partial(nn.Dense, 3)), VECTOR, dense("Dense_0")),
    "dense without bias": (
        chain(partial(nn.Dense, 3, use_bias=False)),
        VECTOR,
        dense("Dense_0", bias=False),
    ),
    "root": (nn.Dense(3), VECTOR, {"kernel": row("Linear", "kernel", (1,), (0,), bias="bias")}),
    "subclass": (chain(partial(MyDense, 3)), VECTOR, dense("MyDense_0")),
    "several features": (
        chain(partial(nn.DenseGeneral, (2, 3))),
        VECTOR,
        {
            "DenseGeneral_0": row(
                "Linear", "DenseGeneral_0.kernel", (1, 2), (0,), bias="DenseGeneral_0.bias"
            )
        },
    ),
    "several axes": (
        chain(partial(nn.DenseGeneral, 3, axis=(1, -1))),
        IMAGE,
        {
            "DenseGeneral_0": row(
                "Linear", "DenseGeneral_0.kernel", (2,), (0, 1), bias="DenseGeneral_0.bias"
            )
        },
    ),
    "batch dims": (
        chain(partial(nn.DenseGeneral, (3, 5), axis=(2, 3), batch_dims=(0, 1))),
        VOLUME,
        {
            "DenseGeneral_0": row(
                "Linear",
                "DenseGeneral_0.kernel",
                (4, 5),
                (2, 3),
                stack=(0, 1),
                bias="DenseGeneral_0.bias",
            )
        },
    ),
    "einsum": (
        chain(partial(nn.Einsum, (4, 2, 3), "bc,chd->bhd")),
        VECTOR,
        {"Einsum_0": row("Linear", "Einsum_0.kernel", (1, 2), (0,), bias="Einsum_0.bias")},
    ),
    "einsum, batched and with dots": (
        chain(partial(nn.Einsum, (8, 4, 3), "...sc,scd->...sd")),
        SIGNAL,
        {
            "Einsum_0": row(
                "Linear", "Einsum_0.kernel", (2,), (1,), stack=(0,), bias="Einsum_0.bias"
            )
        },
    ),
    # The bias has the output's order (d, h), which is not the weight's.
    "einsum, transposed output": (
        chain(partial(nn.Einsum, (4, 2, 3), "bc,chd->bdh")),
        VECTOR,
        {"Einsum_0": row("Linear", "Einsum_0.kernel", (1, 2), (0,))},
    ),
    "conv1d": (
        chain(partial(nn.Conv, 6, 3)),
        SIGNAL,
        {"Conv_0": row("Conv1d", "Conv_0.kernel", (2,), (1,), bias="Conv_0.bias")},
    ),
    "conv2d in groups, then depthwise": (
        chain(
            partial(nn.Conv, 6, (3, 3), feature_group_count=2),
            partial(nn.Conv, 12, (3, 3), feature_group_count=6, use_bias=False),
        ),
        IMAGE,
        {
            "Conv_0": row("Conv2d", "Conv_0.kernel", (3,), (2,), bias="Conv_0.bias", groups=2),
            "Conv_1": row("Conv2d", "Conv_1.kernel", (3,), (2,), groups=6),
        },
    ),
    "conv3d": (
        chain(partial(nn.Conv, 6, (3, 3, 3))),
        VOLUME,
        {"Conv_0": row("Conv3d", "Conv_0.kernel", (4,), (3,), bias="Conv_0.bias")},
    ),
    "conv transpose": (
        chain(
            partial(nn.ConvTranspose, 6, (3,)),
            partial(nn.ConvTranspose, 5, (3,), transpose_kernel=True),
        ),
        SIGNAL,
        {
            "ConvTranspose_0": row(
                "ConvTranspose1d", "ConvTranspose_0.kernel", (2,), (1,), bias="ConvTranspose_0.bias"
            ),
            "ConvTranspose_1": row(
                "ConvTranspose1d", "ConvTranspose_1.kernel", (1,), (2,), bias="ConvTranspose_1.bias"
            ),
        },
    ),
    "conv local": (
        chain(partial(nn.ConvLocal, 6, (3, 3))),
        IMAGE,
        {"ConvLocal_0": row("ConvLocal", "ConvLocal_0.kernel", (3,), (2,))},
    ),
    "embed": (
        chain(partial(nn.Embed, 11, 4)),
        TOKENS,
        {"Embed_0": row("Embedding", "Embed_0.embedding", (1,), (0,))},
    ),
    "norms of vectors": (
        chain(
            partial(nn.BatchNorm, use_running_average=True),
            nn.LayerNorm,
            nn.RMSNorm,
            partial(nn.GroupNorm, 2),
            nn.PReLU,
        ),
        VECTOR,
        {
            "BatchNorm_0": row("BatchNorm1d", "BatchNorm_0.scale", (0,), bias="BatchNorm_0.bias"),
            "LayerNorm_0": row("LayerNorm", "LayerNorm_0.scale", (0,), bias="LayerNorm_0.bias"),
            "RMSNorm_0": row("RMSNorm", "RMSNorm_0.scale", (0,)),
            "GroupNorm_0": row("GroupNorm", "GroupNorm_0.scale", (0,), bias="GroupNorm_0.bias"),
            "PReLU_0": row("PReLU", "PReLU_0.negative_slope"),
        },
    ),
    "norms without scale": (
        chain(
            partial(nn.BatchNorm, use_running_average=True, use_scale=False),
            partial(nn.LayerNorm, use_scale=False, feature_axes=(-2, -1)),
            partial(nn.RMSNorm, use_scale=False),
        ),
        SIGNAL,
        {},
    ),
    "norm over two feature axes": (
        chain(partial(nn.LayerNorm, feature_axes=(-2, -1), reduction_axes=(-2, -1))),
        SIGNAL,
        {"LayerNorm_0": row("LayerNorm", "LayerNorm_0.scale", (0, 1), bias="LayerNorm_0.bias")},
    ),
    **{
        f"norms of {x.ndim} axes": (
            chain(partial(nn.BatchNorm, use_running_average=True), nn.InstanceNorm),
            x,
            {
                "BatchNorm_0": row(
                    f"BatchNorm{d}", "BatchNorm_0.scale", (0,), bias="BatchNorm_0.bias"
                ),
                "InstanceNorm_0": row(
                    f"InstanceNorm{d}", "InstanceNorm_0.scale", (0,), bias="InstanceNorm_0.bias"
                ),
            },
        )
        for x, d in [(SIGNAL, "1d"), (IMAGE, "2d"), (VOLUME, "3d")]
    },
    "attention": (
        chain(partial(nn.MultiHeadAttention, num_heads=2, normalize_qk=False)),
        SIGNAL,
        attention("MultiHeadAttention_0"),
    ),
    "attention without bias": (
        chain(partial(nn.MultiHeadDotProductAttention, num_heads=2, use_bias=False)),
        SIGNAL,
        attention("MultiHeadDotProductAttention_0", bias=False),
    ),
    "lstm": (
        nn.RNN(nn.OptimizedLSTMCell(3, name="cell")),
        SIGNAL,
        {
            f"cell.{side}{gate}": row(
                "Linear",
                f"cell.{side}{gate}.kernel",
                (1,),
                (0,),
                bias=f"cell.h{gate}.bias" if side == "h" else None,
            )
            for gate in "ifgo"
            for side in "ih"
        },
    ),
    "simple rnn": (
        nn.RNN(nn.SimpleCell(3, name="cell")),
        SIGNAL,
        cell("cell", "i", "h", biased="i"),
    ),
    "setup, list, dict and block": (
        Setup(),
        VECTOR,
        {
            **dense("layers_0"),
            **dense("layers_1"),
            **dense("head.Dense_0"),
            "head.LayerNorm_0": row(
                "LayerNorm", "head.LayerNorm_0.scale", (0,), bias="head.LayerNorm_0.bias"
            ),
            **dense("by_name_a"),
        },
    ),
    "shared": (Shared(), VECTOR, dense("Dense_0")),
    "own parameters": (
        chain(Positions),
        SIGNAL,
        {
            **dense("Positions_0.Dense_0"),
            "Positions_0.pos_embed": row(
                "Positions", "Positions_0.pos_embed", aliases=("Positions_0",)
            ),
        },
    ),
    "extra parameter of a known class": (
        chain(partial(WithExtra, 3)),
        VECTOR,
        {
            **dense("WithExtra_0"),
            "WithExtra_0.extra": row("", "WithExtra_0.extra"),
        },
    ),
    "remat, jit and vmap over the batch": (
        chain(
            partial(nn.remat(nn.Dense), 4),
            partial(nn.jit(nn.Dense), 4),
            partial(
                nn.vmap(nn.Dense, variable_axes={"params": None}, split_rngs={"params": False}),
                4,
            ),
        ),
        VECTOR,
        {**dense("CheckpointDense_0"), **dense("JitDense_0"), **dense("VmapDense_0")},
    ),
}


@pytest.mark.parametrize("case", CASES, ids=list(CASES))
def test_table(case):
    module, x, expected = CASES[case]
    params = init(module, x)["params"]
    assert_table(linen.layers(module, params, x), params, expected)


@pytest.mark.parametrize("make", [lambda v: v, freeze], ids=["dict", "FrozenDict"])
def test_whole_variables_have_paths_in_params_and_the_same_names(make):
    module = chain(partial(nn.Conv, 6, (3, 3)), partial(nn.BatchNorm, use_running_average=False))
    variables = make(init(module, IMAGE))
    assert_table(
        linen.layers(module, variables, IMAGE, mutable=["batch_stats"]),
        variables,
        {
            "Conv_0": row("Conv2d", "params.Conv_0.kernel", (3,), (2,), bias="params.Conv_0.bias"),
            "BatchNorm_0": row(
                "BatchNorm2d", "params.BatchNorm_0.scale", (0,), bias="params.BatchNorm_0.bias"
            ),
        },
    )
    bare = linen.layers(module, variables["params"], IMAGE)
    assert [layer.name for layer in bare] == ["Conv_0", "BatchNorm_0"]


def stacked(prefix, kernel, vector):
    """The block's rows where a kernel is (in, out) at ``kernel`` and a vector at ``vector``."""
    out, in_, stack = kernel
    (channel, vector_stack) = vector
    return {
        f"{prefix}.Dense_0": row(
            "Linear",
            f"{prefix}.Dense_0.kernel",
            (out,),
            (in_,),
            stack=stack,
            bias=f"{prefix}.Dense_0.bias",
        ),
        f"{prefix}.LayerNorm_0": row(
            "LayerNorm",
            f"{prefix}.LayerNorm_0.scale",
            (channel,),
            stack=vector_stack,
            bias=f"{prefix}.LayerNorm_0.bias",
        ),
    }


# Width, scan lengths and batch are chosen to coincide where a guess from the shapes would go wrong.
@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (Scanned(0), stacked("ScanScanBlock_0.Block_0", (2, 1, (0,)), (1, (0,)))),
        (Scanned(0, length=4), stacked("ScanScanBlock_0.Block_0", (2, 1, (0,)), (1, (0,)))),
        (Scanned(1, length=4), stacked("ScanScanBlock_0.Block_0", (2, 0, (1,)), (0, (1,)))),
        (Scanned(-1, length=4), stacked("ScanScanBlock_0.Block_0", (1, 0, (2,)), (0, (1,)))),
        (
            NestedScan(0, 0),
            stacked(
                "ScanOuter_0.Scanned_0.ScanScanBlock_0.Block_0",
                (3, 2, (0, 1)),
                (2, (0, 1)),
            ),
        ),
        # Outer 5 on axis 1, inner 3 on axis 0 of what is left: kernels are (3, 5, 4, 4).
        (
            NestedScan(1, 0),
            stacked(
                "ScanOuter_0.Scanned_0.ScanScanBlock_0.Block_0",
                (3, 2, (0, 1)),
                (2, (0, 1)),
            ),
        ),
        # Outer on axis 0, inner on the last: kernels are (5, 4, 4, 3).
        (
            NestedScan(0, -1),
            stacked(
                "ScanOuter_0.Scanned_0.ScanScanBlock_0.Block_0",
                (2, 1, (0, 3)),
                (1, (0, 2)),
            ),
        ),
    ],
    ids=["lead", "lead, square", "middle", "last", "nested", "nested, swapped", "nested, last"],
)
def test_scan_axes_are_known_not_guessed(module, expected):
    params = init(module, VECTOR)["params"]
    assert_table(linen.layers(module, params, VECTOR), params, expected)


def test_ensemble_by_vmap_on_an_inner_axis():
    ensemble = nn.vmap(
        nn.Conv,
        variable_axes={"params": 1},
        split_rngs={"params": True},
        in_axes=None,
        axis_size=3,
    )
    module = chain(partial(ensemble, 6, (3, 3)))
    params = init(module, IMAGE)["params"]
    assert params["VmapConv_0"]["kernel"].shape == (3, 3, 3, 4, 6)
    (layer,) = linen.layers(module, params, IMAGE)
    assert (layer.type, layer.class_name) == ("Conv2d", "Conv")
    assert (layer.out_axes, layer.in_axes, layer.stack_axes) == ((4,), (3,), (1,))


def test_scanned_method_of_a_module_with_its_own_parameter():
    class Steps(nn.Module):
        @partial(nn.scan, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        @nn.compact
        def step(self, x, _):
            return x @ self.param("w", nn.initializers.zeros, (4, 4)), None

        def __call__(self, x):
            return self.step(x, None)[0]

    module = chain(Steps)
    params = init(module, VECTOR)["params"]
    expected = {"Steps_0.w": row("Steps", "Steps_0.w", stack=(0,), aliases=("Steps_0",))}
    assert_table(linen.layers(module, params, VECTOR), params, expected)


def test_class_is_the_user_s_where_a_lifted_class_is_used_unlifted():
    class Head(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.remat(nn.Embed)(7, 4).attend(x)

    params = init(Head(), VECTOR)["params"]
    (layer,) = linen.layers(Head(), params, VECTOR)
    assert (layer.name, layer.type, layer.class_name) == ("CheckpointEmbed_0", "Embedding", "Embed")


def test_class_is_the_user_s_not_the_lifted_one():
    module = chain(partial(nn.remat(MyDense), 4), partial(nn.jit(nn.Dense), 4))
    params = init(module, VECTOR)["params"]
    table = linen.layers(module, params, VECTOR)
    assert [layer.class_name for layer in table] == ["MyDense", "Dense"]
    assert table[0].has_type("MyDense")
    assert table[0].has_type("Linear")


@pytest.mark.parametrize("wrap", [nn.WeightNorm, nn.SpectralNorm])
def test_wrapped_layers_are_seen_through(wrap):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            extra = {"update_stats": False} if wrap is nn.SpectralNorm else {}
            return wrap(nn.Dense(3))(x, **extra)

    params = init(Net(), VECTOR)["params"]
    assert_table(linen.layers(Net(), params, VECTOR), params, dense("Dense_0"))


def test_parameters_boxed_for_sharding():
    kernel_init = nn.with_partitioning(nn.initializers.zeros, ("in", "out"))
    module = chain(partial(nn.Dense, 3, kernel_init=kernel_init))
    params = init(module, VECTOR)["params"]
    assert isinstance(params["Dense_0"]["kernel"], nn.Partitioned)
    table = linen.layers(module, params, VECTOR)
    assert_table(table, params, dense("Dense_0"))


def test_arguments_of_the_call():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, *, train, mode="a", mask=None):
            if train:
                x = nn.Dropout(0.5, deterministic=False)(x)
            x = nn.BatchNorm(use_running_average=not train)(x)
            return nn.Dense(3, name=mode)(x if mask is None else x * mask)

    mask = jax.ShapeDtypeStruct((2, 4), "float32")
    variables = init(Net(), VECTOR, train=False, mode="b")
    for train in (False, True):
        for given in (variables, variables["params"]):
            table = linen.layers(
                Net(), given, VECTOR, train=train, mode="b", mask=mask, mutable=["batch_stats"]
            )
            assert [layer.name for layer in table] == ["BatchNorm_0", "b"]
    key = jax.random.key(1)
    assert linen.layers(Net(), variables["params"], VECTOR, train=True, mode="b", rngs=key) == table


def test_method_and_what_it_does_not_reach():
    module = Setup()
    params = init(module, VECTOR)["params"]
    for method in ("encode", Setup.encode, module.encode):
        table = linen.layers(module, params, VECTOR, method=method)
        assert table[0].name == "layers_0"
        assert table[0].type == "Linear"
        unreached = {layer.name: layer for layer in table[1:]}
        assert set(unreached) == {"layers_1.kernel", "head.Dense_0.kernel", "by_name_a.kernel"}
        assert {layer.type for layer in unreached.values()} == {""}
        assert {layer.out_axes for layer in unreached.values()} == {()}


def test_nothing_is_computed():
    ran = []

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            jax.debug.callback(lambda: ran.append(1))
            return nn.Dense(3)(x)

    x = jnp.ones((2, 4))
    params = Net().init(jax.random.key(0), x)["params"]
    jax.effects_barrier()
    ran.clear()
    linen.layers(Net(), params, x)
    jax.effects_barrier()
    assert ran == []


def test_tracing_leaves_no_tracer_behind():
    module = Scanned()
    params = init(module, VECTOR)["params"]
    with jax.checking_leaks():
        linen.layers(module, params, VECTOR)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((nn.Dense, {}, VECTOR), TypeError, "model must be a flax.linen.Module instance"),
        (({}, nn.Dense(3), VECTOR), TypeError, "model must be a flax.linen.Module instance"),
        ((nn.Dense(3), nn.Dense(3), VECTOR), TypeError, "variables must be what Dense.init"),
        ((nn.Dense(3), {}), TypeError, "do not fit Dense.__call__: missing .* 'inputs'"),
        ((nn.Dense(3), {}, VECTOR), ValueError, "not those of this Dense"),
        ((nn.Dense(3), {"other": {"kernel": VECTOR}}, VECTOR), ValueError, "not those of this"),
        ((nn.Dense(3), {"kernel": VECTOR, "bias": VECTOR}, VECTOR), ValueError, "kernel"),
    ],
)
def test_errors(args, error, message):
    with pytest.raises(error, match=message):
        linen.layers(*args)


class Tied(nn.Module):
    """A head that reads the kernel of another layer out of its variables."""

    @nn.compact
    def __call__(self, x):
        first = nn.Dense(8)
        h = nn.relu(first(x))
        kernel = first.variables["params"]["kernel"]
        return h @ kernel.T + (h * kernel[0][None]).sum() + (2 * kernel - kernel / 2).mean()


def test_kernels_read_out_of_variables():
    x = jnp.ones((2, 6))
    model = Tied()
    (found,) = linen.layers(model, model.init(jax.random.key(0), x), x)
    assert (found.name, found.type, found.out_axes, found.in_axes) == (
        "Dense_0",
        "Linear",
        (1,),
        (0,),
    )
