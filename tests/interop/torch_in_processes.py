"""What several processes check of sharded torch parameters; ``test_torch_processes`` starts them.

Every check compares with what this process computes of the whole parameters alone.
"""

import json
import math
import sys
import traceback
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed import checkpoint
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import purepruning as pp
from purepruning import Layer
from purepruning.criteria import Criterion, reduce_units
from purepruning.selection import kth_shards
from purepruning.stats import activations, gradients, inputs
from purepruning.training import movement
from purepruning_interop import torch as interop

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
        assert isinstance(mask, DTensor)
        assert mask.dtype == torch.bool
        assert mask.device_mesh == params[name].device_mesh
        if mask.shape == params[name].shape:
            assert mask.placements == params[name].placements, (name, mask.placements)
        got = mask.full_tensor()
        assert got.shape == expected[name].shape, (name, got.shape, expected[name].shape)
        assert torch.equal(got, expected[name]), name


RULES = [{"op_types": ["default"], "sparsity": 0.45}]


def configs():
    yield pp.resolve(RULES, LAYERS)
    yield pp.resolve(RULES, LAYERS[:2] + LAYERS[3:], scope="global")
    caps = [{**RULES[0], "max_sparsity_per_layer": 0.5}]
    yield pp.resolve(caps, LAYERS[:2] + LAYERS[3:], scope="global")


def floats():
    rng = np.random.default_rng(1)
    return {
        name: torch.from_numpy(rng.standard_normal(x.shape, np.float32))
        for name, x in whole().items()
    }


def compared(pruner, params, config, layouts=LAYOUTS, stats=lambda params: None):
    """Checks a pruner on every layout; nothing is gathered unless it has to be."""
    expected = pruner(params, stats(params), config)
    seen = 0
    for layout in layouts:
        spread = sharded(params, layout)
        given = stats(spread)
        with CommDebugMode() as sent:
            found = pruner(spread, given, config)
        seen += sum(n for op, n in sent.get_comm_counts().items() if "all_gather" in str(op))
        same(found, expected, spread)
    return seen


def level_and_random():
    for config in configs():
        assert compared(pp.level, whole(), config) == 0
        assert compared(pp.random_pruning, whole(), config, stats=lambda params: 3) == 0
    half = pp.resolve([{"op_types": ["default"], "sparsity": 0.2}], LAYERS)
    params = {**floats(), "a.w": torch.zeros(7, 12)}  # one layer of ties alone
    assert compared(pp.level, params, half) == 0
    none = half.with_counts(dict.fromkeys(half.counts, 0))
    assert compared(pp.level, params, none, ["rows"]) == 0


def bracketed():
    """A sample finds the key, or misses it; either way the masks are the same."""
    params = {**floats(), "a.w": torch.zeros(7, 12)}  # ties alone, at the bracket's lower end
    passes = []
    of_all_keys = kth_shards._keys

    def watched(piece):
        passes.append(piece)
        return of_all_keys(piece)

    with mock.patch.multiple(kth_shards, SMALL=16, SAMPLE=64, CHUNK=32, _keys=watched):
        for config in configs():
            assert compared(pp.level, params, config, ["rows", "mixed"]) == 0
            assert compared(pp.level, whole(), config, ["columns"]) == 0
        passes.clear()
        config = pp.resolve(RULES, LAYERS[1:3], scope="global")
        compared(pp.level, floats(), config, ["rows"])
        assert not passes
        missing = [(0, 1)] * 2
        with mock.patch.object(kth_shards, "_brackets", return_value=missing):
            compared(pp.level, floats(), pp.resolve(RULES, LAYERS[:2]), ["rows"])
        assert len(passes) == 2


def pruned_already():
    for masked in (False, True):  # masks of the whole, and of shards
        for layout in LAYOUTS:
            params = whole()
            spread = sharded(params, layout)
            first = pp.resolve([{"op_types": ["default"], "sparsity": 0.2}], LAYERS)
            before = pp.random_pruning(params, 7, first)
            expected = pp.level(params, None, pp.resolve(RULES, LAYERS).with_masks(before))
            if masked:
                before = pp.random_pruning(spread, 7, first)
            config = pp.resolve(RULES, LAYERS).with_masks(before)
            same(pp.level(spread, None, config), expected, spread)


