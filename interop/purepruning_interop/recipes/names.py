"""auptimizer's compressors: their names, and what each is told in a file and by its caller."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

Kind = Literal["pruning", "quantization", "structure"]


class Given:
    """Stands for an argument that the caller gives and no file can: a function, a loader."""

    def __init__(self, word: str) -> None:
        self._word = word

    def __repr__(self) -> str:
        return self._word


#: The caller must give it, or may.
NEEDED, OPTIONAL = Given("needed"), Given("optional")


@dataclasses.dataclass(frozen=True)
class Named:
    """One compressor of auptimizer.

    Attributes:
        kind: what it does.
        arguments: those of ``create_compressor`` after model and recipe, in auptimizer's order: a
            default, :data:`NEEDED` or :data:`OPTIONAL`.
        keys: keys of its rules besides those that select layers, with their defaults; those
            without one are ``...`` where a rule must have them, and None where it may.
        none: the rules that stand for an empty ``config_list``.
    """

    kind: Kind
    arguments: Mapping[str, Any]
    keys: Mapping[str, Any]
    none: tuple[Mapping[str, Any], ...] = ()

    def data(self) -> dict[str, Any]:
        """Returns the arguments that a file may give, with their defaults."""
        return {k: v for k, v in self.arguments.items() if not isinstance(v, Given)}


#: The step of the native form that makes the smaller model.
SHRINK = "shrink"

_SPARSITY = {"sparsity": ...}
_BITS = {"quant_types": ..., "quant_bits": ...}
_AWARE = {"dependency_aware": False, "dummy_input": OPTIONAL}
_ANNEALING = {
    "start_temperature": 100.0,
    "stop_temperature": 20.0,
    "cool_down_rate": 0.9,
    "perturbation_magnitude": 0.35,
}
_TUNED = {"optimize_mode": "maximize", "base_algo": "l1"}
_FOLDER = {"experiment_data_dir": None}


def _pruner(arguments: Mapping[str, Any], keys: Mapping[str, Any] = _SPARSITY) -> Named:
    return Named("pruning", arguments, keys)


def _quantizer(keys: Mapping[str, Any] = _BITS, none: tuple[Any, ...] = ()) -> Named:
    return Named("quantization", {"optimizer": OPTIONAL}, keys, none)


_PLAIN = {"optimizer": OPTIONAL}
_RANKED = {**_PLAIN, "activation": "relu", "statistics_batch_num": 1, **_AWARE}

#: By exactly the strings that auptimizer knows, and ``"shrink"``.
COMPRESSORS: dict[str, Named] = {
    "level": _pruner(_PLAIN),
    "slim": _pruner(_PLAIN),
    "fpgm": _pruner({**_PLAIN, **_AWARE}),
    "l1_filter": _pruner({**_PLAIN, **_AWARE}),
    "l2_filter": _pruner({**_PLAIN, **_AWARE}),
    "activation_apoz_rank_filter": _pruner(_RANKED),
    "activation_mean_rank_filter": _pruner(_RANKED),
    "taylor_fo_weight_filter": _pruner({**_PLAIN, "statistics_batch_num": 1, **_AWARE}),
    "agp": _pruner(
        {"optimizer": OPTIONAL, "pruning_algorithm": "level"},
        {
            "initial_sparsity": 0.0,
            "final_sparsity": ...,
            "start_epoch": 0,
            "end_epoch": ...,
            "frequency": 1,
        },
    ),
    "net_adapt": _pruner(
        {
            "short_term_fine_tuner": OPTIONAL,
            "evaluator": NEEDED,
            **_TUNED,
            "sparsity_per_iteration": 0.05,
            **_FOLDER,
        }
    ),
    "simulated_annealing": _pruner({"evaluator": NEEDED, **_TUNED, **_ANNEALING, **_FOLDER}),
    "auto_compress": _pruner(
        {
            "trainer": NEEDED,
            "evaluator": NEEDED,
            "dummy_input": NEEDED,
            "num_iterations": 3,
            **_TUNED,
            **_ANNEALING,
            "admm_num_iterations": 30,
            "admm_training_epochs": 5,
            "row": 1e-4,
            **_FOLDER,
        }
    ),
    "amc": _pruner(
        {
            "evaluator": NEEDED,
            "val_loader": NEEDED,
            "suffix": None,
            "model_type": "mobilenet",
            "dataset": "cifar10",
            "flops_ratio": 0.5,
            "lbound": 0.2,
            "rbound": 1.0,
            "reward": "acc_reward",
            "n_calibration_batches": 60,
            "n_points_per_layer": 10,
            "channel_round": 8,
            "hidden1": 300,
            "hidden2": 300,
            "lr_c": 1e-3,
            "lr_a": 1e-4,
            "warmup": 100,
            "discount": 1.0,
            "bsize": 64,
            "rmsize": 100,
            "window_length": 1,
            "tau": 0.01,
            "init_delta": 0.5,
            "delta_decay": 0.99,
            "max_episode_length": 1e9,
            "output_dir": None,
            "debug": False,
            "train_episode": 800,
            "epsilon": 50000,
            "seed": None,
        },
        {},
    ),
    "admm": _pruner(
        {
            "trainer": NEEDED,
            "num_iterations": 30,
            "training_epochs": 5,
            "row": 1e-4,
            "base_algo": "l1",
        }
    ),
    "lottery_ticket": _pruner(
        {"optimizer": OPTIONAL, "lr_scheduler": OPTIONAL, "reset_weights": True},
        {"prune_iterations": ..., **_SPARSITY},
    ),
    "sensitivity": _pruner(
        {
            "evaluator": NEEDED,
            "finetuner": OPTIONAL,
            "base_algo": "l1",
            "sparsity_proportion_calc": OPTIONAL,
            "sparsity_per_iter": 0.1,
            "acc_drop_threshold": 0.05,
            "checkpoint_dir": None,
        }
    ),
    "naive": _quantizer(
        none=({"quant_types": ["weight"], "quant_bits": 8, "op_types": ["default"]},)
    ),
    "qat": _quantizer({**_BITS, "quant_start_step": 0, "quant_scheme": "affine"}),
    "dorefa": _quantizer(),
    "bnn": _quantizer(),
    # Not auptimizer's, whose apply_speedup is a method.
    SHRINK: Named("structure", {"dummy_input": OPTIONAL}, {}),
}

#: What auptimizer hands to NNI where the name has no effect here, and what it then must be.
WITHOUT_EFFECT = (
    "suffix",
    "model_type",
    "dataset",
    "rbound",
    "window_length",
    "max_episode_length",
    "debug",
    "epsilon",
)

#: Arguments that name a folder; None writes nothing, where auptimizer writes into the current one.
FOLDERS = ("experiment_data_dir", "checkpoint_dir", "output_dir")
