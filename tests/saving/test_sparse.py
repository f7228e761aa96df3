"""Pruned parameters in files: bit for bit in every framework, smaller, and nothing else passes."""

import json
import zlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch

import purepruning as pp
from purepruning.arrays import in_framework
from tests.messages import raises

FRAMEWORKS = ["jax", "torch", "numpy"]
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.int8, np.bool_]

rng = np.random.default_rng(0)
MASKS = {
    "a.w": rng.random((6, 35)) < 0.5,
    "c.w": rng.random((3, 1, 5)) < 0.5,  # stays as small as it is
    "n.w": rng.permuted(np.tile([1, 0, 1, 0], (6, 2, 1)), axis=-1).reshape(6, 8).astype(bool),
    "s": np.array(False),
    "z": np.zeros((0, 3), bool),
}
SHAPES = {
    "a.w": (6, 35),
    "a.b": (7,),
    "c.w": (3, 4, 5),
    "n.w": (6, 8),
    "s": (),
    "t": (),
    "z": (0, 3),
}


def bits(x):
    """The bits of an array of any framework."""
    if isinstance(x, torch.Tensor):
        x = x.reshape(-1).view(torch.uint8) if x.ndim else x.reshape(1).view(torch.uint8)
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8).tolist()


def values(dtype):
    """Every byte pattern there is: NaN of any payload, infinities, both zeros, subnormals."""
    found = {}
    for name, shape in SHAPES.items():
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        high = 2 if dtype == np.bool_ else 256
        raw = rng.integers(0, high, size).astype(np.uint8)
        found[name] = raw.view(dtype).reshape(shape)
    return found


def of(framework, arrays):
    return {name: in_framework(framework, x.copy()) for name, x in arrays.items()}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_bit_comes_back(file, framework, dtype):
    arrays = values(dtype)
    params, masks = of(framework, arrays), of(framework, MASKS)
    pp.save_sparse(file, params, masks)
    found = pp.load_sparse(file, params)
    for name, shape in SHAPES.items():
        expected = np.zeros(shape, dtype)
        whole = np.broadcast_to(MASKS.get(name, np.array(True)), shape)
        expected[whole] = arrays[name][whole]
        assert type(found.params[name]) is type(params[name])
        assert found.params[name].dtype == params[name].dtype
        assert tuple(found.params[name].shape) == shape
        assert bits(found.params[name]) == bits(expected)
        if name in MASKS:
            assert type(found.masks[name]) is type(masks[name])
            np.testing.assert_array_equal(np.asarray(found.masks[name]), MASKS[name])
        else:
            assert found.masks.get(name) is None


def test_nan_zero_and_what_is_pruned(file):
    payload = np.array([0x7FC01234, 0xFF800001, 0x80000000, 0x80000000, 0x7FC00000], np.uint32)
    params = {"w": payload.view(np.float32)}
    pp.save_sparse(file, params, {"w": np.array([1, 1, 1, 0, 0], bool)})
    found = pp.load_sparse(file, params).params["w"].view(np.uint32)
    assert [hex(n) for n in found] == ["0x7fc01234", "0xff800001", "0x80000000", "0x0", "0x0"]


@pytest.mark.parametrize("there", FRAMEWORKS)
def test_one_framework_reads_another_and_writes_the_same_bytes(tmp_path, there):
    arrays = values(ml_dtypes.bfloat16)
    files = [tmp_path / name for name in ("here", "there")]
    pp.save_sparse(files[0], of("jax", arrays), of("jax", MASKS))
    found = pp.load_sparse(files[0], of(there, arrays))
    backwards = dict(reversed(found.params.items()))
    pp.save_sparse(str(files[1]), backwards, found.masks)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_trees_and_shapes(file):
    params = {"block": [{"w": jnp.arange(8.0).reshape(2, 4)}, (jnp.ones(3, jnp.bfloat16),)]}
    masks = {"block": [{"w": jnp.array([[True], [False]])}, (None,)]}
    pp.save_sparse(file, params, masks)
    shapes = jax.eval_shape(lambda: params)
    found = pp.load_sparse(file, shapes)
    assert jax.tree.structure(found.params) == jax.tree.structure(params)
    assert jax.tree.structure(found.masks) == jax.tree.structure(masks)
    assert found.params["block"][0]["w"].tolist() == [[0, 1, 2, 3], [0, 0, 0, 0]]
    assert jax.jit(lambda p: p["block"][1][0] + 1)(found.params).tolist() == [2, 2, 2]


