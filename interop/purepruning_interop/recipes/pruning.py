"""Compressors that prune: at once, by statistics, epoch by epoch, in rounds, and by ADMM."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.numpy

import purepruning as pp
from purepruning.masks import to_numpy
from purepruning.saving.files import write_whole
from purepruning.trees import flatten
from purepruning_interop.recipes.compressor import Compressor
from purepruning_interop.recipes.recipe import core_arguments, core_name


class Pruning(Compressor):
    """Masks, applied to the model and kept."""

    _keeper: Any = None
    _coupled = False

    def _resolve(self) -> None:
        step, coupling = self._filled(), None
        if self._coupled or step.args.get("dependency_aware"):
            coupling = self._adapter.couple(*self._first(), *self._needed())
        self._recipe: Any = pp.from_nni(
            core_name(step),
            self._rules(),
            self._layers(),
            coupling=coupling,
            **core_arguments(step),
        )
        self.config = self._recipe.config

    def step(self, model: Any = None) -> Any:
        """Returns the model with pruned weights at zero."""
        self._take(model)
        if self.masks is not None and self._keeper is None:
            self._write(pp.apply_masks(self._params(), self.masks))
        return self.model

    def apply_speedup(self, dummy_input: Any = None, mask_path: Any = None) -> Any:
        """Returns the smaller model; see :meth:`Compressor.apply_speedup`."""
        masks = self.masks
        if mask_path is not None:
            masks = pp.load_masks(mask_path, self._params())
        if masks is None:
            raise ValueError("apply_speedup: nothing is pruned yet; call compress first")
        inputs = self._from(dummy_input)
        coupling = self._adapter.couple(*self._first(), *inputs)
        self._small = self._adapter.shrink(*self._first(), masks, coupling, *inputs)
        return self._small if self._small.model is None else self._small.model

    def _write_files(
        self, file: Path, masks: Path | None, speedup: bool, dummy_input: Any
    ) -> dict[str, str]:
        files = {"model": str(file)}
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
        arrays = {n: to_numpy(x) for n, x in flatten(tree).leaves.items() if hasattr(x, "shape")}
        write_whole(file, safetensors.numpy.save(arrays))
        if masks is not None and self.masks is not None:
            files["masks"] = str(masks)
            pp.save_masks(files["masks"], self.masks, self._params())
        return files

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

    def _train(self, epoch: int, state: Any, rho: float) -> None:
        config = self.config

        def penalty(model: Any) -> Any:
            tree = model if self._name == "linen" else self._edge.params(model)
            return pp.admm.penalty(tree, state, config, rho=rho)

        model = self._edge.trained(self.model, self._given["trainer"], epoch, penalty)
        self._take(model)


class ByWeights(Pruning):
    """Prunes at once, by what weights say."""

    def _compress(self, eval_args: Any, finetune_args: Any) -> Any:
        """Returns the pruned model."""
        self._prune(self._recipe.pruner(self._params(), None, self.config))
        return self.model


class _ByStatistics(Pruning):
    """Prunes once so many batches were seen: of ``data``, or of torch's training."""

    def _compress(self, eval_args: Any, finetune_args: Any) -> Any:
        """Returns the pruned model; without ``data``, the one to be trained, which prunes later."""
        use, data = self._step.use, self._own["data"]
        self.state, self._seen = self._start(), 0
        if data is None:
            if self._given.get("optimizer") is None or self._name != "torch":
                raise TypeError(
                    f"{use} looks at data; give data=, or a torch optimizer, to train with"
                )
            self._watch()
            return self.model
        for batch in data:
            if self._saw(batch):
                return self.model
        raise ValueError(
            f"{use}: data ended after {self._seen} batches, before statistics_batch_num = "
            f"{self._given['statistics_batch_num']}; give more, or say less"
        )

    def _start(self) -> Any:
        """Returns the statistics of nothing."""
        raise NotImplementedError

    def _watch(self) -> None:
        """Looks at what is trained on, from now on."""
        raise NotImplementedError

    def _saw(self, batch: Any) -> bool:
        """Takes a batch; returns whether that was enough, and the model is pruned."""
        raise NotImplementedError

    def _pruned_after(self, state: Any) -> bool:
        self.state = state
        self._seen += 1
        if self._seen < self._given["statistics_batch_num"]:
            return False
        self._prune(self._recipe.pruner(self._params(), state, self.config))
        return True


