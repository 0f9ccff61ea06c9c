"""Trains one optimizer on one task at many learning rates and seeds, in as few programs as fit."""

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from hope_jax.comparison.problem import Batch, Params, Problem, Sums
from hope_jax.optimizers import OptimizerConfig

POINTS = 200
"""The most points of a curve that are kept."""

TIMED = 24
"""Steps that are timed: a multiple of the usual periods, for what is done now and then counts."""


class Replica(NamedTuple):
    """One run.

    Attributes:
      rate: The highest learning rate of its schedule.
      seed: Decides where its parameters start; batches are the same for all.
    """

    rate: float
    seed: int


class Group(NamedTuple):
    """Some replicas that train in one program, stacked in front; one alone is not stacked.

    Attributes:
      rates: Of the replicas.
      params: Where they stand.
      state: Their optimizers'.
      best: Lowest validation loss, and the parameters that had it.
    """

    rates: Float[Array, "..."]
    params: Params
    state: optax.OptState
    best: tuple[Float[Array, "..."], Params]


class Step(NamedTuple):
    """An optimizer's part of a step, for groups of one size.

    Attributes:
      init: Makes its state for parameters.
      apply: Moves parameters and state, which it is given to keep, by a rate and gradients.
    """

    init: Callable[[Params], optax.OptState]
    apply: Callable[[Array, Params, Params, optax.OptState], tuple[Params, optax.OptState]]


class Programs:
    """What is compiled once for a task and groups of one size.

    Gradients are a program of their own, which all optimizers share.
    """

    def __init__(self, problem: Problem, size: int):
        """Compiles nothing yet.

        Args:
          problem: The task.
          size: Replicas in a group.
        """
        self.size = size
        self._problem = problem
        self.step = cache(self._step)
        each = jax.vmap if size > 1 else lambda function, **_: function
        self.init = jax.jit(each(problem.init))
        self.gradient = jax.jit(each(jax.value_and_grad(problem.loss), in_axes=(0, None)))

        def measure(params: Params, batch: Batch) -> Sums:
            # One after the other: evaluation holds more than training does, and takes less time.
            if size == 1:
                return problem.measure(params, batch)
            return jax.lax.map(lambda one: problem.measure(one, batch), params)

        def keep(loss: Array, params: Params, best: tuple[Array, Params]) -> tuple[Array, Params]:
            better = loss < best[0]
            return (
                jnp.where(better, loss, best[0]),
                jax.tree.map(partial(jnp.where, better), params, best[1]),
            )

        self.measure = jax.jit(measure)
        self.keep = jax.jit(each(keep), donate_argnums=2)
        self._each = each

    def stack(self, values: Sequence[float | int] | np.ndarray) -> Array:
        """Lays a number for each replica as the programs take them."""
        return jnp.asarray(values if self.size > 1 else values[0])

    def _step(self, optimizer: OptimizerConfig, steps: int) -> Step:
        def build(rate: float | Array) -> optax.GradientTransformation:
            return optimizer.build(steps, self._problem.info, learning_rate=rate)

        def apply(rate: Array, grads: Params, params: Params, state: optax.OptState):
            updates, state = build(rate).update(grads, state, params)
            return optax.apply_updates(params, updates), state

        init = jax.jit(self._each(lambda params: build(0.0).init(params)))
        return Step(init, jax.jit(self._each(apply), donate_argnums=(2, 3)))


def train(
    problem: Problem,
    optimizer: OptimizerConfig,
    replicas: Sequence[Replica],
    *,
    steps: int,
    every: int,
    programs: Callable[[int], Programs],
    progress: Callable[[int, str], None],
) -> list[dict[str, Any]]:
    """Trains all replicas on the same batches.

    Groups of at most `problem.at_once` of them train in one program, all groups in one pass over
    the data.

    Args:
      problem: The task.
      optimizer: What is compared; its learning rate is replaced by the replicas'.
      replicas: At least one.
      steps: Of each run.
      every: Steps between evaluations; there is one before the first step and one after the last.
      programs: The task's programs by size of a group.
      progress: Told the step after each, and what is new to show.

    Returns:
      For each replica what was found, as JSON has it; see `hope_jax.comparison.report`.
    """
    size = _largest_divisor(len(replicas), problem.at_once or len(replicas))
    program = programs(size)
    step = program.step(optimizer, steps)
    groups = []
    for start in range(0, len(replicas), size):
        rates, seeds = zip(*replicas[start : start + size], strict=True)
        params = program.init(program.stack(seeds))
        best = program.stack([float("inf")] * size), jax.tree.map(jnp.copy, params)
        groups.append(Group(program.stack(rates), params, step.init(params), best))

    train_losses, evaluations = [], []

    def evaluate(number: int):
        found = _evaluate(problem, program, [group.params for group in groups], "valid")
        evaluations.append((number, found))
        losses = _mean(found["loss"])
        if problem.keep_best:
            for i, loss in enumerate(losses.reshape(len(groups), size)):
                best = program.keep(program.stack(loss), groups[i].params, groups[i].best)
                groups[i] = groups[i]._replace(best=best)
        low, high = (pick(losses) for pick in (np.fmin.reduce, np.fmax.reduce))
        progress(number, f"valid {low:.4f} to {high:.4f}")

    evaluate(0)
    with closing(problem.train()) as batches:
        for number in range(1, steps + 1):
            batch = next(batches)
            losses = []
            for i, group in enumerate(groups):
                loss, grads = program.gradient(group.params, batch)
                params, state = step.apply(group.rates, grads, group.params, group.state)
                groups[i] = group._replace(params=params, state=state)
                losses.append(loss)
            train_losses.append(losses)
            jax.block_until_ready(train_losses[-2:][0])  # the device is a step behind, not more
            progress(number, "")
            if number % every == 0 or number == steps:
                evaluate(number)

    judged = [group.best[1] if problem.keep_best else group.params for group in groups]
    test = _evaluate(problem, program, judged, "test")
    curve = np.array(jax.device_get(train_losses), np.float64).reshape(steps, len(replicas))
    return [
        _found(i, problem, evaluations, curve[:, i], test) | {"about": dict(problem.about)}
        for i in range(len(replicas))
    ]


