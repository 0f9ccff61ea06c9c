"""What a task is, and what it is given to examine."""

from collections.abc import Callable
from dataclasses import Field
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
from jaxtyping import Int

from hope_jax.data.packing import Stream
from hope_jax.data.tokenizer import Tokenizer
from hope_jax.models.adapt import repeat, settle
from hope_jax.models.decoder import Decoder, Memory
from hope_jax.models.generate import Track
from hope_jax.models.memory_file import load_memory

Results = dict[str, int | float | str | list[str]]
"""What a task found: numbers by name, and texts that the model wrote."""


class TaskError(ValueError):
    """A question does not fit the subject, or asks for what is not there; the message is a line."""


class Subject(NamedTuple):
    """A trained model with all that it was trained with.

    Attributes:
      model: The model.
      tokenizer: Its tokenizer.
      stream: Gives a split of the data it was trained on, by name.
      window: The tokens that it read at once in training.
      isolate: Whether documents began with fresh memory in training.
      track: Passes steps on and may show how many of them are done.
      folder: Where reports go that are more than numbers.
    """

    model: Decoder
    tokenizer: Tokenizer
    stream: Callable[[str], Stream]
    window: int
    isolate: bool = True
    track: Track = iter
    folder: Path = Path()


class Task(Protocol):
    """A question with its settings: a frozen dataclass of plain values, checked when it is made."""

    __dataclass_fields__: ClassVar[dict[str, Field]]

    def run(self, subject: Subject) -> Results:
        """Asks it.

        Raises:
          TaskError: The question does not fit the subject.
        """
        ...


def read_text(path: Path) -> str:
    """Reads a file that a user names.

    Raises:
      TaskError: There is no such file, or it is no UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise TaskError(f"file {str(path)!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TaskError(f"file {str(path)!r} is not UTF-8: {error}") from error


def recall(model: Decoder, file: str, rows: int) -> Memory:
    """Loads a memory that `read` left, for `rows` sequences that all go on from it.

    Raises:
      TaskError: It cannot be read, is another model's, or of several sequences.
    """
    try:
        return repeat(settle(model, load_memory(file, model)), rows)
    except ValueError as error:
        raise TaskError(str(error)) from error


def encode(tokenizer: Tokenizer, text: str, name: str) -> Int[np.ndarray, " T"]:
    """Encodes a text that a user gives, called `name` in errors.

    Raises:
      TaskError: The tokenizer has no ids for it.
    """
    try:
        return tokenizer.encode(text)
    except ValueError as error:
        raise TaskError(f"the tokenizer cannot encode {name}: {error}") from error
