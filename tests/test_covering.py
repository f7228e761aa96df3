"""Covering arrays, by counting every combination."""

import itertools

import pytest

from tests.covering import covering

#: Six factors of 2 to 7 values.
FACTORS = ("abcdefg", range(5), "uvwxyz", (True, False), range(3), (None, 1))


def has_all(some, every, positions):
    def combinations(cases):
        return {tuple(case[i] for i in positions) for case in cases}

    return combinations(some) == combinations(every)


def allowed(case):
    """As N:M, which has no counts to map over."""
    return not (case[0] in "cf" and case[1] == 4)


@pytest.mark.parametrize("strength", [1, 2, 3])
def test_every_combination_that_exists_is_there(strength):
    every = list(filter(allowed, itertools.product(*FACTORS)))
    some = covering(every, strength=strength)
    for positions in itertools.combinations(range(len(FACTORS)), strength):
        assert has_all(some, every, positions)
    assert set(some) <= set(every)
    assert some == covering(every, strength=strength)


def test_some_factors_can_be_combined_by_three_and_the_rest_by_two():
    every = list(filter(allowed, itertools.product(*FACTORS)))
    some = covering(every, together=[(0, 1, 2)])
    assert has_all(some, every, (0, 1, 2))
    for positions in itertools.combinations(range(len(FACTORS)), 2):
        assert has_all(some, every, positions)


def test_there_are_few():
    """Of 2,520; no fewer than the largest factors have combinations."""
    every = list(itertools.product(*FACTORS))
    assert 42 <= len(covering(every)) <= 50
    assert 210 <= len(covering(every, strength=3)) <= 260
    assert len(covering(every, together=[(0, 1, 2)])) == 210


def test_factors_may_be_what_a_case_is_made_of():
    every = list(itertools.product(range(12), "ab"))
    some = covering(every, factors=lambda number, letter: (number // 6, number % 3, letter))
    assert len(some) == 6
    assert has_all(
        [(n // 6, n % 3, x) for n, x in some], [(n // 6, n % 3, x) for n, x in every], (0, 1)
    )


def test_all_cases_are_needed_where_all_factors_are_combined():
    every = list(itertools.product("ab", range(3)))
    assert covering(every) == every
    assert covering([]) == []