def channels():
    for granularity in ("output_channel", "input_channel"):
        for scope, layers in (("layer", LAYERS[:3]), ("global", LAYERS[:2])):
            config = pp.resolve(RULES, layers, granularity=granularity, scope=scope)
            assert compared(pp.l1_norm, whole(), config) == 0
            assert compared(pp.l1_norm, floats(), config) == 0
            assert compared(pp.l2_norm, floats(), config) == 0
    config = pp.resolve(RULES, LAYERS[:2], granularity=pp.Block((2, 2)))
    assert compared(pp.l1_norm, whole(), config) > 0


def groups():
    layers = LAYERS[:1] + LAYERS[2:]
    config = pp.resolve([{"op_types": ["default"]}], layers, granularity=pp.NM(2, 4))
    assert compared(pp.level, whole(), config, ["rows"]) == 0
    compared(pp.level, whole(), config)


def own_criteria():
    def relative(weight, own):
        size = abs(weight)
        return size / size.max()

    def largest(weight, own, grid):
        return reduce_units(abs(weight), grid, lambda x, axes: x.amax(axes))

    mine = Criterion("mine", element=relative, channel=largest)

    def pruner(params, stats, config):
        return pp.prune(mine, params, stats, config)

    def scores(params, stats, config):
        return pp.prune_scores({n: abs(x) for n, x in params.items()}, params, config)

    for granularity, layers in (("element", LAYERS), ("output_channel", LAYERS[:3])):
        config = pp.resolve(RULES, layers, granularity=granularity)
        compared(pruner, floats(), config)
        assert compared(scores, floats(), config) == 0
    config = pp.resolve(RULES, LAYERS[:2], granularity="output_channel")
    compared(pp.fpgm, floats(), config, ["rows", "columns"])


def read_inputs():
    x = {"a": torch.arange(-18.0, 18).reshape(3, 12), "d": torch.arange(48.0).reshape(3, 16)}
    layers = LAYERS[:1] + LAYERS[3:]
    config = pp.resolve(RULES, layers)

    def stats(params):
        return inputs.update(inputs.init(params, layers), x, layers)

    compared(pp.wanda, whole(), config, stats=stats)


def statistics():
    slopes = whole(5)
    for granularity, layers in (("element", LAYERS), ("output_channel", LAYERS[:3])):
        config = pp.resolve(RULES, layers, granularity=granularity)

        def stats(params, config=config):
            grads = slopes
            if isinstance(params["a.w"], DTensor):
                mesh, at = params["a.w"].device_mesh, {n: x.placements for n, x in params.items()}
                grads = {n: distribute_tensor(x, mesh, at[n]) for n, x in slopes.items()}
            found = gradients.init(params, config, keep=["squares", "signed"])
            for _ in range(2):
                found = gradients.update(found, params, grads, config)
            return gradients.merge(found, found)

        assert compared(pp.taylor_fo, whole(), config, stats=stats) == 0
        assert compared(pp.snip, whole(), config, ["columns"], stats) == 0
        if granularity == "element":
            assert compared(pp.fisher, whole(), config, ["mixed"], stats) == 0
        alone = stats(whole())
        together = stats(sharded(whole(), "columns"))
        for name in alone.squares:
            got = together.squares[name].high
            got = got.full_tensor() if isinstance(got, DTensor) else got
            assert torch.equal(got, alone.squares[name].high), name
    config = pp.resolve(RULES, LAYERS[:2], granularity="output_channel")
    rank, n = dist.get_rank(), dist.get_world_size()
    outputs = {"a": torch.arange(-28.0, 28).reshape(8, 7), "b": torch.ones(8, 6, 2, 2)}
    outputs["b"] *= torch.arange(-2.0, 4)[None, :, None, None]

    def means(params):
        mine = outputs
        if isinstance(params["a.w"], DTensor):
            mine = {name: x[rank::n] for name, x in outputs.items()}
        found = activations.init(params, config)
        found = activations.update(found, mine, config, activation="relu")
        if mine is not outputs:
            for x in jax.tree.leaves(found):
                dist.all_reduce(x)
        return found

    for pruner in (pp.mean_activation_rank, pp.apoz_rank):
        assert compared(pruner, whole(), config, stats=means) == 0


def movement_scores():
    config = pp.resolve(RULES, LAYERS)
    for layout in LAYOUTS:
        params = whole()
        spread = sharded(params, layout)
        scores = {x.name: floats()[x.weight] for x in LAYERS}
        laid = {
            x.name: distribute_tensor(
                scores[x.name], spread[x.weight].device_mesh, spread[x.weight].placements
            )
            for x in LAYERS
        }
        same(movement.masks(spread, laid, config), movement.masks(params, scores, config), spread)


