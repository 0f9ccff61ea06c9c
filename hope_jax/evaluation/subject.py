"""What a task is, and what it is given to examine."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

from flax import nnx

from hope_jax.data.packing import Stream
from hope_jax.data.tokenizer import Tokenizer
from hope_jax.models.generate import Track

Results = dict[str, int | float | str | list[str]]
"""What a task found: numbers by name, and texts that the model wrote."""


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
    track: Track = iter


class Task(Protocol):
    """A question with its settings: a frozen dataclass of plain values, checked when it is made."""

    def run(self, subject: Subject) -> Results:
        """Asks it.

        Raises:
          ValueError: The question does not fit the subject.
        """
        ...
