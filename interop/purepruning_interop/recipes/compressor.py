"""The thin, stateful edge over the library, with the methods that auptimizer's documents call."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

import purepruning as pp
from purepruning.arguments import adapter_of, missing, shown
from purepruning.masks import to_numpy
from purepruning.quantize import integers, observers
from purepruning.saving.files import write_whole
from purepruning.trees import flatten
from purepruning_interop.recipes.names import FOLDERS, NEEDED, Given
from purepruning_interop.recipes.recipe import (
    Recipe,
    Step,
    check_argument,
    core_arguments,
    core_name,
    plain_rule,
    read_recipe,
    within,
)

_FLAX = ("linen", "nnx")
_SEARCHES = ("net_adapt", "simulated_annealing", "sensitivity", "amc")


def create_compressor(
    model: Any,
    recipe: Recipe | str | os.PathLike[str] | Mapping[str, Any],
    *args: Any,
    step: int | None = None,
    variables: Any = None,
    inputs: Sequence[Any] | None = None,
    data: Iterable[Any] | None = None,
    loss: Callable[..., Any] | None = None,
    **kwargs: Any,
) -> Compressor:
    """Returns the compressor of a recipe for a model.

    Further arguments are those of auptimizer for each compressor, by position or by name:
    ``create_compressor(model, recipe, optimizer)``, ``create_compressor(model, recipe,
    evaluator=evaluator)``. What a recipe's ``args`` say holds unless it is said here. Evaluators,
    trainers, loaders and optimizers always come from here.

    A torch or NNX module is changed in place. Of Linen the variables are the model, of Equinox the
    module: methods return it, and take what was trained since as ``model``. Evaluators and the like
    are called as auptimizer calls them; of their arguments, the model that was given here stands
    for the model as it is at the call.

    Args:
        model: a torch, Linen, NNX or Equinox module.
        recipe: a recipe, its file, or what a file holds.
        *args: auptimizer's arguments, in its order.
        step: which step of the recipe; needed where it has several.
        variables: of a Linen module.
        inputs: example inputs, as ``dummy_input``: a Linen module, a coupling and, in JAX,
            quantised activations need them. Of Equinox, of one example.
        data: batches for statistics, each a tuple of inputs (of activations), or what ``loss``
            takes (of gradients). Without it, torch's are those of training.
        loss: ``(model, batch) -> scalar``, for gradients.
        **kwargs: auptimizer's arguments, by name.

    Raises:
        ValueError, TypeError, KeyError: a mistake in the recipe or the arguments, by file, step,
            rule and key. Nothing has been done to the model then.
    """
    recipe = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    with within(recipe.source):
        number = _which(recipe, step)
        chosen = recipe.steps[number]
        adapter = _adapter(model, recipe.framework)
        with within(f"step {number} ({chosen.use})"):
            if recipe.ranges:
                raise ValueError(
                    f"{next(iter(recipe.ranges))} is a range; call search_recipe, or write a number"
                )
            given = _bound(chosen, args, kwargs)
            own = {"variables": variables, "inputs": inputs, "data": data, "loss": loss}
            return Compressor(model, adapter, chosen, given, own)


def _which(recipe: Recipe, step: int | None) -> int:
    if step is None and len(recipe.steps) == 1:
        return 0
    if isinstance(step, int) and 0 <= step < len(recipe.steps):
        return step
    raise ValueError(
        f"the recipe has {len(recipe.steps)} steps, got step={shown(step)}; give the number of one"
    )


def _adapter(model: Any, framework: str | None) -> str:
    if framework == "tensorflow":
        raise ValueError(
            "framework 'tensorflow' would be the Keras adapter, which this version does not have; "
            "choose another framework"
        )
    found = adapter_of(model)
    if found not in ("torch", "linen", "nnx", "equinox"):
        raise TypeError(
            f"create_compressor: model must be a torch, Linen, NNX or Equinox module, got "
            f"{type(model).__name__}; for others use the functions of purepruning"
        )
    if framework not in (None, found) and not (framework == "flax" and found in _FLAX):
        raise ValueError(
            f"the recipe's framework is {framework!r} and the model's {found!r}; change the recipe"
        )
    return str(found)


def _bound(step: Step, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all arguments of a compressor by name."""
    known = step.named.arguments
    if len(args) > len(known):
        raise TypeError(
            f"{step.use} takes at most {len(known)} arguments after model and recipe, got "
            f"{len(args)}"
        )
    given = dict(zip(known, args, strict=False))
    for name, value in kwargs.items():
        if name not in known:
            raise TypeError(missing(f"{step.use} has no argument {name!r}", name, known))
        if name in given:
            raise TypeError(f"{step.use}: {name!r} is given twice; leave one of them out")
        given[name] = value
    for name, value in given.items():
        default = known[name]
        # auptimizer's documents write its defaults out; folders are not written to unless named.
        if not isinstance(default, Given) and not (name in FOLDERS and value in ("./", "./logs")):
            check_argument(name, name, value, default)
    given = {k: v for k, v in given.items() if not (k in FOLDERS and v in ("./", "./logs"))}
    result = {k: None if isinstance(v, Given) else v for k, v in known.items()}
    result |= dict(step.args) | given
    for name, default in known.items():
        if default is NEEDED and result[name] is None:
            raise TypeError(f"{step.use} needs {name!r}; give it to create_compressor")
    return result


