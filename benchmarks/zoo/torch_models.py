"""Real PyTorch models to judge coupling and shrinking on, built with random weights.

Eighty-six of them are a fixed population from four packages, torchvision, timm, pytorchcv and
transformers, for which numbers of other tools are known; those marked ``extra`` came later, so that
nobody tunes for the first. Convolutional and vision models have their real widths and small images,
language models are of the real architecture and small. A package is imported when one of its models
is built; ``missing`` says which is not there.

    pip install --no-deps torchvision timm pytorchcv
    pip install transformers huggingface_hub

``--no-deps`` keeps the installed torch, whatever build of it torchvision would rather have.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

BATCH = 2


class Model(NamedTuple):
    """A model of the population; ``build(batch)`` gives it in evaluation mode, with its inputs."""

    name: str
    family: str
    build: Callable[..., tuple[nn.Module, tuple[Any, ...]]]
    package: str
    extra: bool = False


def missing(package: str) -> bool:
    """Returns whether a package that models come from is not installed."""
    return importlib.util.find_spec(package) is None


# --- inputs


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _ids(batch: int, length: int = 12, vocabulary: int = 99) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, vocabulary, (batch, length), generator=generator)


def _images(*shape: int) -> Callable[[int], tuple[torch.Tensor]]:
    shape = (3, *shape, *shape) if len(shape) == 1 else shape
    return lambda batch: (_random(batch, *shape),)


def _two_images(size: int) -> Callable[[int], tuple[torch.Tensor, torch.Tensor]]:
    def inputs(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        both = _random(2 * batch, 3, size, size)
        return both[:batch], both[batch:]

    return inputs


def _tokens(batch: int) -> tuple[torch.Tensor]:
    return (_ids(batch),)


def _two_sequences(batch: int) -> tuple[Any, ...]:
    """Token numbers, no mask, and the decoder's token numbers: positional in every such model."""
    return _ids(batch), None, _ids(batch, 7)


# --- packages


def _torchvision() -> Any:
    """Imports torchvision, also a build for another torch, whose compiled operators do not load.

    The package then defines fake kernels for operators that nobody declared, which fails; it is
    enough to declare them. Models that call them, such as detectors, stay unusable.
    """
    _declare_operators()
    return importlib.import_module("torchvision")


_declared: list[torch.library.Library] = []  # a library is gone as soon as nothing refers to it


def _declare_operators() -> None:
    if _declared or missing("torchvision"):
        return
    folder = importlib.util.find_spec("torchvision").submodule_search_locations[0]
    compiled = next(Path(folder).glob("_C*"), None)
    try:
        torch.ops.load_library(compiled)
    except (TypeError, OSError):  # there is none, or it is linked to other libraries
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)


def _tv(
    name: str,
    family: str,
    inputs: Any = 64,
    *,
    extra: bool = False,
    folder: str = "",
    **kwargs: Any,
) -> Model:
    def build(batch: int = BATCH) -> tuple[nn.Module, tuple[Any, ...]]:
        _torchvision()
        module = importlib.import_module(f"torchvision.models{folder}")
        return getattr(module, name)(**kwargs).eval(), _sized(inputs)(batch)

    return Model(f"tv/{name}", family, build, "torchvision", extra)


def _timm(name: str, family: str, inputs: Any = 64, *, extra: bool = False, **kwargs: Any) -> Model:
    def build(batch: int = BATCH) -> tuple[nn.Module, tuple[Any, ...]]:
        _declare_operators()
        timm = importlib.import_module("timm")
        return timm.create_model(name, pretrained=False, **kwargs).eval(), _sized(inputs)(batch)

    return Model(f"timm/{name}", family, build, "timm", extra)


def _pcv(name: str, family: str, inputs: Any = 64, **kwargs: Any) -> Model:
    def build(batch: int = BATCH) -> tuple[nn.Module, tuple[Any, ...]]:
        _declare_operators()
        provider = importlib.import_module("pytorchcv.model_provider")
        return provider.get_model(name, pretrained=False, **kwargs).eval(), _sized(inputs)(batch)

    return Model(f"pcv/{name}", family, build, "pytorchcv")


