"""The example configurations of the document on auptimizer's compressors, as they stand there.

Where it shows ``"tensorflow" | "torch"``, torch is chosen.
"""


def _of(compressor, *rules, kind="pruning"):
    return {
        "compression": {
            "framework": "torch",
            "type": kind,
            "compressor": compressor,
            "config_list": list(rules),
        }
    }


_CHANNELS = {"sparsity": 0.5, "op_types": ["Conv2d"]}

SEEDS = {
    "level": _of("level", {"sparsity": 0.8, "op_types": ["default"]}),
    "slim": _of("slim", {"sparsity": 0.8, "op_types": ["BatchNorm2d"]}),
    "fpgm": _of("fpgm", _CHANNELS),
    "l1_filter": _of("l1_filter", _CHANNELS),
    "l2_filter": _of("l2_filter", _CHANNELS),
    "activation_apoz_rank_filter": _of("activation_apoz_rank_filter", _CHANNELS),
    "activation_mean_rank_filter": _of("activation_mean_rank_filter", _CHANNELS),
    "taylor_fo_weight_filter": _of("taylor_fo_weight_filter", _CHANNELS),
    "agp": _of(
        "agp",
        {
            "initial_sparsity": 0.0,
            "final_sparsity": 0.8,
            "start_epoch": 0,
            "end_epoch": 10,
            "frequency": 1,
            "op_types": ["default"],
        },
    ),
    "net_adapt": _of("net_adapt", _CHANNELS),
    "simulated_annealing": _of("simulated_annealing", _CHANNELS),
    "auto_compress": _of("auto_compress", _CHANNELS),
    "amc": _of("amc", {"op_types": ["Conv2d", "Linear"]}),
    "admm": _of(
        "admm",
        {"sparsity": 0.5, "op_types": ["Conv2d"], "op_names": ["conv1"]},
        {"sparsity": 0.5, "op_types": ["Conv2d"], "op_names": ["conv2"]},
    ),
    "lottery_ticket": _of(
        "lottery_ticket", {"prune_iterations": 5, "sparsity": 0.8, "op_types": ["Conv2d"]}
    ),
    "sensitivity": _of("sensitivity", _CHANNELS),
    "naive": _of("naive", kind="quantization"),
    "qat": _of(
        "qat",
        {
            "quant_types": ["weight"],
            "quant_bits": {"weight": 8},
            "op_types": ["Conv2d", "Linear"],
        },
        {
            "quant_types": ["output"],
            "quant_bits": 8,
            "quant_start_step": 7000,
            "op_types": ["ReLU6"],
        },
        kind="quantization",
    ),
    "dorefa": _of(
        "dorefa",
        {"quant_types": ["weight"], "quant_bits": 8, "op_types": ["default"]},
        kind="quantization",
    ),
    "bnn": _of(
        "bnn",
        {
            "quant_bits": 1,
            "quant_types": ["weight"],
            "op_types": ["Conv2d", "Linear"],
            "op_names": ["conv1", "conv2", "fc1", "fc2"],
        },
        {
            "quant_bits": 1,
            "quant_types": ["output"],
            "op_types": ["relu"],
            "op_names": ["relu1", "relu2", "relu3"],
        },
        kind="quantization",
    ),
}
