"""Tasks and models with one thing wrong, as a command line may be given them."""

import dataclasses
import sys

import torch

from tests.runs.tasks import small


def _raises(error):
    def call(*args):
        raise error

    return call


def _with(**changes):
    return lambda: dataclasses.replace(small(), **changes)


init_raises = _with(init=_raises(RuntimeError("no\ndata")))
train_raises = _with(train=_raises(OSError("no disk")))
tune_raises = _with(tune=_raises(AssertionError("mine")))
evaluate_raises = _with(evaluate=_raises(AttributeError("no such thing")))
tune_alive = _with(tune=lambda params, masks, seed, epochs: {n: x + 1 for n, x in params.items()})
evaluate_nan = _with(evaluate=lambda params: float("nan"))
evaluate_exits = _with(evaluate=lambda params: sys.exit(7))
evaluate_none = _with(evaluate=lambda params: None)
evaluate_matrix = _with(evaluate=lambda params: params["w"])
init_none = _with(init=lambda seed: None)
train_none = _with(train=lambda params, seed: None)
train_other = _with(train=lambda params, seed: {"w": params["w"]})
train_turned = _with(train=lambda params, seed: {**params, "w": params["w"].T})
number = 3


def exits():
    sys.exit(7)


def no_model():
    return ()


def wrong_input():
    return torch.nn.Linear(3, 2), torch.zeros(1, 4)


def not_numbers():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    net[0].weight.data.fill_(float("nan"))
    return net, torch.zeros(1, 3)
