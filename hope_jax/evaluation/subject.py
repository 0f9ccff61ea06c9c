"""What a task is, and what it is given to examine."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from flax import nnx

from hope_jax.data.packing import Stream
from hope_jax.data.tokenizer import Tokenizer

Results = dict[str, int | float | str | list[str]]
"""What a task found: numbers by name, and texts that the model wrote."""


def _silently(steps: Sequence[Any]) -> Iterable[Any]:
    return steps


class Subject(NamedTuple):
    """A trained model with all that it was trained with.

    Attributes:
      model: The model.
      tokenizer: Its tokenizer.
      stream: Gives a split of the data it was trained on, by name.
      window: The tokens that it read at once in training.
      isolate: Whether documents began with fresh memory in training.
      track: Passes steps on and may show how many of them are done.
    """

    model: nnx.Module
    tokenizer: Tokenizer
    stream: Callable[[str], Stream]
    window: int
    isolate: bool = True
    track: Callable[[Sequence[Any]], Iterable[Any]] = _silently


class Task(Protocol):
    """A question with its settings: a frozen dataclass of plain values, checked when it is made."""

    def run(self, subject: Subject) -> Results:
        """Asks it.

        Raises:
          ValueError: The question does not fit the subject.
        """
        ...
