"""FLAP and width by activation: by a NumPy oracle, and masked models against shrunk ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import purepruning as pp
from purepruning import Layer
from purepruning.pruners.read_units import units_of_columns
from purepruning.stats import inputs
from purepruning_interop import torch as pt
from tests.coupling import models
from tests.interop.torch_law import distance, masked, state_of
from tests.messages import raises
from tests.modes import MODES, as_jax, as_torch

pytestmark = pytest.mark.usefixtures("unoptimized")

MADE = [{"op_names": ["q", "k", "v", "up"]}]


class Biased(models.Attention):
    """An attention of 4 heads of 8 and a perceptron, whose readers have biases."""

    shapes = models.Attention.shapes | {"o.b": (16,), "down.b": (16,)}
    layers = tuple(
        models.dense_layer(x.name, x.shape, bias=f"{x.name}.b" if x.name in ("o", "down") else None)
        for x in models.Attention.layers
    )

    @staticmethod
    def run(p, x):
        """The output, and what the readers of heads and neurons are given."""
        h = x @ p["emb.w"]
        q, k, v = ((h @ p[f"{n}.w"]).reshape(*x.shape[:2], 4, 8) for n in "qkv")
        a = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) / 8**0.5, axis=-1)
        mixed = jnp.einsum("bhts,bshd->bthd", a, v).reshape(*x.shape[:2], 32)
        h = h + mixed @ p["o.w"] + p["o.b"][None, None]
        c = jax.nn.relu(h @ p["up.w"])
        out = (h + c @ p["down.w"] + p["down.b"][None, None]) @ p["out.w"]
        return out, {"o": mixed, "down": c}

    @staticmethod
    def fn(p, x):
        return Biased.run(p, x)[0]


@functools.cache
def coupling_of(model):
    params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in model.shapes.items()}
    return pp.couple(model.fn, params, model.x)


def config_of(sparsity=0.5, scope="layer", model=Biased):
    rules = [MADE[0] | {"sparsity": sparsity}]
    return pp.resolve(rules, model.layers, coupling=coupling_of(model), scope=scope)


def case(framework=as_jax):
    params = models.weights(Biased.shapes, 3)
    x = np.random.default_rng(5).normal(1.0, 1.0, (7, 6, 5)).astype(np.float32)
    seen = jax.tree.map(np.asarray, Biased.run(as_jax(params), jnp.asarray(x))[1])
    config = config_of()
    stats = inputs.init(framework(params), config.readers, keep=inputs.KEPT)
    stats = inputs.update(stats, framework(seen), config.readers)
    return params, seen, stats, jnp.asarray(x)


def fluctuations(params, seen):
    """By layer, the standardised fluctuation of every column."""
    found = {}
    for name, x in seen.items():
        x, w = np.float64(x).reshape(-1, x.shape[-1]), np.float64(params[f"{name}.w"])
        m = x.var(0) * (w * w).sum(1)
        found[name] = (m - m.mean()) / m.std()
    return found


def lowest(scores, n):
    return sorted(np.argsort(scores, kind="stable")[:n].tolist())


def gone_heads(masks):
    keep = np.broadcast_to(np.asarray(masks["q.w"]), (16, 32)).reshape(16, 4, 8)
    return np.flatnonzero(~keep.any((0, 2))).tolist()


def gone_neurons(masks):
    return np.flatnonzero(~np.asarray(masks["up.w"]).any(0)).tolist()


@pytest.mark.parametrize("framework", [as_jax, as_torch])
def test_flap_prunes_what_fluctuates_least_and_keeps_the_means(framework):
    params, seen, stats, _ = case(framework)
    new, masks = pp.flap(framework(params), stats, config_of())
    z = fluctuations(params, seen)
    assert gone_heads(masks) == lowest(z["o"].reshape(4, 8).mean(1), 2)
    assert gone_neurons(masks) == lowest(z["down"], 12)
    gone = np.zeros(32, bool).reshape(4, 8)
    gone[gone_heads(masks)] = True
    columns = {"o": gone.reshape(-1), "down": np.isin(np.arange(24), gone_neurons(masks))}
    for name, gone in columns.items():
        x, w = np.float64(seen[name]).reshape(-1, len(gone)), np.float64(params[f"{name}.w"])
        expected = params[f"{name}.b"] + x.mean(0)[gone] @ w[gone]
        np.testing.assert_allclose(np.asarray(new[f"{name}.b"]), expected, rtol=1e-4, atol=1e-4)
    assert not np.asarray(new["q.w"])[~np.broadcast_to(np.asarray(masks["q.w"]), (16, 32))].any()
    alone, same = pp.flap(framework(params), stats, config_of(), compensate=False)
    np.testing.assert_equal(np.asarray(alone["o.b"]), params["o.b"])
    assert gone_neurons(same) == gone_neurons(masks)


def test_flap_ranks_heads_and_neurons_together():
    """In global scope those of lowest standard score go until the parameters are few enough."""
    params, seen, stats, _ = case()
    config = config_of(0.2, "global")
    _, masks = pp.flap(as_jax(params), stats, config)
    z = fluctuations(params, seen)
    heads, neurons = z["o"].reshape(4, 8).mean(1), z["down"]
    ranked = sorted([(s, 4 * 16 * 8, "head", i) for i, s in enumerate(heads)])
    ranked = sorted([*ranked, *((s, 2 * 16, "neuron", i) for i, s in enumerate(neurons))])
    size, total = sum(np.prod(s) for s in Biased.shapes.values()), 0
    gone = {"head": [], "neuron": []}
    for _, cost, kind, i in ranked:
        if total >= 0.2 * size:
            break
        total += cost
        gone[kind].append(i)
    assert all(gone.values())
    assert gone_heads(masks) == sorted(gone["head"])
    assert gone_neurons(masks) == sorted(gone["neuron"])


@pytest.mark.parametrize("framework", [as_jax, as_torch])
def test_minitron_prunes_what_is_small(framework):
    params, seen, stats, _ = case(framework)
    masks = pp.minitron(framework(params), stats, config_of())
    means = {n: (np.abs(np.float64(x)).mean(1) ** 2).sum(0) for n, x in seen.items()}
    assert gone_heads(masks) == lowest(means["o"].reshape(4, 8).sum(1), 2)
    assert gone_neurons(masks) == lowest(means["down"], 12)


def flap(params, stats, config):
    """What FLAP returns, in one flat dict."""
    new, masks = pp.flap(params, stats, config)
    return {f"new.{path}": x for path, x in new.items()} | masks


@pytest.mark.parametrize("pruner", [flap, pp.minitron], ids=lambda x: x.__name__)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_one_function_in_every_run_mode(pruner, scope):
    params, _, stats, _ = case()
    stats = jax.tree.map(np.asarray, stats)
    config = config_of(0.2, scope)
    expected = MODES["jax_eager"](pruner, params, stats, config)
    assert any(x.dtype == bool and not x.all() for x in expected.values())
    for mode in ("jax_jit", "jax_vmap_params", "torch_eager", "torch_vmap_counts"):
        got = MODES[mode](pruner, params, stats, config)
        assert got.keys() == expected.keys()
        for path, x in expected.items():
            if x.dtype == bool:
                np.testing.assert_array_equal(got[path], x)
            else:  # means are added up and multiplied in another order
                np.testing.assert_allclose(got[path], x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pruner", [pp.flap, pp.minitron], ids=lambda x: x.__name__)
def test_shrunk_computes_what_masked_does(pruner):
    params, _, stats, x = case()
    params, coupling = as_jax(params), coupling_of(Biased)
    pruned = pruner(params, stats, config_of())
    params, masks = pruned if pruner is pp.flap else (params, pruned)
    small = pp.shrink(Biased.fn, params, masks, coupling, x)
    expected = Biased.fn(pp.apply_masks(params, small.report.masks), x)
    np.testing.assert_allclose(small.fn(small.params, x), expected, rtol=1e-4, atol=1e-4)
    assert small.params["o.w"].shape == (16, 16)
    assert small.params["down.w"].shape == (12, 16)


def test_units_that_columns_of_convolutions_stacks_and_axes_of_heads_read():
    coupling = coupling_of(models.Grouped)
    made = {x.name: x for x in models.Grouped.layers}
    rows = units_of_columns(made["four"], coupling)  # 4 groups of 6 channels of 24
    assert rows.shape[0] == 24
    np.testing.assert_array_equal(rows[:, 0], coupling.leaves["stem.w"].units[3][:, 0])
    coupling = coupling_of(models.Stacked)
    down = models.Stacked.layers[2]
    rows = units_of_columns(down, coupling)
    assert rows.shape[0] == 3 * 8
    expected = coupling.leaves["up.w"].units[2].reshape(24, -1)
    np.testing.assert_array_equal(rows[:, 0], expected[:, 0])


@pytest.mark.parametrize("pruner", [pp.flap, pp.minitron], ids=lambda x: x.__name__)
def test_a_llama_with_grouped_queries(pruner):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        attention_bias=True,
        mlp_bias=True,
    )
    model = LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 40, (3, 9))
    kwargs = {"use_cache": False}
    coupling = pt.couple(model, tokens, **kwargs)
    layers = pt.layers(model)
    rules = [{"op_names_re": [r".*\.(q|k|v|up|gate)_proj"], "sparsity": 0.5}]
    resolved = pp.resolve(rules, layers, coupling=coupling)
    readers = resolved.readers
    assert {x.name.rpartition(".")[2] for x in readers} == {"o_proj", "down_proj"}
    params = dict(model.named_parameters())
    stats = inputs.init(params, readers, keep=["sums", "squares", "means"])
    _, seen = pt.capture(model, tokens, layers=readers, of="inputs", **kwargs)
    stats = inputs.update(stats, seen, readers)
    pruned = pruner(params, stats, resolved)
    new, masks = pruned if pruner is pp.flap else (params, pruned)
    model.load_state_dict(new, strict=False)
    shrunk = pt.shrink(model, masks, coupling, tokens, **kwargs)
    small = shrunk.model.eval()
    with torch.no_grad():
        full = masked(model, shrunk.report.masks)
        assert distance(full(tokens, **kwargs).logits, small(tokens, **kwargs).logits) < 1e-4
    sizes = {name: tuple(x.shape) for name, x in state_of(small).items()}
    assert sizes["model.layers.0.mlp.down_proj.weight"] == (32, 12)
    assert sizes["model.layers.1.self_attn.o_proj.weight"] == (32, 16)


def test_wrong_statistics_and_configs_are_refused():
    params, seen, _, _ = case()
    params, config = as_jax(params), config_of()
    with raises(TypeError, "flap", "stats.inputs"):
        pp.flap(params, None, config)
    stats = inputs.init(params, config.readers, keep=["squares"])
    stats = inputs.update(stats, as_jax(seen), config.readers)
    with raises(ValueError, "flap", "'sums'", "keep="):
        pp.flap(params, stats, config)
    with raises(ValueError, "minitron", "'means'", "config.readers"):
        pp.minitron(params, stats, config)
    (o,) = (x for x in config.readers if x.name == "o")
    half = inputs.update(inputs.init(params, [o], keep=["means"]), as_jax(seen), [o])
    with raises(ValueError, "minitron", "no layer that reads", "up.w", "'down'"):
        pp.minitron(params, half, config)
    empty = inputs.init(params, config.readers, keep=["means"])
    with raises(ValueError, "minitron", "empty"):
        pp.minitron(params, empty, config)
    with raises(ValueError, "minitron", "coupling"):
        pp.minitron(params, empty, pp.resolve(0.5, Biased.layers))
    plain = models.Attention
    bare = pp.resolve([MADE[0] | {"sparsity": 0.5}], plain.layers, coupling=coupling_of(plain))
    stats = inputs.init(params, bare.readers, keep=["sums", "squares"])
    stats = inputs.update(stats, as_jax(seen), bare.readers)
    bare_params = {name: params[name] for name in plain.shapes}
    with raises(ValueError, "flap", "layer 'o' has no bias", "compensate=False"):
        pp.flap(bare_params, stats, bare)
    nothing = pp.resolve([], Biased.layers, coupling=coupling_of(Biased))
    assert pp.minitron(params, stats, nothing) == dict.fromkeys(params)
    assert pp.flap(params, stats, nothing)[1] == dict.fromkeys(params)


def test_readers_are_the_matrices_that_read_what_is_pruned():
    assert [x.name for x in config_of().readers] == ["o", "down"]
    assert config_of().readers[0].bias == "o.b"
    assert pp.resolve(0.5, Biased.layers).readers == ()
    table = [x for x in Biased.layers if x.name != "down"]
    table.append(Layer("table", "Embedding", "down.w", (24, 16), (1,), (0,)))
    coupling = coupling_of(Biased)
    assert [x.name for x in pp.resolve(MADE, table, coupling=coupling).readers] == ["o"]
    rules = [{"op_names": ["up"], "sparsity": 0.5}]
    only = pp.resolve(rules, Biased.layers, coupling=coupling)
    assert [x.name for x in only.readers] == ["down"]
