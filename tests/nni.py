"""What Microsoft NNI answered: the data in ``golden``, whose README says what they are."""

import functools
import json
import pathlib

import numpy as np
import pytest

from purepruning import Layer, resolve

FOLDER = pathlib.Path(__file__).parent / "golden"
DATA = json.loads((FOLDER / "cases.json").read_text())
GRANULARITIES = {"Level": "element", "Slim": "element"}

#: Torch layout to that of Flax: OIHW to HWIO, (out, in) to (in, out).
TO_FLAX = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}


class Model:
    """One model: its parameters and layer table, as torch and as Flax have them."""

    def __init__(self, name):
        info = DATA["models"][name]
        with np.load(FOLDER / f"{name}.npz") as arrays:
            self.bits = np.unpackbits(arrays["mask_bits"], axis=1).astype(bool)
            params = {path: arrays[path] for path, _ in info["masks"]}
        self.name, self.graph = name, info.get("graph", ())
        self.shapes = {path: tuple(shape) for path, shape in info["masks"]}
        self.params = {"torch": params, "flax": {p: turn(x) for p, x in params.items()}}
        self.tables = {"torch": [], "flax": []}
        types = {1: "BatchNorm2d", 2: "Linear", 4: "Conv2d"}
        for path, weight in params.items():
            layer = path.removesuffix(".weight")
            if layer == path:
                continue
            for framework, table in self.tables.items():
                out, in_ = ((0,), (1,)) if framework == "torch" else ((-1,), (-2,))
                table.append(
                    Layer(
                        layer,
                        types[weight.ndim],
                        path,
                        self.params[framework][path].shape,
                        out,
                        in_ if weight.ndim > 1 else (),
                        groups=info["groups"].get(layer, 1),
                        bias=f"{layer}.bias" if f"{layer}.bias" in params else None,
                    )
                )

    @functools.cached_property
    def statistics(self):
        """What NNI's pruners saw of data, by name."""
        with np.load(FOLDER / f"{self.name}_statistics.npz") as arrays:
            return dict(arrays)

    def masks(self, row):
        """NNI's masks by parameter."""
        at, masks = 0, {}
        for path, shape in self.shapes.items():
            masks[path] = self.bits[row, at : at + int(np.prod(shape))].reshape(shape)
            at += masks[path].size
        return masks


def turn(x):
    return np.ascontiguousarray(x.transpose(TO_FLAX[x.ndim]))


def turn_back(x):
    return x.transpose(np.argsort(TO_FLAX[x.ndim]))


model = functools.cache(Model)


def cases(condition):
    chosen = [case for case in DATA["cases"] if condition(case)]
    return pytest.mark.parametrize("case", chosen, ids=[c["id"] for c in chosen])


def asked(case):
    """The sparsity that NNI aimed at; outside of global mode it takes bounds into account."""
    sparsity = case["sparsity"]
    if case["mode"] == "normal":
        sparsity = max(sparsity, case.get("min_sparse_ratio", 0))
        sparsity = min(sparsity, case.get("max_sparse_ratio", 1))
    return sparsity


def config_of(case, table, granularity=None):
    """What a case means in this library's terms; 3.0 protects nothing in global mode."""
    rule = {"op_names": [layer.name for layer in table], "allow_empty": True}
    if case["mode"] == "global":
        default = 1.0 if case["nni_version"] == "3.0" else 0.99
        rule["max_sparsity_per_layer"] = case.get("max_sparse_ratio", default)
    granularity = granularity or GRANULARITIES.get(case["pruner"], "output_channel")
    scope = "global" if case["mode"] == "global" else "layer"
    return resolve([rule], table, scope=scope, granularity=granularity)


def expected_of(case):
    return model(case["model"]).masks(case["row"])
