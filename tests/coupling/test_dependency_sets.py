"""Dependency sets as data, masks that disagree repaired, and published counts."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import torch

import purepruning as pp
from benchmarks.nets import linen_net
from purepruning_interop import linen as ppl
from purepruning_interop import torch as ppt
from tests.coupling.linen_images import BasicBlock, ResNet

IMAGE = jax.ShapeDtypeStruct((2, 12, 12, 3), "float32")


def test_the_sets_of_a_resnet():
    """Each residual stream is one set; a projection belongs to the stream that it begins."""
    model = ResNet(BasicBlock)
    variables = jax.eval_shape(model.init, jax.random.key(0), IMAGE)
    coupling = ppl.couple(model, variables, IMAGE)
    found = pp.dependency_sets(coupling, ppl.layers(model, variables, IMAGE))
    together = {s.layers: s.units for s in found.sets if len(s.layers) > 1}
    assert ("Conv_0", "BasicBlock_0.Conv_1", "BasicBlock_1.Conv_1") in together
    assert ("BasicBlock_2.Conv_1", "BasicBlock_2.Conv_2") in {s[:2] for s in together}
    names = [name for s in found.sets for name in s.layers]
    assert len(set(names)) == len(names)
    assert not any("BatchNorm" in name for name in names)
    first, *rows = found.csv().split("\n")
    assert first == "Dependency Set,Layers"
    assert rows[0] == "Set 1,Conv_0,BasicBlock_0.Conv_1,BasicBlock_1.Conv_1"
    assert len(rows) == len(found.sets)


class Grouped(torch.nn.Module):
    """A convolution of two groups reads one that has none."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 8, 1, groups=2)
        self.c = torch.nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.c(self.b(self.a(x)))


def test_groups_of_a_grouped_convolution():
    model, x = Grouped(), torch.randn(1, 3, 4, 4)
    found = pp.dependency_sets(ppt.couple(model, x), ppt.layers(model))
    assert {s.layers: (s.units, s.groups) for s in found.sets} == {
        ("a",): (8, 2),
        ("b",): (8, 2),
        ("c",): (0, 1),
    }
    assert found.groups_csv().split("\n") == ["Conv Layer Name,Group", "a,2", "b,2", "c,1"]


def test_groups_that_lose_unequally_are_repaired():
    """Three channels of the first group and one of the second: the first keeps two again."""
    model, x = Grouped().eval(), torch.randn(1, 3, 4, 4)
    params = dict(model.named_parameters())
    coupling = ppt.couple(model, x)
    mask = torch.ones(8, 1, 1, 1, dtype=torch.bool)
    mask[[0, 1, 2, 5]] = False
    fixed = coupling.repair({"a.weight": mask}, params)
    assert fixed["a.weight"].any((1, 2, 3)).reshape(2, 4).sum(1).tolist() == [3, 3]
    assert not (fixed["a.weight"] < mask).any()
    assert ppt.shrink(model, fixed, coupling, x).model.a.out_channels == 6


def test_loaded_masks_that_disagree_are_repaired():
    """Kept sets are joined; single weights that are masked stay so."""
    rng = np.random.default_rng(0)
    shapes = {"a": (4, 6), "b": (4, 6), "head": (6, 2)}
    params = {k: jnp.asarray(rng.standard_normal(n), jnp.float32) for k, n in shapes.items()}

    def fn(p, x):
        return (x @ p["a"] + x @ p["b"]) @ p["head"]

    x = jnp.ones((3, 4))
    coupling = pp.couple(fn, params, x)
    masks = {"a": np.ones((4, 6), bool), "b": np.ones((4, 6), bool)}
    masks["a"][:, [0, 1, 2]] = False
    masks["b"][:, [1, 2, 3]] = False
    masks["a"][0, 5] = False
    fixed = coupling.repair({k: jnp.asarray(m) for k, m in masks.items()}, params)
    assert fixed["a"].any(0).tolist() == fixed["b"].any(0).tolist() == [1, 0, 0, 1, 1, 1]
    assert not fixed["a"][0, 5]
    assert fixed["a"][1:, 5].all()
    small = pp.shrink(fn, params, fixed, coupling, x)
    assert small.params["head"].shape == (4, 2)
    assert not small.report.restored
    # Nothing in common: all is kept again, and nothing is refused.
    apart = {"a": jnp.arange(6)[None] != 1, "b": jnp.arange(6)[None] != 2}
    fixed = coupling.repair(apart, params)
    assert fixed["a"].all()
    assert fixed["b"].all()


def test_the_published_counts_of_a_resnet_50():
    """4,089,184,256 multiply-adds at 224 x 224, 25,503,912 weights and biases without norms."""
    size = (((3, 64), (4, 128), (6, 256), (3, 512)), 64)
    apply, variables, _ = linen_net("resnet", size)
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), "float32")
    found = pp.count(apply, variables, image)
    assert found.macs == 4_089_184_256
    assert sum(x.params for x in found.layers if "Norm" not in x.name) == 25_503_912


def test_the_published_counts_of_a_shared_convolution():
    """3 to 5 channels once, then 5 to 5 five times by one layer, on 2 x 2 pixels: 560 and 50."""
    params = {"one": {"w": (1, 1, 3, 5), "b": (5,)}, "two": {"w": (1, 1, 5, 5), "b": (5,)}}
    params = {
        name: {k: jax.ShapeDtypeStruct(n, "float32") for k, n in leaves.items()}
        for name, leaves in params.items()
    }

    def conv(p, x):
        kernel = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, p["w"], (1, 1), "VALID", dimension_numbers=kernel)
        return y + p["b"][None, None, None]

    def fn(p, x):
        h = conv(p["one"], x)
        for _ in range(5):
            h = conv(p["two"], h)
        return h

    found = pp.count(fn, params, jax.ShapeDtypeStruct((1, 2, 2, 3), "float32"))
    assert (found.macs, found.params) == (560, 50)


def test_the_published_counts_of_a_small_torch_model():
    """Of 610 and 240 the products: 60 of the convolution and 200 of the linear layer."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 5, 1),
        torch.nn.BatchNorm2d(5),
        torch.nn.LeakyReLU(),
        torch.nn.Upsample(size=(2, 2)),
        torch.nn.AdaptiveAvgPool2d((2, 2)),
        torch.nn.Flatten(),
        torch.nn.Linear(20, 10),
    )
    found = ppt.count(model.eval(), torch.zeros(1, 3, 2, 2))
    assert (found.macs, found.params) == (260, 240)
    assert math.prod((5, 3)) + 5 + 2 * 5 + math.prod((20, 10)) + 10 == 240
