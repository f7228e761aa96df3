"""Checkpoints pruned file by file: the masks, and the files, of pruning them in memory."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import purepruning as pp
from purepruning import streaming
from tests.messages import raises


def weights(dtype, key=0):
    """Returns two shards of tensors; of few different magnitudes, so that there are many ties."""
    rng = np.random.default_rng(key)

    def some(*shape):
        x = rng.standard_normal(shape)
        return (np.round(x * 4) / 4 if key else x).astype(dtype)

    first = {"embed.weight": some(40, 12), "a.weight": some(16, 12), "norm.weight": some(12)}
    second = {"b.bias": some(9), "b.weight": some(9, 16), "c.weight": some(12, 8), "c.step": 7}
    second["c.step"] = np.int64([7])
    return first, second


def table(params):
    rows = [
        pp.make_layer(params, f"{n}.weight", "Linear", name=n, out_axes=0, in_axes=1) for n in "ac"
    ]
    row = pp.make_layer(
        params, "b.weight", "Linear", name="b", bias="b.bias", out_axes=0, in_axes=1
    )
    return [
        *rows,
        row,
        pp.make_layer(params, "embed.weight", "Embedding", name="embed", out_axes=1),
    ]


def written(folder, shards):
    folder.mkdir()
    for i, shard in enumerate(shards):
        safetensors.numpy.save_file(shard, folder / f"model-{i}.safetensors", {"format": "pt"})
    (folder / "config.json").write_text("{}")
    return folder


def check(tmp_path, shards, pruner, config, stats=None):
    source = written(tmp_path / "source", shards)
    params = shards[0] | shards[1]
    expected = pruner(params, stats, config)
    done = pp.prune_files(pruner, source, tmp_path / "out", config, stats=stats)
    masks = pp.load_masks(done.files[-1], params)
    for name in params:
        assert (masks[name] is None) == (expected[name] is None), name
        if expected[name] is not None:
            np.testing.assert_array_equal(masks[name], expected[name], err_msg=name)
    small = pp.apply_masks(params, expected)
    for i, shard in enumerate(shards):
        again = safetensors.numpy.load_file(tmp_path / "out" / f"model-{i}.safetensors")
        assert again.keys() == shard.keys()
        for name, array in again.items():
            np.testing.assert_array_equal(array, np.asarray(small[name]), err_msg=name)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json", "masks.safetensors", "model-0.safetensors", "model-1.safetensors"
    ]  # fmt: skip
    total = {
        n: int((~np.broadcast_to(m, params[n].shape)).sum())
        for n, m in expected.items()
        if m is not None
    }
    assert done.pruned == total
    return done


CAPS = {"a": 0.3, "b": 0.85, "c": 0.9, "embed": 0.9}
CAPPED = {"sparsity": 0.7, "max_sparsity_per_layer": CAPS}
DTYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("key", [0, 1], ids=["distinct", "ties"])
@pytest.mark.parametrize("rules", [0.5, 0.95, CAPPED, 0.0], ids=["half", "most", "caps", "none"])
def test_all_layers_together_as_in_memory(tmp_path, dtype, key, rules):
    shards = weights(DTYPES[dtype], key)
    config = pp.resolve(rules, table(shards[0] | shards[1]), scope="global")
    check(tmp_path, shards, pp.level, config)


@pytest.mark.parametrize("budget", range(1, 400, 23))
def test_caps_are_met_at_every_budget(tmp_path, budget):
    shards = weights(np.float32, 1)
    rules = [{"sparsity": 0.5, "max_sparsity_per_layer": 0.6, "op_names": ["a", "b", "c"]}]
    config = pp.resolve(rules, table(shards[0] | shards[1]), scope="global")
    budget = min(budget, sum(config.pools[0].caps))
    check(tmp_path, shards, pp.level, config.with_counts({"rule 0": budget}))


@pytest.mark.parametrize(
    ("pruner", "granularity"),
    [
        (pp.level, "element"),
        (pp.level, pp.NM(2, 4)),
        (pp.l1_norm, "output_channel"),
        (pp.l2_norm, pp.Block((4, 4))),
    ],
)
def test_each_layer_by_any_pruner(tmp_path, pruner, granularity):
    shards = weights(ml_dtypes.bfloat16)
    layers = [x for x in table(shards[0] | shards[1]) if x.name in "ab"]
    config = pp.resolve({"sparsity": 0.5}, layers, granularity=granularity)
    check(tmp_path, shards, pruner, config)


def test_statistics_of_inputs(tmp_path):
    from purepruning.stats import inputs

    shards = weights(np.float32)
    params = shards[0] | shards[1]
    config = pp.resolve({"sparsity": 0.5, "op_names": ["a", "b"]}, table(params))
    rng = np.random.default_rng(1)
    seen = {"a": rng.standard_normal((5, 12)), "b": rng.standard_normal((5, 16))}
    arrays = {n: jax.device_put(x.astype(np.float32)) for n, x in seen.items()}
    stats = inputs.update(inputs.init(jax.tree.map(jax.device_put, params), config), arrays, config)
    check(tmp_path, shards, pp.wanda, config, stats)


def test_one_file(tmp_path):
    params = {"w": np.float32([[1, 2], [3, 4]])}
    safetensors.numpy.save_file(params, tmp_path / "w.safetensors")
    layers = [pp.make_layer(params, "w", "Linear", out_axes=0, in_axes=1)]
    pp.prune_files(pp.level, tmp_path / "w.safetensors", tmp_path / "out", pp.resolve(0.5, layers))
    again = safetensors.numpy.load_file(tmp_path / "out" / "w.safetensors")
    assert again["w"].tolist() == [[0, 0], [3, 4]]


KILLED = """
import os, signal, sys
import purepruning as pp
from purepruning import streaming
from tests.test_streaming import table, weights
shards = weights("float32")
config = pp.resolve(0.5, table(shards[0] | shards[1]), scope="global")
write, left = streaming.write_tensors, [int(sys.argv[3])]
def once(path, *rest):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, *rest)
streaming.write_tensors = once
pp.prune_files(pp.level, sys.argv[1], sys.argv[2], config)
"""


@pytest.mark.parametrize("at", [1, 2])
def test_a_killed_run_goes_on(tmp_path, at, monkeypatch):
    shards = weights(np.float32)
    source = written(tmp_path / "source", shards)
    call = [sys.executable, "-c", textwrap.dedent(KILLED), source, tmp_path / "out", str(at)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(["", *sys.path])}
    assert subprocess.run(call, env=environment, check=False).returncode == -signal.SIGKILL
    whole = sorted(p.name for p in (tmp_path / "out").glob("[!.]*"))
    assert whole == ["model-0.safetensors"][: at - 1]
    params = shards[0] | shards[1]
    config = pp.resolve(0.5, table(params), scope="global")
    counted = []
    count = streaming._chunks
    monkeypatch.setattr(streaming, "_chunks", lambda x: counted.append(1) or count(x))
    pp.prune_files(pp.level, source, tmp_path / "out", config)
    # Nothing is counted again; only the layers that were not written are cut.
    assert len(counted) == (4 if at == 1 else 2)
    expected = pp.level(params, None, config)
    masks = pp.load_masks(tmp_path / "out" / "masks.safetensors", params)
    assert all((masks[n] == expected[n]).all() for n in ("a.weight", "b.weight", "b.bias"))


def test_what_another_run_began_is_refused(tmp_path):
    shards = weights(np.float32)
    source = written(tmp_path / "source", shards)
    layers = table(shards[0] | shards[1])
    (tmp_path / "out" / ".pruning").mkdir(parents=True)
    (tmp_path / "out" / ".pruning" / "run").write_text("another")
    with raises(ValueError, "has what another run began; remove"):
        pp.prune_files(pp.level, source, tmp_path / "out", pp.resolve(0.5, layers))


def test_what_was_pruned_can_be_pruned_again(tmp_path):
    shards = weights(np.float32)
    source = written(tmp_path / "source", shards)
    params = shards[0] | shards[1]
    layers = table(params)
    pp.prune_files(pp.level, source, tmp_path / "one", pp.resolve(0.5, layers))
    done = pp.prune_files(pp.level, tmp_path / "one", tmp_path / "two", pp.resolve(0.75, layers))
    masks = pp.load_masks(done.files[-1], params)
    expected = pp.level(params, None, pp.resolve(0.75, layers))
    assert all((masks[n] == expected[n]).all() for n in ("a.weight", "b.weight", "b.bias"))


def test_another_key_is_another_run(tmp_path):
    shards = weights(np.float32)
    source = written(tmp_path / "source", shards)
    config = pp.resolve(0.5, table(shards[0] | shards[1]))
    one, two = jax.random.key(0), jax.random.key(1)
    work = tmp_path / "out" / ".pruning"
    work.mkdir(parents=True)
    read = streaming.read_shards(source)
    streaming._begin(work, read, config, pp.random_pruning, one)
    streaming._begin(work, read, config, pp.random_pruning, one)
    with raises(ValueError, "has what another run began"):
        pp.prune_files(pp.random_pruning, source, tmp_path / "out", config, stats=two)


def test_mistakes_are_named(tmp_path):
    shards = weights(np.float32)
    source, out = written(tmp_path / "source", shards), tmp_path / "out"
    params = shards[0] | shards[1]
    layers = table(params)
    good = pp.resolve(0.5, layers)
    with raises(ValueError, "target is the folder of the source"):
        pp.prune_files(pp.level, source, source, good)
    with raises(ValueError, "by magnitude alone; pass pp.level"):
        channels = pp.resolve(0.5, layers[:2], scope="global", granularity="output_channel")
        pp.prune_files(pp.l1_norm, source, out, channels)
    with raises(KeyError, "layer 'x': the files have no 'x.weight'"):
        other = {"x.weight": params["a.weight"]}
        row = pp.make_layer(other, "x.weight", "Linear", name="x", out_axes=0, in_axes=1)
        pp.prune_files(pp.level, source, out, pp.resolve(0.5, [row]))
    with raises(FileNotFoundError, "has no .safetensors files"):
        (tmp_path / "empty").mkdir()
        pp.prune_files(pp.level, tmp_path / "empty", out, good)
    shards[0]["a.weight"][3, 3] = np.nan
    source = written(tmp_path / "nan", shards)
    for scope in ("layer", "global"):
        with raises(ValueError, "scores of layer 'a' are NaN"):
            pp.prune_files(pp.level, source, tmp_path / scope, pp.resolve(0.5, layers, scope=scope))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes((source / "model-0.safetensors").read_bytes()[:-5])
    with raises(ValueError, "is no safetensors file, or is damaged"):
        pp.prune_files(pp.level, broken, out, good)
    assert json.loads((source / "config.json").read_text()) == {}
