"""Checkpoints pruned file by file: the masks, and the files, of pruning them in memory."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import tracemalloc

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


def everything_in_memory(params):
    """Returns what no counting of bits ranks: pruner, config and statistics, by name."""
    layers = table(params)
    units = pp.resolve(0.4, layers[:3], scope="global", granularity="output_channel")
    together = pp.resolve(0.6, layers, scope="global")
    nested = together.with_masks(pp.level(params, None, pp.resolve(0.1, layers)))
    stack = pp.make_layer(params, "c.weight", "Linear", out_axes=1, stack_axes=0)
    stacked = pp.resolve(0.5, [layers[0], stack], scope="global")
    return {
        "channels": (pp.l1_norm, units, None),
        "chance": (pp.random_pruning, together, jax.random.key(3)),
        "nested": (pp.level, nested, None),
        "stacked": (pp.level, stacked, None),
    }


@pytest.mark.parametrize("which", ["channels", "chance", "nested", "stacked"])
def test_what_is_ranked_together_in_memory(tmp_path, which):
    shards = weights(np.float32)
    check(tmp_path, shards, *everything_in_memory(shards[0] | shards[1])[which])


def test_float64_together(tmp_path):
    shards = weights(np.float64, 1)
    check(tmp_path, shards, pp.level, pp.resolve(0.5, table(shards[0] | shards[1]), scope="global"))


def test_float8_together(tmp_path):
    shards = weights(ml_dtypes.float8_e4m3fn, 1)
    params = shards[0] | shards[1]
    config = pp.resolve(0.5, table(params), scope="global")
    source = written(tmp_path / "source", shards)
    done = pp.prune_files(pp.level, source, tmp_path / "out", config)
    masks, expected = pp.load_masks(done.files[-1], params), pp.level(params, None, config)
    (again,) = streaming.read_shards(done.files[0])
    for name in ("a.weight", "embed.weight"):
        np.testing.assert_array_equal(masks[name], expected[name])
        want = np.where(expected[name], params[name].astype(np.float32), 0)
        np.testing.assert_array_equal(again.arrays()[name].astype(np.float32), want)


def test_more_weights_than_int32_counts_take_one_rule(tmp_path, monkeypatch):
    shards = weights(np.float32, 1)
    params = shards[0] | shards[1]
    layers = table(params)
    expected = pp.level(params, None, pp.resolve(0.5, layers, scope="global"))
    monkeypatch.setattr("purepruning.config.config._COUNTABLE", 600)  # of 912
    source = written(tmp_path / "source", shards)
    config = pp.resolve(0.5, layers, scope="global")
    done = pp.prune_files(pp.level, source, tmp_path / "out", config)
    masks = pp.load_masks(done.files[-1], params)
    assert all((masks[x.weight] == expected[x.weight]).all() for x in layers)
    # What counts in memory says so, and so do tables of counts.
    says = ("'rule 0' has 912 units", "599 at most", "split the rule", "prune_files")
    for call in (
        lambda: pp.level(params, None, config),
        lambda: pp.agp(end_step=3).init(config),
        lambda: config.with_sparsity([0.1, 0.2]),
    ):
        with raises(ValueError, *says):
            call()


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_without_a_target_it_is_counted_and_not_written(tmp_path, scope):
    shards = weights(np.float32)
    source = written(tmp_path / "source", shards)
    config = pp.resolve(0.5, table(shards[0] | shards[1]), scope=scope)
    seen = []
    counted = pp.prune_files(
        pp.level, source, None, config, progress=lambda *told: seen.append(told)
    )
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
    done = pp.prune_files(pp.level, source, tmp_path / "out", config)
    assert counted == ((), done.pruned, done.size)
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("rules", [0.5, 0.0])
def test_progress_is_told_in_bytes_to_the_end(tmp_path, dtype, rules):
    shards = weights(DTYPES[dtype])
    source = written(tmp_path / "source", shards)
    config = pp.resolve(rules, table(shards[0] | shards[1]), scope="global")
    seen = []
    pp.prune_files(pp.level, source, tmp_path / "out", config, progress=lambda *x: seen.append(x))
    width = np.dtype(DTYPES[dtype]).itemsize
    written_bytes = (912 + 12 + 9) * width + 8
    total = written_bytes + 912 * width * (2 if dtype == "F32" else 1)
    assert {row[1] for row in seen} == {total}
    assert [row[0] for row in seen] == sorted(row[0] for row in seen)
    assert seen[-1][0] == total
    assert {row[2] for row in seen} >= {"a.weight", "b.bias", "c.step"}


def test_what_an_index_does_not_name_is_left_out_and_so_are_other_formats(tmp_path):
    shards = weights(np.float32)
    source = written(tmp_path / "source", shards)
    names = {name: f"model-{i}.safetensors" for i, part in enumerate(shards) for name in part}
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    safetensors.numpy.save_file({"a.weight": shards[0]["a.weight"]}, source / "all.safetensors")
    for other in ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf"):
        (source / other).write_text("")
    config = pp.resolve(0.5, table(shards[0] | shards[1]))
    pp.prune_files(pp.level, source, tmp_path / "out", config)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "masks.safetensors",
        "model-0.safetensors",
        "model-1.safetensors",
        "model.safetensors.index.json",
    ]


def test_tensors_are_aligned_whatever_they_were(tmp_path):
    """The header has any length, and three bytes lie before the weight."""
    w = np.arange(1, 9, dtype=np.float32).reshape(2, 4)
    rows = {
        "flags": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "w": {"dtype": "F32", "shape": [2, 4], "data_offsets": [3, 35]},
    }
    header = json.dumps(rows).encode()
    source = tmp_path / "w.safetensors"
    source.write_bytes(len(header).to_bytes(8, "little") + header + bytes([1, 2, 3]) + w.tobytes())
    layers = [pp.make_layer({"w": w}, "w", "Linear", out_axes=0, in_axes=1)]
    for scope in ("layer", "global"):
        config = pp.resolve(0.5, layers, scope=scope)
        pp.prune_files(pp.level, source, tmp_path / scope, config)
        again = safetensors.numpy.load_file(tmp_path / scope / "w.safetensors")
        assert again["w"].tolist() == [[0, 0, 0, 0], [5, 6, 7, 8]]
        assert again["flags"].tolist() == [1, 2, 3]
        (shard,) = streaming.read_shards(tmp_path / scope / "w.safetensors")
        assert shard.tensors["w"].start % 4 == 0


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
    with raises(ValueError, "masks.safetensors", "rename it"):
        safetensors.numpy.save_file(params, tmp_path / "masks.safetensors")
        pp.prune_files(pp.level, tmp_path / "masks.safetensors", out, good)
    with raises(FileNotFoundError, "the shard 'gone.safetensors' is missing"):
        (tmp_path / "indexed").mkdir()
        index = {"weight_map": {"a.weight": "gone.safetensors"}}
        (tmp_path / "indexed" / "model.safetensors.index.json").write_text(json.dumps(index))
        pp.prune_files(pp.level, tmp_path / "indexed", out, good)
    with raises(KeyError, "layer 'x': the files have no 'x.weight'"):
        other = {"x.weight": params["a.weight"]}
        row = pp.make_layer(other, "x.weight", "Linear", name="x", out_axes=0, in_axes=1)
        pp.prune_files(pp.level, source, out, pp.resolve(0.5, [row]))
    with raises(FileNotFoundError, "has no .safetensors files"):
        (tmp_path / "empty").mkdir()
        pp.prune_files(pp.level, tmp_path / "empty", out, good)
    with raises(ValueError, "prune_files: the count of", "has shape (2,)", "give one number"):
        several = good.with_counts({pool.name: np.array([1, 2]) for pool in good.pools})
        pp.prune_files(pp.level, source, out, several)
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


@pytest.mark.parametrize("granularity", ["output_channel", pp.Block((4, 4))], ids=str)
def test_norms_of_units_take_less_memory_than_a_weight(tmp_path, granularity):
    w = np.random.default_rng(0).normal(size=(4096, 1024)).astype(np.float32)
    safetensors.numpy.save_file({"w": w}, tmp_path / "model.safetensors")
    layer = pp.Layer("w", "Linear", "w", w.shape, (0,), (1,))
    config = pp.resolve(0.5, [layer], granularity=granularity)
    del w
    tracemalloc.start()
    pp.prune_files(pp.l1_norm, tmp_path / "model.safetensors", tmp_path / "out", config)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24  # bytes of the weight