def test_a_module_that_has_no_memory_yet(file):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)).eval()
    masks = {"0.weight": torch.arange(12).reshape(3, 4) % 2 == 0}
    pp.save_sparse(file, model.state_dict(), masks)
    with torch.device("meta"):
        empty = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)).eval()
    found = pp.load_sparse(file, empty.state_dict())
    empty.load_state_dict(found.params, assign=True)
    with torch.no_grad():
        model[0].weight *= masks["0.weight"]
        x = torch.randn(5, 4)
        assert torch.equal(empty(x), model(x))
    assert torch.equal(found.masks["0.weight"], masks["0.weight"])


def test_tensors_that_track_gradients_or_lie_elsewhere(file):
    w = torch.nn.Parameter(torch.arange(12.0).reshape(3, 4))
    params = {"w": w, "t": w.detach().t()}
    pp.save_sparse(file, params, {"t": torch.tensor([[True], [True], [False], [True]])})
    found = pp.load_sparse(file, params).params
    assert found["w"].tolist() == w.tolist()
    assert found["t"].tolist() == [[0, 4, 8], [1, 5, 9], [0, 0, 0], [3, 7, 11]]


def test_the_format(file):
    # Kept are the first, third and fourth of five: 0b01101.
    params = {"w": np.array([1, 2, 3, 4, 5], np.int8), "b": np.array([0.5], np.float32)}
    pp.save_sparse(file, params, {"w": np.array([1, 0, 1, 1, 0], bool)})
    with safetensors.safe_open(file, framework="numpy") as content:
        header = json.loads(content.metadata()["purepruning"])
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    assert tensors["b"].tolist() == [0.5]
    assert tensors["w:values"].tolist() == [1, 3, 4]
    assert tensors["w:values"].dtype == np.int8
    assert tensors["w:positions"].tolist() == [0b01101]
    row = {"shape": [5], "mask_shape": [5], "positions": {"layout": "bits"}}
    assert header == {
        "format": "sparse", "format_version": 1, "library_version": pp.__version__,
        "params": {"b": {"shape": [1]}, "w": row},
    }  # fmt: skip
    # In the order of the file: larger elements first, then by name.
    parts = np.float32(0.5).tobytes(), b"\x0d", b"\1\3\4"
    sums = b"".join(zlib.crc32(part).to_bytes(4, "little") for part in parts)
    assert tensors[":crc32"].tobytes() == sums


@pytest.mark.parametrize(
    ("dtype", "density", "most"),
    # Kept weights, and a bit or less for each: 16 * 0.5 + 1 bits of 16, and so on.
    [(ml_dtypes.bfloat16, 0.5, 9 / 16), (np.float32, 0.1, 3.93 / 32), (np.float32, 0.05, 2.1 / 32)],
)
def test_sizes(file, dtype, density, most):
    n = 2**20
    params = {"w": np.ones(n, dtype)}
    pp.save_sparse(file, params, {"w": rng.random(n) < density})
    assert file.stat().st_size < most * params["w"].nbytes * 1.005


def test_two_of_four_takes_three_bits_for_four(file):
    weight = {"w": rng.standard_normal((64, 256)).astype(np.float16)}
    layer = pp.make_layer(weight, "w", "Linear", out_axes=0, in_axes=1)
    config = pp.resolve(0.5, [layer], granularity=pp.NM(keep=2, of=4))
    pp.save_sparse(file, weight, pp.level(weight, None, config))
    (rows,) = (json.loads(header_of(file)["__metadata__"]["purepruning"])["params"],)
    assert rows["w"]["positions"] == {"layout": "nm", "keep": 2, "of": 4, "axis": 1}
    n = weight["w"].size
    assert file.stat().st_size < 2 * n / 2 + 3 * n / 4 / 8 + 1000


