"""What several processes check of sharded torch parameters; ``test_torch_processes`` starts them.

Every check compares with what this process computes of the whole parameters alone.
"""

import json
import math
import sys
import traceback

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

import purepruning as pp
from purepruning import Layer
from purepruning.stats import gradients

#: Sizes that two and four do not divide, a convolution, a stack of layers, a weight of one row.
LAYERS = (
    Layer("a", "Linear", "a.w", (7, 12), (0,), (1,), bias="a.b"),
    Layer("b", "Conv2d", "b.w", (6, 5, 3, 3), (0,), (1,)),
    Layer("c", "Linear", "c.w", (3, 5, 8), (1,), (2,), stack_axes=(0,)),
    Layer("d", "Linear", "d.w", (1, 16), (0,), (1,), bias="d.b"),
)
LAYOUTS = {
    "rows": {"a.w": 0, "a.b": 0, "b.w": 0, "c.w": 0, "d.w": 0, "d.b": 0},
    "columns": {"a.w": 1, "a.b": None, "b.w": 1, "c.w": 2, "d.w": 1, "d.b": None},
    "mixed": {"a.w": None, "a.b": 0, "b.w": 2, "c.w": 1, "d.w": 1, "d.b": 0},
}


def whole(seed=0):
    """Small integers, so that many weights tie."""
    rng = np.random.default_rng(seed)
    shapes = {x.weight: x.shape for x in LAYERS} | {"a.b": (7,), "d.b": (1,)}
    return {
        name: torch.from_numpy(rng.integers(-6, 7, shape).astype(np.float32))
        for name, shape in shapes.items()
    }


def mesh_of(dims=1):
    n = dist.get_world_size()
    if dims == 1:
        return init_device_mesh("cpu", (n,))
    return init_device_mesh("cpu", (2, n // 2), mesh_dim_names=("data", "model"))


def sharded(params, layout):
    mesh = mesh_of()
    places = {n: Replicate() if a is None else Shard(a) for n, a in LAYOUTS[layout].items()}
    return {n: distribute_tensor(x, mesh, [places[n]]) for n, x in params.items()}


def same(found, expected, params):
    assert set(found) == set(expected), (set(found), set(expected))
    for name, mask in found.items():
        assert isinstance(mask, DTensor) and mask.dtype == torch.bool
        assert mask.device_mesh == params[name].device_mesh
        if mask.shape == params[name].shape:
            assert mask.placements == params[name].placements, (name, mask.placements)
        got = mask.full_tensor()
        assert got.shape == expected[name].shape, (name, got.shape, expected[name].shape)
        assert torch.equal(got, expected[name]), name


RULES = [{"op_types": ["default"], "sparsity": 0.45}]


def configs():
    yield "layer", pp.resolve(RULES, LAYERS)
    yield "global", pp.resolve(RULES, LAYERS[:2] + LAYERS[3:], scope="global")
    caps = [{**RULES[0], "max_sparsity_per_layer": 0.5}]
    yield "caps", pp.resolve(caps, LAYERS[:2] + LAYERS[3:], scope="global")


def level():
    for layout in LAYOUTS:
        for name, config in configs():
            params = whole()
            spread = sharded(params, layout)
            same(pp.level(spread, None, config), pp.level(params, None, config), spread)


CHECKS = [level]


def main(rank, world, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    results = {}
    for check in CHECKS:
        try:
            check()
            results[check.__name__] = None
        except Exception:
            results[check.__name__] = traceback.format_exc()
            break  # others may wait for what this one did not send
    print(json.dumps(results), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