def _sized(inputs: Any) -> Callable[[int], tuple[Any, ...]]:
    return _images(inputs) if isinstance(inputs, int) else inputs


_SMALL: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _hf(
    name: str,
    family: str,
    architecture: str,
    inputs: Callable[[int], tuple[Any, ...]] = _tokens,
    *,
    extra: bool = False,
    without: tuple[str, ...] = (),
    **kwargs: Any,
) -> Model:
    """A model of transformers; its settings are ``_SMALL``, less ``without``, plus ``kwargs``."""

    def build(batch: int = BATCH) -> tuple[nn.Module, tuple[Any, ...]]:
        _declare_operators()
        transformers = importlib.import_module("transformers")
        cls = getattr(transformers, architecture)
        settings = {k: v for k, v in _SMALL.items() if k not in without} | kwargs
        config = cls.config_class(**settings)
        config.use_cache = False
        return cls(config).eval(), inputs(batch)

    return Model(f"hf/{name}", family, build, "transformers", extra)


# --- the population

_VISION = ("vocab_size", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")
_NAMES_OF_GPT = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

TORCHVISION = (
    _tv("alexnet", "plain CNN, flatten and linear"),
    _tv("convnext_tiny", "depthwise 7x7, LayerNorm, layer scale"),
    _tv(
        "deeplabv3_mobilenet_v3_large",
        "segmentation, ASPP",
        folder=".segmentation",
        weights_backbone=None,
    ),
    _tv("densenet121", "dense concatenation"),
    _tv("efficientnet_b0", "MBConv, squeeze-excite"),
    _tv("efficientnet_v2_s", "fused MBConv, squeeze-excite"),
    _tv("fcn_resnet50", "segmentation, dilated", folder=".segmentation", weights_backbone=None),
    _tv("googlenet", "inception", aux_logits=False, init_weights=False),
    _tv("inception_v3", "inception", 96, aux_logits=False, init_weights=False),
    _tv("lraspp_mobilenet_v3_large", "segmentation", folder=".segmentation", weights_backbone=None),
    _tv("mnasnet0_5", "depthwise"),
    _tv("mobilenet_v2", "depthwise, inverted residual"),
    _tv("mobilenet_v3_small", "depthwise, squeeze-excite"),
    _tv("regnet_y_400mf", "grouped convolution, squeeze-excite"),
    _tv("resnet18", "residual"),
    _tv("resnet50", "residual bottleneck"),
    _tv("resnext50_32x4d", "grouped convolution"),
    _tv("shufflenet_v2_x0_5", "channel split and shuffle"),
    _tv("squeezenet1_1", "fire modules, convolution as classifier"),
    _tv("swin_t", "shifted windows"),
    _tv("vgg11_bn", "plain CNN, flatten and linear"),
    _tv("vit_b_16", "ViT with nn.MultiheadAttention", image_size=64),
)

TIMM = (
    _timm("convnextv2_atto", "ConvNeXt with global response norm"),
    _timm("cspresnet50", "cross-stage split and concatenation"),
    _timm("deit_tiny_distilled_patch16_224", "ViT with two class tokens", 64, img_size=64),
    _timm("dla34", "tree aggregation"),
    _timm("dpn68", "dual path: slices and concatenation"),
    _timm("ecaresnet26t", "convolution over channels"),
    _timm("efficientformer_l1", "pooling and attention", 224),
    _timm("ese_vovnet19b_dw", "one-shot aggregation"),
    _timm("ghostnet_100", "ghost modules: concatenation and slice"),
    _timm("hrnet_w18_small", "several resolutions, fused"),
    _timm("inception_resnet_v2", "inception and residual", 96),
    _timm("legacy_seresnet18", "squeeze-excite"),
    _timm("levit_128s", "attention with BatchNorm", 224),
    _timm("mixer_s32_224", "token mixing", 224),
    _timm("mixnet_s", "depthwise, split by kernel size"),
    _timm("mobileone_s0", "sum of depthwise branches"),
    _timm("mobilevit_xxs", "convolution and transformer"),
    _timm("nfnet_l0", "weight standardisation, gains"),
    _timm("pit_ti_224", "pooling ViT", 224),
    _timm("poolformer_s12", "pooling in place of attention, GroupNorm"),
    _timm("repvgg_a0", "sum of branches"),
    _timm("res2net50_26w_4s", "split and hierarchical concatenation"),
    _timm("resmlp_12_224", "token mixing, affine parameters", 224),
    _timm("resnetv2_50", "residual, activation first"),
    _timm("resnetv2_50x1_bit", "weight standardisation, GroupNorm"),
    _timm("skresnet18", "selective kernel: softmax over branches"),
    _timm("swinv2_tiny_window8_256", "cosine attention in windows", 256),
    _timm("vit_tiny_patch16_224", "ViT, fused qkv", 64, img_size=64),
    _timm("xception41", "separable convolution"),
    _timm("xcit_nano_12_p16_224", "cross-covariance attention", 64),
)

PYTORCHCV = (
    _pcv("bisenet_resnet18_celebamaskhq", "segmentation, two paths", 128, in_size=(128, 128)),
    _pcv("cbam_resnet18", "channel and spatial attention", 224),
    _pcv("condensenet74_c4_g4", "index_select, grouped and dense convolution", 224),
    _pcv("densenet40_k12_cifar10", "dense concatenation", 32),
    _pcv("diracnet18v2", "plain, without norms", 224),
    _pcv("espnetv2_wd2", "grouped, pyramid of concatenations", 224),
    _pcv("igcv3_w1", "grouped convolution and shuffle", 224),
    _pcv("lwopenpose2d_mobilenet_cmupan_coco", "pose, refined by concatenation"),
    _pcv("preresnet18", "residual, activation first", 224),
    _pcv("pyramidnet110_a48_cifar10", "shortcut padded with zeros", 32),
    _pcv("resnet20_cifar10", "residual", 32),
    _pcv("ror3_56_cifar10", "residual of residuals", 32),
    _pcv("scnet50", "self-calibrated: split", 224),
    _pcv("selecsls42b", "concatenation", 224),
    _pcv("shufflenet_g3_w1", "grouped 1x1 and shuffle", 224),
    _pcv("unet_cityscapes", "U-Net"),
)

TRANSFORMERS = (
    _hf("bert", "encoder", "BertForSequenceClassification"),
    _hf(
        "clip_text", "text encoder and projection", "CLIPTextModelWithProjection", projection_dim=48
    ),
    _hf(
        "distilbert",
        "encoder",
        "DistilBertForSequenceClassification",
        dim=64,
        hidden_dim=128,
        n_layers=2,
        n_heads=4,
    ),
    _hf(
        "gpt2",
        "decoder, fused qkv in Conv1D",
        "GPT2LMHeadModel",
        without=_NAMES_OF_GPT,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=64,
    ),
    _hf("gpt_neox", "decoder, qkv interleaved per head", "GPTNeoXForCausalLM"),
    _hf(
        "hf_swin",
        "shifted windows",
        "SwinForImageClassification",
        _images(32),
        without=(*_VISION, *_NAMES_OF_GPT),
        image_size=32,
        patch_size=2,
        embed_dim=32,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
    ),
    _hf(
        "hf_vit",
        "ViT, separate qkv",
        "ViTForImageClassification",
        _images(32),
        without=_VISION,
        image_size=32,
        patch_size=8,
    ),
    _hf(
        "llama_gqa",
        "decoder, RMSNorm, RoPE, shared keys",
        "LlamaForCausalLM",
        num_key_value_heads=2,
    ),
    _hf("llama_mha", "decoder, RMSNorm, RoPE", "LlamaForCausalLM", num_key_value_heads=4),
    _hf(
        "mamba",
        "state space",
        "MambaForCausalLM",
        without=("intermediate_size", "num_attention_heads", "max_position_embeddings"),
        state_size=8,
    ),
    _hf(
        "mixtral_moe",
        "sparse mixture of experts",
        "MixtralForCausalLM",
        num_key_value_heads=2,
        num_local_experts=4,
    ),
    _hf("opt", "decoder", "OPTForCausalLM", ffn_dim=128, word_embed_proj_dim=64),
    _hf("phi3", "decoder, fused qkv, fused gate and up", "Phi3ForCausalLM", num_key_value_heads=4),
    _hf("qwen2_gqa", "decoder, shared keys, qkv bias", "Qwen2ForCausalLM", num_key_value_heads=2),
    _hf("roberta", "encoder", "RobertaForSequenceClassification"),
    _hf(
        "segformer",
        "hierarchical segmentation",
        "SegformerForSemanticSegmentation",
        _images(64),
        without=(*_VISION, *_NAMES_OF_GPT),
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 3, 4],
        decoder_hidden_size=64,
    ),
    _hf(
        "t5",
        "encoder and decoder, relative bias",
        "T5ForConditionalGeneration",
        _two_sequences,
        without=("max_position_embeddings", "bos_token_id", *_NAMES_OF_GPT),
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    ),
    _hf(
        "whisper",
        "audio encoder and decoder",
        "WhisperForConditionalGeneration",
        lambda batch: (_random(batch, 8, 40), None, _ids(batch, 7)),
        without=("max_position_embeddings", *_NAMES_OF_GPT),
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=20,
        decoder_start_token_id=1,
    ),
)

