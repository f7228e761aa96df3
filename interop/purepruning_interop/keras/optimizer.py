"""An optimizer around another one, whose variables hold masks: ``fit`` keeps weights pruned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from purepruning.arguments import instance, shown
from purepruning.arrays import copied
from purepruning.masks import apply_masks, by_path
from purepruning.types import Masks
from purepruning_interop.keras.variables import load, variables, write
from purepruning_interop.keras.walk import check


@keras.saving.register_keras_serializable("purepruning")
class KeepPruned(keras.optimizers.Optimizer):
    """An optimizer each of whose steps ends with pruned weights at zero.

    The step is that of ``inner_optimizer``: with momentum, weight decay, constraints, accumulated
    gradients and averages of weights (``use_ema``), none of which gets past it. Gradients are not
    masked. A mask of booleans for every trained variable is among the optimizer's variables, all
    True until :func:`set_masks` or :class:`PruneOnSchedule` says otherwise: they are a part of the
    compiled step's state, so that new masks take effect without another trace, and are saved and
    loaded with the model.

    Args:
        inner_optimizer: a Keras optimizer.
        name: its name.

    >>> import keras
    >>> from purepruning_interop.keras import KeepPruned
    >>> optimizer = KeepPruned(keras.optimizers.SGD(0.1, momentum=0.9))
    >>> weight = keras.Variable([1.0, 2.0])
    >>> optimizer.build([weight])
    >>> _ = optimizer.masks[0].assign([False, True])
    >>> optimizer.apply([keras.ops.array([1.0, 1.0])])
    >>> weight.value.tolist()
    [0.0, 1.9]
    """

    def __init__(self, inner_optimizer: Any, name: str | None = None) -> None:
        instance(
            inner_optimizer,
            keras.optimizers.Optimizer,
            "KeepPruned: inner_optimizer",
            "a Keras optimizer, such as keras.optimizers.Adam()",
        )
        super().__init__(learning_rate=0.0, name=name)
        self.inner_optimizer = inner_optimizer
        #: A mask for each of the variables that are trained, in their order; made by ``build``.
        self.masks: list[Any] = []

    def build(self, variables: Any) -> None:
        """Makes a mask for each of the variables, and what the inner optimizer needs."""
        if self.built:
            return
        self.inner_optimizer.build(variables)
        self.masks = [
            self.add_variable(v.shape, _all_true, dtype="bool", name=f"mask_{i}")
            for i, v in enumerate(variables)
        ]
        super().build(variables)

    @property
    def variables(self) -> list[Any]:
        """The masks, and the variables of the inner optimizer."""
        return super().variables + self.inner_optimizer.variables

    @property
    def trained(self) -> list[Any]:
        """The variables that it was built for."""
        return list(self._trainable_variables)

    def mask_of(self, variable: Any) -> Any:
        """Returns the variable that holds the mask of one that is trained."""
        return self.masks[self._get_variable_index(variable)]

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        """Takes a step of the inner optimizer, and sets pruned weights to zero."""
        if trainable_variables is not None and not self.built:
            self.build(list(trainable_variables))
        self.inner_optimizer.apply(grads, trainable_variables)
        self._zero(self.trained)

    def finalize_variable_values(self, var_list: Any) -> None:
        """Lets the inner optimizer write averages of weights, and sets pruned ones to zero."""
        self.inner_optimizer.finalize_variable_values(var_list)
        self._zero(var_list)

    def _zero(self, variables: Any) -> None:
        for v in variables:
            mask = self.mask_of(v)
            v.assign(keras.ops.where(mask.value, v.value, keras.ops.zeros_like(v.value)))

    @property
    def learning_rate(self) -> Any:
        """That of the inner optimizer."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def iterations(self) -> Any:
        """The steps taken, as the inner optimizer counts them."""
        return self.inner_optimizer.iterations

    def scale_loss(self, loss: Any) -> Any:
        """Returns the loss as the inner optimizer scales it."""
        return self.inner_optimizer.scale_loss(loss)

    def get_config(self) -> dict[str, Any]:
        """Returns what :meth:`from_config` makes it from again."""
        inner = keras.saving.serialize_keras_object(self.inner_optimizer)
        return {"name": self.name, "inner_optimizer": inner}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> KeepPruned:
        """Returns the optimizer that :meth:`get_config` describes."""
        inner = keras.saving.deserialize_keras_object(
            config["inner_optimizer"], custom_objects=custom_objects
        )
        return cls(inner, name=config["name"])


