"""transformers: the Flax classes, built small from their configurations.

The last version that has them is 4.57; they need no torch::

    pip install --no-deps transformers==4.57.6
    pip install "huggingface_hub<1.0" "tokenizers<0.23" regex requests pyyaml filelock packaging
"""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from zoo import old_names

from tests.coupling.entry import Entry, draw_inputs, fill, normal, tokens

PACKAGES = ("transformers",)

WORDS = 50
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
TEXT = {**SIZES, "vocab_size": WORDS, "max_position_embeddings": 64, "type_vocab_size": 2}
IMAGE = {**SIZES, "image_size": 16, "patch_size": 4}
DECODER = {k: v for k, v in TEXT.items() if k != "type_vocab_size"} | {"pad_token_id": 0}
BOTH = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": WORDS,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": WORDS,
    "decoder_start_token_id": 0,
}

IDS = {"input_ids": tokens(2, 8, below=WORDS)}
DECODER_IDS = {"decoder_input_ids": tokens(2, 6, below=WORDS)}
TWO = IDS | DECODER_IDS
PIXELS = {"pixel_values": normal(2, 3, 16, 16)}
LONG = {"input_ids": tokens(1, 64, below=WORDS)}


def model(name: str, family: str, of: str, head: str, sizes: dict, inputs: dict) -> Entry:
    """The entry of ``Flax<of><head>`` under a small ``<of>Config``; returns its first output."""

    def build(key):
        import transformers

        config = getattr(transformers, f"{of}Config")(**sizes)
        return from_config(getattr(transformers, f"Flax{of}{head}"), config, inputs, key)

    return Entry(f"hf_{name}", "linen", family, build)


def from_config(
    cls: Any, config: Any, inputs: dict, key: jax.Array, *, initialise: bool = False
) -> tuple:
    """What a ``build`` returns for the model of a configuration."""
    old_names.allow()
    made = cls(config, dtype=jnp.zeros(()).dtype, _do_init=initialise)
    shape = made.input_shape
    if len(shape) == 2 and isinstance(shape[0], int):  # (1, 1) of text, too short for some
        shape = (1, 64 if "input_ids" in inputs and inputs is LONG else 8)
    if initialise:
        params = made.params
    else:
        params = jax.eval_shape(lambda key: made.init_weights(key, shape), key)
    names = tuple(inputs)
    evaluate = {"train": False} if "train" in inspect.signature(made.__call__).parameters else {}

    def fn(params, *inputs):
        return made(**dict(zip(names, inputs, strict=True)), params=params, **evaluate)[0]

    return (
        fn,
        fill(jax.tree.map(lambda x: x, dict(params)), key),
        draw_inputs(tuple(inputs.values()), key),
    )


def text(name: str, family: str, of: str, head: str = "ForMaskedLM", **sizes: Any) -> Entry:
    return model(name, family, of, head, TEXT | sizes, IDS)


def decoder(name: str, of: str, head: str = "ForCausalLM", **sizes: Any) -> Entry:
    return model(name, "gpt", of, head, DECODER | sizes, IDS)


def both(name: str, of: str, head: str = "ForConditionalGeneration", **sizes: Any) -> Entry:
    return model(name, "bart", of, head, BOTH | sizes, TWO)


def clip(key):
    from transformers import CLIPConfig, FlaxCLIPModel

    parts = {"text_config": TEXT | {"eos_token_id": 2}, "vision_config": IMAGE}
    return from_config(FlaxCLIPModel, CLIPConfig(**parts, projection_dim=24), IDS | PIXELS, key)


def two_models(cls: str, encoder: str, encoder_sizes: dict, inputs: dict, key: jax.Array) -> tuple:
    """An encoder of one kind and GPT-2 as a decoder that attends to it."""
    import transformers

    gpt2 = transformers.GPT2Config(**GPT2, add_cross_attention=True)
    first = getattr(transformers, f"{encoder}Config")(**encoder_sizes)
    config_cls = getattr(transformers, cls.removeprefix("Flax").replace("Model", "Config"))
    config = config_cls.from_encoder_decoder_configs(first, gpt2)
    return from_config(getattr(transformers, cls), config, inputs, key, initialise=True)


GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": WORDS}
WAV2VEC2 = SIZES | {
    "vocab_size": WORDS,
    "conv_dim": (16, 16),
    "conv_kernel": (4, 3),
    "conv_stride": (3, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "do_stable_layer_norm": True,
    "feat_extract_norm": "layer",
}
WHISPER = BOTH | {
    "num_mel_bins": 8,
    "max_source_positions": 8,
    "max_target_positions": 16,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
STAGES = {"embedding_size": 8, "hidden_sizes": (8, 16), "depths": (2, 2), "num_labels": 5}

MODELS = (
    text("bert", "bert", "Bert", "ForPreTraining"),
    text("bert_classifier", "bert", "Bert", "ForSequenceClassification"),
    text("bert_base", "bert", "Bert", "Model"),
    text("roberta", "bert", "Roberta"),
    text("roberta_prelayernorm", "bert", "RobertaPreLayerNorm"),
    text("xlm_roberta_questions", "bert", "XLMRoberta", "ForQuestionAnswering"),
    text("albert", "bert", "Albert", embedding_size=16, num_hidden_groups=1),
    text("electra", "bert", "Electra", "ForPreTraining", embedding_size=16),
    text("electra_masked", "bert", "Electra", embedding_size=16),
    text("roformer", "bert", "RoFormer", embedding_size=16),
    model(
        "distilbert",
        "bert",
        "DistilBert",
        "ForMaskedLM",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": WORDS},
        IDS,
    ),
    text("big_bird_full", "big_bird", "BigBird", attention_type="original_full"),
    model(
        "big_bird_sparse",
        "big_bird",
        "BigBird",
        "ForMaskedLM",
        TEXT | {"attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 2},
        LONG,
    ),
    model("gpt2", "gpt", "GPT2", "LMHeadModel", GPT2, IDS),
    model("gptj", "gpt", "GPTJ", "ForCausalLM", GPT2 | {"rotary_dim": 4}, IDS),
    model(
        "gpt_neo",
        "gpt",
        "GPTNeo",
        "ForCausalLM",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "intermediate_size": 48,
            "vocab_size": WORDS,
            "max_position_embeddings": 64,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
        },
        IDS,
    ),
    decoder("opt", "OPT", ffn_dim=48, word_embed_proj_dim=32),
    decoder("opt_projected", "OPT", ffn_dim=48, word_embed_proj_dim=16),
    model(
        "bloom",
        "gpt",
        "Bloom",
        "ForCausalLM",
        {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": WORDS},
        IDS,
    ),
    decoder("llama", "Llama"),
    decoder("llama_gqa", "Llama", num_key_value_heads=2),
    decoder("mistral", "Mistral", num_key_value_heads=2, sliding_window=4),
    decoder("gemma", "Gemma", num_key_value_heads=1, head_dim=8),
    model(
        "xglm",
        "gpt",
        "XGLM",
        "ForCausalLM",
        {
            "d_model": 32,
            "num_layers": 2,
            "attention_heads": 4,
            "ffn_dim": 48,
            "vocab_size": WORDS,
            "max_position_embeddings": 64,
        },
        IDS,
    ),
    model("t5", "t5", "T5", "ForConditionalGeneration", T5, TWO),
    model(
        "t5_gated",
        "t5",
        "T5",
        "ForConditionalGeneration",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        TWO,
    ),
    *(
        model(
            f"longt5_{kind}",
            "t5",
            "LongT5",
            "ForConditionalGeneration",
            T5 | {"encoder_attention_type": attention, "local_radius": 3, "global_block_size": 4},
            LONG | {"decoder_input_ids": tokens(1, 6, below=WORDS)},
        )
        for kind, attention in (("local", "local"), ("global", "transient-global"))
    ),
    both("bart", "Bart"),
    model(
        "bart_classifier",
        "bart",
        "Bart",
        "ForSequenceClassification",
        BOTH | {"num_labels": 3},
        IDS | {"decoder_input_ids": tokens(2, 8, below=WORDS)},
    ),
    both("mbart", "MBart"),
    both("pegasus", "Pegasus"),
    both("marian", "Marian", "MTModel"),
    both("blenderbot", "Blenderbot"),
    model(
        "whisper",
        "whisper",
        "Whisper",
        "ForConditionalGeneration",
        WHISPER,
        {"input_features": normal(2, 8, 16), "decoder_input_ids": tokens(2, 6, below=WORDS)},
    ),
    model(
        "whisper_classifier",
        "whisper",
        "Whisper",
        "ForAudioClassification",
        WHISPER | {"classifier_proj_size": 16, "num_labels": 3},
        {"input_features": normal(2, 8, 16)},
    ),
    model("wav2vec2", "wav2vec2", "Wav2Vec2", "ForCTC", WAV2VEC2, {"input_values": normal(2, 96)}),
    model("vit", "vit", "ViT", "ForImageClassification", IMAGE, PIXELS),
    model("beit", "vit", "Beit", "ForImageClassification", IMAGE, PIXELS),
    model(
        "beit_relative",
        "vit",
        "Beit",
        "ForImageClassification",
        IMAGE | {"use_relative_position_bias": True, "use_mean_pooling": True},
        PIXELS,
    ),
    model("dinov2", "vit", "Dinov2", "ForImageClassification", IMAGE, PIXELS),
    Entry("hf_clip", "linen", "clip", clip),
    model(
        "resnet",
        "resnet",
        "ResNet",
        "ForImageClassification",
        STAGES | {"layer_type": "basic"},
        PIXELS,
    ),
    model("resnet_bottleneck", "resnet", "ResNet", "ForImageClassification", STAGES, PIXELS),
    model(
        "regnet_y",
        "resnext",
        "RegNet",
        "ForImageClassification",
        STAGES | {"groups_width": 4, "layer_type": "y"},
        PIXELS,
    ),
    Entry(
        "hf_vit_gpt2",
        "linen",
        "encoder-decoder",
        lambda key: two_models(
            "FlaxVisionEncoderDecoderModel", "ViT", IMAGE, PIXELS | DECODER_IDS, key
        ),
    ),
    Entry(
        "hf_bert_gpt2",
        "linen",
        "encoder-decoder",
        lambda key: two_models("FlaxEncoderDecoderModel", "Bert", TEXT, TWO, key),
    ),
)
