"""What a task is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import purepruning as pp


def _same(params: Any) -> Any:
    return params


class Objective(NamedTuple):
    """What a task's ``minimize`` minimises in the place of the task's own loss.

    Attributes:
        loss: ``(params, extra, batch) -> (scalar, extra)``. ``extra`` is a tree of arrays that goes
            from step to step, such as running ranges or a dual variable; it gets no gradient.
        after: ``(params) -> params``, to be called on what every step of the optimizer returns.
    """

    loss: Callable[[Any, Any, Any], tuple[Any, Any]]
    after: Callable[[Any], Any] = _same


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)  # functions are equal to none
class Task:
    """A model, its data and its training, as pure functions over parameters.

    Parameters are a pytree of JAX arrays, or a flat dict from name to torch tensor; whatever else a
    model must hold, such as running statistics of norms, may be among them. No function changes
    what it is given, and with the same arguments each returns the same.

    In JAX, with ``traced=True``, every function must run under ``jax.jit`` and ``jax.vmap``; seeds
    are then int32 arrays (``jax.random.key(seed)`` takes them), and a study prunes and trains many
    networks in one call. A function of torch may put parameters into a module
    (``load_state_dict``), train that, and return its ``state_dict``, cloned.

    Only the first seven are needed. Each of the others is asked for by what needs it, by name:
    ADMM, AutoCompress and quantizers train with ``minimize`` and ``loss``, and quantised
    activations need the three that end in ``activations`` and ``at``.

    Attributes:
        name: in titles and files.
        layers: the layer table, as an adapter's ``layers`` returns it.
        rules: which layers are pruned: rules as of :func:`purepruning.resolve`. A study replaces
            their sparsity, a recipe has rules of its own.
        init: ``(seed) -> params``: a network that is not trained.
        train: ``(params, seed) -> params``: training from the start, nothing pruned.
        tune: ``(params, masks, seed, epochs) -> params``: trains on, as after pruning. ``masks``
            have the structure of ``params``, True where kept, None where nothing is pruned (or are
            None: then nothing is); pruned weights end at zero. ``epochs`` is a Python integer.
        evaluate: ``(params) -> score``, a scalar; larger is better. Of data that no other function
            of the task sees.
        tuning_epochs: after how many epochs a study compares.
        metric: what the score is; ``"accuracy"`` is from 0 to 1, and shown in percent.
        batches: some batches of training data, for statistics: what ``loss`` and ``capture`` take.
        loss: ``(params, batch) -> scalar``, for criteria that rank by gradients, and ``minimize``.
        minimize: ``(objective, extra, params, masks, seed, epochs) -> (params, extra)``: what
            ``tune`` does, with the loss of an :class:`Objective` in the place of the task's own.
            One objective serves many calls, and is hashed by identity: ``jax.jit`` may take it, and
            ``epochs``, as static.
        capture: ``(params, batch, layers, of) -> {layer name: array}``, what an adapter's
            ``capture`` finds: ``of="outputs"`` of layers, before their activation, or ``"inputs"``.
        activation: of the outputs: a name as of :mod:`purepruning.stats.activations`.
        activations: rows that an adapter's ``activations`` returns: where activations may be
            quantised.
        loss_at: ``(params, batch, at) -> (scalar, seen)``: ``loss`` of the model with functions at
            sites, and what these found, as an adapter's ``replace`` returns it.
        evaluate_at: ``(params, at) -> score``: ``evaluate`` of the same.
        apply: ``(params, *inputs) -> outputs``, the forward pass: what is coupled and shrunk.
        inputs: example inputs of ``apply``, a batch.
        model: the torch, NNX or Equinox module, where a smaller module is wanted.
        traced: whether the functions are JAX, and may be traced.
        about: what a report says of the task: data, split, training; a sentence each, by its title.

    >>> import jax, jax.numpy as jnp
    >>> import purepruning as pp
    >>> params = {"w": jnp.ones((2, 3))}
    >>> task = Task(
    ...     name="sums",
    ...     layers=(pp.make_layer(params, "w", "Linear", out_axes=1, in_axes=0),),
    ...     rules=[{"sparsity": 0.5, "op_types": ["default"]}],
    ...     init=lambda seed: {"w": jax.random.normal(jax.random.key(seed), (2, 3))},
    ...     train=lambda params, seed: params,
    ...     tune=lambda params, masks, seed, epochs: params,
    ...     evaluate=lambda params: params["w"].sum(),
    ...     traced=True,
    ... )
    >>> task.metric, task.tuning_epochs
    ('accuracy', 5)
    """

    name: str
    layers: tuple[pp.Layer, ...]
    rules: Sequence[Mapping[str, Any]]
    init: Callable[[Any], Any]
    train: Callable[[Any, Any], Any]
    tune: Callable[[Any, Any, Any, int], Any]
    evaluate: Callable[[Any], Any]
    tuning_epochs: int = 5
    metric: str = "accuracy"
    batches: Sequence[Any] = ()
    loss: Callable[[Any, Any], Any] | None = None
    minimize: Callable[..., tuple[Any, Any]] | None = None
    capture: Callable[..., Mapping[str, Any]] | None = None
    activation: str = "relu"
    activations: Sequence[pp.Activation] = ()
    loss_at: Callable[..., tuple[Any, Any]] | None = None
    evaluate_at: Callable[[Any, Any], Any] | None = None
    apply: Callable[..., Any] | None = None
    inputs: tuple[Any, ...] = ()
    model: Any = None
    traced: bool = False
    about: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        where = f"task {self.name!r}"
        object.__setattr__(self, "layers", tuple(self.layers))
        for name in ("init", "train", "tune", "evaluate"):
            if not callable(getattr(self, name)):
                raise TypeError(
                    f"{where}: {name} must be a function, got {getattr(self, name)!r}; give one"
                )
        for name in ("loss", "minimize", "capture", "apply", "loss_at", "evaluate_at"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise TypeError(f"{where}: {name} must be a function, got {value!r}; leave it out")
        if not self.layers or not all(isinstance(x, pp.Layer) for x in self.layers):
            raise TypeError(
                f"{where}: layers must be rows of the layer table, got {self.layers!r}; give what "
                "an adapter's layers() returns"
            )
