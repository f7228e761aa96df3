"""Blocks in turn: each is given what the changed blocks before it make of the data."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from purepruning_interop import torch as pt
from tests.messages import raises

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import large_models as example


@pytest.mark.parametrize("name", list(example.models(example.QUICK)))
def test_architectures_are_pruned_block_by_block(name):
    """The last block is calibrated by the pruned model, and every matrix loses half."""
    make, pruner, keep = example.models(example.QUICK)[name]
    torch.manual_seed(0)
    model = make().eval()
    batches = [torch.randint(64, (2, 16)) for _ in range(3)]
    calls = []

    def watched(params, stats, config):
        calls.append(stats)
        return pruner(params, stats, config)

    zeros = example.prune_model(model, batches, watched, keep)
    matrices = [
        x
        for name, x in model.model.layers.named_parameters()
        if x.ndim > 1 and "mlp.gate.weight" not in name
    ]
    assert len(calls) == 2
    assert zeros == sum(x.numel() for x in matrices) // 2
    for x in matrices:
        assert int((x == 0).sum()) == x.numel() // 2
    last = "model.layers.1.self_attn.q_proj"
    total = 0
    for batch in batches:
        _, given = pt.capture(model, batch, layers=[last], of="inputs", use_cache=False)
        rows = given[last].flatten(0, 1).double()
        total = total + (rows.T @ rows if keep == ["grams"] else (rows * rows).sum(0))
    found = getattr(calls[1], keep[0])["self_attn.q_proj"]
    torch.testing.assert_close((found.high + found.low)[0].double(), total, rtol=1e-4, atol=1e-3)


def test_experts_are_given_the_tokens_that_are_routed_to_them():
    """What the example says experts are given makes what the module returns."""
    make = example.models(example.QUICK)["Qwen-MoE, Wanda"][0]
    torch.manual_seed(0)
    model = make().eval()
    turn = next(iter(pt.blocks_in_turn(model, [torch.randint(64, (2, 5))], at="model.layers")))
    ((args, kwargs),) = turn.calls
    given = example.seen(turn.block, example.layers(turn.block), args, kwargs)
    kept = []
    experts = turn.block.mlp.experts
    hook = experts.register_forward_hook(lambda module, args, output: kept.append((args, output)))
    with torch.no_grad():
        turn.block(*args, **kwargs)
        hook.remove()
        (_, index, weights), output = kept[0]
        share = torch.zeros(len(experts.down_proj), len(index))
        for slot in range(index.shape[1]):
            share[index[:, slot], torch.arange(len(index))] = weights[:, slot]
        down = torch.einsum("etm,edm->etd", given["mlp.experts.down_proj"], experts.down_proj)
        torch.testing.assert_close((down * share[:, :, None]).sum(0), output)


def test_nothing_runs_behind_the_last_block_and_nothing_needs_gradients():
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).eval()
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the head was called"))
    names = []
    for turn in pt.blocks_in_turn(model, torch.randint(20, (1, 4)), at="model.layers"):
        names.append(turn.name)
        assert all(not args[0].requires_grad for args, _ in turn.calls)
    assert names == [f"model.layers.{i}" for i in range(3)]
    assert not any(block._forward_pre_hooks for block in model.model.layers)


class _Reversed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(2))

    def forward(self, x):
        for block in reversed(self.blocks):
            x = block(x)
        return x


def test_models_that_call_their_blocks_otherwise_are_refused():
    model, x = _Reversed(), torch.ones(1, 2)
    with raises(ValueError, "block 1 must be called once", "make a module around"):
        pt.blocks_in_turn(model, [x], at="blocks")
    assert not any(block._forward_pre_hooks for block in model.blocks)
    with raises(KeyError, "'block'", "'blocks'"):
        pt.blocks_in_turn(model, [x], at="block")
    with raises(TypeError, "ModuleList"):
        pt.blocks_in_turn(model, [x], at="blocks.0")
    with raises(ValueError, "no batches"):
        pt.blocks_in_turn(model, [], at="blocks")
    for wrong in (5, [[1, 2]]):
        with raises(TypeError, "blocks_in_turn: batches"):
            pt.blocks_in_turn(model, wrong, at="blocks")
