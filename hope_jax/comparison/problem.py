"""What a task of a comparison has to say: where it starts, what it costs and how it is judged."""

from collections.abc import Callable, Generator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int, PyTree

from hope_jax.optimizers import ParamInfo

Params = Any  # a pytree of arrays
Batch = Any  # a pytree of arrays
Batches = Generator[Batch, None, None]
Sums = dict[str, tuple[Array, Array]]
"""Sums over a batch and the weights that they are for, by the name of what was measured."""

CHANGEABLE = ("name", "goal", "at_once")
"""Settings of tasks that change no result."""


class Problem(NamedTuple):
    """A task, ready to be trained on.

    Attributes:
      init: Makes the parameters of a seed; traced.
      loss: What is descended on; traced.
      measure: What is judged; traced. "loss" is, and is the smaller the better.
      train: Reads the batches of training: the same ones, in the same order, at every call.
      evaluate: Reads a split, "valid" or "test", once.
      info: Metadata of the parameters, see `hope_jax.optimizers.describe`.
      keep_best: Whether a run is judged where its validation loss was lowest, not at its end.
      at_once: How many runs train in one program; None for all.
      about: Further facts for the report, as `parameters`.
    """

    init: Callable[[Int[Array, ""]], Params]
    loss: Callable[[Params, Batch], Float[Array, ""]]
    measure: Callable[[Params, Batch], Sums]
    train: Callable[[], Batches]
    evaluate: Callable[[str], Batches]
    info: PyTree[ParamInfo] | None = None
    keep_best: bool = False
    at_once: int | None = None
    about: Mapping[str, float] = MappingProxyType({})


@runtime_checkable
class Task(Protocol):
    """The settings of a task; a frozen dataclass with a field `kind`."""

    @property
    def name(self) -> str | None:
        """In files and tables; None for its kind."""
        ...

    @property
    def steps(self) -> int:
        """Of a run."""
        ...

    @property
    def every(self) -> int:
        """Steps between evaluations."""
        ...

    @property
    def goal(self) -> float | None:
        """Validation loss to stay below; optimizers are then ranked by the steps it takes."""
        ...

    def build(self) -> Problem:
        """Makes the problem."""
        ...

    def identity(self) -> dict[str, Any]:
        """All that its results depend on, as JSON has it."""
        ...


def check(task: Task):
    """Raises ValueError unless the settings that all tasks have can be."""
    for name in ("steps", "every"):
        if getattr(task, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(task, name)}")
    if task.goal is not None and not task.goal > 0:
        raise ValueError(f"goal must be above 0, or null for none, got {task.goal}")
