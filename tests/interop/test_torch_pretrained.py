"""Small models of transformers come back from files by their config, or the report says why not."""

import pytest
import torch
import transformers

import purepruning as pp
from purepruning_interop import torch as ppt

IDS = torch.arange(12).view(2, 6)
SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def bert():
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)), (IDS,)


def llama():
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, use_cache=False)
    return transformers.LlamaForCausalLM(config), (IDS,)


def phi3():
    """Its forward reads the number of heads off the config."""
    config = transformers.Phi3Config(
        **SIZES, num_key_value_heads=2, pad_token_id=0, eos_token_id=1, use_cache=False
    )
    return transformers.Phi3ForCausalLM(config), (IDS,)


def vit():
    sizes = {k: v for k, v in SIZES.items() if k != "vocab_size"}
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=8)
    return transformers.ViTForImageClassification(config), (torch.randn(2, 3, 16, 16),)


def t5():
    config = transformers.T5Config(
        vocab_size=60, d_model=32, d_kv=8, d_ff=24, num_layers=2, num_heads=4,
        decoder_start_token_id=0, use_cache=False,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config), (IDS, None, IDS[:, :4])


def shrunk(build, choose, norms="original"):
    """A model without a share of its families: ``choose`` gives how many units of each go."""
    torch.manual_seed(0)
    model, inputs = build()
    model.eval()
    coupling = ppt.couple(model, *inputs)
    units = [n for f in coupling.families for n in f.units[: choose(f)].tolist()]
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    small = ppt.shrink(model, coupling.masks(units, state), coupling, *inputs, norms=norms)
    assert type(small.model) is type(model)
    return model, inputs, small


def first_heads(family):
    """One of two pairs of keys and values of every layer."""
    return int(family.kind == "head" and not family.name.endswith("#2"))


def inner(family):
    """A third of the widths of the feed-forward layers."""
    return 8 if len(family) == 24 else 0


def heads(family):
    return len(family) // 2 if family.kind == "head" and len(family) == 4 else 0


def width_and_heads(family):
    """Half of the residual width and of the heads, so that heads keep their size."""
    return len(family) // 2 if family.kind == "head" or len(family) == 32 else 0


def key_heads(family):
    """One of two pairs of keys and values, with the two heads that read it."""
    return int(family.kind == "head" and "k_proj" in family.name)


@pytest.mark.parametrize(
    ("build", "choose", "norms", "config"),
    [
        (bert, inner, "original", {"intermediate_size": 16}),
        (bert, width_and_heads, "kept", {"hidden_size": 16, "num_attention_heads": 2}),
        (vit, inner, "original", {"intermediate_size": 16}),
        (vit, width_and_heads, "kept", {"hidden_size": 16, "num_attention_heads": 2}),
        (llama, inner, "original", {"intermediate_size": 16}),
        (llama, key_heads, "original", {"num_attention_heads": 2, "num_key_value_heads": 1}),
        (phi3, first_heads, "original", {"head_dim": 8, "num_attention_heads": 2}),
        (t5, inner, "original", {"d_ff": 16}),
        (t5, heads, "original", {"num_heads": 2}),
    ],
)
def test_a_small_model_is_saved_and_loaded(build, choose, norms, config, tmp_path):
    model, inputs, small = shrunk(build, choose, norms)
    before = model.config.to_dict()
    assert {k: getattr(small.model.config, k) for k in config} == config
    for key, value in config.items():
        assert f"{key} {before.get(key)} -> {value}" in str(small.report)
    small.model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(again(*inputs).logits, small.model(*inputs).logits)
    assert model.config.to_dict() == before


def uneven(family):
    return 8 if len(family) == 24 and ".1." in family.name else 0


def head_positions(family):
    return len(family) // 2 if family.kind == "head_position" else 0


@pytest.mark.parametrize(
    ("build", "choose", "why"),
    [
        (bert, uneven, "no number of it stands for"),
        (bert, heads, "none that was tried has"),
        (llama, head_positions, "scaling is"),
        (vit, width_and_heads, 'norms="kept" does not'),
    ],
)
def test_what_no_config_says_is_built_from_the_plan(build, choose, why):
    model, inputs, small = shrunk(build, choose)
    assert why in small.report.config
    assert "load it by rebuild" in str(small.report)
    assert small.model.config.to_dict() == model.config.to_dict()
    again = ppt.rebuild(build()[0].eval(), small.report.plan, *inputs).model
    again.load_state_dict(small.model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(again(*inputs).logits, small.model(*inputs).logits)


def test_a_model_without_a_config_says_nothing_of_one():
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Linear(8, 2)).eval()
    x = torch.ones(1, 3)
    coupling = ppt.couple(model, x)
    masks = coupling.masks([1, 2], dict(model.named_parameters()))
    assert ppt.shrink(model, masks, coupling, x).report.config == ""


def test_the_documented_flow_ends_in_a_model_that_is_loaded_again(tmp_path):
    model, inputs = bert()
    model.eval()
    layers = ppt.layers(model)
    coupling = ppt.couple(model, *inputs)
    rules = [{"sparsity": 0.5, "op_names_re": r".*\.intermediate\.dense"}]
    config = pp.resolve(rules, layers, coupling=coupling)
    masks = pp.l1_norm(dict(model.named_parameters()), None, config)
    small = ppt.shrink(model, masks, coupling, *inputs).model
    small.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert again.config.intermediate_size == 12
    with torch.no_grad():
        torch.testing.assert_close(again(*inputs).logits, small(*inputs).logits)
