"""Toys whose optimum is known: a valley that turns, and tasks that have nothing in common."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hope_jax.comparison.problem import CHANGEABLE, Batches, Params, Problem, Sums, check


@dataclass(frozen=True, kw_only=True)
class ValleyTask:
    """A quadratic whose curvature turns while it is descended on.

        loss_t(W) = 1/2 sum_i c_i ((W - W*) R_t e_i)^2,    R_t a rotation by `turn` t

    R_t turns each column with its neighbour, as 2 x 2 blocks; the curvatures c_i fall in equal
    ratios from 1 to 1 / condition. With one row and two columns it is the toy of the paper's figure
    4 in our words. Seeds decide where W starts, at the same distance from the optimum. Judged by
    that distance, as a share of the first one.

    Attributes:
      rows: Of W.
      columns: Of W; even.
      condition: The largest curvature over the smallest.
      turn: Radians from step to step.
      noise: Deviation of what is added to each number of the gradient.

    References:
      Behrouz et al., "Nested Learning", 2025, figure 4.
    """

    kind: Literal["valley"] = "valley"
    name: str | None = None
    rows: int = 1
    columns: int = 2
    condition: float = 3.0
    turn: float = 0.3
    noise: float = 0.0
    steps: int = 300
    every: int = 1
    goal: float | None = None

    def __post_init__(self):
        check(self)
        if self.rows < 1 or self.columns < 2 or self.columns % 2:
            raise ValueError(
                "rows must be at least 1 and columns even and at least 2, got "
                f"{self.rows} and {self.columns}"
            )
        if self.condition < 1:
            raise ValueError(f"condition must be at least 1, got {self.condition}")
        if self.noise < 0:
            raise ValueError(f"noise must be at least 0, got {self.noise}")

    def identity(self) -> dict[str, Any]:
        """See `Task`."""
        return {key: value for key, value in asdict(self).items() if key not in CHANGEABLE}

    def build(self) -> Problem:
        """See `Task`."""
        curvature = jnp.geomspace(1.0, 1 / self.condition, self.columns)
        best = jnp.tile(jnp.array([1.0, -1.0]), (self.rows, self.columns // 2))
        length = 3 * float(np.sqrt(self.rows * self.columns))

        def init(seed: Int[Array, ""]) -> Params:
            away = jax.random.normal(jax.random.key(seed), best.shape)
            return {"weight": best + length * away / jnp.linalg.norm(away)}

        def loss(params: Params, t: Int[Array, ""]) -> Float[Array, ""]:
            away = params["weight"] - best
            angle = self.turn * t
            first, second = away[:, 0::2], away[:, 1::2]
            along = first * jnp.cos(angle) + second * jnp.sin(angle)
            across = second * jnp.cos(angle) - first * jnp.sin(angle)
            turned = jnp.stack([along, across], axis=-1).reshape(best.shape)
            kick = self.noise * jax.random.normal(
                jax.random.fold_in(jax.random.key(0), t), away.shape
            )
            return jnp.sum(curvature * turned**2) / 2 + jnp.vdot(kick, away)

        def measure(params: Params, _: Int[Array, ""]) -> Sums:
            return {"loss": (jnp.linalg.norm(params["weight"] - best) / length, jnp.ones(()))}

        return Problem(init, loss, measure, _count, _once, about={"parameters": best.size})


@dataclass(frozen=True, kw_only=True)
class SequenceTask:
    """Regressions one after another, on inputs that are orthogonal to those of all the others.

    A network with one hidden layer learns each linear map for `steps / tasks` steps. Inputs of task
    i lie in a subspace of their own, so that gradients of the first layer are orthogonal between
    tasks; the second layer is shared. Judged at the end, by the mean error on all tasks, where 1 is
    what saying nothing costs: what is learned late must not undo what was learned early.

    Attributes:
      tasks: How many.
      size: Dimensions of a task's inputs.
      hidden: Units of the hidden layer.
      out: Dimensions of the outputs.
      batch: Examples in a step.

    References:
      Behrouz et al., "Nested Learning", 2025, section 4.3.
    """

    kind: Literal["sequence"] = "sequence"
    name: str | None = None
    tasks: int = 5
    size: int = 4
    hidden: int = 64
    out: int = 4
    batch: int = 16
    steps: int = 500
    every: int = 10
    goal: float | None = None

    def __post_init__(self):
        check(self)
        for name in ("tasks", "size", "hidden", "out", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.steps % self.tasks:
            raise ValueError(f"steps must be a multiple of tasks={self.tasks}, got {self.steps}")

    def identity(self) -> dict[str, Any]:
        """See `Task`."""
        return {key: value for key, value in asdict(self).items() if key not in CHANGEABLE}

    def build(self) -> Problem:
        """See `Task`."""
        into = self.tasks * self.size
        basis, maps, fixed = jax.random.split(jax.random.key(0), 3)
        basis = jnp.linalg.qr(jax.random.normal(basis, (into, into)))[0]
        basis = basis.reshape(into, self.tasks, self.size)
        maps = jax.random.normal(maps, (self.tasks, self.size, self.out)) / self.size**0.5
        held_out = jax.random.normal(fixed, (self.tasks, 64, self.size))

        def init(seed: Int[Array, ""]) -> Params:
            first, second = jax.random.split(jax.random.key(seed))
            return {
                "first": jax.random.normal(first, (into, self.hidden)) / self.size**0.5,
                "second": jax.random.normal(second, (self.hidden, self.out)) / self.hidden,
            }

        def error(params: Params, task: Array, code: Float[Array, "N size"]) -> Float[Array, ""]:
            hidden = jnp.tanh(code @ basis[:, task].T @ params["first"])
            return jnp.mean((hidden @ params["second"] - code @ maps[task]) ** 2)

        def loss(params: Params, t: Int[Array, ""]) -> Float[Array, ""]:
            key = jax.random.fold_in(jax.random.key(1), t)
            code = jax.random.normal(key, (self.batch, self.size))
            return error(params, t // (self.steps // self.tasks), code)

        def measure(params: Params, _: Int[Array, ""]) -> Sums:
            errors = jax.vmap(lambda task, code: error(params, task, code))(
                jnp.arange(self.tasks), held_out
            )
            cost = jnp.mean(jnp.sum(maps**2, axis=1), axis=-1)  # of saying nothing, by task
            errors, count = errors / cost, jnp.full((), float(self.tasks))
            return {"loss": (jnp.sum(errors), count), "first_task": (errors[0], jnp.ones(()))}

        size = (into + self.out) * self.hidden
        return Problem(init, loss, measure, _count, _once, about={"parameters": size})


def _count() -> Batches:
    """The steps themselves: all else is drawn from them."""
    step = 0
    while True:
        yield np.int32(step)
        step += 1


def _once(split: str) -> Batches:
    """One batch, as what is judged needs no data; both splits are the same."""
    del split
    yield np.int32(0)