def masks_are_masks():
    for layout in LAYOUTS:
        params = whole()
        spread = sharded(params, layout)
        config = pp.resolve(RULES, LAYERS)
        plain, laid = pp.level(params, None, config), pp.level(spread, None, config)
        assert pp.density(laid, spread) == pp.density(plain, params)
        same(pp.invert(laid), pp.invert(plain), spread)
        same(pp.expand(laid, spread), pp.expand(plain, params), spread)
        rows = pp.resolve(RULES, LAYERS[:1], granularity="output_channel")
        some, few = pp.l1_norm(params, None, rows), pp.l1_norm(spread, None, rows)
        same(pp.merge_masks(laid, few), pp.merge_masks(plain, some), spread)
        for given in (laid, plain):
            for name, x in pp.apply_masks(spread, given).items():
                assert torch.equal(x.full_tensor(), pp.apply_masks(params, plain)[name]), name
        text = pp.summarize(params, plain, LAYERS)
        assert str(pp.summarize(spread, laid, LAYERS)) == str(text)


def net():
    torch.manual_seed(0)
    relu, linear = torch.nn.ReLU, torch.nn.Linear
    return torch.nn.Sequential(linear(5, 8), relu(), linear(8, 9), relu(), linear(9, 3))


def spread_net(kind):
    model = net()
    if kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    mesh = mesh_of(1 if kind == "fsdp" else 2)
    if kind == "fsdp and tensor parallel":
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(model, mesh["model"], plan)
        mesh = mesh["data"]
    fully_shard(model[2], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def trained(model, steps=4):
    """Trains under a schedule on the same data in every process; returns the last masks."""
    table = interop.layers(model)
    config = pp.resolve([{"op_types": ["Linear"], "sparsity": 0.6}], table, scope="global")
    schedule = pp.agp(end_step=2, frequency=1, initial_sparsity=0.2)
    state = schedule.init(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    x = torch.linspace(-1, 1, 40).reshape(8, 5)
    handle = None
    for _ in range(steps):
        state, event = schedule.step(state)
        if event.due:
            masks = pp.level(dict(model.named_parameters()), None, config.with_counts(event.counts))
            interop.apply_(model, masks)
            if handle is None:
                handle = interop.keep_pruned(model, masks, optimizer, zero_moments=True)
            handle.set_masks(masks)
        optimizer.zero_grad()
        (model(x) ** 2).sum().backward()
        optimizer.step()
    for name, mask in masks.items():
        weight = dict(model.named_parameters())[name]
        moment = optimizer.state[weight]["exp_avg"]
        for found in (weight, moment):
            assert not entire(found)[~entire(mask)].any(), name
    return masks


def entire(x):
    return x.detach().full_tensor() if isinstance(x, DTensor) else x.detach()


def training():
    alone = net()
    expected = trained(alone)
    for kind in ("fsdp", "fsdp and tensor parallel", "ddp"):
        model = spread_net(kind)
        found = trained(model)
        assert {n.removeprefix("module.") for n in found} == set(expected)
        for name, mask in found.items():
            short = name.removeprefix("module.")
            # Gradients are summed in another order, so that weights agree up to rounding.
            assert torch.equal(entire(mask), expected[short]), (kind, name)
            weight = entire(dict(model.named_parameters())[name])
            torch.testing.assert_close(weight, dict(alone.named_parameters())[short].detach())


def captured():
    """Statistics of what layers of a sharded model put out, each process its own examples."""
    rank, n = dist.get_rank(), dist.get_world_size()
    x = torch.linspace(-1, 1, 80).reshape(16, 5)

    def seen(model, x):
        table = interop.layers(model)
        config = pp.resolve([{"op_types": ["Linear"]}], table, granularity="output_channel")
        _, outputs = interop.capture(model, x, layers=table)
        stats = activations.init(dict(model.named_parameters()), config)
        return activations.update(stats, outputs, config, activation="relu")

    alone = seen(net(), x)
    together = seen(spread_net("fsdp"), x[rank::n])
    for total in jax.tree.leaves(together):
        dist.all_reduce(total)
    for name, zeros in alone.zeros.items():
        assert torch.equal(together.zeros[name].low, zeros.low), name


def structure():
    alone = net()
    x = torch.ones(2, 5)
    coupling = interop.couple(alone, x)
    rule = {"sparsity": 0.5, "op_types": ["Linear"]}
    config = pp.resolve(rule, interop.layers(alone), coupling=coupling)
    expected = pp.l1_norm(dict(alone.named_parameters()), None, config)
    for kind in ("fsdp", "fsdp and tensor parallel"):
        model = spread_net(kind)
        params = dict(model.named_parameters())
        same(pp.l1_norm(params, None, config), expected, params)
        interop.apply_(model, expected)  # masks that were made before
        for name, weight in model.named_parameters():
            wanted = pp.apply_masks(dict(alone.named_parameters()), expected)[name]
            assert torch.equal(entire(weight), wanted.detach()), name
        gathered = {name: entire(x) for name, x in model.named_parameters()}
        back = net()
        back.load_state_dict(gathered)
        small = interop.shrink(back, expected, coupling, x).model
        torch.testing.assert_close(small(x), back(x))


def refused(words, call, kind=ValueError):
    with pytest.raises(kind) as raised:
        call()
    for word in words:
        assert word in str(raised.value), raised.value


def refusals():
    model, x = spread_net("fsdp"), torch.ones(2, 5)
    params = dict(model.named_parameters())
    config = pp.resolve(0.5, interop.layers(model))
    masks = pp.level(params, None, config)
    coupling = interop.couple(net(), x)
    whole_first = ["before fully_shard", "full_tensor"]
    refused(["couple", *whole_first], lambda: interop.couple(model, x))
    refused(["count", *whole_first], lambda: interop.count(model, x))
    refused(["shrink", *whole_first], lambda: interop.shrink(model, masks, coupling, x))
    refused(["full_tensor"], lambda: interop.shrink(net(), masks, coupling, x), TypeError)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    refused(
        ["sparse_training", *whole_first],
        lambda: interop.sparse_training(model, config, sgd, masks=masks, end_step=4),
    )
    refused(["keep_pruned"], lambda: interop.masked_call(model, masks, x))
    file = Path(sys.argv[4]) / "masks"
    refused(["torch.distributed.checkpoint"], lambda: pp.save_masks(file, masks, params))
    assert not file.exists()
    refused(["full_tensor"], lambda: interop.apply_(net(), masks), TypeError)
    flat = torch.nn.Sequential(FullyShardedDataParallel(net(), device_id=torch.device("cpu")))
    refused(["layers", "'0'", "fully_shard"], lambda: interop.layers(flat))
    refused(["apply_", "fully_shard"], lambda: interop.apply_(flat[0], masks))
    scores = movement.init(params, config)
    refused(["apply", "full_tensor"], lambda: movement.apply(params, scores, config))
    bad = sharded(whole(), "rows")
    bad["b.w"].to_local()[..., 0] = math.nan if dist.get_rank() == 0 else 1.0
    table = pp.resolve(RULES, LAYERS)
    refused(["'b'", "NaN"], lambda: pp.level(bad, None, table))
    rows = pp.resolve(RULES, LAYERS[:3], granularity="output_channel")
    refused(["'b'", "NaN"], lambda: pp.l1_norm(bad, None, rows))
    refused(["'b'", "NaN"], lambda: gradients.update(gradients.init(bad, table), bad, bad, table))
    pending = DTensor.from_local(torch.ones(7, 12), mesh_of(), [Partial()])
    refused(["pending"], lambda: pp.level({**bad, "a.w": pending}, None, table))


def checkpoints():
    """Reads what one process wrote, and writes what one process will read."""
    folder = Path(sys.argv[4])
    model = spread_net("fsdp")
    masks = trained(model)
    read = {"masks": {n: torch.zeros_like(m) for n, m in masks.items()}}
    checkpoint.load(read, checkpoint_id=folder / "by_one")
    alone = net()
    expected = trained(alone)
    for name, mask in read["masks"].items():
        assert mask.placements == masks[name].placements
        assert torch.equal(entire(mask), expected[name]), name
    state = {"model": model.state_dict(), "masks": masks}
    checkpoint.save(state, checkpoint_id=folder / "by_all")


CHECKS = [
    level_and_random,
    bracketed,
    pruned_already,
    channels,
    groups,
    own_criteria,
    read_inputs,
    statistics,
    movement_scores,
    masks_are_masks,
    training,
    captured,
    structure,
    refusals,
    checkpoints,
]


def main(rank, world, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    results = {}
    for check in CHECKS:
        try:
            check()
            results[check.__name__] = None
        except Exception:
            results[check.__name__] = traceback.format_exc()
            if "--go-on" not in sys.argv:
                break  # others may wait for what this one did not send
    print(json.dumps(results), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
