"""Experts of transformers, which are stacked in one parameter: each is pruned as a layer."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import purepruning as pp
from purepruning.matrices import as_matrices, form
from purepruning.stats import inputs
from purepruning_interop import torch as pt
from tests.interop.torch_law import distance, masked, state_of

SIZES = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
EXPERTS = "model.layers.0.mlp.experts"


def made(name):
    torch.manual_seed(0)
    qwen = {"num_experts": 3, "moe_intermediate_size": 24, "decoder_sparse_step": 1, "head_dim": 4}
    gpt = {"num_local_experts": 3, "head_dim": 4, "layer_types": ["full_attention"]}
    match name:
        case "mixtral":
            model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=3))
        case "olmoe":
            model = OlmoeForCausalLM(OlmoeConfig(**SIZES, num_experts=3))
        case "qwen":
            model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES | qwen))
        case _:
            model = GptOssForCausalLM(GptOssConfig(**SIZES, **gpt))
            for x in model.parameters():  # biases too, which are zero else
                torch.nn.init.normal_(x, 0, 0.3)
    return model.eval()


def table(model):
    return [x for x in pt.layers(model) if x.name.startswith(EXPERTS)]


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen", "gpt_oss"])
def test_experts_are_stacked_layers(name):
    """By the axes of the table and the paper's formula, a token comes out as from the module."""
    model = made(name)
    up, down = table(model)
    assert (up.name, down.name) == (f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj")
    assert {x.type for x in (up, down)} == {"Linear"}
    params = {n: x.detach() for n, x in model.named_parameters()}
    experts = model.get_submodule(EXPERTS)
    x, chosen = torch.randn(1, 16), torch.tensor([[2, 0]])

    def through(row, e, x):
        y = as_matrices(params[row.weight], form("test", row))[e] @ x
        return y if row.bias is None else y + params[row.bias][e]

    expected = 0
    for e, share in ((2, 0.7), (0, 0.3)):
        hidden = through(up, e, x[0])
        if name == "gpt_oss":
            gate, value = hidden[0::2].clamp(max=7), hidden[1::2].clamp(-7, 7)
            hidden = (value + 1) * gate * torch.sigmoid(1.702 * gate)
        else:
            gate, value = hidden.chunk(2)
            hidden = torch.nn.functional.silu(gate) * value
        expected = expected + share * through(down, e, hidden)
    with torch.no_grad():
        found = experts(x, chosen, torch.tensor([[0.7, 0.3]]))
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_every_expert_loses_as_many(name):
    model = made(name)
    rows = table(model)
    params = {x.weight: model.get_parameter(x.weight).detach() for x in rows}
    forms = {x.name: form("test", x) for x in rows}
    rng = np.random.default_rng(0)
    seen = {
        n: torch.tensor(rng.normal(size=(3, 40, f.columns)), dtype=torch.float32)
        for n, f in forms.items()
    }
    stats = inputs.update(inputs.init(params, rows), seen, rows)
    config = pp.resolve([{"op_types": ["Linear"], "sparsity": 0.5}], rows, bias="keep")
    by_size, by_input = pp.level(params, None, config), pp.wanda(params, stats, config)
    channels = pp.resolve(0.25, rows, granularity="output_channel", bias="keep")
    by_channel = pp.l1_norm(params, None, channels)
    for row in rows:
        f = forms[row.name]
        w = as_matrices(params[row.weight], f).abs().numpy()
        keep = {
            n: as_matrices(m[row.weight].expand(row.shape), f).numpy()
            for n, m in {"size": by_size, "input": by_input, "channel": by_channel}.items()
        }
        for e in range(3):
            assert keep["size"][e].sum() == w[e].size // 2
            assert w[e][keep["size"][e]].min() >= w[e][~keep["size"][e]].max()
            scores = w[e] * np.linalg.norm(seen[row.name][e].numpy(), axis=0)
            order = np.argsort(np.argsort(scores, axis=1), axis=1)
            np.testing.assert_array_equal(keep["input"][e], order >= f.columns // 2)
            norms = w[e].sum(1)
            stay = np.isin(np.arange(f.out), np.argsort(norms)[f.out // 4 :])
            np.testing.assert_array_equal(
                keep["channel"][e], np.repeat(stay[:, None], f.columns, 1)
            )


def test_neurons_of_all_experts_go_together_and_shrink():
    """Run as grouped products, experts can be read: a neuron is one in all of them."""
    model = made("mixtral")
    model.set_experts_implementation("grouped_mm")
    tokens, kwargs = torch.randint(0, 20, (2, 6)), {"use_cache": False}
    coupling, layers = pt.couple(model, tokens, **kwargs), pt.layers(model)
    rules = [{"op_names": [f"{EXPERTS}.gate_up_proj"], "sparsity": 0.25}]
    config = pp.resolve(rules, layers, coupling=coupling)
    params = {n: x.detach() for n, x in model.named_parameters()}
    masks = pp.group_norm(params, None, config)
    shrunk = pt.shrink(model, masks, coupling, tokens, **kwargs)
    sizes = {n: tuple(x.shape) for n, x in state_of(shrunk.model).items()}
    assert sizes[f"{EXPERTS}.gate_up_proj"] == (3, 36, 16)
    assert sizes[f"{EXPERTS}.down_proj"] == (3, 16, 18)
    with torch.no_grad():
        full = masked(model, shrunk.report.masks)
        small = shrunk.model.eval()
        assert distance(full(tokens, **kwargs).logits, small(tokens, **kwargs).logits) < 1e-5


def test_whole_experts_behind_products_by_index_stay_and_are_listed():
    model = made("mixtral")
    model.set_experts_implementation("grouped_mm")
    coupling = pt.couple(model, torch.randint(0, 20, (2, 6)), use_cache=False)
    rules = [{"op_partial_names": ["gate_up_proj"], "sparsity": 0.5, "units": "expert"}]
    reason = "its stacked layers stay: experts, of which the rows choose; prune its channels"
    with pytest.raises(ValueError, match=reason):
        pp.resolve(rules, pt.layers(model), coupling=coupling)


class Expert(nn.Module):
    """A gated MLP with biases."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def shares(logits):
    """By token and expert: the softmax where an expert is one of the two largest, else zero."""
    weight, chosen = logits.softmax(-1).topk(2, -1)
    return torch.zeros_like(logits).scatter(1, chosen, weight)


class Looped(nn.Module):
    """Experts in a list, each with arrays of its own."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(8, 4)
        self.experts = nn.ModuleList(Expert() for _ in range(4))

    def forward(self, x):
        share = shares(self.router(x))
        return sum(share[:, i : i + 1] * e(x) for i, e in enumerate(self.experts))


class Mixture(nn.Module):
    """Two of four experts for each token, beside a plain MLP."""

    def __init__(self, moe):
        super().__init__()
        self.stem, self.head = nn.Linear(3, 8), nn.Linear(8, 2)
        self.mlp = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 8))
        self.moe = moe

    def forward(self, x):
        h = self.stem(x)
        h = h + self.mlp(h)
        return self.head(h + self.moe(h))


def test_whole_experts_go_and_the_class_stays():
    torch.manual_seed(0)
    model, x = Mixture(Looped()).eval(), torch.randn(9, 3)
    small_ones = [model.moe.experts[e] for e in (1, 2)]
    with torch.no_grad():
        for expert in small_ones:
            expert.up.weight.mul_(0.1)
            expert.gate.weight.mul_(0.1)
    coupling = pt.couple(model, x)
    rules = [{"sparsity": 0.5, "units": "expert"}]
    config = pp.resolve(rules, pt.layers(model), coupling=coupling)
    params = {n: p.detach() for n, p in model.named_parameters()}
    small = pt.shrink(model, pp.l1_norm(params, None, config), coupling, x).model.eval()
    assert type(small) is Mixture
    sizes = {n: tuple(p.shape) for n, p in state_of(small).items()}
    assert (sizes["moe.router.weight"], sizes["mlp.0.weight"]) == ((4, 8), (5, 8))
    assert [sizes[f"moe.experts.{e}.up.weight"][0] for e in range(4)] == [6, 0, 0, 6]
    with torch.no_grad():
        found, full = small(x), model(x)
        # By hand: of what goes only the last bias is left, and the router's share of it.
        for expert in small_ones:
            expert.down.weight.zero_()
        expected = model(x)
    assert (full - expected).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
