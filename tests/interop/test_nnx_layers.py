"""The layer table of NNX models; every expectation is written by hand."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from purepruning.trees import leaf_paths
from purepruning_interop import nnx as adapter
from tests.fast import some_key
from tests.interop.table import assert_table, row

pytestmark = pytest.mark.usefixtures("unoptimized")


def rngs():
    return nnx.Rngs(some_key())


def linear(name, bias=True, aliases=()):
    return {
        name: row(
            "Linear",
            f"{name}.kernel",
            (1,),
            (0,),
            bias=f"{name}.bias" if bias else None,
            aliases=aliases,
        )
    }


def norm(name, type, bias=True):
    return {name: row(type, f"{name}.scale", (0,), bias=f"{name}.bias" if bias else None)}


def one(module, type, leaf, out=(), in_=(), bias="bias", **kwargs):
    """The case of a module inside a list, whose only weight is ``leaf``."""
    if bias:
        kwargs["bias"] = f"0.{bias}"
    return nnx.List([module]), {"0": row(type, f"0.{leaf}", out, in_, **kwargs)}


class MyLinear(nnx.Linear):
    """A user's subclass of a known class."""


class Positions(nnx.Module):
    """A module with its own parameters: weights, a list of them, and what is no weight."""

    def __init__(self):
        self.pos_embed = nnx.Param(jnp.zeros((5, 4)))
        self.tables = nnx.List([nnx.Param(jnp.zeros((2, 3)))])
        self.scale = nnx.Param(jnp.zeros(4))
        self.count = nnx.Param(jnp.zeros((2, 2), int))
        self.cache = nnx.Variable(jnp.zeros((2, 2)))


class Shared(nnx.Module):
    """A module, a variable, and a cycle, reached in several ways."""

    def __init__(self):
        self.encoder = nnx.Linear(4, 4, rngs=rngs())
        self.head = nnx.Linear(4, 4, rngs=rngs())
        self.other = nnx.Dict(twice=self.encoder)
        self.tail = nnx.Linear(4, 4, rngs=rngs())
        self.tail.kernel = self.head.kernel


