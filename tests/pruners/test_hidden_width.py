"""Width of the residual stream by activation: shrunk, whole models compute what masked ones do."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import purepruning as pp
from purepruning.stats import inputs
from purepruning_interop import torch as pt
from tests.interop.torch_law import distance, masked, state_of

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import _gpt_jax as gpt
from _gpt import Settings

pytestmark = pytest.mark.usefixtures("unoptimized")

WIDTH, KEPT = 16, 12


@pytest.fixture(autouse=True)
def _promotion_of_the_example():
    with jax.numpy_rank_promotion("allow"):
        yield


def expected(given, stay):
    """Channels by the norm over examples of their mean magnitude, added over the layers."""
    scores = sum(np.sqrt((np.abs(np.float64(x)).mean(1) ** 2).sum(0)) for x in given)
    np.testing.assert_array_equal(np.sort(stay), np.sort(np.argsort(scores)[-KEPT:]))


def test_a_gpt_in_jax():
    settings = Settings(blocks=2, width=WIDTH, heads=2, context=8)
    params = gpt.init(jax.random.key(0), 11, settings)
    keys = jax.random.split(jax.random.key(1), 5)
    for i in range(2):  # scales that make some channels matter more
        for j, norm in enumerate(("norm1", "norm2")):
            params[f"block{i}"][norm] = jax.random.uniform(keys[2 * i + j], (WIDTH,), minval=0.1)
    rows = jax.random.randint(keys[4], (5, 8), 0, 11)
    side = gpt.Side(settings)
    coupling = pp.couple(side.fn, params, rows[:1])
    model = gpt.Model(side.fn, params)
    layers = [x for i in range(2) for x in side.layers(model, i)]
    layers += [
        pp.make_layer(params, name, "Embedding", out_axes=1, in_axes=0)
        for name in ("letters", "places")
    ]
    makers = {"op_names_re": [r"letters|places|.*\.(out|down)"], "sparsity": 1 - KEPT / WIDTH}
    rules = [makers]
    config = pp.resolve(rules, layers, coupling=coupling)
    # Of those that read the stream one each: queries, keys and values read the same.
    watched = [x for x in layers if x.name.endswith(("qkv", "up"))]
    given = gpt.run(params, rows, 2)[2]
    stats = inputs.update(inputs.init(params, watched, keep=["means"]), given, watched)
    masks = pp.minitron(params, stats, config)
    stay = np.flatnonzero(np.asarray(masks["block0"]["out"]).any(0))
    expected([given[x.name] for x in watched], stay)
    small = pp.shrink(side.fn, params, masks, coupling, rows[:1])
    assert small.params["letters"].shape == (11, KEPT)
    assert small.params["block1"]["down"].shape == (4 * WIDTH, KEPT)
    assert small.params["block1"]["norm2"].shape == (KEPT,)
    full = side.fn(pp.apply_masks(params, coupling.complete(masks, params)), rows)
    assert jnp.abs(small.fn(small.params, rows) - full).max() <= 1e-5 * jnp.abs(full).max()


def test_a_llama_in_torch():
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": WIDTH, "intermediate_size": 24}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()
    for name, x in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(x, 0.1, 1)
    tokens, kwargs = torch.randint(0, 20, (3, 7)), {"use_cache": False}
    coupling, layers = pt.couple(model, tokens, **kwargs), pt.layers(model)
    makers = [r".*\.(embed_tokens|o_proj|down_proj)"]
    rules = [{"op_names_re": makers, "sparsity": 1 - KEPT / WIDTH}]
    config = pp.resolve(rules, layers, coupling=coupling)
    watched = [x for x in config.readers if x.name.endswith(("q_proj", "up_proj"))]
    assert len(watched) == 4
    params = dict(model.named_parameters())
    _, given = pt.capture(model, tokens, layers=watched, of="inputs", **kwargs)
    stats = inputs.update(inputs.init(params, watched, keep=["means"]), given, watched)
    masks = pp.minitron(params, stats, config)
    stay = np.flatnonzero(masks["model.embed_tokens.weight"].numpy().any(0))
    expected([given[x.name].detach().numpy() for x in watched], stay)
    shrunk = pt.shrink(model, masks, coupling, tokens, **kwargs)
    small = shrunk.model.eval()
    with torch.no_grad():
        full = masked(model, shrunk.report.masks)
        assert distance(full(tokens, **kwargs).logits, small(tokens, **kwargs).logits) < 1e-5
    ends = ("layernorm.weight", "q_proj.weight")
    assert {x.shape[-1] for n, x in state_of(small).items() if n.endswith(ends)} == {KEPT}
