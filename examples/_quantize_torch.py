"""The PyTorch side of ``quantize.py``: an ordinary loop over modules, which stay as they are."""

from __future__ import annotations

import copy
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import quantize
import torch
from _digits_torch import CNN
from torch import nn

import purepruning as pp
from purepruning.quantize import ptq
from purepruning_interop import torch as interop


class Networks(NamedTuple):
    """Networks of all seeds, and what is the same of them."""

    models: list[nn.Module]
    layers: tuple[pp.Layer, ...]
    macs: float = 1.0


class Tuned(NamedTuple):
    """Accuracies of all seeds, and the first network."""

    model: nn.Module
    trained: Any
    state: Any
    accuracies: np.ndarray


def _replace(model: nn.Module) -> Any:
    return lambda params, x, at: interop.replace(model, x, at=at, params=params)


def train(data: Any, seeds: np.ndarray, orders: np.ndarray, rate: float) -> Networks:
    models = []
    for seed in seeds.tolist():
        torch.manual_seed(seed)
        models.append(CNN())
    recipe, networks = quantize.RECIPES[0], Networks(models, interop.layers(models[0]))
    config = pp.resolve_quantization(quantize.rules(recipe), networks.layers)
    for model, order in zip(models, orders, strict=True):
        _tune(recipe, model, config, data, order, rate)
    return networks


def pruned(data: Any, dense: Networks, sparsity: float) -> Networks:
    """Returns smaller modules, coupled and shrunk one by one."""
    x = torch.tensor(data.test_images[:2])
    rules = [{"sparsity": sparsity, "op_types": ["default"]}]
    rules.append({"exclude": True, "op_names": ["classifier"]})
    found = []
    for model in dense.models:
        coupling = interop.couple(model, x)
        config = pp.resolve(rules, dense.layers, coupling=coupling)
        masks = pp.l1_norm(dict(model.named_parameters()), None, config)
        found.append(interop.shrink(model, masks, coupling, x))
    models = [small.model for small in found]
    macs = found[0].report.macs
    return Networks(models, interop.layers(models[0]), macs[1] / macs[0])


def tune(
    recipe: Any, networks: Networks, config: Any, data: Any, orders: np.ndarray, rate: float
) -> Tuned:
    tuned = []
    for model, order in zip(networks.models, orders, strict=True):
        own = copy.deepcopy(model)
        trained, state = _tune(recipe, own, config, data, order, rate)
        with torch.no_grad():
            x = torch.tensor(data.test_images)
            logits, _ = quantize.forward(recipe, trained, state, config, _replace(own), x)
        hits = logits.argmax(-1).numpy() == data.test_labels
        tuned.append((own, trained, state, hits.mean()))
    return Tuned(*tuned[0][:3], np.array([one[3] for one in tuned]))


def _tune(
    recipe: Any, model: nn.Module, config: Any, data: Any, order: np.ndarray, rate: float
) -> Any:
    """Trains the module's own parameters; returns what is trained, and the state."""
    images, labels = torch.tensor(data.train_images), torch.tensor(data.train_labels)
    replace, params = _replace(model), dict(model.named_parameters())
    with torch.no_grad():
        trained, state = quantize.init(recipe, params, config, replace, images[:256])
    scales = [x.requires_grad_() for x in trained[1].values()] if recipe.kind == "lsq" else []
    adam = torch.optim.Adam([*params.values(), *scales], lr=rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, max(len(order), 1))
    for at in torch.tensor(order):
        logits, seen = quantize.forward(
            recipe, trained, state, config, replace, images[at], training=True
        )
        adam.zero_grad()
        nn.functional.cross_entropy(logits, labels[at]).backward()
        adam.step()
        decay.step()
        with torch.no_grad():
            new, state = quantize.after_step(recipe, trained, state, seen, config)
            if new is not trained:  # clipped
                for name, x in new.items():
                    params[name].copy_(x)
    return trained, state


def latency(recipe: Any, done: Tuned, config: Any, data: Any) -> float:
    """Returns milliseconds of one thread of onnxruntime for all test images."""
    import onnxruntime

    with torch.no_grad():
        weights, packed, ranges = quantize.integer_weights(recipe, done.trained, done.state, config)
    model, x = copy.deepcopy(done.model).eval(), torch.tensor(data.test_images)
    model.load_state_dict(weights)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        levels = ptq.activation_levels(ranges, config)
        interop.export_onnx(model, path, packed, levels, config, x)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, options)
    name = session.get_inputs()[0].name
    times = []
    for _ in range(20):
        start = time.perf_counter()
        session.run(None, {name: x.numpy()})
        times.append(time.perf_counter() - start)
    return 1000 * min(times)