def speed(
    problem: Problem,
    optimizer: OptimizerConfig,
    replica: Replica,
    *,
    steps: int,
    programs: Callable[[int], Programs],
) -> dict[str, Any]:
    """Times one replica alone, and weighs its optimizer's state; arguments as for `train`.

    Returns:
      Seconds of a whole step, seconds of the optimizer's part, and bytes of its state.
    """
    program = programs(1)
    step = program.step(optimizer, steps)
    params = program.init(program.stack([replica.seed]))
    state, rate = step.init(params), program.stack([replica.rate])
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    with closing(problem.train()) as batches:
        batch = next(batches)

    def whole(params: Params, state: optax.OptState) -> tuple[Params, optax.OptState]:
        _, grads = program.gradient(params, batch)
        return step.apply(rate, grads, params, state)

    seconds, (params, state) = _time(whole, params, state)
    _, grads = program.gradient(params, batch)
    update, _ = _time(lambda *carry: step.apply(rate, grads, *carry), params, state)
    return {
        "step_seconds": seconds,
        "update_seconds": update,
        "state_bytes": size,
    }


def _found(
    i: int, problem: Problem, evaluations: list, curve: np.ndarray, test: dict[str, np.ndarray]
) -> dict[str, Any]:
    """What there is to say of replica `i`."""
    at = [number for number, _ in evaluations]
    valid = {name: [float(_mean(found[name])[i]) for _, found in evaluations] for name in test}
    losses = np.nan_to_num(valid["loss"], nan=np.inf)
    judged = int(np.argmin(losses)) if problem.keep_best else len(at) - 1
    thin = -(-len(curve) // POINTS)
    # Points are means over the steps since the last one, which noise makes a line of.
    ends = np.arange(thin, len(curve) + 1, thin)
    return {
        "valid_steps": at,
        "valid": valid,
        "judged_at": at[judged],
        "judged": {name: values[judged] for name, values in valid.items()},
        "test": {name: float(_mean(sums)[i]) for name, sums in test.items()},
        "test_sums": {name: float(sums[0][i]) for name, sums in test.items()},
        "train_steps": ends.tolist(),
        "train": [float(np.mean(curve[end - thin : end])) for end in ends],
    }


def _evaluate(
    problem: Problem, program: Programs, params: Sequence[Params], split: str
) -> dict[str, np.ndarray]:
    """Sums and weights (2, replicas) over a split, by name."""
    sums = []
    with closing(problem.evaluate(split)) as batches:
        for batch in batches:
            sums.append([program.measure(one, batch) for one in params])
    host = jax.device_get(sums)
    return {
        name: np.stack(
            [
                np.sum([[np.atleast_1d(found[name][k]) for found in row] for row in host], axis=0)
                for k in (0, 1)
            ],
            dtype=np.float64,
        ).reshape(2, -1)
        for name in host[0][0]
    }


def _mean(sums: np.ndarray) -> np.ndarray:
    return sums[0] / sums[1]


def _time(run: Callable[..., tuple], *carry: Any) -> tuple[float, tuple]:
    """Mean seconds of `carry = run(*carry)`, in the best of some rounds behind one to warm up."""
    seconds = []
    for steps in (3, *[TIMED] * 3):
        start = time.perf_counter()
        for _ in range(steps):
            carry = run(*carry)
        jax.block_until_ready(carry)
        seconds.append((time.perf_counter() - start) / steps)
    return min(seconds[1:]), carry


def _largest_divisor(number: int, most: int) -> int:
    return next(size for size in range(min(most, number), 0, -1) if number % size == 0)
