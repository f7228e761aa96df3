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

#: The document's "example creation" of each, as it stands there.
CALLS = {
    "level": ("aup.create_compressor(model, config, optimizer=None)"),
    "slim": ("aup.create_compressor(model, config, optimizer=None)"),
    "fpgm": (
        "aup.create_compressor(model, config, optimizer=None, dependency_aware=False, dum"
        "my_input=None)"
    ),
    "l1_filter": (
        "aup.create_compressor(model, config, optimizer=None, dependency_aware=False, dum"
        "my_input=None)"
    ),
    "l2_filter": (
        "aup.create_compressor(model, config, optimizer=None, dependency_aware=False, dum"
        "my_input=None)"
    ),
    "activation_apoz_rank_filter": (
        "aup.create_compressor(model, config, optimizer=None, activation='relu', statisti"
        "cs_batch_num=1, dependency_aware=False, dummy_input=None)"
    ),
    "activation_mean_rank_filter": (
        "aup.create_compressor(model, config, optimizer=None, activation='relu', statisti"
        "cs_batch_num=1, dependency_aware=False, dummy_input=None)"
    ),
    "taylor_fo_weight_filter": (
        "aup.create_compressor(model, config, optimizer=None, statistics_batch_num=1, dep"
        "endency_aware=False, dummy_input=None)"
    ),
    "agp": ("aup.create_compressor(model, config, optimizer, pruning_algorithm='level')"),
    "net_adapt": (
        "aup.create_compressor(model, config, short_term_fine_tuner, evaluator, optimize_"
        "mode='maximize', base_algo='l1', sparsity_per_iteration=0.05, experiment_data_di"
        "r='./')"
    ),
    "simulated_annealing": (
        "aup.create_compressor(model, config, evaluator, optimize_mode='maximize', base_a"
        "lgo='l1', start_temperature=100, stop_temperature=20, cool_down_rate=0.9, pertur"
        "bation_magnitude=0.35, experiment_data_dir='./')"
    ),
    "auto_compress": (
        "aup.create_compressor(model, config, trainer, evaluator, dummy_input, num_iterat"
        "ions=3, optimize_mode='maximize', base_algo='l1', start_temperature=100, stop_te"
        "mperature=20, cool_down_rate=0.9, perturbation_magnitude=0.35, admm_num_iteratio"
        "ns=30, admm_training_epochs=5, row=0.0001, experiment_data_dir='./')"
    ),
    "amc": (
        "aup.create_compressor(model, config, evaluator, val_loader, suffix=None, model_t"
        "ype='mobilenet', dataset='cifar10', flops_ratio=0.5, lbound=0.2, rbound=1.0, rew"
        "ard='acc_reward', n_calibration_batches=60, n_points_per_layer=10, channel_round"
        "=8, hidden1=300, hidden2=300, lr_c=0.001, lr_a=0.0001, warmup=100, discount=1.0,"
        " bsize=64, rmsize=100, window_length=1, tau=0.01, init_delta=0.5, delta_decay=0."
        "99, max_episode_length=1000000000.0, output_dir='./logs', debug=False, train_epi"
        "sode=800, epsilon=50000, seed=None)"
    ),
    "admm": (
        "aup.create_compressor(model, config, trainer, num_iterations=30, training_epochs"
        "=5, row=0.0001, base_algo='l1')"
    ),
    "lottery_ticket": (
        "aup.create_compressor(model, config, optimizer=None, lr_scheduler=None, reset_we"
        "ights=True)"
    ),
    "sensitivity": (
        "aup.create_compressor(model, config_list, evaluator, finetuner=None, base_algo='"
        "l1', sparsity_proportion_calc=None, sparsity_per_iter=0.1, acc_drop_threshold=0."
        "05, checkpoint_dir=None)"
    ),
    "naive": ("aup.create_compressor(model, config)"),
    "qat": ("aup.create_compressor(model, config)"),
    "dorefa": ("aup.create_compressor(model, config)"),
    "bnn": ("aup.create_compressor(model, config)"),
}
