"""``purepruning shrink``, and ``inspect`` of models, in every framework."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

import purepruning as pp
import purepruning_interop.torch
from purepruning.trees import flatten
from purepruning_interop.cli.models import edge_of
from tests.cli import models_to_shrink as nets
from tests.cli.calls import call, failed

NETS = f"{nets.__name__}:"
pytestmark = pytest.mark.usefixtures("unoptimized", "standard_promotion")


def dense_macs(width):
    return width * 6 + 3 * width


def shrunk(capsys, tmp_path, name, *options):
    out = tmp_path / "small"
    report = call(capsys, "shrink", f"{NETS}{name}", *options, "-o", out, "--json").json
    assert json.loads((out / "report.json").read_text()).items() <= report.items()
    return out, report


def test_a_torch_model_within_its_budget_computes_what_the_masked_one_does(tmp_path, capsys):
    model, x = nets.torch_net()
    model[1].running_mean += torch.rand(12)
    torch.save(model.state_dict(), tmp_path / "trained.pt")
    options = ("--budget", "macs=0.5", "--weights", tmp_path / "trained.pt")
    out, report = shrunk(capsys, tmp_path, "torch_net", *options)
    # The batch of two is counted: 6 of 12 channels are half of the multiply-adds.
    assert report["macs"] == [2 * dense_macs(12), 2 * dense_macs(6)]
    plan = pp.load_plan(out / "plan.safetensors")
    again = purepruning_interop.torch.rebuild(nets.torch_net()[0], plan, x).model
    again.load_state_dict(safetensors.torch.load_file(out / "weights.safetensors"))
    masks = pp.load_masks(out / "masks.safetensors", dict(model.state_dict()))
    model.load_state_dict(pp.apply_masks(dict(model.state_dict()), masks))
    x = torch.randn(5, 6)
    torch.testing.assert_close(again.eval()(x), model.eval()(x), rtol=1e-5, atol=1e-6)
    assert again[0].out_features == 6
    # By norm, as the library does it.
    norms = torch.load(tmp_path / "trained.pt")["0.weight"].abs().sum(1)
    kept = set(np.flatnonzero(masks["0.weight"].any(1).numpy()))
    assert kept == set(norms.argsort()[6:].tolist())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("linen_net", marks=pytest.mark.full),
        "nnx_net",
        pytest.param("equinox_net", marks=pytest.mark.full),
        pytest.param("keras_net", marks=pytest.mark.full),
    ],
)
def test_jax_models_compute_what_the_masked_one_does(tmp_path, capsys, name):
    with jax.numpy_rank_promotion("allow"):  # which Keras relies on
        check_shrunk_by_jax(tmp_path, capsys, name)


def check_shrunk_by_jax(tmp_path, capsys, name):
    out, report = shrunk(capsys, tmp_path, name, "--budget", "macs=0.5")
    made = getattr(nets, name)()
    first, x = made[:-1], made[-1]
    batch = len(x) if x.ndim == 2 else 1
    assert report["macs"] == [batch * dense_macs(12), batch * dense_macs(6)]
    framework = name.removesuffix("_net")
    adapter = __import__(f"purepruning_interop.{framework}", fromlist=["rebuild"])
    small = adapter.rebuild(*first, pp.load_plan(out / "plan.safetensors"), x)
    arrays = safetensors.numpy.load_file(out / "weights.safetensors")
    tree = flatten(small.params)
    params = tree.rebuild({n: jax.numpy.asarray(arrays[n]) for n in tree.leaves})
    fn, whole = adapter.function(*first)
    masks = pp.load_masks(out / "masks.safetensors", whole)
    want = fn(pp.apply_masks(whole, masks), x)
    np.testing.assert_allclose(small.fn(params, x), want, rtol=1e-5, atol=1e-6)
    sizes = {n: x.size for n, x in tree.leaves.items()}
    assert sum(sizes.values()) == report["params"][1] == 6 * 6 + 6 + 6 * 3 + 3


def test_rules_say_which_layers_and_budgets_how_much(tmp_path, capsys):
    rules = [{"op_names": ["0"], "sparsity": 0.1}]
    (tmp_path / "r.json").write_text(json.dumps(rules))
    options = ("--rules", tmp_path / "r.json")
    _, report = shrunk(capsys, tmp_path, "torch_net", *options)
    assert report["layers"][0]["after"] == [11, 6]
    options = (*options, "--budget", "params=0.6", "--round-to", "2", "--overwrite")
    _, report = shrunk(capsys, tmp_path, "torch_net", *options)
    before, after = report["params"]
    assert after <= 0.6 * before
    assert report["layers"][0]["after"][0] % 2 == 0


def test_what_is_shown_of_a_shrunk_model(tmp_path, capsys):
    out = tmp_path / "small"
    found = call(
        capsys, "shrink", f"{NETS}torch_alone", "--sparsity", "0.5", "--input", "4x6", "-o", out
    )
    assert found.status == 0
    assert "multiply-adds  432 -> 216 (50.0%)" in found.out
    assert "kept whole     3: what keeps it is 'an output'" in found.out
    assert "12x6    6x6" in found.out
    assert sorted(p.name for p in out.iterdir()) == [
        "masks.safetensors",
        "plan.safetensors",
        "report.json",
        "weights.safetensors",
    ]


def test_models_are_inspected_with_costs_coupling_and_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "coupling.svg"
    found = call(capsys, "inspect", f"{NETS}nnx_net", "--picture", picture)
    rows = {line.split()[0]: line.split() for line in found.out.splitlines() if line.strip()}
    assert rows["layers.0"][1:6] == ["Linear", "6x12", "72", "144", "66.7%"]
    assert "12 x channel       layers.0.kernel[1]" in found.out
    assert "guessed" not in found.out
    assert picture.read_text().startswith("<?xml")


def test_inspecting_a_model_as_json_with_rules(tmp_path, capsys):
    (tmp_path / "r.json").write_text('[{"sparsity": 0.5, "op_names": ["0"]}]')
    arguments = ("inspect", f"{NETS}torch_net", "--rules", tmp_path / "r.json", "--json")
    found = call(capsys, *arguments).json
    assert found["macs"] == 2 * dense_macs(12)
    assert [x["removed_by_rules"] for x in found["layers"]] == [36, None, None]


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("broken", (), "raised RuntimeError: there is no data; purepruning --traceback"),
        ("three", (), "must return a torch"),
        ("linen_alone", (), "(module, variables, *inputs)"),
        ("torch_alone", (), "--input 1x3x32x32"),
        ("torch_alone", ("--input", "1,6"), "1x3x32x32"),
        ("torch_net", ("--picture", "x.txt"), ".png"),
        ("torc_net", (), "nearest: 'torch_net'"),
    ],
)
def test_functions_that_are_no_models(capsys, name, options, says):
    failed(capsys, 1, "inspect", f"{NETS}{name}", *options, says=says)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "give --budget, --sparsity or --rules"),
        (("--budget", "0.5"), "write macs=0.5"),
        (("--budget", "flops=0.5"), "write macs=0.5"),
        (("--budget", "macs=0"), "write macs=0.5"),
        (("--budget", "macs=0.5", "--sparsity", "0.5"), "give one"),
        (("--sparsity", "0.5", "--pruner", "level"), "'l1_norm'"),
        (("--sparsity", "0.5", "--rules", "x"), "give one"),
        (("--budget", "macs=0.0001"), "units that may go"),
    ],
)
def test_wrong_options(tmp_path, capsys, options, says):
    out = tmp_path / "small"
    failed(capsys, 1, "shrink", f"{NETS}torch_net", *options, "-o", out, says=says)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_the_models(tmp_path, capsys):
    state = nets.torch_alone().state_dict()
    arguments = ("shrink", f"{NETS}torch_net", "--sparsity", "0.5", "-o", tmp_path / "o")
    for change, says in (
        ({"0.weight": torch.zeros(12, 7)}, ("'0.weight' has shape (12, 7)", "(12, 6)")),
        ({"0.wait": torch.zeros(1)}, "'0.wait'"),
        ({"0.weight": None}, ("has no '0.weight'")),
    ):
        changed = {k: v for k, v in {**state, **change}.items() if v is not None}
        torch.save(changed, tmp_path / "m.pt")
        failed(capsys, 1, *arguments, "--weights", tmp_path / "m.pt", says=says)
    failed(capsys, 1, *arguments, "--weights", tmp_path / "none.pt", says="there is no")


def test_bfloat16_weights_are_read_into_models():
    import ml_dtypes

    from purepruning_interop.cli.models import _like

    x = np.array([1.5, -2.0]).astype(ml_dtypes.bfloat16)
    found = _like("torch", x, torch.zeros(2, dtype=torch.bfloat16))
    assert found.tolist() == [1.5, -2.0]
    assert edge_of("torch").__name__.endswith("torch")


def test_modules_that_are_not_there(capsys):
    failed(capsys, 1, "inspect", "nowhere.at_all:make", says="there is no module 'nowhere'")
    failed(capsys, 1, "inspect", "x", "--picture", "x.png", says="are of models")
