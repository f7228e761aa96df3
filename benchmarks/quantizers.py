"""Rows about quantizers: a step of training that is aware of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from data import normal
from measure import at_most, in_turns, report

import purepruning as pp
from purepruning.quantize import qat

LAYERS = 6
START = 6  # the step at which outputs are quantised: timed steps lie on both sides


def qat_step(shape: tuple[int, int], run: Callable[..., Any]) -> dict[str, Any]:
    width, batch = shape
    times = run(_timing, width, batch)
    others = [name for name in times if name not in ("plain", "qat")]
    cpu = {name: t["cpu_s"] for name, t in times.items()}
    return {
        "title": f"QAT step, weights and outputs in 8 bits, {LAYERS} x Dense({width}), "
        f"batch {batch}, Adam",
        "ours": {"qat": {"time": times["qat"]}},
        "instead": {name: {"time": times[name]} for name in ("plain", *others)},
        "checks": [
            at_most("CPU time / plain step", cpu["qat"] / cpu["plain"], 1.35),
            *(report(f"CPU time / {name}", cpu["qat"] / cpu[name]) for name in others),
        ],
    }


def _timing(width: int, batch: int) -> dict[str, Any]:
    """Returns the times of a plain step, ours, and those of qwix and torchao where installed."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import linen as nn

    from purepruning_interop import linen

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            for i in range(LAYERS):
                x = nn.relu(nn.Dense(width, use_bias=False, name=f"dense{i}")(x))
            return x

    net = Net()
    params = {
        f"dense{i}": {"kernel": jnp.asarray(normal((width, width), i))} for i in range(LAYERS)
    }
    x, y = jnp.asarray(normal((batch, width), 97)), jnp.asarray(normal((batch, width), 98))
    rule = {"op_types": ["Linear"], "quant_bits": 8, "quant_scheme": "per_tensor_symmetric"}
    rules = [
        rule | {"quant_types": ["weight"]},
        rule | {"quant_types": ["output"], "quant_start_step": START},
    ]
    config = pp.resolve_quantization(rules, linen.layers(net, params, x))
    adam = optax.adam(1e-4)

    def aware(params: Any, state: Any, x: Any, y: Any) -> Any:
        at = qat.activations(state, config)
        out, seen = linen.replace(net, qat.weights(params, state, config), x, at=at)
        return jnp.mean((out - y) ** 2), qat.update(state, seen, config)

    def stepper(loss: Callable[..., Any], params: Any, state: Any) -> Callable[[], Any]:
        def step(params: Any, opt_state: Any, state: Any, x: Any, y: Any) -> Any:
            grads, state = jax.grad(loss, has_aux=True)(params, state, x, y)
            updates, opt_state = adam.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, state

        jitted = jax.jit(step, donate_argnums=(0, 1, 2))
        params = jax.tree.map(jnp.copy, params)
        carry = [params, adam.init(params), state]

        def take() -> Any:
            carry[:] = jax.block_until_ready(jitted(*carry, x, y))
            assert jitted._cache_size() == 1  # also across the start step
            return carry[0]

        return take

    def plain(model: Any) -> Callable[..., Any]:
        return lambda p, s, x, y: (jnp.mean((model.apply({"params": p}, x) - y) ** 2), s)

    steps = {
        "plain": stepper(plain(net), params, ()),
        "qat": stepper(aware, params, qat.init(params, config)),
    }
    if importlib.util.find_spec("qwix"):
        import qwix

        rule = qwix.QtRule(module_path=".*", weight_qtype="int8", act_qtype="int8")
        model = qwix.quantize_model(net, qwix.QtProvider([rule]))
        steps["qwix QT, weights and inputs"] = stepper(plain(model), params, ())
    if importlib.util.find_spec("torchao"):
        steps["torchao QAT, weights and inputs"] = _torchao_step(width, batch)
    return in_turns(steps, least=START, most=20)


def _torchao_step(width: int, batch: int) -> Callable[[], Any]:
    import numpy as np
    import torch
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    layers: list[Any] = []
    for _ in range(LAYERS):
        layers += [torch.nn.Linear(width, width, bias=False), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers)
    read = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weight = IntxFakeQuantizeConfig(torch.int8, "per_channel")
    quantize_(model, QATConfig(activation_config=read, weight_config=weight, step="prepare"))
    x, y = (torch.tensor(np.asarray(normal((batch, width), seed))) for seed in (97, 98))
    adam = torch.optim.Adam(model.parameters(), lr=1e-4)

    def take() -> None:
        adam.zero_grad()
        ((model(x) - y) ** 2).mean().backward()
        adam.step()

    return take
