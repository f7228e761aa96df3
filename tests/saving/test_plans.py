"""Plans in files: what was saved comes back, and anything else is refused."""

import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import purepruning as pp
from purepruning.coupling.plan import Cut, Plan
from tests.messages import raises

SHAPES = {"conv": (3, 3, 4, 8), "fc": (12, 6)}
CUTS = {
    "conv": (Cut(3, np.array([0, 2, 7])),),
    "fc": (Cut(0, np.array([[0, 1], [1, 2]]), by=1), Cut(1, np.array([0, 1, 3, 5]))),
}
PLAN = Plan(SHAPES, CUTS, (2, 3, 11))


@pytest.fixture
def file(tmp_path):
    return tmp_path / "plan.safetensors"


def parts(path):
    """Returns the header and the tensors of a plan's file."""
    with safe_open(path, "np") as opened:
        header = json.loads(opened.metadata()["purepruning"])
        return header, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def write(path, header, tensors):
    save_file(tensors, path, {"purepruning": json.dumps(header)})


def test_a_plan_comes_back(file):
    pp.save_plan(file, PLAN)
    plan = pp.load_plan(str(file))
    assert (plan.shapes, plan.removed) == (SHAPES, (2, 3, 11))
    assert plan.cuts.keys() == CUTS.keys()
    for name, cuts in CUTS.items():
        for found, cut in zip(plan.cuts[name], cuts, strict=True):
            assert (found.axis, found.by) == (cut.axis, cut.by)
            np.testing.assert_array_equal(found.positions, cut.positions)


def test_the_same_plan_gives_the_same_bytes(tmp_path):
    files = [tmp_path / str(i) for i in range(12)]
    for path in files:
        pp.save_plan(path, PLAN)
    assert len({path.read_bytes() for path in files}) == 1


@pytest.mark.parametrize("tensor", ["conv:3", "fc:0", ":removed"])
def test_a_changed_tensor_is_noticed(file, tensor):
    pp.save_plan(file, PLAN)
    header, tensors = parts(file)
    changed = tensors[tensor].copy()
    changed.reshape(-1)[-1] += 1
    write(file, header, {**tensors, tensor: changed})
    with raises(ValueError, str(file), tensor, "checksum"):
        pp.load_plan(file)


@pytest.mark.parametrize(
    "change",
    [
        {"cuts": None},
        {"cuts": {"conv": None}},
        {"cuts": {"conv": [{"axis": 3}]}},
        {"cuts": {"conv": [{"axis": 7, "by": None}]}},
        {"cuts": {"nothing": []}},
        {"shapes": 5},
        {"shapes": {"conv": [3, 3, 4, 8]}},
        {"shapes": {**SHAPES, "conv": [3, 3, 4, 7]}},
        {"shapes": {**SHAPES, "conv": [3.5, 3, 4, 8]}},
        {"tensors": {}},
        {"tensors": {"conv:3": 1, "fc:0": 1, "fc:1": 1, ":removed": 1}},
        {"format": "masks"},
        {"format_version": 2},
    ],
    ids=repr,
)
def test_a_header_that_does_not_fit(file, change):
    pp.save_plan(file, PLAN)
    header, tensors = parts(file)
    write(file, header | change, tensors)
    with raises(ValueError, str(file), "plan"):
        pp.load_plan(file)


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 200_000, '{"format": "' + "x" * 10**6])
def test_a_header_that_is_none_gives_a_short_error(file, text):
    save_file({":removed": np.zeros(0, np.int64)}, file, {"purepruning": text})
    with pytest.raises(ValueError, match="cannot be read as plan") as caught:
        pp.load_plan(file)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("positions", "axis", "by", "expected"),
    [
        ([1, 1, 2], 0, None, "ascend"),
        ([2, 0], 0, None, "ascend"),
        ([-1, 2], 0, None, "ascend"),
        ([True, False], 0, None, "integers"),
        ([0.0, 1.0], 0, None, "integers"),
        (["0"], 0, None, "integers"),
        ([[0, 1]], 0, None, "1 axes"),
        ([0, 1], 0, 1, "2 axes"),
        (3, 0, None, "1 axes"),
        ([0, 1], -1, None, "axis"),
        ([0, 1], True, None, "axis"),
        ([[0, 1]], 0, 0, "another axis"),
    ],
)
def test_cuts_that_are_none(positions, axis, by, expected):
    with pytest.raises((TypeError, ValueError), match=expected):
        Cut(axis, np.array(positions), by)


@pytest.mark.parametrize(
    ("cuts", "expected"),
    [
        ((Cut(7, np.array([0])),), "no place"),
        ((Cut(0, np.array([[0]]), by=5),), "no place"),
        ((Cut(0, np.array([0, 12])),), "no position 12"),
        ((Cut(1, np.array([0])), Cut(1, np.array([1]))), "cut twice"),
        ((Cut(0, np.arange(4).repeat(4).reshape(4, 4).T, by=1),), "4 blocks do not divide"),
        ([Cut(0, np.array([0]))], "tuple of Cut"),
        ((None,), "tuple of Cut"),
    ],
)
def test_plans_whose_cuts_have_no_place(cuts, expected):
    with pytest.raises((TypeError, ValueError), match=expected):
        Plan({"fc": (12, 6)}, {"fc": cuts}, ())


@pytest.mark.parametrize(
    "tree", [{}, None, 5, "text", [], object()], ids=lambda x: type(x).__name__
)
def test_a_tree_without_arrays_is_not_cut(tree):
    with raises(TypeError, "Plan.apply", "arrays"):
        PLAN.apply(tree)


def test_unknown_parameters_and_no_plans():
    with raises(KeyError, "'fd'", "nearest: 'fc'"):
        PLAN.shape("fd")
    assert PLAN.shape("fc") == (2, 4)
    with raises(TypeError, "save_plan", "Plan", "None"):
        pp.save_plan("nowhere", None)