# --- later ones

_MORE_TORCHVISION = (
    _tv("maxvit_t", "blocks and grids", 224, extra=True),
    _tv(
        "r2plus1d_18",
        "video, factored convolution",
        _images(3, 4, 32, 32),
        extra=True,
        folder=".video",
    ),
    _tv(
        "raft_small",
        "optical flow, recurrent",
        _two_images(128),
        extra=True,
        folder=".optical_flow",
    ),
    _tv("regnet_x_400mf", "grouped convolution", extra=True),
    _tv("s3d", "video, separable inception", _images(3, 16, 224, 224), extra=True, folder=".video"),
    _tv("swin_v2_t", "cosine attention in windows", 64, extra=True),
)

_MORE_TIMM = (
    _timm("cait_xxs24_224", "talking heads, class attention", 64, extra=True, img_size=64),
    _timm("coatnet_nano_rw_224", "convolution, then relative attention", 224, extra=True),
    _timm("convit_tiny", "gated positional attention", 224, extra=True),
    _timm("crossvit_tiny_240", "two branches that exchange tokens", 240, extra=True),
    _timm("edgenext_xx_small", "split depthwise, cross-covariance attention", extra=True),
    _timm("efficientvit_m0", "cascaded group attention", 224, extra=True),
    _timm("eva02_tiny_patch14_224", "SwiGLU, RoPE on patches", 56, extra=True, img_size=56),
    _timm("fastvit_t8", "branches to be merged", extra=True),
    _timm("focalnet_tiny_srf", "focal modulation", extra=True),
    _timm("gmlp_s16_224", "spatial gating", 224, extra=True),
    _timm("mambaout_femto", "gated convolution", extra=True),
    _timm("mobilenetv4_conv_small", "universal inverted bottleneck", extra=True),
    _timm("mvitv2_tiny", "pooled attention, decomposed relative positions", 224, extra=True),
    _timm("pvt_v2_b0", "attention on reduced keys", extra=True),
    _timm("repvit_m0_9", "token and channel mixers", extra=True),
    _timm("resnest14d", "split attention: softmax over branches", extra=True),
    _timm("sequencer2d_s", "LSTM over rows and columns", 224, extra=True),
    _timm("starnet_s1", "products of branches", extra=True),
    _timm(
        "tiny_vit_5m_224", "convolution and windows with biases", 224, extra=True, num_classes=1000
    ),
    _timm("twins_svt_small", "local and global attention", extra=True),
    _timm("volo_d1_224", "outlook attention: fold and unfold", 224, extra=True),
)

