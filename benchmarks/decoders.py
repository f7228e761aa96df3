"""Rows about depth and width: coupling decoders whose parameters are shapes only."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from measure import MIB, at_most, peak_extra, report


class Decoder(NamedTuple):
    """A decoder as in Llama, Mixtral or DeepSeek.

    ``shared`` is the width of the expert that sees every token; without ``experts`` all have one
    network of ``hidden`` channels.
    """

    layers: int
    width: int
    heads: int
    key_heads: int
    hidden: int
    words: int
    experts: int = 0
    shared: int = 0


#: Published shapes of about 70, 141 and 671 billion parameters; the last with plain attention.
SHAPES = {
    "Llama 70B": Decoder(80, 8192, 64, 8, 28672, 128256),
    "Mixtral 8x22B": Decoder(56, 6144, 48, 8, 16384, 32768, 8),
    "DeepSeek-V3": Decoder(61, 7168, 128, 128, 2048, 129280, 256, 2048),
}
HEAD = 128
TOP = 2


def coupling_growth(size: Any, run: Callable[..., Any]) -> dict[str, Any]:
    """Seconds and peak memory of ``couple`` by the number of layers, and of published shapes."""
    shape, few, many, shapes = size
    ways = {"JAX": jax_growth, "JAX, scanned": scanned_growth, "torch": torch_growth}
    ours, checks = {}, []
    for way, measure in ways.items():
        found = [run(measure, shape._replace(layers=n)) for n in (few, many)]
        ours |= {f"{n} layers, {way}": x for n, x in zip((few, many), found, strict=True)}
        growth = found[1]["time"]["cpu_s"] / found[0]["time"]["cpu_s"]
        what = f"{many} layers / {few}, {way}"
        checks.append(at_most(what, growth, 1.25 * many / few))
        checks.append(report(f"memory of {what}", found[1]["peak_extra_mib"]))
        for name, published in shapes.items():
            row = run(measure, published)
            ours[f"{name}, {way}"] = row
            checks.append(at_most(f"{name}, {way}: MiB", row["peak_extra_mib"], 1024))
    return {
        "title": f"coupling of decoders, from {few} to {many} layers and of published shapes",
        "ours": ours,
        "instead": {},
        "checks": checks,
    }


def _row(couple: Callable[[], Any], small: Callable[[], Any]) -> dict[str, Any]:
    """Processor seconds of a first call on a model, and how far memory rises in a second one."""
    small()  # what the first call of a process pays
    start = time.process_time()
    found = couple()
    row = {"time": {"cpu_s": time.process_time() - start}, "units": found.n_units}
    del found
    return row | {"peak_extra_mib": peak_extra(couple) / MIB}


def jax_growth(shape: Decoder, scanned: bool = False) -> dict[str, Any]:
    import jax

    import purepruning as pp

    tokens = jax.ShapeDtypeStruct((1, 8), "int32")

    def couple(shape: Decoder) -> Any:
        def fn(params: Any, tokens: Any) -> Any:  # another function each time: nothing is cached
            return jax_decoder(shape, scanned, params, tokens)

        return pp.couple(fn, jax_params(shape, scanned), tokens)

    tiny = Decoder(2, 16, 2, 1, 16, 8, min(shape.experts, 2), min(shape.shared, 16))
    return _row(functools.partial(couple, shape), functools.partial(couple, tiny))


def scanned_growth(shape: Decoder) -> dict[str, Any]:
    return jax_growth(shape, True)


def jax_params(shape: Decoder, scanned: bool) -> Any:
    """Returns the parameters of :func:`jax_decoder`, as shapes."""
    import jax

    stack = (shape.layers,) if scanned else ()

    def array(*sizes: int, stack: tuple[int, ...] = ()) -> Any:
        return jax.ShapeDtypeStruct((*stack, *sizes), "bfloat16")

    one = functools.partial(array, stack=stack)
    width, hidden, experts = shape.width, shape.hidden, shape.experts
    many = (experts,) if experts else ()

    def layer() -> Any:
        found = {"norm1": one(width), "norm2": one(width)}
        found |= {"q": one(width, shape.heads * HEAD), "o": one(shape.heads * HEAD, width)}
        found |= {name: one(width, shape.key_heads * HEAD) for name in "kv"}
        found |= {name: one(*many, width, hidden) for name in ("gate", "up")}
        found["down"] = one(*many, hidden, width)
        if experts:
            found["router"] = one(width, experts)
        if shape.shared:
            found["shared"] = {name: one(width, shape.shared) for name in ("gate", "up")}
            found["shared"]["down"] = one(shape.shared, width)
        return found

    return {
        "words": array(shape.words, width),
        "layers": layer() if scanned else [layer() for _ in range(shape.layers)],
        "norm": array(width),
        "head": array(width, shape.words),
    }


def jax_decoder(shape: Decoder, scanned: bool, params: Any, tokens: Any) -> Any:
    import jax
    import jax.numpy as jnp

    def norm(x: Any, scale: Any) -> Any:
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-5) * scale

    def rotated(x: Any) -> Any:
        angles = jnp.arange(x.shape[1])[:, None] / 1e4 ** (jnp.arange(0, HEAD, 2) / HEAD)
        cos, sin = (f(angles)[:, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
        a, b = jnp.split(x, 2, -1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def attention(p: Any, x: Any) -> Any:
        q, k, v = (jnp.reshape(x @ p[name], (*x.shape[:2], -1, HEAD)) for name in "qkv")
        k, v = (jnp.repeat(y, shape.heads // shape.key_heads, 2) for y in (rotated(k), v))
        scores = jnp.einsum("bthd,bshd->bhts", rotated(q), k)
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -1e9)
        found = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)
        return found.reshape(*x.shape[:2], -1) @ p["o"]

    def network(p: Any, x: Any) -> Any:
        return (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]

    def experts(p: Any, x: Any) -> Any:
        weights, chosen = jax.lax.top_k(jax.nn.softmax(x @ p["router"]), TOP)
        share = (jax.nn.one_hot(chosen, shape.experts, dtype=x.dtype) * weights[..., None]).sum(-2)
        h = jax.nn.silu(jnp.einsum("btd,edf->btef", x, p["gate"]))
        h = h * jnp.einsum("btd,edf->btef", x, p["up"])
        return jnp.einsum("btef,efd,bte->btd", h, p["down"], share)

    def layer(x: Any, p: Any) -> tuple[Any, None]:
        x = x + attention(p, norm(x, p["norm1"]))
        h = norm(x, p["norm2"])
        x = x + (experts if shape.experts else network)(p, h)
        return x + network(p["shared"], h) if shape.shared else x, None

    x = params["words"][tokens]
    if scanned:
        x = jax.lax.scan(layer, x, params["layers"])[0]
    else:
        for p in params["layers"]:
            x = layer(x, p)[0]
    return norm(x, params["norm"]) @ params["head"]


def torch_growth(shape: Decoder) -> dict[str, Any]:
    import torch

    from purepruning_interop import torch as ppt

    tokens = torch.zeros((1, 8), dtype=torch.int64)

    def couple(shape: Decoder) -> Any:
        return ppt.couple(torch_decoder(shape), tokens.to("meta"))

    tiny = Decoder(2, 16, 2, 1, 16, 8, min(shape.experts, 2), min(shape.shared, 16))
    return _row(functools.partial(couple, shape), functools.partial(couple, tiny))


def torch_decoder(shape: Decoder) -> Any:
    """Returns the module, on the meta device."""
    import torch
    from torch import nn

    width, hidden = shape.width, shape.hidden
    linear = functools.partial(nn.Linear, bias=False)

    def rotated(x: Any) -> Any:
        powers = torch.arange(0, HEAD, 2, device=x.device) / HEAD
        angles = torch.arange(x.shape[1], device=x.device)[:, None] / 1e4**powers
        cos, sin = (y[:, None].to(x.dtype) for y in (angles.cos(), angles.sin()))
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.o = linear(width, shape.heads * HEAD), linear(shape.heads * HEAD, width)
            self.k, self.v = (linear(width, shape.key_heads * HEAD) for _ in "kv")

        def forward(self, x: Any) -> Any:
            q, k, v = (f(x).unflatten(-1, (-1, HEAD)) for f in (self.q, self.k, self.v))
            q, k, v = (y.transpose(1, 2) for y in (rotated(q), rotated(k), v))
            k, v = (y.repeat_interleave(shape.heads // shape.key_heads, 1) for y in (k, v))
            found = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.o(found.transpose(1, 2).flatten(2))

    class Network(nn.Module):
        def __init__(self, hidden: int) -> None:
            super().__init__()
            self.gate, self.up = linear(width, hidden), linear(width, hidden)
            self.down = linear(hidden, width)

        def forward(self, x: Any) -> Any:
            return self.down(nn.functional.silu(self.gate(x)) * self.up(x))

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = linear(width, shape.experts)
            self.gate = nn.Parameter(torch.empty(shape.experts, width, hidden))
            self.up = nn.Parameter(torch.empty(shape.experts, width, hidden))
            self.down = nn.Parameter(torch.empty(shape.experts, hidden, width))

        def forward(self, x: Any) -> Any:
            weights, chosen = self.router(x).softmax(-1).topk(TOP)
            one_hot = nn.functional.one_hot(chosen, shape.experts).to(x.dtype)
            share = (one_hot * weights[..., None]).sum(-2)
            h = nn.functional.silu(torch.einsum("btd,edf->btef", x, self.gate))
            h = h * torch.einsum("btd,edf->btef", x, self.up) * share[..., None]
            return torch.einsum("btef,efd->btd", h, self.down)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
            self.attention = Attention()
            self.network = Experts() if shape.experts else Network(hidden)
            self.shared = Network(shape.shared) if shape.shared else None

        def forward(self, x: Any) -> Any:
            x = x + self.attention(self.norm1(x))
            h = self.norm2(x)
            x = x + self.network(h)
            return x if self.shared is None else x + self.shared(h)

    with torch.device("meta"):
        return nn.Sequential(
            nn.Embedding(shape.words, width),
            *(Layer() for _ in range(shape.layers)),
            nn.RMSNorm(width),
            linear(width, shape.words),
        )
