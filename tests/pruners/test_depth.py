"""Which blocks go, by hand and by NumPy, and models without them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import MistralConfig, MistralForCausalLM

import purepruning as pp
from purepruning.stats import blocks
from purepruning.stats.accumulate import value
from purepruning_interop import torch as pt
from tests.messages import raises
from tests.modes import as_jax, as_torch

pytestmark = pytest.mark.usefixtures("unoptimized")


def states(n=5, seed=0):
    """A stream of n blocks, the second of which only scales."""
    rng = np.random.default_rng(seed)
    found = [rng.normal(size=(3, 4, 6)).astype(np.float32)]
    for i in range(n):
        step = rng.normal(size=(3, 4, 6)).astype(np.float32) * (0.2 + 0.3 * (n - i))
        found.append(found[-1] * np.float32(1.5) if i == 1 else found[-1] + step)
    return found


def influence(found):
    """The formula, in float64."""
    rows = [x.reshape(-1, 6) for x in found]
    return [1 - np.mean(list(map(_cosine, x, y))) for x, y in itertools.pairwise(rows)]


def _cosine(a, b):
    a, b = np.float64(a), np.float64(b)
    return a @ b / np.sqrt((a @ a) * (b @ b))


@pytest.mark.parametrize("framework", [as_jax, as_torch])
def test_block_influence(framework):
    parts = [states(seed=i) for i in range(2)]
    made = framework({"w": np.ones(1, np.float32)})
    stats = blocks.init(made, 5)
    for part in parts:
        stats = blocks.update(stats, [framework({"": x})[""] for x in part])
    expected = np.mean([influence(part) for part in parts], axis=0)
    found = np.asarray(pp.block_influence(stats))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert abs(found[1]) < 1e-6
    order = np.argsort(expected).tolist()
    assert pp.short_gpt(stats, 3) == tuple(order[:3])
    assert pp.short_gpt(stats, 0) == ()
    assert int(value(stats.positions)) == 2 * 12


def test_statistics_of_blocks_merge_and_are_jitted_and_scanned():
    parts = [np.stack(states(seed=i)) for i in range(3)]
    start = blocks.init({"w": jnp.ones(1)}, 5)
    each = [blocks.update(start, jnp.asarray(part)) for part in parts]
    merged = blocks.merge(blocks.merge(each[0], each[1]), each[2])
    one, _ = jax.jit(lambda s, x: jax.lax.scan(lambda s, x: (blocks.update(s, x), None), s, x))(
        start, jnp.asarray(np.stack(parts))
    )
    for a, b in zip(merged, one, strict=True):
        np.testing.assert_allclose(value(a), value(b), rtol=1e-6)


def test_cosines_of_nothing_are_zero():
    zeros = [jnp.zeros((2, 3)), jnp.ones((2, 3)), jnp.ones((2, 3))]
    stats = blocks.update(blocks.init(zeros, 2), zeros)
    np.testing.assert_allclose(pp.block_influence(stats), [1, 0], atol=1e-6)


def test_sleb_drops_what_is_missed_least_round_by_round():
    """Block 0 is worth nothing; 1 and 2 stand in for each other, so that only one of them goes."""
    calls = []

    def loss(kept):
        calls.append(kept)
        assert list(kept) == sorted(kept)
        return -(0.0 * (0 in kept) + 5.0 * (1 in kept or 2 in kept) + 1.0 * (3 in kept))

    assert pp.sleb(loss, 4, 3) == (0, 1, 3)
    assert len(calls) == 4 + 3 + 2
    assert pp.sleb(loss, 4, 0) == ()


def stream(params, x):
    for p in params["blocks"]:
        x = x + jax.nn.relu(x @ p["up"]) @ p["down"]
    return x


def _block(rng):
    shapes = {"up": (6, 8), "down": (8, 6)}
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}


def test_dropped_blocks_compute_what_masked_ones_do():
    """Lists, numbered keys, stacks in a scan, and Flax's states: the blocks that stay, in order."""
    rng = np.random.default_rng(1)
    some = [_block(rng) for _ in range(4)]
    x = jnp.asarray(rng.normal(size=(2, 6)), jnp.float32)
    masked = [p | {"down": p["down"] * 0} if i in (0, 2) else p for i, p in enumerate(some)]
    expected = stream({"blocks": masked}, x)
    for container in (list, tuple):
        small = pp.drop_blocks({"blocks": container(some)}, (2, 0), at="blocks.{}")
        assert type(small["blocks"]) is container
        np.testing.assert_array_equal(stream(small, x), expected)
    named = {"net": {"head": 1, **{f"layer_{i}": p for i, p in enumerate(some)}}}
    small = pp.drop_blocks(named, [0, 2], at="net.layer_{}")["net"]
    assert list(small) == ["head", "layer_0", "layer_1"]
    found = stream({"blocks": [small["layer_0"], small["layer_1"]]}, x)
    np.testing.assert_array_equal(found, expected)
    assert len(named["net"]) == 5
    stacked = {"blocks": jax.tree.map(lambda *xs: jnp.stack(xs), *some)}
    small = pp.drop_blocks(stacked, [0, 2], at="blocks")

    def layer(h, p):
        return h + jax.nn.relu(h @ p["up"]) @ p["down"], None

    np.testing.assert_allclose(jax.lax.scan(layer, x, small["blocks"])[0], expected, rtol=1e-5)


