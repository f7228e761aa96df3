"""A ResNet with half its multiply-adds, in PyTorch: couple, prune, shrink, train on, export.

    python examples/structured_torch.py

The small model is the user's own class with smaller layers. A plan and a state dict are enough to
build it again. Writes both, and ONNX files of the dense and the small model, which onnxruntime runs.
``structured_flax.py`` does the same in JAX; its network, given the weights trained here, loses the
same channels.
"""

from __future__ import annotations

import copy
import logging
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import structured_flax
import torch
from _structured import (
    ROLES,
    RULES,
    STAGES,
    STEM,
    TRAINING_RATE,
    TUNING_RATE,
    Row,
    deviation,
    given,
    latencies,
    table,
)
from flax.traverse_util import unflatten_dict
from rich.console import Console
from torch import nn

import purepruning as pp
from purepruning_interop import linen
from purepruning_interop import torch as interop

torch.set_num_threads(1)  # a second one costs such small operations more than it brings
# Of torch's exporter: torchvision is missing, and it uses a class that is going to be private.
logging.getLogger("torch.onnx").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)


class Block(nn.Module):
    """Two convolutions and a residual, which is projected where its shape changes."""

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.project = self.norm = None
        if (inputs, 1) != (channels, stride):
            self.project = nn.Conv2d(inputs, channels, 1, stride, bias=False)
            self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the sum, activated."""
        y = self.norm1(self.conv1(x)).relu()
        y = self.norm2(self.conv2(y))
        if self.project is not None:
            x = self.norm(self.project(x))
        return (x + y).relu()


class ResNet(nn.Module):
    """A stem and three stages for images of 8 x 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, STEM, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(STEM)
        inputs = STEM
        for name, (channels, stride) in STAGES.items():
            self.add_module(name, Block(inputs, channels, stride))
            inputs = channels
        self.classifier = nn.Linear(inputs, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns logits, ``(batch, 10)``."""
        x = self.norm(self.stem(images[:, None])).relu()
        for name in STAGES:
            x = self.get_submodule(name)(x)
        return self.classifier(x.mean((2, 3)))


def fit(model: nn.Module, data: Any, batches: Any, rate: float) -> None:
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    images, labels = torch.tensor(data.train_images), torch.tensor(data.train_labels)
    model.train()
    for batch in torch.tensor(batches):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        schedule.step()
    model.eval()


def export(model: nn.Module, x: torch.Tensor, name: str) -> onnxruntime.InferenceSession:
    """Returns what runs the model without torch; writes it and the state dict to files."""
    torch.save(model.state_dict(), f"{name}.pt")
    shapes = ({0: torch.export.Dim("batch")},)
    options = {"dynamo": True, "external_data": False, "verbose": False}
    torch.onnx.export(model, (x,), f"{name}.onnx", dynamic_shapes=shapes, **options)
    threads = onnxruntime.SessionOptions()
    threads.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(f"{name}.onnx", threads, ["CPUExecutionProvider"])


def sizes(name: str) -> dict[str, str]:
    kinds = {"ONNX, KiB": "onnx", "state dict, KiB": "pt"}
    return {k: f"{Path(f'{name}.{end}').stat().st_size / 1024:,.0f}" for k, end in kinds.items()}


def as_flax(model: nn.Module) -> dict[str, Any]:
    """Returns the variables that the network in Flax has with the same weights."""
    kinds = {"running_mean": ("batch_stats", "mean"), "running_var": ("batch_stats", "var")}
    found = {}
    for path, tensor in model.state_dict().items():
        *module, name = path.split(".")
        if name == "num_batches_tracked":
            continue
        other = {1: "scale", 2: "kernel", 4: "kernel"}[tensor.ndim] if name == "weight" else name
        collection, other = kinds.get(name, ("params", other))
        order = {2: (1, 0), 4: (2, 3, 1, 0)}.get(tensor.ndim, (0,))
        found[collection, *module, other] = tensor.numpy().transpose(order)
    return unflatten_dict(found)


def shrunk_in_flax(model: nn.Module, x: np.ndarray) -> pp.Shrunk:
    """Returns what the lines of ``structured_flax.py`` make of the same weights."""
    variables, fn = as_flax(model), structured_flax.model
    coupling = pp.couple(fn, variables, x, False, outputs=(True, False))
    layers = linen.layers(structured_flax.MODEL, variables, x)
    config = pp.resolve(RULES, layers, coupling=coupling, scope="global", cost="macs")
    masks = pp.group_norm(jax.tree.map(jnp.asarray, variables), None, config, roles=ROLES)
    return pp.shrink(fn, variables, masks, coupling, x, False)


def main() -> None:
    data, training, tuning, repeats = given(__doc__)
    console, images = Console(), torch.tensor(data.test_images)
    x = images[:1]
    torch.manual_seed(0)
    dense = ResNet()
    fit(dense, data, training, TRAINING_RATE)

    coupling = interop.couple(dense, x)
    layers = interop.layers(dense)
    config = pp.resolve(RULES, layers, coupling=coupling, scope="global", cost="macs")
    masks = pp.group_norm(dict(dense.named_parameters()), None, config, roles=ROLES)
    shrunk, report = interop.shrink(dense, masks, coupling, x)
    console.print(str(coupling), str(report), sep="\n\n", end="\n\n", soft_wrap=True)
    # The small model is trained as the whole one was.
    tuned = copy.deepcopy(shrunk)
    fit(tuned, data, tuning, TUNING_RATE)
    masked = copy.deepcopy(dense)
    interop.apply_(masked, report.masks)

    # Files, and the small model from them again.
    names = {"dense": "structured_dense", "fine-tuned": "structured_small"}
    models = {"dense": dense, "masked": masked, "shrunk": shrunk, "fine-tuned": tuned}
    sessions = {name: export(models[name], images, file) for name, file in names.items()}
    report.plan.save("structured_plan.safetensors")
    plan, state = pp.Plan.load("structured_plan.safetensors"), torch.load("structured_small.pt")
    again = interop.rebuild(ResNet(), plan, state, x).eval()

    calls = {
        name: torch.inference_mode()(lambda model=model: model(images).numpy())
        for name, model in models.items()
    }
    calls |= {
        f"{name}, onnxruntime": lambda run=session.run: run(None, {"images": data.test_images})[0]
        for name, session in sessions.items()
    }
    milliseconds = latencies(calls, repeats)
    logits = {name: call() for name, call in calls.items()}
    rows = []
    for name, model in models.items():
        more = {"onnxruntime, ms": "", "ONNX, KiB": "", "state dict, KiB": ""}
        if name in names:
            more["onnxruntime, ms"] = f"{milliseconds[f'{name}, onnxruntime']:.1f}"
            more |= sizes(names[name])
        accuracy = float((logits[name].argmax(-1) == data.test_labels).mean())
        counts = interop.count(model, x)
        rows.append(Row(name, accuracy, counts.params, counts.macs, milliseconds[name], more))
    console.print(table("A ResNet in PyTorch, and half of it", rows))

    off = deviation(logits["masked"], logits["shrunk"])
    console.print(f"Largest relative deviation of the shrunk model from the masked one: {off:.1e}")
    assert off <= 1e-5
    assert rows[-1].macs <= rows[0].macs / 2
    off = deviation(logits["fine-tuned"], logits["fine-tuned, onnxruntime"])
    console.print(f"... of onnxruntime from torch: {off:.1e}")
    assert off <= 1e-5
    with torch.inference_mode():
        assert torch.equal(again(images), tuned(images))
    theirs = shrunk_in_flax(dense, data.test_images[:1])
    expected = jax.tree.map(np.shape, as_flax(shrunk))
    assert jax.tree.map(np.shape, theirs.params) == expected
    off = deviation(
        logits["shrunk"], np.asarray(theirs.fn(theirs.params, data.test_images, False)[0])
    )
    console.print(f"... of the model that Flax shrinks from the same weights: {off:.1e}")
    assert off <= 1e-5
    console.print(
        "Wrote structured_dense and structured_small (.onnx, .pt), structured_plan.safetensors."
    )


if __name__ == "__main__":
    main()
