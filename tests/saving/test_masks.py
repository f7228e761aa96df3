"""Masks in files: what is read is what was written, in either framework; nothing else passes."""

import json
import subprocess
import sys
import zlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from flax import linen, nnx

import purepruning as pp
from purepruning.saving.masks import load_masks, save_masks
from purepruning.trees import flatten
from tests.fast import some_key
from tests.messages import raises

rng = np.random.default_rng(0)
SHAPES = {"a.w": (5, 7), "a.b": (7,), "c.w": (3, 4, 5), "s": (), "d": (4,)}
MASKS = {
    "a.w": rng.random((5, 7)) < 0.5,  # 35 bits: no whole number of bytes
    "a.b": rng.random(7) < 0.5,
    "c.w": rng.random((1, 4, 1)) < 0.5,  # stays as small as it is
    "s": np.array(False),
}
PARAMS = {
    "jax": {path: jnp.zeros(shape) for path, shape in SHAPES.items()},
    "torch": {path: torch.zeros(shape) for path, shape in SHAPES.items()},
}
AS = {
    "jax": lambda: {path: jnp.asarray(mask) for path, mask in MASKS.items()} | {"d": None},
    "torch": lambda: {path: torch.as_tensor(mask) for path, mask in MASKS.items()},
}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "masks.safetensors"


@pytest.mark.parametrize("there", AS)
@pytest.mark.parametrize("here", AS)
def test_masks_come_back_in_either_framework(file, here, there):
    save_masks(file, AS[here](), PARAMS[here])
    loaded = load_masks(file, PARAMS[there])
    if there == "jax":
        assert loaded.keys() == SHAPES.keys()
        assert loaded.pop("d") is None
    assert loaded.keys() == MASKS.keys()
    for path, mask in loaded.items():
        assert isinstance(mask, jax.Array if there == "jax" else torch.Tensor)
        assert str(mask.dtype) in ("bool", "torch.bool")
        assert tuple(mask.shape) == MASKS[path].shape
        np.testing.assert_array_equal(np.asarray(mask), MASKS[path])


def test_the_same_masks_give_the_same_bytes(tmp_path):
    files = [tmp_path / name for name in ("one", "two", "three")]
    backwards = dict(reversed(AS["torch"]().items()))
    save_masks(files[0], AS["jax"](), PARAMS["jax"])
    save_masks(files[1], AS["torch"](), PARAMS["torch"])
    save_masks(str(files[2]), backwards, PARAMS["torch"])
    assert len({file.read_bytes() for file in files}) == 1


def test_the_format(file):
    # Ten elements in C order, the first in the lowest bit: 0b01100101 and 0b10.
    mask = jnp.array([[1, 0, 1, 0, 0], [1, 1, 0, 0, 1]], bool)
    save_masks(file, {"w": mask}, {"w": jnp.zeros((2, 5))})
    with safetensors.safe_open(file, framework="numpy") as content:
        assert list(content.keys()) == ["w"]
        assert content.get_tensor("w").tolist() == [0b01100101, 0b10]
        assert content.get_tensor("w").dtype == np.uint8
        header = json.loads(content.metadata()["purepruning"])
    assert header == {
        "format": "masks",
        "format_version": 1,
        "library_version": pp.__version__,
        "masks": {
            "w": {"mask_shape": [2, 5], "param_shape": [2, 5], "crc32": zlib.crc32(b"\x65\x02")}
        },
    }


def test_a_bit_per_element(file):
    n = 1_000_000
    save_masks(file, {"w": jnp.ones(n, bool)}, {"w": jnp.zeros(n, jnp.bfloat16)})
    assert n / 8 <= file.stat().st_size < n / 8 + 1000


def trees():
    dense = linen.Dense(3).init(some_key(), jnp.ones((1, 2)))
    return {
        "linen": (dense, "params.kernel"),
        "nnx": (nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(some_key())), nnx.Param), "kernel"),
        "equinox": (eqx.nn.Linear(2, 3, key=some_key()), "weight"),
        "nested": ({"a": [jnp.zeros((2, 3)), (jnp.zeros(3),)]}, "a.0"),
    }


