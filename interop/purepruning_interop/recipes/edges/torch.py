"""PyTorch: a module is changed in place, and its optimizer's steps end with pruned weights at 0."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from purepruning_interop import torch as adapter


def params(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns the parameters by name."""
    return dict(model.named_parameters())


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns copies of parameters and buffers."""
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


def restored(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Writes a snapshot back."""
    model.load_state_dict(state)
    return model


@torch.no_grad()
def written(model: torch.nn.Module, values: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Writes parameters into the model."""
    own = params(model)
    for name, value in values.items():
        own[name].copy_(value)
    return model


def arrays(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns what a file of the model holds."""
    return snapshot(model)


def zeros(shape: tuple[int, ...]) -> torch.Tensor:
    """Returns an input of zeros."""
    return torch.zeros(shape)


def capture(
    model: torch.nn.Module, inputs: tuple[Any, ...], layers: Any, of: Any = "outputs"
) -> dict[str, Any]:
    """Returns the outputs, or inputs, of layers for a batch."""
    with torch.no_grad():
        return adapter.capture(model, *inputs, layers=layers, of=of)[1]


def gradients(model: torch.nn.Module, loss: Callable[..., Any], batch: Any) -> dict[str, Any]:
    """Returns the gradients of ``loss(model, batch)``."""
    own = params(model)
    found = torch.autograd.grad(loss(model, batch), list(own.values()), allow_unused=True)
    return {
        n: torch.zeros_like(p) if g is None else g
        for (n, p), g in zip(own.items(), found, strict=True)
    }


def keep(
    model: torch.nn.Module, masks: dict[str, torch.Tensor], optimizer: Any
) -> adapter.training.KeepPruned:
    """Returns the handle of a hook that keeps pruned weights at zero."""
    return adapter.keep_pruned(model, masks, optimizer)


def before_steps(optimizer: Any, call: Callable[[], bool]) -> None:
    """Calls a function before every step of an optimizer, until it returns True."""

    def before(*_: Any) -> None:
        if call():
            hook.remove()

    hook = optimizer.register_step_pre_hook(before)


def watch_inputs(model: torch.nn.Module, see: Callable[[tuple[Any, ...]], bool]) -> None:
    """Hands the inputs of every training call to a function, until it returns True."""

    def watch(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if module.training and see(inputs):
            hook.remove()

    hook = model.register_forward_pre_hook(watch)


def trained(model: torch.nn.Module, trainer: Callable[..., Any], epoch: int, penalty: Any) -> Any:
    """Trains for an epoch as NNI's ADMM does: ``callback()`` adds the penalty's gradient."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=5e-5)

    def callback() -> None:
        penalty(model).backward()

    trainer(
        model,
        optimizer=optimizer,
        criterion=torch.nn.CrossEntropyLoss(),
        epoch=epoch,
        callback=callback,
    )
    return model


class Quantized(torch.nn.Module):
    """The module with its weights and activations quantised; its parameters are the module's.

    Attributes:
        model: the module itself, which is not changed.
    """

    def __init__(self, model: torch.nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self._call = call

    def forward(self, *inputs: Any) -> Any:
        """Returns what the quantised module does."""
        return self._call(self.model, inputs, self.training)


def quantized(model: torch.nn.Module, call: Callable[..., Any]) -> Quantized:
    """Returns what ``compress`` of a quantizer returns."""
    return Quantized(model, call)


def replace(model: torch.nn.Module, weights: Any, inputs: Iterable[Any], at: Any) -> Any:
    """Returns result and finds of a call with other weights, and functions at sites."""
    return adapter.replace(model, *inputs, at=at, params=weights)