def header_of(file):
    content = file.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def test_mapped_files_are_read_one_after_another(tmp_path, file):
    """What is written is never in memory together: a tenth of it at a time."""
    import tracemalloc

    n, parts = 2**18, 10
    source = np.memmap(tmp_path / "dense", np.float32, "w+", shape=(parts, n))
    params = {str(i): source[i] for i in range(parts)}
    masks = {name: np.arange(n) % 2 == 0 for name in params}
    tracemalloc.start()
    pp.save_sparse(file, params, masks)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5 * source.nbytes / parts


def test_a_failed_write_leaves_the_old_file_and_nothing_else(file, monkeypatch):
    pp.save_sparse(file, {"w": np.ones(3)}, {})
    before = file.read_bytes()

    def full_disk(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        pp.save_sparse(file, {"w": np.zeros(3)}, {})
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


W3 = np.ones(3)


@pytest.mark.parametrize(
    ("params", "masks", "error", "words"),
    [
        ({"w": np.ones(3)}, {"v": np.ones(3, bool)}, KeyError, ("'v'",)),
        ({"w": np.ones(3)}, {"w": np.ones(2, bool)}, ValueError, ("'w'",)),
        ({"w": np.ones(3)}, {"w": np.ones(3)}, TypeError, ("'w'",)),
        ({"w": np.ones(3, complex)}, {}, TypeError, ("complex128", "convert")),
        ({"w": 3.0}, {}, TypeError, ("'w'", "3.0")),
        ({"w": jax.ShapeDtypeStruct((3,), "float32")}, {}, TypeError, ("'w'",)),
        ({"w": W3, "w:values": W3}, {"w": np.ones(3, bool)}, ValueError, ("'w:values'", "rename")),
        ({"__metadata__": np.ones(3)}, {}, ValueError, ("'__metadata__'", "rename")),
        ({":crc32": np.ones(3)}, {}, ValueError, ("':crc32'", "rename")),
    ],
)  # fmt: skip
def test_what_is_not_written(file, params, masks, error, words):
    with raises(error, *words):
        pp.save_sparse(file, params, masks)
    assert not file.exists()


def test_not_under_jit(file):
    with raises(TypeError, "save_sparse", "outside of jit"):
        jax.jit(lambda w: pp.save_sparse(file, {"w": w}, {}))(jnp.ones(3))


@pytest.mark.parametrize(
    ("params", "error", "words"),
    [
        ({"w": np.ones(4, np.float32)}, ValueError, ("'w'", "shape (3,)", "(4,)")),
        ({"w": np.ones(3, np.float16)}, ValueError, ("'w'", "dtype float32", "float16")),
        ({"v": np.ones(3, np.float32)}, KeyError, ("no parameter 'v'", "'w'")),
        ({}, KeyError, ("has a parameter 'w'",)),
        ({"w": 1.0}, TypeError, ("'w'", "1.0")),
    ],
)
def test_another_model_is_an_error(file, params, error, words):
    pp.save_sparse(file, {"w": np.ones(3, np.float32)}, {})
    with raises(error, "load_sparse", *words):
        pp.load_sparse(file, params)


def test_float64_where_jax_has_none(file):
    pp.save_sparse(file, {"w": np.ones(3)}, {})
    with raises(ValueError, "'w'", "float64", "float32"):
        pp.load_sparse(file, {"w": jnp.ones(3)})
    with raises(ValueError, "'w'", "float64", "jax_enable_x64"):
        pp.load_sparse(file, {"w": jax.ShapeDtypeStruct((3,), np.float64)})


W = {"w": np.zeros(4, np.float32)}
ROW = {"shape": [4], "mask_shape": [4], "positions": {"layout": "bits"}}
PARTS = {"w:values": np.array([1, 2], np.float32), "w:positions": np.array([0b1001], np.uint8)}


def write(file, parts, row, *, sums=None, **changes):
    header = {"format": "sparse", "format_version": 1, "library_version": "9", "params": {"w": row}}
    found = b"".join(zlib.crc32(x.tobytes()).to_bytes(4, "little") for x in parts.values())
    parts = parts | {":crc32": np.frombuffer(found if sums is None else sums, np.uint8)}
    metadata = {"purepruning": json.dumps(header | changes)}
    file.write_bytes(safetensors.numpy.save(parts, metadata))


def test_a_file_written_by_hand_is_read(file):
    write(file, PARTS, ROW)
    assert pp.load_sparse(file, W).params["w"].tolist() == [1, 0, 0, 2]


@pytest.mark.parametrize(
    ("parts", "row", "changes", "words"),
    [
        ({"w:values": np.ones(3, np.float32)}, {}, {}, ("(3,) values", "keeps 2")),
        ({"w:values": np.ones((2, 1), np.float32)}, {}, {}, ("(2, 1) values",)),
        ({"w:positions": np.array([0b10001], np.uint8)}, {}, {}, ("behind the 4",)),
        ({"w:positions": np.array([9, 0], np.uint8)}, {}, {}, ("2 bytes for 4 bits",)),
        ({"w:positions": np.array([9], np.int8)}, {}, {}, ("mask",)),
        ({"w:positions": np.array([7], np.uint8)},
         {"positions": {"layout": "nm", "keep": 2, "of": 4, "axis": 0}}, {}, ("pattern 7",)),
        ({}, {"positions": {}}, {}, ("cannot be read",)),
        ({}, {"positions": None}, {}, ("cannot be read",)),
        ({}, {"mask_shape": [5]}, {}, ("cannot be read",)),
        ({}, {"mask_shape": [2, 4]}, {}, ("mask of shape",)),
        ({}, {"mask_shape": [-4]}, {}, ("mask_shape",)),
        ({}, {"mask_shape": 4}, {}, ("cannot be read",)),
        ({}, {"shape": [2**62]}, {}, ("shape (4611686018427387904,)",)),
        ({"v": np.ones(1, np.float32)}, {}, {}, ("different parameters",)),
        ({}, {}, {"sums": b"\0" * 8}, ("'w:values'", "checksum")),
        ({}, {}, {"sums": b""}, ("0 bytes of checksums for 2",)),
        ({}, {}, {"params": []}, ("cannot be read",)),
        ({}, {}, {"params": {"w": 5}}, ("cannot be read",)),
        ({}, {}, {"params": {}}, ("different parameters",)),
        ({}, {}, {"format": "masks"}, ("'masks'",)),
        ({}, {}, {"format_version": 2}, ("version 2",)),
    ],
)  # fmt: skip
def test_broken_files(file, parts, row, changes, words):
    write(file, PARTS | parts, ROW | row, **changes)
    with raises(ValueError, str(file), *words):
        pp.load_sparse(file, W)


def test_truncated_and_foreign_files(file):
    with pytest.raises(FileNotFoundError, match=r"model.safetensors"):
        pp.load_sparse(file, W)
    pp.save_masks(file, {"w": np.ones(4, bool)}, W)
    with raises(ValueError, "'masks'"):
        pp.load_sparse(file, W)
    pp.save_sparse(file, W, {"w": np.array([1, 0, 0, 1], bool)})
    whole = file.read_bytes()
    for end in range(0, len(whole), 7):
        file.write_bytes(whole[:end])
        with raises(ValueError, str(file)):
            pp.load_sparse(file, W)


def test_no_bit_of_a_file_flips_unseen(file):
    pp.save_sparse(file, W, {"w": np.array([1, 0, 0, 1], bool)})
    whole = file.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for at in range(start, len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with raises(ValueError, "checksum"):
            pp.load_sparse(file, W)