_MORE_TRANSFORMERS = (
    _hf(
        "albert",
        "one layer used again and again",
        "AlbertForSequenceClassification",
        extra=True,
        embedding_size=32,
    ),
    _hf(
        "bart",
        "encoder and decoder, shared embedding",
        "BartForConditionalGeneration",
        _two_sequences,
        extra=True,
        without=_NAMES_OF_GPT,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
    ),
    _hf(
        "bert_base",
        "encoder of twelve layers, real size",
        "BertForSequenceClassification",
        lambda batch: (_ids(batch, 64, 30000),),
        extra=True,
        vocab_size=30522,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=512,
    ),
    _hf(
        "bloom",
        "decoder, ALiBi, qkv interleaved per head",
        "BloomForCausalLM",
        extra=True,
        without=("intermediate_size", "num_hidden_layers", "num_attention_heads"),
        n_layer=2,
        n_head=4,
    ),
    _hf(
        "deberta_v2",
        "disentangled attention",
        "DebertaV2ForSequenceClassification",
        extra=True,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
    ),
    _hf(
        "deepseek_v3",
        "latent attention, sigmoid-routed experts",
        "DeepseekV3ForCausalLM",
        extra=True,
        num_key_value_heads=4,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
    ),
    _hf(
        "dinov2",
        "ViT with layer scale",
        "Dinov2ForImageClassification",
        _images(32),
        extra=True,
        without=_VISION,
        image_size=32,
        patch_size=8,
    ),
    _hf(
        "electra",
        "encoder, narrow embedding",
        "ElectraForSequenceClassification",
        extra=True,
        embedding_size=32,
    ),
    _hf(
        "falcon",
        "decoder, one key for all heads, parallel",
        "FalconForCausalLM",
        extra=True,
        without=("intermediate_size",),
        multi_query=True,
        parallel_attn=True,
    ),
    _hf("fnet", "Fourier mixing over channels", "FNetForSequenceClassification", extra=True),
    _hf(
        "gemma3",
        "decoder, norms of queries, sliding window",
        "Gemma3ForCausalLM",
        extra=True,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=8,
    ),
    _hf(
        "gptj",
        "decoder, RoPE of neighbours, parallel",
        "GPTJForCausalLM",
        extra=True,
        without=_NAMES_OF_GPT,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=64,
        rotary_dim=8,
    ),
    _hf(
        "mamba2",
        "state space with heads",
        "Mamba2ForCausalLM",
        extra=True,
        without=("intermediate_size", "num_attention_heads", "max_position_embeddings"),
        num_heads=8,
        head_dim=16,
        expand=2,
        state_size=8,
        n_groups=2,
        chunk_size=8,
    ),
    _hf(
        "qwen3",
        "decoder, norms of queries and keys",
        "Qwen3ForCausalLM",
        extra=True,
        num_key_value_heads=2,
        head_dim=16,
    ),
    _hf(
        "wav2vec2",
        "audio, weight-normed positions",
        "Wav2Vec2ForCTC",
        lambda batch: (_random(batch, 800),),
        extra=True,
        conv_dim=(32, 32, 32),
        conv_kernel=(10, 3, 2),
        conv_stride=(5, 2, 2),
        num_feat_extract_layers=3,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
    ),
)

POPULATION: tuple[Model, ...] = (*TORCHVISION, *TIMM, *PYTORCHCV, *TRANSFORMERS)
EXTRA: tuple[Model, ...] = (*_MORE_TORCHVISION, *_MORE_TIMM, *_MORE_TRANSFORMERS)
MODELS: tuple[Model, ...] = (*POPULATION, *EXTRA)
