"""Masked/shrunk equivalence of architectures nobody here wrote; the benchmarks have 128."""

import warnings

import pytest
import torch

from benchmarks.zoo.torch_models import MODELS, missing
from purepruning_interop import torch as ppt
from tests.coupling.torch_patterns import cast, fill
from tests.interop.torch_law import check_law, half, state_of

SAMPLE = [
    "tv/resnet18",
    "tv/shufflenet_v2_x0_5",
    "tv/squeezenet1_1",
    "hf/gpt2",
    "hf/llama_gqa",
]


@pytest.mark.filterwarnings("ignore")  # what packages say about themselves when imported and traced
@pytest.mark.parametrize("name", SAMPLE)
def test_masked_and_shrunk_are_one_function(name):
    (entry,) = (m for m in MODELS if m.name == name)
    if missing(entry.package):
        pytest.skip(f"{entry.package} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, inputs = cast(*entry.build(2), torch.float64)
    fill(model, 0)
    coupling = ppt.couple(model, *inputs)
    assert not coupling.unknown
    masks = coupling.masks(half(coupling), state_of(model))
    found = ppt.shrink(model, masks, coupling, *inputs)
    small, report = found.model, found.report
    # Norms of language models compute in float32 whatever the dtype.
    check_law(model, inputs, masks, small, report.plan, 1e-5 if "llama" in name else 1e-10)
    assert report.params[1] < 0.7 * report.params[0]
    assert report.macs[1] < 0.7 * report.macs[0]
