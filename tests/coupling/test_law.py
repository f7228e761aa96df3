"""Masked and shrunk models are one function, on models as people write them.

The whole population runs in ``benchmarks/population.py``; here are all plain functions, with
gradients, and of the frameworks one model of every kind of structure, without.
"""

import jax
import pytest

import purepruning as pp
from tests.coupling.law import compare, distance, half
from tests.coupling.zoo import MODELS
from tests.fast import jit_once
from tests.versions import enable_x64

pytestmark = pytest.mark.usefixtures("unoptimized")

#: Functions that nothing can be removed from, and why.
WHOLE = {
    "plain_softmax_over_channels": "a maximum over it",
    "plain_sorted_channels": "a sort",
    "plain_fourier_over_channels": "a Fourier transform",
    "plain_response_norm": "a window",
    "plain_largest_channels": "a sort",
    "plain_entropy": "a maximum over it",
    "plain_update_in_place": "a part that is written to",
    "plain_running_logarithm": "summed, and not zero where it is masked",
    "plain_order_of_samples": "summed, and not zero where it is masked",
    "plain_missing_sample": "summed, and not zero where it is masked",
    "plain_random_by_number": "what keys are made of",
    "plain_divided_by_scale": "no number where it is masked",
    "plain_gamma_of_scale": "no number where it is masked",
    "plain_fixed_point": "a maximum over it",
    "plain_channel_attention": "nothing would be left of an axis",
}

#: Functions whose masked model divides zero by zero: there is nothing to compare with.
UNDEFINED = {"plain_scaled_kernel"}

#: Loops that run until something holds have no reverse derivative, nor has a scatter that applies.
FORWARD = {"plain_while_loop", "plain_fixed_point", "plain_applied"}


#: Models of the frameworks, one of every kind of structure. The population has them all.
SAMPLE = {
    "linen_mobilenet_v2",
    "linen_cbam",
    "linen_shufflenet_v1",
    "linen_shufflenet_v2",
    "linen_diffusion",
    "linen_weight_norm",
    "linen_llama",
    "linen_lstm",
    "linen_scanned_blocks",
    "linen_remat_blocks",
    "linen_experts",
    "nnx_gemma",
    "nnx_resnet",
    "equinox_stacked_blocks",
    "haiku_norms",
}

ENTRIES = [
    pytest.param(entry, id=entry.name)
    for entry in MODELS
    if entry.name in SAMPLE or (entry.framework == "plain" and entry.name not in UNDEFINED)
]


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_shrunk_model_is_the_masked_one(entry, standard_promotion):
    with jax.numpy_rank_promotion("allow"):
        fn, params, inputs = entry.build(jax.random.key(0))
        found = compare(fn, params, *inputs, gradients=entry.name not in FORWARD | SAMPLE)
    assert found.outputs <= 1e-5
    assert found.gradients <= 1e-5
    if entry.name in WHOLE:
        assert not found.coupling.n_units
        assert WHOLE[entry.name] in {axis.reason for axis in found.coupling.frozen}
    else:
        before, after = found.shrunk.report.params
        assert after < before
        assert found.shrunk.report.macs[1] < found.shrunk.report.macs[0]


@pytest.mark.parametrize("name", ["plain_grouped_queries", "equinox_convnext"])
def test_in_double_precision_they_agree_to_rounding(name, standard_promotion):
    entry = next(e for e in MODELS if e.name == name)
    with jax.numpy_rank_promotion("allow"), enable_x64(True):
        fn, params, inputs = entry.build(jax.random.key(0))
        params, inputs = jax.tree.map(_double, (params, inputs))
        found = compare(fn, params, *inputs)
    assert max(found.outputs, found.gradients) <= 1e-10


def _double(x):
    return x.astype("float64") if x.dtype == "float32" else x


#: Models that run in bfloat16 by default; the others do with --full.
HALF = {"linen_llama", "linen_lstm", "nnx_resnet", "plain_grouped_queries"}

#: Functions that JAX does not run in bfloat16: carries of another dtype, no such complex numbers.
SINGLE = {
    "plain_on_the_circle",
    "plain_scan_over_layers",
    "plain_spectral_convolution",
    "plain_fixed_point",
}


def _in_half(entry):
    return pytest.param(entry, marks=[pytest.mark.full] * (entry.name not in HALF), id=entry.name)


@pytest.mark.parametrize(
    "entry", [_in_half(e) for e in (x.values[0] for x in ENTRIES) if e.name not in SINGLE]
)
def test_in_bfloat16_they_differ_by_no_more_than_rounding(entry, standard_promotion):
    """Rounding is how far the masked model is from itself in float32, with the same weights."""
    with jax.numpy_rank_promotion("allow"):
        fn, params, inputs = entry.build(jax.random.key(0))
        params, inputs = jax.tree.map(_half, (params, inputs))
        coupling = pp.couple(fn, params, *inputs)
        masks = coupling.masks(half(coupling), params)
        small = pp.shrink(fn, params, masks, coupling, *inputs)
        masked = pp.apply_masks(params, masks)
        wide = jax.tree.map(_single, (masked, inputs))

        def run(masked, small_params, wide):
            return fn(masked, *inputs), small.fn(small_params, *inputs), fn(wide[0], *wide[1])

        masked_out, small_out, exact = jit_once(run)(masked, small.params, wide)
    dtypes = [{x.dtype for x in jax.tree.leaves(out)} for out in (masked_out, small_out)]
    assert dtypes[0] == dtypes[1]
    rounding = distance(exact, masked_out)
    assert distance(exact, small_out) <= 2 * rounding + 2**-7


def _half(x):
    return x.astype("bfloat16") if x.dtype == "float32" else x


def _single(x):
    return x.astype("float32") if x.dtype == "bfloat16" else x