def set_masks(model: Any, masks: Masks) -> None:
    """Writes masks into the optimizer of a compiled model, and zeros into its pruned weights.

    From then on ``fit`` keeps them at zero; weights that were pruned and are not any more begin at
    zero. Masks of variables that are not trained (frozen layers, averages of a batch norm) write
    zeros once.

    Args:
        model: a model compiled with :class:`KeepPruned`, which is changed.
        masks: boolean arrays by path, as pruners return them for :func:`params`; what they do not
            name, or None, is not pruned.

    Raises:
        TypeError: ``model`` is no Keras layer, or a mask is not boolean.
        ValueError: it is not compiled with :class:`KeepPruned`, or a mask has another shape.
        KeyError: a mask names no variable.
    """
    where = "set_masks(model, masks)"
    optimizer = _keeper(where, model)
    found = variables(model)
    arrays = {path: v.value for path, v in found.items()}
    instance(masks, (Mapping, type(None)), f"{where}: masks", "a dictionary of masks by path")
    given = by_path(masks, arrays)
    load(model, apply_masks({path: arrays[path] for path in given}, given))
    trained = {id(v) for v in model.trainable_variables}
    for path, v in found.items():
        if id(v) in trained:
            mask = jnp.broadcast_to(jnp.asarray(given.get(path, True)), v.shape)
            write(optimizer.mask_of(v), mask)


def get_masks(model: Any) -> dict[str, jax.Array]:
    """Returns the masks in the optimizer of a compiled model, by path, of what is pruned.

    Args:
        model: a model compiled with :class:`KeepPruned`, also one that was saved and loaded.

    Raises:
        TypeError: ``model`` is no Keras layer.
        ValueError: it is not compiled with :class:`KeepPruned`.
    """
    optimizer = _keeper("get_masks(model)", model)
    trained = {id(v) for v in model.trainable_variables}
    masks = {p: optimizer.mask_of(v).value for p, v in variables(model).items() if id(v) in trained}
    return {path: copied(mask) for path, mask in masks.items() if not np.asarray(mask).all()}


def _keeper(where: str, model: Any) -> KeepPruned:
    """Returns the optimizer of a compiled model that keeps weights pruned, built."""
    check(where, model)
    optimizer = getattr(model, "optimizer", None)
    while optimizer is not None and not isinstance(optimizer, KeepPruned):
        optimizer = getattr(optimizer, "inner_optimizer", None)
    if optimizer is None:
        found = getattr(model, "optimizer", None)
        raise ValueError(
            f"{where}: the model must be compiled with KeepPruned(optimizer), got "
            f"{shown(found) if found is not None else 'a model that is not compiled'}; call "
            "model.compile(KeepPruned(keras.optimizers.Adam()), ...)"
        )
    if not optimizer.built:
        model.optimizer.build(model.trainable_variables)
    known = {id(v) for v in optimizer.trained}
    unknown = [v.path for v in model.trainable_variables if id(v) not in known]
    if unknown:
        raise ValueError(
            f"{where}: the optimizer was built without {unknown[0]!r}, which is trained now; "
            "compile the model again with a new optimizer"
        )
    return optimizer


def _all_true(shape: Any, dtype: Any = None) -> Any:
    return keras.ops.ones(shape, dtype)