class Block(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(4, 6, (3, 3), feature_group_count=2, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, rngs=rngs, keep_rngs=False)


class Ensemble(nnx.Module):
    def __init__(self):
        self.blocks = nnx.split_rngs(splits=3)(nnx.vmap(Block))(rngs())


class Ensembles(nnx.Module):
    def __init__(self):
        make = nnx.vmap(nnx.vmap(lambda rngs: nnx.Linear(4, 4, rngs=rngs)))
        self.linear = nnx.split_rngs(splits=(2, 3))(make)(rngs())


# Functions, because modules are made under nnx.eval_shape: their numbers take no part.
CASES = {
    "linear": lambda: one(nnx.Linear(3, 4, rngs=rngs()), "Linear", "kernel", (1,), (0,)),
    "linear without bias": lambda: one(
        nnx.Linear(3, 4, use_bias=False, rngs=rngs()), "Linear", "kernel", (1,), (0,), bias=None
    ),
    "root": lambda: (
        nnx.Linear(3, 4, rngs=rngs()),
        {"kernel": row("Linear", "kernel", (1,), (0,), bias="bias")},
    ),
    "subclass": lambda: one(MyLinear(3, 4, rngs=rngs()), "Linear", "kernel", (1,), (0,)),
    "linear general": lambda: one(
        nnx.LinearGeneral((2, 3), (4, 5), axis=(-2, -1), batch_axis={0: 7}, rngs=rngs()),
        "Linear",
        "kernel",
        (3, 4),
        (1, 2),
        stack=(0,),
    ),
    "einsum": lambda: one(
        nnx.Einsum("bc,chd->bhd", (4, 2, 3), (2, 3), rngs=rngs()), "Linear", "kernel", (1, 2), (0,)
    ),
    "conv1d": lambda: one(nnx.Conv(4, 6, 3, rngs=rngs()), "Conv1d", "kernel", (2,), (1,)),
    "depthwise": lambda: one(
        nnx.Conv(4, 8, (3, 3), feature_group_count=4, rngs=rngs()),
        "Conv2d",
        "kernel",
        (3,),
        (2,),
        groups=4,
    ),
    "conv3d": lambda: one(nnx.Conv(4, 6, (3, 3, 3), rngs=rngs()), "Conv3d", "kernel", (4,), (3,)),
    "conv transpose": lambda: one(
        nnx.ConvTranspose(4, 6, (3, 3), rngs=rngs()), "ConvTranspose2d", "kernel", (3,), (2,)
    ),
    "conv transpose, transposed kernel": lambda: one(
        nnx.ConvTranspose(4, 6, (3, 3), transpose_kernel=True, rngs=rngs()),
        "ConvTranspose2d",
        "kernel",
        (2,),
        (3,),
    ),
    "embed": lambda: one(
        nnx.Embed(7, 4, rngs=rngs()), "Embedding", "embedding", (1,), (0,), bias=None
    ),
    "prelu": lambda: one(nnx.PReLU(), "PReLU", "negative_slope", bias=None),
    "norms": lambda: (
        nnx.Dict(
            batch=nnx.BatchNorm(4, rngs=rngs()),
            group=nnx.GroupNorm(4, 2, rngs=rngs()),
            instance=nnx.InstanceNorm(4, rngs=rngs()),
            layer=nnx.LayerNorm(4, rngs=rngs()),
            plain=nnx.LayerNorm(4, use_scale=False, rngs=rngs()),
            rms=nnx.RMSNorm(4, rngs=rngs()),
        ),
        {
            **norm("batch", "BatchNorm"),
            **norm("group", "GroupNorm"),
            **norm("instance", "InstanceNorm"),
            **norm("layer", "LayerNorm"),
            **norm("rms", "RMSNorm", bias=False),
        },
    ),
    "attention": lambda: (
        nnx.Dict(a=nnx.MultiHeadAttention(2, 4, rngs=rngs(), normalize_qk=True)),
        {
            "a.key": row("Linear", "a.key.kernel", (1, 2), (0,), bias="a.key.bias"),
            **norm("a.key_ln", "LayerNorm", bias=False),
            "a.out": row("Linear", "a.out.kernel", (2,), (0, 1), bias="a.out.bias"),
            "a.query": row("Linear", "a.query.kernel", (1, 2), (0,), bias="a.query.bias"),
            **norm("a.query_ln", "LayerNorm", bias=False),
            "a.value": row("Linear", "a.value.kernel", (1, 2), (0,), bias="a.value.bias"),
        },
    ),
    "lora": lambda: (
        nnx.Dict(a=nnx.LoRALinear(3, 4, lora_rank=2, rngs=rngs())),
        {
            **linear("a"),
            "a.lora.lora_a": row("LoRA", "a.lora.lora_a", (1,), (0,), aliases=("a.lora",)),
            "a.lora.lora_b": row("LoRA", "a.lora.lora_b", (1,), (0,), aliases=("a.lora",)),
        },
    ),
    "simple rnn": lambda: (
        nnx.Dict(cell=nnx.SimpleCell(3, 4, rngs=rngs())),
        {**linear("cell.dense_h", bias=False), **linear("cell.dense_i")},
    ),
    "containers": lambda: (
        nnx.Dict(
            list=nnx.List([nnx.Linear(2, 2, rngs=rngs()) for _ in range(11)]),
            data=nnx.data({"x": [nnx.Linear(2, 2, rngs=rngs())]}),
            seq=nnx.Sequential(nnx.relu, nnx.Linear(2, 2, rngs=rngs())),
        ),
        {
            **linear("data.x.0"),
            **{name: r for i in range(11) for name, r in linear(f"list.{i}").items()},
            **linear("seq.layers.1"),
        },
    ),
    "shared module and tied variable": lambda: (
        Shared(),
        {
            **linear("encoder", aliases=("other.twice",)),
            **linear("head", aliases=("tail",)),
        },
    ),
    "own parameters": lambda: (
        nnx.Dict(a=Positions()),
        {
            "a.pos_embed": row("Positions", "a.pos_embed", aliases=("a",)),
            "a.tables.0": row("Positions", "a.tables.0", aliases=("a",)),
        },
    ),
    "ensemble": lambda: (
        Ensemble(),
        {
            **{
                f"blocks.attention.{n}": row(
                    "Linear",
                    f"blocks.attention.{n}.kernel",
                    (3,) if n == "out" else (2, 3),
                    (1, 2) if n == "out" else (1,),
                    stack=(0,),
                    bias=f"blocks.attention.{n}.bias",
                )
                for n in ("key", "out", "query", "value")
            },
            "blocks.conv": row(
                "Conv2d",
                "blocks.conv.kernel",
                (4,),
                (3,),
                stack=(0,),
                groups=2,
                bias="blocks.conv.bias",
            ),
            "blocks.norm": row(
                "BatchNorm", "blocks.norm.scale", (1,), stack=(0,), bias="blocks.norm.bias"
            ),
        },
    ),
    "ensemble of ensembles": lambda: (
        Ensembles(),
        {"linear": row("Linear", "linear.kernel", (3,), (2,), stack=(0, 1), bias="linear.bias")},
    ),
}

if hasattr(nnx, "WeightNorm"):  # Flax 0.12.0 has none
    CASES["weight norm"] = lambda: (
        nnx.Dict(a=nnx.WeightNorm(nnx.Linear(3, 4, rngs=rngs()), rngs=rngs())),
        linear("a.layer_instance"),
    )


@pytest.mark.parametrize("case", CASES, ids=list(CASES))
def test_table(case):
    expected = None

    def make():
        nonlocal expected
        model, expected = CASES[case]()
        return model

    model = nnx.eval_shape(make)
    assert_table(adapter.layers(model), nnx.state(model, nnx.Param), expected)


def test_stack_axis_that_is_not_the_first():
    @nnx.vmap(in_axes=0, out_axes=nnx.StateAxes({nnx.Param: 1}))
    def make(rngs):
        return nnx.Conv(4, 6, (3, 3), use_bias=False, rngs=rngs)

    model = nnx.Dict(a=nnx.split_rngs(splits=5)(make)(rngs()))
    assert model.a.kernel.shape == (3, 5, 3, 4, 6)
    (layer,) = adapter.layers(model)
    assert (layer.out_axes, layer.in_axes, layer.stack_axes) == ((4,), (3,), (1,))


def test_class_names():
    table = adapter.layers(nnx.Dict(a=MyLinear(3, 4, rngs=rngs()), b=nnx.LayerNorm(4, rngs=rngs())))
    assert [layer.class_name for layer in table] == ["MyLinear", "LayerNorm"]
    assert table[0].has_type("MyLinear")
    assert table[0].has_type("Linear")


class Net(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.tied = nnx.Linear(4, 4, rngs=rngs)
        self.tied.kernel = self.layers[0].kernel

    def __call__(self, x):
        for layer in (*self.layers, self.norm, self.tied):
            x = layer(x)
        return x


def trees_of_parameters():
    """Every tree of the model's parameters that users have in their hands, by where it is from."""
    model = Net(rngs())
    seen = {}

    def remember(name):
        def update(updates, state, params=None):
            seen[f"{name}: updates"], seen[f"{name}: params"] = updates, params
            return updates, state

        def start(params):
            seen[f"{name}: init"] = params
            return optax.EmptyState()

        return optax.GradientTransformation(start, update)

    def loss(model, x):
        return jnp.sum(model(x))

    x = jnp.ones((2, 4))
    grads = nnx.grad(loss)(model, x)
    optimizer = nnx.Optimizer(model, remember("optimizer"), wrt=nnx.Param)
    optimizer.update(model, grads)

    @nnx.jit
    def step(model, optimizer, x):
        optimizer.update(model, nnx.grad(loss)(model, x))

    jitted = nnx.Optimizer(model, remember("jitted optimizer"), wrt=nnx.Param)
    step(model, jitted, x)
    state = nnx.state(model, nnx.Param)
    return model, {
        "state": state,
        "state of everything": nnx.state(model),
        "pure dict": nnx.to_pure_dict(state),
        **({"pure": nnx.as_pure(state)} if hasattr(nnx, "as_pure") else {}),
        "grad": grads,
        "split": nnx.split(model, nnx.Param, ...)[1],
        **seen,
    }


def test_one_path_in_every_tree_of_parameters():
    model, trees = trees_of_parameters()
    weights = {w for layer in adapter.layers(model) for w in (layer.weight, layer.bias)}
    assert weights == {
        *(f"layers.{i}.{leaf}" for i in (0, 1) for leaf in ("kernel", "bias")),
        "norm.scale",
        "norm.bias",
    }
    assert len(trees) == 11 + hasattr(nnx, "as_pure")
    for name, tree in trees.items():
        assert weights <= set(leaf_paths(tree)), name
    assert set(leaf_paths(trees["grad"])) == {*weights, "tied.bias"}


def test_abstract_model():
    model = nnx.eval_shape(lambda: Net(rngs()))
    assert isinstance(jax.tree.leaves(model)[0], jax.ShapeDtypeStruct)
    assert adapter.layers(model) == adapter.layers(Net(rngs()))


def test_module_that_is_no_pytree():
    class Plain(nnx.Module, pytree=False):
        def __init__(self):
            self.linear = nnx.Linear(4, 4, rngs=rngs())
            self.me = self

    model = Plain()
    assert_table(adapter.layers(model), nnx.state(model, nnx.Param), linear("linear"))


@pytest.mark.parametrize(
    "wrong", [nnx.Linear, nnx.state(nnx.Linear(2, 2, rngs=rngs())), {"kernel": 1.0}]
)
def test_what_is_no_module(wrong):
    with pytest.raises(TypeError, match=r"model must be a flax\.nnx\.Module instance, got"):
        adapter.layers(wrong)


def test_parameter_with_too_few_axes():
    model = nnx.Linear(3, 4, rngs=rngs())
    model.kernel = nnx.Param(jnp.zeros(12))
    with pytest.raises(ValueError, match=r"'kernel' of Linear has shape \(12,\).* 2 axes"):
        adapter.layers(model)