@pytest.mark.parametrize("kind", trees())
def test_trees_come_back_as_trees(file, kind):
    params, path = trees()[kind]
    flat = flatten(params)
    mask = jnp.arange(6).reshape(flat.leaves[path].shape) % 2 == 0
    masks = flat.rebuild({path: mask})
    save_masks(file, masks, params)
    loaded = load_masks(file, params)
    assert jax.tree.structure(loaded) == jax.tree.structure(masks)
    assert jax.tree.leaves(loaded)[0].tolist() == mask.tolist()


def test_a_torch_mask_loads_into_nnx_of_the_same_names_and_shapes(file):
    save_masks(file, {"kernel": torch.tensor([[True, False]])}, {"kernel": torch.zeros(2, 2)})
    params = nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(some_key())), nnx.Param)
    loaded = load_masks(file, params)
    assert pp.leaf_paths(loaded) == ("kernel",)
    assert jax.tree.leaves(loaded)[0].tolist() == [[True, False]]


def test_no_masks_at_all(file):
    save_masks(file, {}, PARAMS["torch"])
    assert load_masks(file, PARAMS["torch"]) == {}
    save_masks(file, {"w": jnp.zeros((0, 3), bool)}, {"w": jnp.zeros((0, 3))})
    assert load_masks(file, {"w": jnp.zeros((0, 3))})["w"].shape == (0, 3)


def test_another_model_is_an_error(file):
    save_masks(file, AS["jax"](), PARAMS["jax"])
    for params in PARAMS.values():
        renamed = {path.replace("a.w", "a.weight"): x for path, x in params.items()}
        with pytest.raises(KeyError, match=r"'a.w', which is no parameter.*nearest:.*'a.weight'"):
            load_masks(file, renamed)
        reshaped = params | {"c.w": params["c.w"].reshape(12, 5)}
        with pytest.raises(ValueError, match=r"'c.w'.*\(3, 4, 5\).*\(12, 5\)"):
            load_masks(file, reshaped)
    # Of the same shape as the mask, but not as the parameter it was for.
    with pytest.raises(ValueError, match=r"'c.w'.*\(3, 4, 5\).*\(1, 4, 1\)"):
        load_masks(file, PARAMS["jax"] | {"c.w": jnp.zeros((1, 4, 1))})


def write(file, tensors, header):
    metadata = {"purepruning": header if isinstance(header, str) else json.dumps(header)}
    file.write_bytes(safetensors.numpy.save(tensors, metadata=metadata))


def header(**changes):
    row = {"mask_shape": [7], "param_shape": [7], "crc32": CRC}
    return {
        "format": "masks", "format_version": 1, "library_version": "9", "masks": {"a.b": row},
    } | changes  # fmt: skip


BITS = {"a.b": np.zeros(1, np.uint8)}
CRC = zlib.crc32(b"\0")


def test_a_file_written_by_hand_is_read(file):
    write(file, BITS, header())
    assert not load_masks(file, PARAMS["jax"])["a.b"].any()


@pytest.mark.parametrize(
    ("tensors", "text", "message"),
    [
        (BITS, "{", "cannot be read"),
        (BITS, "[]", "cannot be read"),
        (BITS, header(format="weights"), "'weights'"),
        (BITS, header(format_version=2), "version 2, by purepruning '9'; this is version 1"),
        (BITS, header(masks={}), "different masks"),
        (BITS, header(masks={"a.b": {}}), "cannot be read"),
        (BITS, header(masks={"a.b": {"mask_shape": [7], "param_shape": "x"}}), "cannot be read"),
        (
            BITS,
            header(masks={"a.b": {"mask_shape": [9], "param_shape": [7], "crc32": CRC}}),
            "'a.b'.*uint8",
        ),
        (
            BITS,
            header(masks={"a.b": {"mask_shape": [5], "param_shape": [7], "crc32": CRC}}),
            "broadcast",
        ),
        (BITS, header(masks={"a.b": header()["masks"]["a.b"] | {"crc32": 1}}), "checksum"),
        (BITS, header(masks={"a.b": {"mask_shape": [-7], "param_shape": [7]}}), "'a.b'"),
        ({"a.b": np.zeros(7, bool)}, header(), "'a.b': bool"),
    ],
)
def test_a_header_that_does_not_fit_is_an_error(file, tensors, text, message):
    write(file, tensors, text)
    with pytest.raises(ValueError, match=message):
        load_masks(file, PARAMS["jax"])