def test_blocks_of_a_state_of_nnx():
    model = nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(i)) for i in range(3)])
    _, state = nnx.split(nnx.Dict(blocks=model))
    small = pp.drop_blocks(state, [1], at="blocks.{}")
    np.testing.assert_array_equal(small["blocks"][1]["kernel"][...], model[2].kernel[...])
    assert len(small["blocks"]) == 2


def mistral():
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return MistralForCausalLM(config).eval()


def test_a_torch_model_without_blocks_computes_what_the_masked_one_does():
    model = mistral()
    tokens = torch.randint(0, 40, (2, 7))
    dropped = (2, 0)
    small = pt.drop_blocks(model, dropped, at="model.layers")
    assert small.model.layers[1].mlp.up_proj.weight is model.model.layers[3].mlp.up_proj.weight
    assert (small.config.num_hidden_layers, model.config.num_hidden_layers) == (2, 4)
    assert len(model.model.layers) == 4
    with torch.no_grad():
        found = small(tokens).logits
        for i in dropped:
            model.model.layers[i].self_attn.o_proj.weight.zero_()
            model.model.layers[i].mlp.down_proj.weight.zero_()
        torch.testing.assert_close(found, model(tokens).logits)
        # The cache counts blocks from 0 on.
        settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        made = small.generate(tokens, **settings)
        assert torch.equal(made, model.generate(tokens, **settings))
    loaded = MistralForCausalLM(small.config)
    loaded.load_state_dict(small.state_dict())


def test_a_sequential_without_blocks():
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(3)))
    holder = torch.nn.ModuleDict({"blocks": model}).eval()
    small = pt.drop_blocks(holder, [1], at="blocks")["blocks"]
    assert [small[i].weight is model[j].weight for i, j in ((0, 0), (1, 2))] == [True, True]
    assert not small.training


def test_wrong_calls_say_what_to_do():
    with raises(ValueError, "drop_blocks", "0 to 2", "[3]"):
        pp.drop_blocks([1, 2, 3], [3], at="{}")
    with raises(ValueError, "drop_blocks", "leave one"):
        pp.drop_blocks([1, 2, 3], [0, 1, 2], at="{}")
    with raises(KeyError, "'layer_0'", "'layers_0'"):
        pp.drop_blocks({"layers_0": 1}, [0], at="layer_{}")
    with raises(KeyError, "'blocks'", "'block'"):
        pp.drop_blocks({"block": [1]}, [0], at="blocks.{}")
    with raises(ValueError, "first axes", "[2, 3]", "put {}"):
        pp.drop_blocks({"a": jnp.ones(2), "b": jnp.ones(3)}, [0], at="")
    with raises(TypeError, "blocks along their first axis"):
        pp.drop_blocks({"a": {"b": jnp.ones(())}}, [0], at="a")
    with raises(ValueError, "in its last key", "'a{}.b'"):
        pp.drop_blocks({"a": 1}, [0], at="a{}.b")
    with raises(KeyError, "'model.layer'", "'model.layers'"):
        pt.drop_blocks(mistral(), [0], at="model.layer")
    with raises(TypeError, "ModuleList"):
        pt.drop_blocks(mistral(), [0], at="model.embed_tokens")
    stats = blocks.init({"w": jnp.ones(1)}, 2)
    with raises(ValueError, "states must be 3", "got 2"):
        blocks.update(stats, [jnp.ones((1, 2))] * 2)
    with raises(ValueError, "state 1", "(1, 3)"):
        blocks.update(stats, [jnp.ones((1, 2)), jnp.ones((1, 3)), jnp.ones((1, 2))])
    with raises(ValueError, "empty"):
        pp.short_gpt(stats, 1)
    with raises(ValueError, "short_gpt: drop", "at most 1"):
        pp.short_gpt(blocks.update(stats, [jnp.ones((1, 2))] * 3), 2)
    with raises(ValueError, "without block 1 is NaN"):
        pp.sleb(lambda kept: np.nan if kept == (0, 2) else 1.0, 3, 1)
    with raises(ValueError, "of 2 and of 3"):
        blocks.merge(stats, blocks.init({"w": jnp.ones(1)}, 3))
