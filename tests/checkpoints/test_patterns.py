"""What is zero in a weight, by hand."""

import ml_dtypes
import numpy as np
import pytest

import purepruning as pp
from purepruning_interop.checkpoints import pattern_of

ROWS = pp.Layer("fc", "Linear", "w", (2, 8), (0,), (1,))


@pytest.mark.parametrize(
    ("rows", "nm"),
    [
        ([[1, 2, 0, 0, 3, 0, 4, 0], [0, 0, 1, 1, 1, 1, 0, 0]], (2, 4)),
        ([[1, 0, 0, 0, 0, 0, 0, 1], [0, 1, 0, 0, 0, 0, 0, 0]], (1, 4)),
        ([[1, 0, 0, 1, 0, 1, 1, 0], [0, 1, 0, 1, 0, 1, 0, 1]], (1, 2)),
        ([[1, 1, 1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]], (4, 8)),
        ([[1, 1, 1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]], (5, 8)),
        ([[1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0]], None),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_smallest_ratio_along_the_inputs(rows, nm, dtype):
    found = pattern_of(np.array(rows).astype(dtype), ROWS)
    assert found.nm == nm
    assert found.nonzero == np.count_nonzero(rows)


def test_the_input_axis_is_that_of_the_layer():
    kernel = np.array([[1, 1], [1, 1], [0, 0], [0, 0]], np.float32)
    layer = pp.Layer("fc", "Linear", "w", (4, 2), (1,), (0,))
    assert pattern_of(kernel, layer).nm == (2, 4)


def test_negative_zero_is_zero_in_every_dtype():
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        assert pattern_of(np.array([-0.0, 1.0]).astype(dtype)).nonzero == 1


def test_whole_channels():
    assert pattern_of(
        np.array([[1.0, 0], [0, 0]]), pp.Layer("a", "Linear", "w", (2, 2), (0,), (1,))
    ) == (
        1,
        4,
        (1, 2),
        1,
    )
