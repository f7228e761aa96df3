"""Atoms: whatever constraints they were given, any choice of what goes satisfies all of them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from purepruning.coupling.atoms import KEPT, Atoms

SIZES = (2, 3, 4, 6, 12)


class Script:
    """Axes made by random operations, and what must hold of them whichever atoms go."""

    def __init__(self):
        self.atoms, self.axes, self.laws = Atoms(), [], []

    def add(self, axis, n):
        self.axes.append((axis, n))
        return len(self.axes) - 1

    def gone(self, index, removed):
        axis, n = self.axes[index]
        x = self.atoms.resolve(axis)
        return np.zeros(n, bool) if x is None else removed[x].any(1)

    def fresh(self, draw):
        n = draw(st.sampled_from(SIZES))
        self.add(self.atoms.fresh(n), n)

    def same(self, draw):
        i = self.pick(draw)
        j = draw(st.sampled_from([k for k, (_, n) in enumerate(self.axes) if n == self.axes[i][1]]))
        self.atoms.same(self.axes[i][0], self.axes[j][0])
        self.laws.append(lambda removed: (self.gone(i, removed), self.gone(j, removed)))

    def permute(self, draw):
        i = self.pick(draw)
        axis, n = self.axes[i]
        order = np.array(draw(st.permutations(range(n))))
        j = self.add(None if axis is None else axis[order], n)
        self.laws.append(lambda removed: (self.gone(i, removed)[order], self.gone(j, removed)))

    def merge(self, draw):
        i, j = self.pick(draw), self.pick(draw)
        n, m = self.axes[i][1], self.axes[j][1]
        if n * m > 24:
            return
        k = self.add(self.atoms.merge([self.axes[i][0], self.axes[j][0]], [n, m]), n * m)
        self.product(i, j, k)

    def split(self, draw):
        k = self.pick(draw)
        axis, n = self.axes[k]
        outer = draw(st.sampled_from([d for d in range(1, n + 1) if n % d == 0]))
        parts = self.atoms.split(axis, [outer, n // outer])
        self.product(self.add(parts[0], outer), self.add(parts[1], n // outer), k)

    def product(self, i, j, k):
        self.laws.append(
            lambda removed: (
                np.logical_or.outer(self.gone(i, removed), self.gone(j, removed)).reshape(-1),
                self.gone(k, removed),
            )
        )

    def keep(self, draw):
        i = self.pick(draw)
        axis, n = self.axes[i]
        j = draw(st.integers(0, n - 1))
        self.atoms.keep(None if axis is None else axis[j : j + 1], "a test")
        self.laws.append(lambda removed: (self.gone(i, removed)[j], False))

    def pick(self, draw):
        return draw(st.integers(0, len(self.axes) - 1))


@given(st.data())
@settings(max_examples=400)
def test_any_choice_satisfies_every_constraint(data):
    script = Script()
    script.fresh(data.draw)
    names = ["fresh", "same", "same", "permute", "merge", "split", "split", "keep"]
    for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=12)):
        getattr(script, name)(data.draw)
    rng = np.random.default_rng(0)
    for share in (0.1, 0.3, 0.6):
        removed = rng.random(script.atoms.size) < share
        removed[KEPT] = False
        for law in script.laws:
            one, other = law(removed)
            np.testing.assert_array_equal(one, other)


def loose(atoms, axis):
    """Numbers of the atoms of an axis, relabelled by order; None if all stay."""
    x = atoms.resolve(axis)
    return None if x is None else np.unique(x, return_inverse=True)[1].reshape(x.shape).tolist()


def test_equal_axes_are_one_and_others_are_not():
    atoms = Atoms()
    x, y, z = (atoms.fresh(3) for _ in range(3))
    atoms.same(x, y)
    assert np.array_equal(atoms.resolve(x), atoms.resolve(y))
    assert not np.intersect1d(atoms.resolve(x), atoms.resolve(z)).size


def test_a_split_axis_goes_by_whole_rows_and_columns():
    atoms = Atoms()
    x = atoms.fresh(6)
    rows, columns = atoms.split(x, [2, 3])
    assert (loose(atoms, rows), loose(atoms, columns)) == ([[0], [1]], [[0], [1], [2]])
    assert loose(atoms, x) == [[0, 2], [0, 3], [0, 4], [1, 2], [1, 3], [1, 4]]
    assert np.array_equal(atoms.merge([rows, columns], [2, 3]), atoms.resolve(x))


def test_a_split_along_one_factor_keeps_the_other_free():
    """Flattened channels and positions: the positions stay, the channels may go."""
    atoms = Atoms()
    channels = atoms.fresh(4)
    flat = atoms.merge([channels, None], [4, 9])
    again, positions = atoms.split(flat, [4, 9])
    assert positions is None
    assert np.array_equal(atoms.resolve(again), atoms.resolve(channels))


@pytest.mark.parametrize("by_hand", [True, False])
def test_what_meets_a_kept_axis_is_kept_with_the_reason(by_hand):
    atoms = Atoms()
    x = atoms.fresh(2)
    if by_hand:
        atoms.keep(x, "an output")
        assert atoms.reason(x[:, 0]) == ["an output"] * 2
    else:
        atoms.same(x, None, "the input")
        assert atoms.reason(x[:, 0]) == ["the input"] * 2
    assert atoms.resolve(x) is None


def test_two_ways_to_factor_one_axis_keep_it():
    """2 x 6 and 4 x 3 of twelve: no rows and columns of both can go, but common ones may."""
    atoms = Atoms()
    x = atoms.fresh(12)
    atoms.split(x, [2, 6])
    atoms.split(x, [4, 3])
    outer, inner = atoms.split(x, [2, 2, 3])[::2]
    assert loose(atoms, inner) == [[0], [1], [2]]
    assert loose(atoms, outer) in (None, [[0], [1]])


def test_sets_are_alike_in_any_order():
    atoms = Atoms()
    one, two, mixed = atoms.fresh(3), atoms.fresh(3), atoms.fresh(3)
    # A product that is read from behind: the same two atoms, the other first.
    there, back = np.concatenate([one, two], 1), np.concatenate([two, one], 1)
    atoms.same(there, back)
    atoms.same(np.where([[True], [False], [False]], 0, there), mixed)
    for axis in (one[1:], two[1:]):
        assert atoms.resolve(axis).shape == (2, 1)
    assert atoms.resolve(mixed)[0].tolist() == [0, 0]
    assert sorted(atoms.resolve(mixed)[1].tolist()) == sorted(there[1].tolist())


def test_a_copy_is_not_touched_by_what_comes_later():
    atoms = Atoms()
    axis, other = atoms.fresh(3), atoms.fresh(3)
    before = atoms.copy()
    assert atoms.is_as(before, axis)
    atoms.same(axis, other)
    assert atoms.is_as(before, axis)
    assert not atoms.is_as(before, other)
    atoms.keep(axis, "for a test")
    assert not atoms.is_as(before, axis)
    assert before.resolve(axis).tolist() == axis.tolist()
