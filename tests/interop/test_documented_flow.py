"""The flow of the README with default options, on models that nobody prepared for it.

layers, couple, resolve, a pruner, shrink: op types only, the head left among the selected layers,
float32. It must end in a smaller model that computes what the masked one does; what cannot be
pruned is listed.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import purepruning as pp
from purepruning_interop import torch as ppt


class Block(nn.Module):
    """Half of a transformer: a stem of another type makes the residual stream too."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv1d(4, 16, 1)
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 3)

    def forward(self, x):
        h = self.stem(x).transpose(1, 2)
        return self.head(h + self.down(self.up(h).relu()))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(16, 11)

    def forward(self, tokens):
        h = self.embed(tokens)
        for layer in self.layers:
            h = layer(h)
        return self.head(h)


class Mobile(nn.Module):
    """An inverted residual with a depthwise convolution, batch norms and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.wide, self.depth = nn.Conv2d(8, 24, 1), nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.narrow, self.head = nn.Conv2d(24, 8, 1), nn.Linear(8, 5)
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (8, 24, 24, 8))

    def forward(self, x):
        h = self.norms[0](self.stem(x)).relu()
        y = functional.relu6(self.norms[1](self.wide(h)))
        y = functional.relu6(self.norms[2](self.depth(y)))
        return self.head((h + self.norms[3](self.narrow(y))).mean((2, 3)))


MODULES = {
    "block": (Block, lambda: (torch.randn(2, 4, 7),)),
    "transformer": (Transformer, lambda: (torch.randint(0, 11, (2, 6)),)),
    "mobile": (Mobile, lambda: (torch.randn(2, 3, 6, 6),)),
}


def randomised(model):
    """Returns the model with all state drawn anew, so that nothing is zero or alike."""
    generator = torch.Generator().manual_seed(0)
    for name, x in model.state_dict().items():
        if x.is_floating_point():
            scale = x.shape[-1] ** -0.5 if x.ndim > 1 else 0.3
            x.copy_(torch.randn(x.shape, generator=generator) * scale)
            if "running_var" in name or (x.ndim == 1 and "norm" in name and "weight" in name):
                x.abs_().add_(0.5)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "types"),
    [
        ("block", "Linear"),
        ("block", "default"),
        ("transformer", "Linear"),
        ("transformer", "default"),
        ("mobile", "Conv2d"),
        ("mobile", "default"),
    ],
)
def test_torch_models_get_smaller_with_default_options(name, types):
    torch.manual_seed(0)
    make, inputs_of = MODULES[name]
    model, inputs = randomised(make()), inputs_of()
    layers = ppt.layers(model)
    coupling = ppt.couple(model, *inputs)
    params = dict(model.named_parameters())
    config = pp.resolve([{"sparsity": 0.5, "op_types": [types]}], layers, coupling=coupling)
    masks = pp.l1_norm(params, None, config)
    found = ppt.shrink(model, masks, coupling, *inputs)
    small, report = found.model, found.report
    assert report.params[1] < report.params[0]
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    masked = torch.func.functional_call(model, pp.apply_masks(state, report.masks), inputs)
    torch.testing.assert_close(small(*inputs), masked, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_pruned_is_listed_all_at_once():
    model = randomised(Block())
    coupling = ppt.couple(model, torch.randn(2, 4, 7))
    rules = [{"sparsity": 0.5, "op_types": ["Linear"]}]
    config = pp.resolve(rules, ppt.layers(model), coupling=coupling)
    kept = {name: k.reason for k in config.kept_whole for name in k.layers}
    assert "an output" in kept["head"]
    assert "'stem' makes them too, and no rule selects it" in kept["down"]


def test_a_layer_that_is_named_and_cannot_be_pruned_is_an_error():
    model = randomised(Block())
    coupling = ppt.couple(model, torch.randn(2, 4, 7))
    rules = [{"sparsity": 0.5, "op_names": ["up", "head"]}]
    with pytest.raises(ValueError, match=r"layer 'head' has no channel that can go: .*an output"):
        pp.resolve(rules, ppt.layers(model), coupling=coupling)


def test_nothing_left_to_prune_is_an_error_that_names_all():
    model = randomised(Block())
    coupling = ppt.couple(model, torch.randn(2, 4, 7))
    rules = [{"sparsity": 0.5, "op_types": ["Linear"]}, {"exclude": True, "op_names": ["up"]}]
    with pytest.raises(ValueError, match=r"nothing that the rules select can be pruned: .*head"):
        pp.resolve(rules, ppt.layers(model), coupling=coupling, extra="none")


@pytest.mark.parametrize("extra", ["own", "none"])
def test_layers_of_which_nothing_is_pruned_take_no_part(extra):
    """Three of five layers are selected, and one of them makes what another makes too."""
    sizes = {"a": (6, 8), "b": (8, 8), "c": (8, 16), "d": (16, 3)}
    rng = np.random.default_rng(0)
    params = {k: jnp.asarray(rng.standard_normal(n), jnp.float32) for k, n in sizes.items()}

    def fn(p, x):
        h = x @ p["a"]
        return jax.nn.relu((h + h @ p["b"]) @ p["c"]) @ p["d"]

    x = jnp.asarray(rng.standard_normal((4, 6)), jnp.float32)
    layers = [pp.make_layer(params, k, "Linear", out_axes=1, in_axes=0) for k in params]
    coupling = pp.couple(fn, params, x)
    rules = [{"sparsity": 0.5, "op_types": ["Linear"]}, {"exclude": True, "op_names": ["b"]}]
    config = pp.resolve(rules, layers, coupling=coupling, extra=extra)
    masks = pp.l1_norm(params, None, config)
    small = pp.shrink(fn, params, masks, coupling, x)
    assert small.params["c"].shape == (8, 8)
    assert small.params["a"].shape == (6, 8)
    assert len(small.report.restored) == (4 if extra == "own" else 0)
    masked = fn(pp.apply_masks(params, small.report.masks), x)
    np.testing.assert_allclose(small.fn(small.params, x), masked, rtol=1e-4, atol=1e-5)


def test_channels_whose_norms_are_masked_go_with_their_convolutions():
    """Slim ranks norms; a channel whose scale and shift are zero is zero."""
    model = randomised(Mobile())
    x = torch.randn(2, 3, 6, 6)
    coupling = ppt.couple(model, x)
    params = dict(model.named_parameters())
    rules = [{"sparsity": 0.5, "op_names": ["norms.1", "norms.2"]}]
    config = pp.resolve(rules, ppt.layers(model), granularity="output_channel")
    masks = pp.slim(params, None, config)
    both = masks["norms.1.weight"] & masks["norms.2.weight"]
    for name in ("norms.1.weight", "norms.1.bias", "norms.2.weight", "norms.2.bias"):
        masks[name] = both
    shrunk = ppt.shrink(model, masks, coupling, x)
    small, report = shrunk.model, shrunk.report
    kept = int(both.sum())
    assert small.wide.out_channels == small.depth.groups == small.narrow.in_channels == kept
    assert len(report.extended) == 24 - kept
    torch.testing.assert_close(
        small(x),
        torch.func.functional_call(model, pp.apply_masks(params, masks), (x,)),
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_channel_that_another_norm_keeps_stays():
    """Both branches of a residual have norms; masking those of one does not make it zero."""
    model = randomised(Mobile())
    x = torch.randn(2, 3, 6, 6)
    coupling = ppt.couple(model, x)
    mask = torch.arange(8) > 2
    masks = {"norms.0.weight": mask, "norms.0.bias": mask}
    assert not coupling.chosen(masks, dict(model.named_parameters())).removed.any()
    both = masks | {"norms.3.weight": mask, "norms.3.bias": mask}
    assert coupling.chosen(both, dict(model.named_parameters())).removed.sum() == 3


def test_slim_on_the_norms_of_coupled_channels_ends_in_a_smaller_model():
    model = randomised(Mobile())
    x = torch.randn(2, 3, 6, 6)
    coupling = ppt.couple(model, x)
    params = dict(model.named_parameters())
    rules = [{"sparsity": 0.5, "op_types": ["BatchNorm2d"]}]
    config = pp.resolve(rules, ppt.layers(model), coupling=coupling)
    shrunk = ppt.shrink(model, pp.slim(params, None, config), coupling, x)
    small, report = shrunk.model, shrunk.report
    assert small.stem.out_channels == 4
    assert small.depth.out_channels == 12
    state = params | dict(model.named_buffers())
    masked = torch.func.functional_call(model, pp.apply_masks(state, report.masks), (x,))
    torch.testing.assert_close(small(x), masked, rtol=1e-4, atol=1e-5)


def test_an_excluded_embedding_that_is_tied_protects_its_width():
    """It makes the residual stream, though it also reads it at the end."""
    rng = np.random.default_rng(0)
    shapes = {"words": (11, 8), "up": (8, 12), "down": (12, 8)}
    params = {k: jnp.asarray(rng.standard_normal(n), jnp.float32) for k, n in shapes.items()}

    def fn(p, tokens):
        h = p["words"][tokens]
        h = h + jax.nn.relu(h @ p["up"]) @ p["down"]
        return h @ p["words"].T

    tokens = jnp.array([1, 5, 3])
    coupling = pp.couple(fn, params, tokens)
    table = pp.coupled_layers(coupling)
    rules = [{"sparsity": 0.5, "op_types": ["default"]}, {"exclude": True, "op_names": ["words"]}]
    config = pp.resolve(rules, table, coupling=coupling)
    assert [k.reason for k in config.kept_whole] == [
        "layer 'words' makes them too, and rule 1 excludes it"
    ]
    masks = pp.l1_norm(params, None, config)
    small = pp.shrink(fn, params, masks, coupling, tokens)
    assert jax.tree.map(jnp.shape, small.params) == {
        "words": (11, 8), "up": (8, 6), "down": (6, 8)
    }  # fmt: skip
    masked = fn(pp.apply_masks(params, masks), tokens)
    np.testing.assert_allclose(small.fn(small.params, tokens), masked, rtol=1e-4, atol=1e-5)


def test_norms_that_are_not_masked_keep_channels_that_some_of_their_makers_lose():
    """A module without a dot in its path is no statistic of another one."""
    shapes = {"one": {"w": (4, 8), "b": (8,)}, "two": {"w": (4, 8)}, "norm": {"scale": (8,)}}
    params = {m: {k: jnp.ones(n) for k, n in leaves.items()} for m, leaves in shapes.items()}
    params["out"] = {"w": jnp.ones((8, 3))}

    def fn(p, x):
        h = x @ p["one"]["w"] + p["one"]["b"][None] + x @ p["two"]["w"]
        return h * p["norm"]["scale"][None] @ p["out"]["w"]

    coupling = pp.couple(fn, params, jnp.ones((5, 4)))
    keep = jnp.arange(8) > 2
    with pytest.raises(ValueError, match="the masks disagree on 3 units"):
        coupling.chosen({"one": {"w": keep[None], "b": keep}}, params)


def test_statistics_that_are_returned_are_named_with_what_to_do():
    params = {
        "params": {"a": jnp.ones((4, 8)), "head": jnp.ones((8, 2))},
        "batch_stats": {"mean": jnp.zeros(8)},
    }

    def fn(v, x):
        h = x @ v["params"]["a"]
        return (h - h.mean(0)[None]) @ v["params"]["head"], {
            "mean": 0.9 * v["batch_stats"]["mean"] + 0.1 * h.mean(0)
        }

    x = jnp.ones((3, 4))
    coupling = pp.couple(fn, params, x)
    table = pp.coupled_layers(coupling)
    with pytest.raises(ValueError, match=r"'batch_stats.mean' .* outputs=\(True, False\)"):
        pp.resolve(0.5, table, coupling=coupling)
    coupling = pp.couple(fn, params, x, outputs=(True, False))
    assert pp.resolve(0.5, table, coupling=coupling).counts == {"params.a": 4}


def test_masks_of_statistics_say_what_to_apply_them_to():
    """The masks of a report name statistics, which are in the state dict and are no parameters."""
    model = randomised(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)))
    x = torch.randn(2, 3, 4, 4)
    coupling = ppt.couple(model, x)
    masks = coupling.masks([1, 2], model.state_dict())
    small = ppt.shrink(model, masks, coupling, x)
    with pytest.raises(KeyError, match=r"'1.running_mean'.* statistics too, such as a state dict"):
        pp.apply_masks(dict(model.named_parameters()), small.report.masks)
    model.load_state_dict(pp.apply_masks(model.state_dict(), small.report.masks))
    torch.testing.assert_close(small.model(x), model(x), rtol=1e-4, atol=1e-5)
