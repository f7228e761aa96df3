"""A sample of ``benchmarks/workflow.py``: the flow with default options ends in smaller models."""

import pytest

from benchmarks.workflow import CASES, SMALLER, JaxModel, run
from tests.coupling.zoo import MODELS

pytestmark = pytest.mark.usefixtures("unoptimized")

SAMPLE = {
    "linen_weight_norm": ("default",),
    "linen_mobilenet_v2": ("slim",),
    "linen_llama": ("partly",),
    "linen_perceiver": ("default",),
    "nnx_gemma": ("Linear",),
    "nnx_gpt": ("macs",),
    "equinox_mlp": ("default", "twice"),
    "haiku_cnn": ("Conv2d", "global"),
    "plain_tied_autoencoder": ("default",),
}


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name, cases in SAMPLE.items() for case in cases]
)
def test_the_flow_ends_in_a_smaller_model(name, case):
    assert case in CASES
    row = run(JaxModel(next(e for e in MODELS if e.name == name)), case)
    assert row["status"] == SMALLER, row.get("message", row)
