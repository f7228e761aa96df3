"""Runs that are stopped: really killed and resumed; and states in files."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
import torch

import purepruning as pp
from purepruning import Layer
from tests.messages import raises

KILLED_RUN = Path(__file__).parent.parent / "killed_run.py"


@pytest.mark.parametrize("kills", [6, pytest.param(20, marks=pytest.mark.full)])
def test_a_run_that_is_killed_often_ends_as_if_it_had_not_been(tmp_path, kills):
    command = [sys.executable, "-W", "error", str(KILLED_RUN), str(tmp_path), str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    errors = (tmp_path / "errors.txt").read_text() if (tmp_path / "errors.txt").exists() else ""
    assert done.returncode == 0, done.stderr + errors
    report = json.loads(done.stdout)
    assert report["status"] == 0, errors
    assert len(report["steps_before_kill"]) == kills
    assert sum(map(bool, report["steps_before_kill"])) > kills // 2
    whole, killed = (
        safetensors.numpy.load_file(tmp_path / f"{name}.safetensors")
        for name in ("whole", "killed")
    )
    assert whole.keys() == killed.keys()
    assert all(whole[name].tobytes() == killed[name].tobytes() for name in whole)
    # Nine tenths of 192 and three quarters of 128 are gone.
    assert (whole["['params']['a']"] == 0).sum() == 172
    assert (whole["['params']['b']"] == 0).sum() == 96


# States in files.

LAYERS = (
    Layer("a", "Linear", "a", (4, 6), (1,), (0,)),
    Layer("b", "Linear", "b", (6, 3), (1,), (0,), bias="c"),
)
RULES = [{"final_sparsity": 0.5, "op_types": ["Linear"], "end_epoch": 5}]
CONFIG = pp.resolve(RULES, LAYERS)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "state.safetensors"


def params(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"a": (4, 6), "b": (6, 3), "c": (3,)}
    return {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()}


def a_run(seed=0):
    """One of everything that has a state."""
    tx = pp.prune_on_schedule(pp.level, pp.agp(), CONFIG, optax.sgd(0.1, momentum=0.9))
    key = jax.random.key(seed)
    tickets = pp.lottery(pp.level, CONFIG, rounds=3)
    run = {"params": params(seed), "key": key}
    state, _ = tickets.step(tickets.init(run), {"params": params(seed + 1), "key": key})
    return {
        "optimizer": tx.update(params(seed + 1), tx.init(params(seed)), params(seed))[1],
        "lottery": state,
        "search": pp.search.annealing(CONFIG).init(key),
        "clock": pp.agp().init(CONFIG)._replace(step=np.asarray(seed, np.int32)),
        "keys": [jax.random.split(key, 3), jax.random.key(seed, impl="rbg")],
    }


def same(a, b):
    assert type(a) is type(b)
    if jnp.issubdtype(getattr(a, "dtype", np.float32), jax.dtypes.prng_key):
        assert jax.random.key_impl(a) == jax.random.key_impl(b)
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_every_state_comes_back(file):
    pp.save_state(file, a_run(3), config=CONFIG)
    restored = pp.load_state(file, a_run(0), config=CONFIG)
    assert jax.tree.structure(restored) == jax.tree.structure(a_run(3))
    jax.tree.map(same, restored, a_run(3))
    pp.save_state(file.with_name("again"), restored, config=CONFIG)
    assert file.read_bytes() == file.with_name("again").read_bytes()


def test_any_dtype_and_pythons_own_numbers(file):
    floats = np.random.default_rng(0).normal(size=(3, 2))
    state = {
        str(dtype): jnp.asarray(floats, dtype)
        for dtype in ("float32", "float16", "bfloat16", "float8_e4m3fn", "int8", "uint32", "bool")
    }
    state |= {"double": floats, "bf16": torch.tensor(floats, dtype=torch.bfloat16).t()}
    state |= {"scalar": jnp.float32(-0.0), "empty": np.zeros((0, 3)), "nan": np.float32(np.nan)}
    own = {"step": 7, "lr": 0.1, "nesterov": False, "name": "adam", "none": None}
    pp.save_state(file, [state, own])
    like = {jax.Array: jnp.zeros_like, torch.Tensor: torch.zeros_like, np.ndarray: np.zeros_like}
    like |= {np.generic: lambda x: x * 0, object: lambda x: type(x)()}
    fresh = jax.tree.map(
        lambda x: next(f for kind, f in like.items() if isinstance(x, kind))(x), [state, own]
    )
    (arrays, scalars) = pp.load_state(file, fresh)
    assert scalars == own
    for name, x in state.items():
        assert arrays[name].dtype == x.dtype
        if isinstance(x, torch.Tensor):
            assert torch.equal(arrays[name], x)
        else:
            assert np.asarray(arrays[name]).tobytes() == np.asarray(x).tobytes()


def test_a_single_leaf_is_a_state(file):
    pp.save_state(file, jax.random.key(5))
    assert pp.load_state(file, jax.random.key(0)) == jax.random.key(5)


def test_torch_training_goes_on(file):
    """Parameters, masks, optimizer and schedule of a torch loop, half way."""

    def begin():
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        return model, torch.optim.Adam(model.parameters(), lr=0.1)

    layer = Layer("fc", "Linear", "weight", (3, 4), (0,), (1,))
    config = pp.resolve([{"sparsity": 0.5, "op_types": ["Linear"]}], [layer])
    schedule = pp.linear(end_step=6)

    def parts(model, optimizer, clock, masks):
        params = dict(model.named_parameters())
        return {
            "params": params,
            "optimizer": optimizer.state_dict(),
            "clock": clock,
            "masks": masks,
        }

    def train(model, optimizer, clock, masks, steps):
        x = torch.arange(8.0).reshape(2, 4) / 8
        for _ in range(steps):
            clock, event = schedule.step(clock)
            if event.due:
                now = config.with_counts(event.counts).with_masks(masks)
                masks = pp.level(dict(model.named_parameters()), None, now)
            optimizer.zero_grad()
            ((model(x) - 1) ** 2).mean().backward()
            optimizer.step()
            with torch.no_grad():
                for name, mask in masks.items():
                    dict(model.named_parameters())[name].masked_fill_(~mask, 0)
        return clock, masks

    masks = {"weight": torch.ones(3, 4, dtype=torch.bool)}
    whole = begin()
    train(*whole, schedule.init(config), masks, 9)

    half = begin()
    clock, kept = train(*half, schedule.init(config), masks, 4)
    pp.save_state(file, parts(*half, clock, kept), config=config)
    # An optimizer has its moments after a step.
    fresh = begin()
    train(*fresh, schedule.init(config), masks, 1)
    state = pp.load_state(file, parts(*fresh, schedule.init(config), masks), config=config)
    model, optimizer = fresh
    model.load_state_dict(state["params"])
    optimizer.load_state_dict(state["optimizer"])
    train(model, optimizer, state["clock"], state["masks"], 5)
    assert torch.equal(model.weight, whole[0].weight)
    assert torch.equal(model.bias, whole[0].bias)
    assert int((model.weight == 0).sum()) == 6


# Another run is not resumed.

OTHERS = {
    "sparsity": (
        pp.resolve([RULES[0] | {"final_sparsity": 0.4}], LAYERS),
        ("counts['a']", "12", "9"),
    ),
    "times": (pp.resolve([RULES[0] | {"end_epoch": 6}], LAYERS), ("end_epoch", "5", "6")),
    "one more rule": (
        pp.resolve([*RULES, {"exclude": True, "op_names": ["b"]}], LAYERS),
        ("['a', 'b']", "['a']"),
    ),
    "units": (
        pp.resolve([RULES[0]], LAYERS, granularity="output_channel"),
        ("counts['a']", "12", "3"),
    ),
    "bias": (pp.resolve(RULES, LAYERS, bias="keep"), ("bias", "'follow'", "'keep'")),
    "model": (
        pp.resolve(RULES, [LAYERS[0], dataclasses.replace(LAYERS[1], shape=(6, 5))]),
        ("counts['b']", "9", "15"),
    ),
    "type": (
        pp.resolve(RULES, [dataclasses.replace(LAYERS[0], class_name="Dense"), LAYERS[1]]),
        ("pools['a']", "class_name", "Dense"),
    ),
}


@pytest.mark.parametrize("change", OTHERS)
def test_changed_rules_or_models_are_a_clear_error(file, change):
    other, parts = OTHERS[change]
    pp.save_state(file, {"params": params()}, config=CONFIG)
    with raises(ValueError, str(file), "the rules or the model have changed", *parts):
        pp.load_state(file, {"params": params()}, config=other)


def test_another_tree_is_a_clear_error(file):
    state = {"params": params(), "clock": pp.agp().init(CONFIG), "step": 3}
    pp.save_state(file, state)
    for like, parts in (
        ({k: v for k, v in state.items() if k != "step"}, ("['step']", "this one has not")),
        (state | {"lr": 0.1}, ("['lr']", "this one has")),
        (state | {"step": 3.0}, ("['step']", "int", "float")),
        (state | {"step": np.int32(3)}, ("['step']", "type int", "dtype int32")),
        (
            state | {"params": params() | {"b": jnp.ones((6, 5))}},
            ("['params']['b']", "[6, 3]", "[6, 5]"),
        ),
        (
            state | {"params": params() | {"b": jnp.ones((6, 3), jnp.float16)}},
            ("['params']['b']", "float32", "float16"),
        ),
        (state | {"clock": pp.linear().init(CONFIG)}, ("another schedule", "counts of 'a'")),
    ):
        with raises(ValueError, str(file), *parts):
            pp.load_state(file, like)
    with raises(ValueError, "without a config", "with one", "config=..."):
        pp.load_state(file, state, config=CONFIG)
    pp.save_state(file, state, config=CONFIG)
    with raises(ValueError, "with one", "without a config", "config=..."):
        pp.load_state(file, state)
    pp.save_state(file, jax.random.key(0))
    with raises(ValueError, "the state itself", "threefry2x32", "rbg"):
        pp.load_state(file, jax.random.key(0, impl="rbg"))
    with raises(ValueError, "the state itself", "key", "uint32"):
        pp.load_state(file, jnp.zeros(2, jnp.uint32))


@pytest.mark.parametrize("name", ["SGD", "Adam", "LBFGS"])
def test_torch_training_goes_on_in_a_fresh_optimizer(file, name):
    def begin():
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        momentum = {"momentum": 0.9} if name == "SGD" else {}
        return model, getattr(torch.optim, name)(model.parameters(), lr=0.1, **momentum)

    def train(model, optimizer):
        def loss():
            optimizer.zero_grad()
            loss = ((model(torch.ones(2, 4)) - 1) ** 2).sum()
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(loss)

    def parts(model, optimizer):
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 3}

    model, optimizer = begin()
    train(model, optimizer)
    saved = parts(model, optimizer)
    pp.save_state(file, saved)
    other, fresh = begin()
    state = pp.load_state(file, parts(other, fresh))
    expected = saved["optimizer"]["state"]
    assert jax.tree.structure(state["optimizer"]["state"]) == jax.tree.structure(expected)
    other.load_state_dict(state["model"])
    fresh.load_state_dict(state["optimizer"])
    train(model, optimizer)
    train(other, fresh)
    assert torch.equal(model.weight, other.weight)
    with raises(ValueError, "it has ['optimizer']['state'][0]", "empty dict"):
        pp.load_state(
            file, parts(other, fresh) | {"optimizer": fresh.state_dict() | {"state": {1: {}}}}
        )


def test_an_empty_dict_takes_what_is_there(file):
    state = {
        "a": [np.arange(3), (jnp.ones(2, jnp.bfloat16), None, {})],
        "b": {1: jax.random.key(3), "x'y": 0.5, (0, "z"): "s", "list": [], "tuple": ()},
        "c": torch.ones(2, dtype=torch.bfloat16),
    }
    state["b"] = {str(key): value for key, value in state["b"].items()}
    pp.save_state(file, state)
    for like in ({}, {"a": {}, "b": {}, "c": torch.zeros(2, dtype=torch.bfloat16)}):
        found = pp.load_state(file, like)
        assert jax.tree.structure(found) == jax.tree.structure(state)
        assert found["a"][1][2] == {}
        assert found["b"]["list"] == []
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
            assert type(a) is type(b)
            assert getattr(a, "dtype", None) == getattr(b, "dtype", None)
            assert np.all(np.asarray(a == b))


def test_an_empty_dict_takes_no_named_tuple(file):
    clock = pp.agp().init(CONFIG)
    pp.save_state(file, {"clock": clock})
    with raises(ValueError, "['clock'].", "neither dict, list nor tuple", "give like"):
        pp.load_state(file, {})
    # Nor in one: its dicts are those of the run.
    tx = pp.keep_pruned({"a": jnp.ones((4, 6), bool)})
    pp.save_state(file, {"tx": tx.init(params())})
    with raises(ValueError, "it has ['tx'].masks['a']"):
        pp.load_state(file, {"tx": pp.keep_pruned({}).init(params())})


def test_what_is_no_state(file):
    with pytest.raises(FileNotFoundError):
        pp.load_state(file, {})
    file.write_bytes(b"nothing")
    with raises(ValueError, str(file), "damaged"):
        pp.load_state(file, {})
    pp.save_masks(file, {"a": jnp.ones((4, 6), bool)}, params())
    with raises(ValueError, str(file), "'masks'", "'state'"):
        pp.load_state(file, params())
    safetensors.numpy.save_file({"a": np.ones(3)}, file)
    with raises(ValueError, str(file), "save_state"):
        pp.load_state(file, {})
    pp.save_state(file, {"w": np.arange(100.0)})
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with raises(ValueError, str(file), "['w']", "checksum"):
        pp.load_state(file, {"w": np.zeros(100)})
    with raises(TypeError, "['f']", "no array or number"):
        pp.save_state(file, {"f": object()})
    with raises(TypeError, "['w']", "jit"):
        jax.jit(lambda w: pp.save_state(file, {"w": w}))(1.0)
    # What was there is still there.
    with raises(ValueError, "checksum"):
        pp.load_state(file, {"w": np.zeros(100)})


RECORD = np.dtype([("a", "f4"), ("b", "i4")])


@pytest.mark.parametrize(
    "leaf",
    [
        np.ones(2, ">f4"),
        np.asarray([None, 1], object),
        np.zeros(2, RECORD),
        np.asarray(["text"]),
        np.asarray(["2020-01-01"], "datetime64[D]"),
        np.ones(2, np.longdouble),
        torch.ones(2, 2).to_sparse(),
        torch.ones(2, device="meta"),
        jax.ShapeDtypeStruct((2,), "float32"),
    ],
    ids=lambda x: f"{type(x).__module__}-{x.dtype}",
)
def test_what_could_not_be_read_back_is_not_written(file, leaf):
    with raises(TypeError, "['w']"):
        pp.save_state(file, {"w": leaf})
    assert not file.exists()


def test_float8_and_conjugated_tensors_come_back(file):
    numbers = torch.tensor([[1 + 2j, 3.0], [0.5j, -1]])
    state = {
        "f8": torch.tensor([[0.5, -3.0], [448.0, 0.0]]).to(torch.float8_e4m3fn).t(),
        "conj": numbers.conj(),
        "negative": numbers.conj().imag,
        "complex": jnp.asarray(numbers.numpy()),
    }
    pp.save_state(file, state)
    fresh = {"f8": torch.zeros(2, 2, dtype=torch.float8_e4m3fn)}
    fresh |= {"conj": torch.zeros(2, 2, dtype=torch.complex64), "negative": torch.zeros(2, 2)}
    found = pp.load_state(file, fresh | {"complex": jnp.zeros((2, 2), jnp.complex64)})
    assert found["f8"].dtype == torch.float8_e4m3fn
    assert found["f8"].float().tolist() == [[0.5, 448.0], [-3.0, 0.0]]
    assert torch.equal(found["conj"], torch.tensor([[1 - 2j, 3.0], [-0.5j, -1]]))
    assert torch.equal(found["negative"], torch.tensor([[-2.0, 0], [-0.5, 0]]))
    np.testing.assert_array_equal(found["complex"], state["complex"])


def test_a_row_does_not_change_what_a_leaf_is(file):
    pp.save_state(file, {"step": 3, "w": np.ones(2)})
    tensors = safetensors.numpy.load_file(file)
    with safetensors.safe_open(file, "np") as opened:
        header = json.loads(opened.metadata()["purepruning"])
    for name, changed in {
        "step": {"type": "int", "value": [3]},
        "w": {"dtype": "float64", "shape": [2], "value": "text"},
    }.items():
        leaves = {**header["leaves"], f"['{name}']": changed}
        text = json.dumps({**header, "leaves": leaves})
        safetensors.numpy.save_file(tensors, file, {"purepruning": text})
        with raises(ValueError, str(file), "state"):
            pp.load_state(file, {"step": 0, "w": np.zeros(2)})