def test_foreign_and_damaged_files_are_errors(file):
    with pytest.raises(FileNotFoundError, match=r"masks.safetensors"):
        load_masks(file, PARAMS["jax"])
    file.write_bytes(b"no safetensors at all")
    with pytest.raises(ValueError, match="no safetensors file"):
        load_masks(file, PARAMS["jax"])
    file.write_bytes(safetensors.numpy.save({"a.b": np.zeros(7, np.float32)}))
    with pytest.raises(ValueError, match="not written by save_masks"):
        load_masks(file, PARAMS["jax"])
    save_masks(file, AS["jax"](), PARAMS["jax"])
    whole = file.read_bytes()
    for end in (0, 5, 100, len(whole) - 1):
        file.write_bytes(whole[:end])
        with pytest.raises(ValueError, match="damaged"):
            load_masks(file, PARAMS["jax"])


def test_a_failed_write_leaves_the_old_file_and_nothing_else(file, monkeypatch):
    save_masks(file, AS["jax"](), PARAMS["jax"])
    before = file.read_bytes()

    def full_disk(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_masks(file, {"a.b": jnp.ones(7, bool)}, PARAMS["jax"])
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_masks_that_do_not_fit_are_not_written(file):
    with pytest.raises(KeyError, match=r"'a.x'"):
        save_masks(file, {"a.x": jnp.ones(3, bool)}, PARAMS["jax"])
    with pytest.raises(TypeError, match="not known under jit"):
        jax.jit(lambda m: save_masks(file, {"a.b": m}, PARAMS["jax"]))(jnp.ones(7, bool))
    assert not file.exists()


WRITER = """
import os, sys, time
from pathlib import Path
from purepruning.saving import files
os.fsync = lambda fd: (print("writing", flush=True), time.sleep(60))
files.write_whole(Path(sys.argv[1]), b"half")
"""


def test_the_next_writer_removes_what_a_killed_one_left_and_spares_the_living(file):
    def start():
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(file)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout.readline() == "writing\n"
        return writer

    dead, living = start(), start()
    dead.kill()
    dead.wait()
    beside = file.with_name(f".{file.name}.other")
    beside.write_text("of somebody else")
    assert len(list(file.parent.iterdir())) == 3
    try:
        pp.save_masks(file, {"a": jnp.ones(2, bool)}, {"a": jnp.ones(2)})
        left = set(file.parent.iterdir()) - {file, beside}
        assert len(left) == 1  # the living writer's
    finally:
        living.kill()
        living.wait()
        living.stdout.close()
        dead.stdout.close()
    pp.save_masks(file, {"a": jnp.ones(2, bool)}, {"a": jnp.ones(2)})
    assert set(file.parent.iterdir()) == {file, beside}


def test_a_dtype_that_numpy_has_not_is_no_mask(file):
    header = {"format": "masks", "format_version": 1, "library_version": "1", "masks": {}}
    body = {"a": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}
    text = json.dumps({"__metadata__": {"purepruning": json.dumps(header)}, **body}).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"\0")
    with raises(ValueError, str(file)):
        pp.load_masks(file, {"a": jnp.ones(1)})


@pytest.mark.parametrize("path", [None, 5, b"bytes", ["text"]], ids=repr)
def test_what_is_no_path(path):
    for call in (
        lambda: pp.save_masks(path, {}, {}),
        lambda: pp.load_masks(path, {}),
        lambda: pp.save_state(path, {}),
        lambda: pp.load_state(path, {}),
        lambda: pp.load_plan(path),
    ):
        with raises(TypeError, "path must be a string or a path"):
            call()
