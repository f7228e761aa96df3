"""The thin, stateful edge over the library, with the methods that auptimizer's documents call."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import purepruning as pp
from purepruning.saving.files import write_whole
from purepruning_interop.recipes.recipe import Recipe, Step, plain_rule


class Compressor:
    """What :func:`create_compressor` returns: a class for each way to compress, of one shape.

    Attributes:
        masks: what is pruned; None before.
        config: the resolved rules.
        state: of a quantizer that has one, or of ADMM or lottery tickets.
        history: rows of the search, if it is one.
    """

    def __init__(
        self, model: Any, adapter: str, step: Step, given: dict[str, Any], own: dict[str, Any]
    ) -> None:
        self._edge: Any = importlib.import_module(f"purepruning_interop.recipes.edges.{adapter}")
        if adapter == "tree":
            table = tuple(own["layers"])
            self._edge = self._edge.Functions(table, own["apply"], own["capture"])
        self._adapter: Any = (
            self._edge
            if adapter == "tree"
            else importlib.import_module(f"purepruning_interop.{adapter}")
        )
        self._name, self._step, self._given, self._own = adapter, step, given, own
        self._original = model
        self.config: Any = None
        self.masks: Any = None
        self.state: Any = None
        self.history: list[dict[str, Any]] = []
        self._small: Any = None
        self._inputs = self._example()
        if adapter == "linen":
            if own["variables"] is None or self._inputs is None:
                raise TypeError("a Linen module needs variables= and inputs=; give both")
            self._model = self._edge.Bound(model, own["variables"])
        else:
            self._model = model
        if given.get("optimizer") is not None and adapter not in ("torch", "keras"):
            raise TypeError(
                "optimizer: an Optax transformation holds no parameters; leave it out, and call "
                "model = compressor.step(model) after each update"
            )
        self._resolve()

    def _resolve(self) -> None:
        """Resolves the rules against the model; sets ``config``."""
        raise NotImplementedError

    # What a model is.
    @property
    def model(self) -> Any:
        """The model as it is now: a module, or of Linen the variables."""
        return self._model.variables if self._name == "linen" else self._model

    def _first(self) -> tuple[Any, ...]:
        if self._name == "linen":
            return self._model.module, self._model.variables
        return (self._model,)

    def _example(self) -> tuple[Any, ...] | None:
        dummy = self._given.get("dummy_input")
        if dummy is None:
            inputs = self._own["inputs"]
            if inputs is None and self._given.get("val_loader") is not None:
                inputs = next(iter(self._given["val_loader"]))[:1]
            return None if inputs is None else tuple(inputs)
        return tuple(dummy) if isinstance(dummy, tuple | list) else (dummy,)

    def _needed(self) -> tuple[Any, ...]:
        if self._inputs is None:
            raise TypeError(f"{self._step.use}: this needs example inputs; give inputs=(x,)")
        return self._inputs

    def _from(self, dummy: Any) -> tuple[Any, ...]:
        if dummy is None:
            return self._needed()
        return tuple(dummy) if isinstance(dummy, tuple | list) else (dummy,)

    def _take(self, model: Any) -> None:
        """Takes what was trained since."""
        if model is None:
            return
        if self._name == "linen":
            self._model = self._edge.Bound(self._model.module, model)
        elif self._name == "torch" and isinstance(model, self._edge.Quantized):
            self._model = model.model
        else:
            self._model = model

    def _write(self, params: Any) -> None:
        self._model = self._edge.written(self._model, params)

    def _params(self) -> Any:
        return self._edge.params(self._model)

    def _layers(self) -> Any:
        return self._adapter.layers(*self._first(), *(self._inputs or ()))

    def _rules(self) -> list[dict[str, Any]]:
        return [plain_rule(rule) for rule in self._step.rules]

    def _filled(self) -> Step:
        args = {k: self._given[k] for k in self._step.named.data()}
        return Step(self._step.use, self._step.rules, args)

    # auptimizer's methods.
    def compress(
        self,
        *,
        eval_args: Sequence[Any] | None = None,
        finetune_args: Sequence[Any] | None = None,
    ) -> Any:
        """Returns the compressed model, or what is to be trained further.

        Args:
            eval_args: of a search's evaluator; the model unless given.
            finetune_args: of its fine-tuner.
        """
        return self._compress(eval_args, finetune_args)

    def _compress(self, eval_args: Any, finetune_args: Any) -> Any:
        """Does what this compressor does at once; returns the model."""
        raise NotImplementedError

    def update_epoch(self, epoch: int, model: Any = None) -> Any:
        """Returns the model pruned as far as is due in an epoch; only AGP prunes here."""
        self._take(model)
        return self.model

    def get_prune_iterations(self) -> Iterator[int]:
        """Returns the rounds of lottery tickets: one more than prune, the first one trains all."""
        raise ValueError(self._only_of_tickets("get_prune_iterations"))

    def prune_iteration_start(self, model: Any = None) -> Any:
        """Returns the model that the next round trains: pruned, and back at its start.

        Of torch, optimizer and scheduler go back too.
        """
        raise ValueError(self._only_of_tickets("prune_iteration_start"))

    def _only_of_tickets(self, method: str) -> str:
        return f"{method} is of 'lottery_ticket', and this is {self._step.use!r}"

    def step(self, model: Any = None) -> Any:
        """Returns the model after an optimizer's step: pruned weights at zero, BNN's clipped.

        Of torch and Keras, with the optimizer given, pruned weights are kept at zero at each of its
        steps.
        """
        self._take(model)
        return self.model

    def apply_speedup(self, dummy_input: Any = None, mask_path: Any = None) -> Any:
        """Returns the smaller model, without what is pruned; of Linen, a function and parameters.

        Args:
            dummy_input: example inputs, unless they were given before.
            mask_path: a file of :func:`purepruning.save_masks`, in place of the masks.
        """
        raise ValueError("apply_speedup is of pruning; a quantised model has as many weights")

    def count_flops_params(self, input_shape: Sequence[int]) -> tuple[int, int, Any]:
        """Returns multiply-adds (NNI's FLOPs), parameters, and both by layer, for a zero input."""
        first = self._first()
        if self._small is not None and self._small.model is not None:
            first = (self._small.model,)
        found = self._adapter.count(*first, self._edge.zeros(tuple(input_shape)))
        return int(found.macs), found.params, found.layers

    def export_model(
        self,
        model_path: str,
        mask_path: str | None = None,
        folder_name: str = ".",
        speedup: bool = False,
        dummy_input: Any = None,
    ) -> dict[str, str]:
        """Writes weights in safetensors, masks, and a report in JSON; returns the files by kind.

        Quantised weights are integers, with NNI's calibration in the JSON file beside them. With
        ``speedup`` weights are those of the smaller model, and the plan that rebuilds it is written
        too. The suffix of a pickle (``.pth``, ``.pt``, ``.bin``) or of Keras is replaced by
        ``.safetensors``, for nothing is pickled.

        Args:
            model_path: file in the folder.
            mask_path: file in the folder.
            folder_name: it is made.
            speedup: whether to shrink.
            dummy_input: example inputs, unless they were given before.
        """
        folder = Path(folder_name)
        folder.mkdir(parents=True, exist_ok=True)
        file = _as_safetensors(folder / model_path)
        masks = None if mask_path is None else _as_safetensors(folder / mask_path)
        files = self._write_files(file, masks, speedup, dummy_input)
        report: dict[str, Any] = {
            "recipe": Recipe((self._filled(),)).resolved(),
            "files": files,
            "history": self.history,
        }
        if self.masks is not None:
            report["density"] = float(pp.density(self.masks, self._params()))
        files["report"] = str(file.with_suffix(".report.json"))
        write_whole(Path(files["report"]), json.dumps(report, indent=2).encode())
        return files

    def _write_files(
        self, file: Path, masks: Path | None, speedup: bool, dummy_input: Any
    ) -> dict[str, str]:
        """Writes the model, and its masks if they have a file; returns the files by kind."""
        raise NotImplementedError


#: What the model files of other formats end in.
_OTHER_FORMATS = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".h5", ".keras")


def _as_safetensors(file: Path) -> Path:
    """Returns the file's name with ``.safetensors`` in the place of another format's suffix."""
    if file.suffix in (".safetensors", *_OTHER_FORMATS):
        return file.with_suffix(".safetensors")
    return file.with_name(f"{file.name}.safetensors")