class Compressor:
    """What :func:`create_compressor` returns.

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
        self._adapter: Any = importlib.import_module(f"purepruning_interop.{adapter}")
        self._name, self._step, self._given, self._own = adapter, step, given, own
        self._original = model
        self._recipe: Any = None  # what from_nni returned
        self._quantizer: Any = None
        self.config: Any = None
        self.masks: Any = None
        self.state: Any = None
        self.history: list[dict[str, Any]] = []
        self._keeper: Any = None
        self._small: Any = None
        self._epoch = -1
        self._inputs = self._example()
        if adapter == "linen":
            if own["variables"] is None or self._inputs is None:
                raise TypeError("a Linen module needs variables= and inputs=; give both")
            self._model = self._edge.Bound(model, own["variables"])
        else:
            self._model = model
        if given.get("optimizer") is not None and adapter != "torch":
            raise TypeError(
                "optimizer: an Optax transformation holds no parameters; leave it out, and call "
                "model = compressor.step(model) after each update"
            )
        self._resolve()

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

    # Rules.
    def _rules(self) -> list[dict[str, Any]]:
        return [plain_rule(rule) for rule in self._step.rules]

    def _resolve(self) -> None:
        step = self._filled()
        table = self._adapter.layers(*self._first(), *(self._inputs or ()))
        if step.kind == "quantization":
            # In JAX the functions are found in the program, which needs inputs.
            seen = self._name == "torch" or self._inputs is not None
            acts = self._adapter.activations(*self._first(), *(self._inputs or ())) if seen else ()
            recipe: Any = pp.from_nni(step.use, self._rules(), table, activations=acts)
            self._quantizer, self.config = recipe.quantizer, recipe.config
            if hasattr(self._quantizer, "init"):
                self.state = self._quantizer.init(self._params(), self.config)
            return
        coupled = step.use in ("amc", "auto_compress") or step.args.get("dependency_aware")
        coupling = None
        if coupled:
            coupling = self._adapter.couple(*self._first(), *self._needed())
        self._recipe = pp.from_nni(
            core_name(step), self._rules(), table, coupling=coupling, **core_arguments(step)
        )
        self.config = self._recipe.config

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
            eval_args: of the evaluator; the model unless given.
            finetune_args: of the fine-tuner.
        """
        use = self._step.use
        if self._step.kind == "quantization":
            return self._edge.quantized(self._model, self._forward)
        if use in _SEARCHES:
            self._search(eval_args, finetune_args)
        elif use == "auto_compress":
            self._auto_compress()
        elif use == "agp":
            self._times = self._recipe.schedule.init(self.config)
            self.update_epoch(0)
        elif use == "lottery_ticket":
            rewind: list[str] | None = None if self._given["reset_weights"] else []
            self._tickets = pp.lottery(self._recipe.pruner, self.config, rewind=rewind)
            self.state = self._tickets.init(self._run())
            self._round = 0
        elif use == "admm":
            self._admm()
        else:
            self._once()
        return self.model

    def update_epoch(self, epoch: int, model: Any = None) -> Any:
        """Returns the model pruned as far as is due in an epoch; only AGP prunes here."""
        self._take(model)
        if self._step.use != "agp":
            return self.model
        event = None
        while self._epoch < epoch:
            self._times, now = self._recipe.schedule.step(self._times)
            self._epoch += 1
            event = now if bool(now.due) else event
        if event is not None:
            config = self.config.with_counts(event.counts).with_masks(self.masks or {})
            self._prune(self._recipe.pruner(self._params(), None, config))
        return self.step()

    def get_prune_iterations(self) -> Iterator[int]:
        """Returns the rounds of lottery tickets: one more than prune, the first one trains all."""
        self._only("lottery_ticket", "get_prune_iterations")
        return iter(range(self._step.rules[0]["prune_iterations"] + 1))

    def prune_iteration_start(self, model: Any = None) -> Any:
        """Returns the model that the next round trains: pruned, and back at its start.

        Of torch, optimizer and scheduler go back too.
        """
        self._only("lottery_ticket", "prune_iteration_start")
        self._take(model)
        if self._round:
            self.state, run = self._tickets.step(self.state, self._run())
            self._model = self._edge.written(self._model, run["params"])
            if "rest" in run:
                self._model.load_state_dict(run["rest"], strict=False)
            for name in ("optimizer", "lr_scheduler"):
                if name in run:
                    self._given[name].load_state_dict(run[name])
            self._prune(self.state.masks)
        self._round += 1
        return self.model

    def step(self, model: Any = None) -> Any:
        """Returns the model after an optimizer's step: pruned weights at zero, BNN's clipped.

        Of torch, with the optimizer given, that is done at each of its steps.
        """
        self._take(model)
        if self._step.use == "bnn":
            self._write(self._quantizer.clip(self._params(), self.config))
        elif self.masks is not None and self._keeper is None:
            self._write(pp.apply_masks(self._params(), self.masks))
        return self.model

    def apply_speedup(self, dummy_input: Any = None, mask_path: Any = None) -> Any:
        """Returns the smaller model, without what is pruned; of Linen, a function and parameters.

        Args:
            dummy_input: example inputs, unless they were given before.
            mask_path: a file of :func:`purepruning.save_masks`, in place of the masks.
        """
        if self._step.kind != "pruning":
            raise ValueError("apply_speedup is of pruning; a quantised model has as many weights")
        masks = self.masks
        if mask_path is not None:
            masks = pp.load_masks(mask_path, self._params())
        if masks is None:
            raise ValueError("apply_speedup: nothing is pruned yet; call compress first")
        inputs = self._from(dummy_input)
        coupling = self._adapter.couple(*self._first(), *inputs)
        self._small = self._adapter.shrink(*self._first(), masks, coupling, *inputs)
        return self._small if self._small.model is None else self._small.model

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
        files = {"model": str(file)}
        if self._step.kind == "quantization":
            self._export_quantized(file)
            files["calibration"] = str(file.with_suffix(".json"))
        else:
            tree = self._edge.arrays(self._model)
            if speedup:
                self.apply_speedup(dummy_input)
                tree = self._small.params
                if self._small.model is not None:
                    tree = self._edge.arrays(self._small.model)
                files["plan"] = str(file.with_suffix(".plan.safetensors"))
                pp.save_plan(files["plan"], self._small.report.plan)
            elif self.masks is not None:
                tree = pp.apply_masks(tree, self.masks)
            arrays = {
                n: to_numpy(x) for n, x in flatten(tree).leaves.items() if hasattr(x, "shape")
            }
            write_whole(file, safetensors.numpy.save(arrays))
            if mask_path is not None and self.masks is not None:
                files["masks"] = str(_as_safetensors(folder / mask_path))
                pp.save_masks(files["masks"], self.masks, self._params())
        report: dict[str, Any] = {
            "recipe": self._resolved(),
            "files": files,
            "history": self.history,
        }
        if self.masks is not None:
            report["density"] = float(pp.density(self.masks, self._params()))
        files["report"] = str(file.with_suffix(".report.json"))
        write_whole(Path(files["report"]), json.dumps(report, indent=2).encode())
        return files

    # How each of them goes.
    def _prune(self, masks: Any) -> None:
        self.masks = masks
        self._write(pp.apply_masks(self._params(), masks))
        optimizer = self._given.get("optimizer")
        if optimizer is None:
            return
        if self._keeper is None:
            self._keeper = self._edge.keep(self._model, masks, optimizer)
        else:
            self._keeper.set_masks(masks)

    def _once(self) -> None:
        use, params = self._step.use, self._params()
        if use not in ("taylor_fo_weight_filter", *_BY_ACTIVATION):
            self._prune(self._recipe.pruner(params, None, self.config))
            return
        by_gradient = use == "taylor_fo_weight_filter"
        stats = pp.stats.gradients if by_gradient else pp.stats.activations
        self.state, self._seen = stats.init(params, self.config), 0
        data, loss = self._own["data"], self._own["loss"]
        if data is not None:
            if by_gradient and loss is None:
                raise TypeError(f"{use}: gradients are those of a loss; give loss= with data=")
            for batch in data:
                if by_gradient:
                    found = self._edge.gradients(self._model, loss, batch)
                    done = self._saw_gradients(found)
                else:
                    done = self._saw_inputs(batch if isinstance(batch, tuple) else (batch,))
                if done:
                    return
            raise ValueError(
                f"{use}: data ended after {self._seen} batches, before statistics_batch_num = "
                f"{self._given['statistics_batch_num']}; give more, or say less"
            )
        if self._given.get("optimizer") is None:
            raise TypeError(f"{use} looks at data; give data=, or a torch optimizer, to train with")
        if by_gradient:

            def before() -> bool:
                grads = {
                    n: p.grad if p.grad is not None else 0 * p for n, p in self._params().items()
                }
                return self._saw_gradients(grads)

            self._edge.before_steps(self._given["optimizer"], before)
        else:
            self._edge.watch_inputs(self._model, self._watch)

    def _watch(self, inputs: tuple[Any, ...]) -> bool:
        # The pass that looks at layers is a call of the model too.
        if getattr(self, "_looking", False):
            return False
        self._looking = True
        try:
            return self._saw_inputs(inputs)
        finally:
            self._looking = False

    def _saw_inputs(self, inputs: tuple[Any, ...]) -> bool:
        outputs = self._edge.capture(self._model, inputs, self.config.layers)
        self.state = pp.stats.activations.update(
            self.state, outputs, self.config, activation=self._given["activation"]
        )
        return self._after_statistics()

    def _saw_gradients(self, grads: Any) -> bool:
        params = self._params()
        self.state = pp.stats.gradients.update(self.state, params, grads, self.config)
        return self._after_statistics()

    def _after_statistics(self) -> bool:
        self._seen += 1
        if self._seen < self._given["statistics_batch_num"]:
            return False
        self._prune(self._recipe.pruner(self._params(), self.state, self.config))
        return True

    def _run(self) -> dict[str, Any]:
        """Returns the run of a lottery ticket: what goes back at the head of a round."""
        run = {"params": self._params()}
        if self._name == "torch":
            own = run["params"]
            run["rest"] = {n: x for n, x in self._model.state_dict().items() if n not in own}
        for name in ("optimizer", "lr_scheduler"):
            if self._given.get(name) is not None:
                run[name] = self._given[name].state_dict()
        return run

    def _admm(self) -> None:
        rho, pruner = self._given["row"], self._recipe.pruner
        self.state = pp.admm.init(self._params(), self.config)
        for i in range(self._given["num_iterations"]):
            for epoch in range(self._given["training_epochs"]):
                self._train(i * self._given["training_epochs"] + epoch, self.state, rho)
            self.state, _ = pp.admm.step(
                self._params(), self.state, self.config, rho, pruner=pruner
            )
        self._prune(pp.admm.masks(self._params(), self.state, self.config, pruner=pruner))

    def _train(self, epoch: int, state: Any, rho: float) -> None:
        config = self.config

        def penalty(model: Any) -> Any:
            tree = model if self._name == "linen" else self._edge.params(model)
            return pp.admm.penalty(tree, state, config, rho=rho)

        model = self._edge.trained(self.model, self._given["trainer"], epoch, penalty)
        self._take(model)

    def _called(self, function: Callable[..., Any], args: Sequence[Any]) -> Any:
        """Calls a function of the caller's with the model as it is now, for the given one."""
        given = (self._original, self._own["variables"])
        now = [self.model if any(a is g for g in given if g is not None) else a for a in args]
        return function(*now)

    def _search(self, eval_args: Any, finetune_args: Any) -> None:
        given, recipe, use = self._given, self._recipe, self._step.use
        model = self._own["variables"] if self._name == "linen" else self._original
        tune: Any = given.get("short_term_fine_tuner") or given.get("finetuner")
        first = (given["val_loader"], model) if use == "amc" else (model,)
        eval_args = first if eval_args is None else eval_args
        finetune_args = (model,) if finetune_args is None else finetune_args
        if given.get("sparsity_proportion_calc") is not None:
            raise TypeError(
                "sparsity_proportion_calc decides by curves; run pp.search.sensitivity, and give "
                "what it decides to pp.search.fitted"
            )
        start = self._edge.snapshot(self._model)

        def evaluate(trial: Any) -> Any:
            base = start if trial.payload is None else trial.payload
            self._model = self._edge.restored(self._model, base)
            try:
                config = recipe.config.with_counts(trial.counts)
                masks = recipe.pruner(self._params(), None, config)
                self._write(pp.apply_masks(self._params(), masks))
                tuned = tune is not None and (use != "sensitivity" or trial.stage > 0)
                if tuned:
                    self._take(self._called(tune, finetune_args))
                    self._write(pp.apply_masks(self._params(), masks))
                score = float(self._called(given["evaluator"], eval_args))
                return (score, self._edge.snapshot(self._model)) if tuned else score
            finally:
                self._model = self._edge.restored(self._model, start)

        folder = next((given[f] for f in FOLDERS if given.get(f) is not None), None)
        key = jax.random.key(given.get("seed") or 0)
        found = pp.search.run_search(
            recipe.search, recipe.search.init(key), evaluate, problem=recipe.problem, folder=folder
        )
        self.history = found.history
        if found.payload is not None:
            self._model = self._edge.restored(self._model, found.payload)
        self.config = recipe.config.with_counts(found.best)
        self._prune(recipe.pruner(self._params(), None, self.config))

    def _auto_compress(self) -> None:
        if self._name == "linen":
            raise ValueError(
                "auto_compress shrinks between rounds, and a Linen module cannot be smaller; use "
                "NNX or Equinox, or pp.search.auto_compress with functions"
            )
        given, inputs, rules = self._given, self._needed(), self._rules()
        named = [{k: v for k, v in rule.items() if k != "sparsity"} for rule in rules]
        options, pruner = dict(self._recipe.options), self._recipe.pruner
        rounds, budget = options.pop("rounds"), options.pop("budget")
        rho, steps = options.pop("rho"), options.pop("admm_steps")
        epochs = options.pop("epochs_per_step")

        def resolved(model: Any) -> Any:
            coupling = self._adapter.couple(model, *inputs)
            table = self._adapter.layers(model, *inputs)
            return pp.resolve(
                named, table, granularity="output_channel", coupling=coupling, extra="none"
            )

        def evaluate(model: Any, counts: Any) -> float:
            config, start = resolved(model).with_counts(counts), self._edge.snapshot(model)
            params = self._edge.params(model)
            masked = self._edge.written(model, pp.apply_masks(params, pruner(params, None, config)))
            try:
                return float(given["evaluator"](masked))
            finally:
                self._edge.restored(model, start)

        def compress(model: Any, counts: Any) -> Any:
            config = resolved(model).with_counts(counts)
            self._model, self.config = model, config
            state = pp.admm.init(self._params(), config)
            for i in range(steps):
                for epoch in range(epochs):
                    self._train(i * epochs + epoch, state, rho)
                state, _ = pp.admm.step(self._params(), state, config, rho, pruner=pruner)
            masks = pruner(self._params(), None, config)
            coupling = config.allocation.coupling
            small = self._adapter.shrink(self._model, masks, coupling, *inputs)
            if small.model is None:
                raise ValueError(f"auto_compress: {small.reason}; use pp.search.auto_compress")
            return small.model

        found = pp.search.auto_compress(
            self._model,
            budget,
            problem=lambda model, aim: pp.search.problem(resolved(model), aim),
            evaluate=evaluate,
            compress=compress,
            key=jax.random.key(0),
            rounds=rounds,
            **options,
        )
        self._model, self.history = found.model, found.history

    # Quantizers.
    def _forward(self, *args: Any) -> Any:
        """The quantised model: of torch a module's call; in JAX ``(model, state, *inputs)``."""
        if self._name == "torch":
            model, inputs, training = args
            result, seen = self._quantised(model, self.state, inputs, training)
            if training and hasattr(self._quantizer, "update"):
                self.state = self._quantizer.update(self.state, _detached(seen), self.config)
            return result
        model, state, *inputs = args
        bound = self._edge.Bound(self._model.module, model) if self._name == "linen" else model
        return self._quantised(bound, state, inputs, True)

    def update_state(self, seen: Mapping[str, Any]) -> None:
        """Takes what a step has seen at quantised activations, in JAX; torch does it by itself."""
        if hasattr(self._quantizer, "update"):
            self.state = self._quantizer.update(self.state, seen, self.config)

    def _quantised(self, model: Any, state: Any, inputs: Any, training: bool) -> Any:
        weights = self._quantizer.weights(self._edge.params(model), state, self.config)
        at: dict[str, Any] = {}
        if self._step.use == "qat":
            at = self._quantizer.activations(state, self.config, training=training)
        elif self.config.activations:
            at = self._quantizer.activations(self.config)
        return self._edge.replace(model, weights, tuple(inputs), at)

    def _export_quantized(self, file: Path) -> None:
        params, quantizer = self._params(), self._quantizer
        by_weight = self._step.use in ("qat", "naive")
        levels = (
            quantizer.levels(params, self.config) if by_weight else quantizer.levels(self.config)
        )
        # Counted as trained: a start step says when training begins to quantise.
        state = self.state
        if state is not None:
            start = max([t.start_step for t in self.config.targets], default=0)
            state = state._replace(step=state.step * 0 + max(start, 1))
        weights = quantizer.weights(params, state, self.config)
        whole = integers.of(weights, levels, self.config)
        ranges = observers.ranges(self.state.averages) if self.state is not None else {}
        if not ranges and self.config.activations:
            unit = {"dorefa": (0.0, 1.0), "bnn": (-1.0, 1.0)}[self._step.use]
            ends = observers.Range(*map(np.float32, unit))
            ranges = {t.site: ends for t in self.config.activations}
        pp.save_quantized(file, weights, whole, ranges, self.config)

    def _resolved(self) -> dict[str, Any]:
        step = self._filled()
        return Recipe((step,)).resolved()

    def _from(self, dummy: Any) -> tuple[Any, ...]:
        if dummy is None:
            return self._needed()
        return tuple(dummy) if isinstance(dummy, tuple | list) else (dummy,)

    def _only(self, use: str, method: str) -> None:
        if self._step.use != use:
            raise ValueError(f"{method} is of {use!r}, and this is {self._step.use!r}")


_BY_ACTIVATION = ("activation_apoz_rank_filter", "activation_mean_rank_filter")


#: What the model files of other formats end in.
_OTHER_FORMATS = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".h5", ".keras")


def _as_safetensors(file: Path) -> Path:
    """Returns the file's name with ``.safetensors`` in the place of another format's suffix."""
    if file.suffix in (".safetensors", *_OTHER_FORMATS):
        return file.with_suffix(".safetensors")
    return file.with_name(f"{file.name}.safetensors")


def _detached(seen: Any) -> Any:
    return jax.tree.map(lambda x: x.detach() if hasattr(x, "detach") else x, seen)
