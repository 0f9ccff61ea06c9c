"""Class-incremental learning: groups of classes come one after the other, and are to be kept."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree

from hope_jax.data.intents import Classes
from hope_jax.models.decoder import Decoder, ModelConfig
from hope_jax.optimizers import OptimizerConfig, ParamInfo, describe
from hope_jax.training.step import outline

Params = Any  # {"model": ..., "head": ...}
FISHER_BATCHES = 16
"""Batches of a group that the curvature of its loss is estimated from."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """What is done against forgetting.

    Attributes:
      name: In files and tables.
      replay: Examples of each class seen that are kept, and make up half of a batch; 0 keeps none.
      everything: Whether all examples seen so far can be drawn: no continual learning, a bound.
      strength: How strongly parameters are drawn to what they were, times the curvature of the loss
        there (elastic weight consolidation).
    """

    name: str
    replay: int = 0
    everything: bool = False
    strength: float = 0.0

    def __post_init__(self):
        for name in ("replay", "strength"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")


class Plan(NamedTuple):
    """What one run trains on.

    Attributes:
      rows: Numbers of training examples, of each batch of each group.
      curvature: The same for estimating the curvature behind each group.
      allowed: For each group, and an example's class, the classes that are chosen from.
      strength: See `Method`.
      seed: Decides where parameters start.
    """

    rows: Int[Array | np.ndarray, "groups steps B"]
    curvature: Int[Array | np.ndarray, "groups batches B"]
    allowed: Bool[Array | np.ndarray, "groups classes classes"]
    strength: float | Array
    seed: int | Array


class Anchor(NamedTuple):
    """Where elastic weight consolidation draws parameters.

    Attributes:
      params: What they were behind the last group.
      curvature: The sum over groups of the Fisher information's diagonal.
    """

    params: Params
    curvature: Params


def plan(
    train: Classes,
    groups: Sequence[Int[np.ndarray, " _"]],
    method: Method,
    *,
    steps: int,
    batch: int,
    seed: int,
    known_task: bool = False,
) -> Plan:
    """Draws all batches of a run before it begins.

    Args:
      train: All training examples; a batch has none of later groups.
      groups: The classes of each group.
      method: What is done against forgetting.
      steps: Batches of each group.
      batch: Examples of a batch.
      seed: Of the examples and of the parameters.
      known_task: Whether an example's group is known, so that only its classes are chosen from.
    """
    random = np.random.default_rng((seed, 1))
    classes = 1 + int(train.labels.max())
    rows, curvature, allowed = [], [], []
    group = np.zeros(classes, int)
    for number, mine in enumerate(groups):
        group[mine] = number
    together = group[:, None] == group
    kept, old = np.zeros(0, int), np.zeros(0, int)
    for mine in groups:
        new = np.flatnonzero(np.isin(train.labels, mine))
        pool = np.concatenate([old, new]) if method.everything else new
        drawn = random.choice(pool, (steps, batch))
        if len(kept):
            half = batch // 2
            drawn[:, :half] = random.choice(kept, (steps, half))
        rows.append(drawn)
        curvature.append(random.choice(new, (FISHER_BATCHES, batch)))
        old = np.concatenate([old, new])
        seen = np.isin(np.arange(classes), train.labels[old])
        allowed.append(together if known_task else np.tile(seen, (classes, 1)))
        for one in mine:
            its = random.permutation(np.flatnonzero(train.labels == one))
            kept = np.concatenate([kept, its[: method.replay]])
    return Plan(np.stack(rows), np.stack(curvature), np.stack(allowed), method.strength, seed)


class Classifier:
    """Scores classes: a decoder that reads symbols and a matrix on its last state, or an MLP."""

    def __init__(self, model: ModelConfig | None, *, symbols: int, length: int, classes: int):
        """Allocates nothing.

        Args:
          model: The decoder; None for an MLP of two hidden layers of 256 that takes symbols for
            numbers, as grey levels are.
          symbols: Ids of inputs.
          length: Symbols of an input.
          classes: How many there are.
        """
        self._model, self._symbols, self._classes = model, symbols, classes
        matrix, vector = ParamInfo((None, None), "matrix"), ParamInfo((None,), "vector")
        if model is None:
            self._widths = (length, 256, 256, classes)
            self.info: PyTree[ParamInfo] = [
                {"weight": matrix, "bias": vector} for _ in self._widths[1:]
            ]
            return
        made = outline(partial(model.build, seed=0))
        self._graphdef = made.graphdef
        self.info = {"model": describe(made.variables), "head": matrix}

    def init(self, seed: Int[Array, ""]) -> Params:
        """Makes the parameters of a seed."""
        if self._model is None:
            keys = jax.random.split(jax.random.key(seed), len(self._widths) - 1)
            return [
                {
                    "weight": jax.random.normal(key, (into, out)) * (2 / into) ** 0.5,
                    "bias": jnp.zeros(out),
                }
                for key, into, out in zip(keys, self._widths, self._widths[1:], strict=False)
            ]
        model = self._model.build(seed=seed)
        shape = self._model.width, self._classes
        head = jax.random.normal(jax.random.fold_in(jax.random.key(seed), 1), shape)
        return {
            "model": nnx.to_pure_dict(nnx.split(model, nnx.Param)[1]),
            "head": head / self._model.width**0.5,
        }

    def logits(
        self,
        params: Params,
        inputs: Int[Array | np.ndarray, "B T"],
        lengths: Int[Array | np.ndarray, " B"],
    ) -> Float[Array, "B classes"]:
        """What the classifier says."""
        if self._model is None:
            x = jnp.asarray(inputs, jnp.float32) / (self._symbols - 1)
            for layer in params[:-1]:
                x = jax.nn.relu(x @ layer["weight"] + layer["bias"])
            return x @ params[-1]["weight"] + params[-1]["bias"]
        model: Decoder = nnx.merge(self._graphdef, params["model"])
        hidden = model.hidden(jnp.asarray(inputs))[0].astype(jnp.float32)
        last = jnp.take_along_axis(hidden, jnp.asarray(lengths)[:, None, None] - 1, axis=1)[:, 0]
        return last @ params["head"]


def learn(
    classifier: Classifier,
    optimizer: OptimizerConfig,
    data: tuple[Classes, Classes],
    groups: Sequence[Sequence[Int[np.ndarray, " _"]]],
    plans: Sequence[Plan],
    *,
    reset: bool,
    progress: Callable[[int, str], None],
) -> list[Float[np.ndarray, "groups groups"]]:
    """Trains all runs on one group after the other, in one program.

    Args:
      classifier: What learns.
      optimizer: How.
      data: Training and test examples.
      groups: For each run the classes of its groups.
      plans: For each run its batches.
      reset: Whether the optimizer forgets behind each group, and its schedule begins again.
      progress: Told how many groups are done, and what is new to show.

    Returns:
      For each run its accuracy matrix; see `summary`.
    """
    count, steps = plans[0].rows.shape[:2]
    programs = _Programs(classifier, optimizer, steps if reset else count * steps)
    train, test = (jax.tree.map(jnp.asarray, part) for part in data)
    stacked = Plan(*(jnp.asarray(np.stack(some)) for some in zip(*plans, strict=True)))
    params, fresh, anchor = programs.begin(stacked.seed)
    state, matrices = fresh, np.zeros((len(plans), count, count))
    for number in range(count):
        state = fresh if reset else state
        rows, allowed = stacked.rows[:, number], stacked.allowed[:, number]
        params, state = programs.train(
            params, state, anchor, train, rows, allowed, stacked.strength
        )
        if any(one.strength for one in plans):
            curvature = stacked.curvature[:, number]
            anchor = programs.consolidate(params, anchor, train, curvature, allowed)
        right = np.asarray(programs.judge(params, test, allowed))
        for run, its in enumerate(groups):
            for j, mine in enumerate(its):
                matrices[run, number, j] = right[run, np.isin(data[1].labels, mine)].mean()
        progress(number + 1, f"so far {matrices[:, number, : number + 1].mean():.3f}")
    return list(matrices)


class _Programs:
    """What is compiled for a classifier and an optimizer."""

    def __init__(self, classifier: Classifier, optimizer: OptimizerConfig, steps: int):
        build = partial(optimizer.build, steps, classifier.info)

        def nats(params: Params, batch: Classes, allowed: Array) -> Float[Array, ""]:
            logits = classifier.logits(params, batch.inputs, batch.lengths)
            logits = jnp.where(allowed[batch.labels], logits, -jnp.inf)
            own = jnp.take_along_axis(logits, batch.labels[:, None], axis=1)[:, 0]
            return jnp.mean(jax.nn.logsumexp(logits, axis=1) - own)

        def begin(seed: Array) -> tuple[Params, optax.OptState, Anchor]:
            params = classifier.init(seed)
            zeros = jax.tree.map(jnp.zeros_like, params)
            return params, build().init(params), Anchor(jax.tree.map(jnp.copy, params), zeros)

        def train(params, state, anchor: Anchor, data: Classes, rows, allowed, strength):
            def loss(params: Params, batch: Classes) -> Float[Array, ""]:
                pulls = jax.tree.map(
                    lambda x, before, weight: jnp.sum(weight * jnp.square(x - before)),
                    params,
                    anchor.params,
                    anchor.curvature,
                )
                return nats(params, batch, allowed) + strength / 2 * sum(jax.tree.leaves(pulls))

            def step(carry, rows):
                params, state = carry
                grads = jax.grad(loss)(params, jax.tree.map(lambda x: x[rows], data))
                updates, state = build().update(grads, state, params)
                return (optax.apply_updates(params, updates), state), None

            return jax.lax.scan(step, (params, state), rows)[0]

        def consolidate(params, anchor: Anchor, data: Classes, rows, allowed) -> Anchor:
            def square(row: Array) -> Params:
                example = jax.tree.map(lambda x: x[row][None], data)
                return jax.tree.map(jnp.square, jax.grad(nats)(params, example, allowed))

            def add(curvature: Params, rows: Array):
                # Of single examples: the square of a batch's mean gradient is another thing.
                squares = jax.vmap(square)(rows)
                mean = jax.tree.map(lambda x: jnp.mean(x, 0) / FISHER_BATCHES, squares)
                return jax.tree.map(jnp.add, curvature, mean), None

            return Anchor(params, jax.lax.scan(add, anchor.curvature, rows)[0])

        def judge(params: Params, test: Classes, allowed: Array) -> Bool[Array, " N"]:
            size = max(n for n in range(1, 257) if len(test.labels) % n == 0)

            def some(part: Classes) -> Bool[Array, " B"]:
                logits = classifier.logits(params, part.inputs, part.lengths)
                logits = jnp.where(allowed[part.labels], logits, -jnp.inf)
                return jnp.argmax(logits, -1) == part.labels

            parts = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), test)
            return jax.lax.map(some, parts).ravel()

        self.begin = jax.jit(jax.vmap(begin))
        self.train = jax.jit(jax.vmap(train, (0, 0, 0, None, 0, 0, 0)))
        self.consolidate = jax.jit(jax.vmap(consolidate, (0, 0, None, 0, 0)))
        self.judge = jax.jit(jax.vmap(judge, (0, None, 0)))