class ByActivations(_ByStatistics):
    """Prunes by what layers put out."""

    _looking = False

    def _start(self) -> Any:
        return pp.stats.activations.init(self._params(), self.config)

    def _watch(self) -> None:
        self._edge.watch_inputs(self._model, self._saw_in_training)

    def _saw_in_training(self, inputs: tuple[Any, ...]) -> bool:
        # The pass that looks at layers is a call of the model too.
        if self._looking:
            return False
        self._looking = True
        try:
            return self._saw(inputs)
        finally:
            self._looking = False

    def _saw(self, batch: Any) -> bool:
        inputs = batch if isinstance(batch, tuple) else (batch,)
        outputs = self._edge.capture(self._model, inputs, self.config.layers)
        activation = self._given["activation"]
        return self._pruned_after(
            pp.stats.activations.update(self.state, outputs, self.config, activation=activation)
        )


class ByGradients(_ByStatistics):
    """Prunes by what the loss would do."""

    def _start(self) -> Any:
        if self._own["data"] is not None and self._own["loss"] is None:
            raise TypeError(
                f"{self._step.use}: gradients are those of a loss; give loss= with data="
            )
        return pp.stats.gradients.init(self._params(), self.config)

    def _watch(self) -> None:
        def before() -> bool:
            grads = {n: p.grad if p.grad is not None else 0 * p for n, p in self._params().items()}
            return self._saw_gradients(grads)

        self._edge.before_steps(self._given["optimizer"], before)

    def _saw(self, batch: Any) -> bool:
        return self._saw_gradients(self._edge.gradients(self._model, self._own["loss"], batch))

    def _saw_gradients(self, grads: Any) -> bool:
        return self._pruned_after(
            pp.stats.gradients.update(self.state, self._params(), grads, self.config)
        )


class AGP(Pruning):
    """Prunes more from epoch to epoch."""

    _epoch = -1

    def _compress(self, eval_args: Any, finetune_args: Any) -> Any:
        """Returns the model as it is to be trained in epoch 0."""
        self._times = self._recipe.schedule.init(self.config)
        self.update_epoch(0)
        return self.model

    def update_epoch(self, epoch: int, model: Any = None) -> Any:
        """Returns the model pruned as far as is due in an epoch."""
        self._take(model)
        event = None
        while self._epoch < epoch:
            self._times, now = self._recipe.schedule.step(self._times)
            self._epoch += 1
            event = now if bool(now.due) else event
        if event is not None:
            config = self.config.with_counts(event.counts).with_masks(self.masks or {})
            self._prune(self._recipe.pruner(self._params(), None, config))
        return self.step()


class Tickets(Pruning):
    """Lottery tickets: rounds of training, pruning and going back."""

    def _compress(self, eval_args: Any, finetune_args: Any) -> Any:
        """Returns the model that the first round trains."""
        rewind: list[str] | None = None if self._given["reset_weights"] else []
        self._tickets = pp.lottery(self._recipe.pruner, self.config, rewind=rewind)
        self.state = self._tickets.init(self._run())
        self._round = 0
        return self.model

    def get_prune_iterations(self) -> Iterator[int]:
        """Returns the rounds: one more than prune, the first one trains all."""
        return iter(range(self._step.rules[0]["prune_iterations"] + 1))

    def prune_iteration_start(self, model: Any = None) -> Any:
        """Returns the model that the next round trains: pruned, and back at its start."""
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

    def _run(self) -> dict[str, Any]:
        """Returns the run of a lottery ticket: what goes back at the head of a round."""
        run = {"params": self._params()}
        if self._name == "torch":
            own = run["params"]
            run["rest"] = {n: x for n, x in self._model.state_dict().items() if n not in own}
        for name in ("optimizer", "lr_scheduler"):
            if self._given.get(name) is not None and self._name == "torch":
                run[name] = self._given[name].state_dict()
        return run


class Shrinking(Pruning):
    """Makes a model smaller that was pruned before: channels that are zero go."""

    def _resolve(self) -> None:
        layers = self._layers()
        self.config = pp.resolve([{}], layers, granularity="output_channel")

    def _compress(self, eval_args: Any, finetune_args: Any) -> Any:
        """Returns the smaller model, as :meth:`apply_speedup` does."""
        self.masks = pp.masks_from_zeros(self._params(), self.config)
        return self.apply_speedup()


class ADMM(Pruning):
    """Trains towards weights that are zero already, then prunes."""

    def _compress(self, eval_args: Any, finetune_args: Any) -> Any:
        """Returns the trained and pruned model."""
        rho, pruner = self._given["row"], self._recipe.pruner
        self.state = pp.admm.init(self._params(), self.config)
        for i in range(self._given["num_iterations"]):
            for epoch in range(self._given["training_epochs"]):
                self._train(i * self._given["training_epochs"] + epoch, self.state, rho)
            self.state, _ = pp.admm.step(
                self._params(), self.state, self.config, rho, pruner=pruner
            )
        self._prune(pp.admm.masks(self._params(), self.state, self.config, pruner=pruner))
        return self.model
