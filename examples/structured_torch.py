"""A ResNet with half its multiply-adds, in PyTorch: couple, prune, shrink, train on, export.

    python examples/structured_torch.py [--quick]

The small model is the user's own class with smaller layers. A plan and a state dict are enough to
build it again. Writes both, and the dense and the small model for onnxruntime. The network of
``structured_flax.py``, given the weights trained here, loses the same channels.
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
from purepruning.jaxpr.shrink import Shrunk
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

    def __init__(self, stem: int = STEM) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, stem, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(stem)
        inputs = stem
        for name, (times, stride) in STAGES.items():
            self.add_module(name, Block(inputs, times * stem, stride))
            inputs = times * stem
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


def halve(model: nn.Module, coupling: pp.Coupling, x: torch.Tensor, round_to: int = 1) -> Shrunk:
    """Returns the model with half the multiply-adds, its widths multiples of ``round_to``."""
    layers = interop.layers(model)
    how = {"scope": "global", "cost": "macs", "round_to": round_to}
    config = pp.resolve(RULES, layers, coupling=coupling, **how)
    masks = pp.group_norm(dict(model.named_parameters()), None, config, roles=ROLES)
    return interop.shrink(model, masks, coupling, x)


def export(model: nn.Module, images: torch.Tensor, name: str) -> onnxruntime.InferenceSession:
    """Returns what runs the model without torch, on one thread; writes it, and a state dict."""
    torch.save(model.state_dict(), f"{name}.pt")
    torch.onnx.export(
        model,
        (images,),
        f"{name}.onnx",
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=False,
        verbose=False,
    )
    threads = onnxruntime.SessionOptions()
    threads.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(f"{name}.onnx", threads, ["CPUExecutionProvider"])


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


def halve_in_flax(model: nn.Module, x: np.ndarray) -> Shrunk:
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
    half = halve(dense, coupling, x)
    shrunk, report = half.model, half.report
    console.print(str(coupling), str(report), sep="\n\n", end="\n\n", soft_wrap=True)
    masked = copy.deepcopy(dense)
    interop.apply_(masked.state_dict(), report.masks)  # statistics of batch norms are masked too
    # The small model is trained as the whole one was.
    tuned, eights = copy.deepcopy(shrunk), halve(dense, coupling, x, round_to=8).model
    fit(tuned, data, tuning, TUNING_RATE)
    fit(eights, data, tuning, TUNING_RATE)

    exported = {"dense": dense, "fine-tuned": tuned, "round_to=8": eights}
    ends = {"dense": "dense", "fine-tuned": "half", "round_to=8": "8"}
    files = {name: f"structured_{end}" for name, end in ends.items()}
    sessions = {name: export(model, images, files[name]) for name, model in exported.items()}
    # The small model again, from files.
    pp.save_plan("structured_half.safetensors", report.plan)
    plan, state = pp.load_plan("structured_half.safetensors"), torch.load("structured_half.pt")
    again = interop.rebuild(ResNet().eval(), plan, x).model
    again.load_state_dict(state)

    models = {"dense": dense, "masked": masked, "shrunk": shrunk, **exported}
    calls = {n: torch.inference_mode()(lambda m=m: m(images).numpy()) for n, m in models.items()}
    for name, session in sessions.items():
        calls[f"onnx {name}"] = lambda s=session: s.run(None, {"images": data.test_images})[0]
    logits, milliseconds = {n: call() for n, call in calls.items()}, latencies(calls, repeats)
    rows = []
    for name, model in models.items():
        accuracy = float((logits[name].argmax(-1) == data.test_labels).mean())
        counts = interop.count(model, x)
        more = {"onnxrun-\ntime, ms": "", "ONNX,\nKiB": "", "state,\nKiB": ""}
        if name in sessions:
            sizes = [Path(f"{files[name]}.{end}").stat().st_size for end in ("onnx", "pt")]
            cells = milliseconds[f"onnx {name}"], sizes[0] / 1024, sizes[1] / 1024
            more = {k: f"{cell:,.0f}" for k, cell in zip(more, cells, strict=True)}
        rows.append(Row(name, accuracy, counts.params, counts.macs, milliseconds[name], more))
    console.print(table("A ResNet in PyTorch, and half of it", rows))
    assert all(row.macs <= rows[0].macs / 2 for row in rows[2:])

    theirs = halve_in_flax(dense, data.test_images[:1])
    found = jax.jit(theirs.fn, static_argnums=2)(theirs.params, data.test_images, False)[0]
    for what, one, other in (
        ("the shrunk model from the masked one", logits["masked"], logits["shrunk"]),
        ("onnxruntime from torch", logits["fine-tuned"], logits["onnx fine-tuned"]),
        ("what Flax shrinks, with these weights", logits["shrunk"], np.asarray(found)),
    ):
        off = deviation(one, other)
        console.print(f"Largest relative deviation of {what}: {off:.1e}")
        assert off <= 1e-5
    same = jax.tree.map(np.array_equal, theirs.params, as_flax(shrunk))
    assert all(jax.tree.leaves(same))  # of every array the same channels are left
    with torch.inference_mode():
        assert torch.equal(again(images), tuned(images))
    console.print(f"Wrote {', '.join(files.values())} (.onnx, .pt), structured_half.safetensors.")


if __name__ == "__main__":
    main()
