"""Made-up examples with a label at each position, for what next-token prediction cannot ask."""

from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Float, Int


class Labelled(NamedTuple):
    """Inputs and what is to be said of them; a leading axis of many where they are stacked.

    Attributes:
      inputs: What a model reads.
      labels: What it is to say after each input.
      weights: How much each label counts; 0 where there is none.
    """

    inputs: Int[Array | np.ndarray, "*N T"]
    labels: Int[Array | np.ndarray, "*N T"]
    weights: Float[Array | np.ndarray, "*N T"]


class About(NamedTuple):
    """What a task is, beside its examples.

    Attributes:
      title: In files and tables.
      symbols: Ids that inputs and labels need, from 0 on.
      tests: Names of the splits that are reported; `train` and `valid` are the others.
      score: What a test counts: "accuracy" of single labels, or that of "strings", in which all
        labels have to be right.
      chance: That score for the best guess that does not see the input.
      summary: Whether the labels are about the whole input, and said after its last token alone.
    """

    title: str
    symbols: int
    tests: tuple[str, ...]
    score: Literal["accuracy", "strings"]
    chance: float
    summary: bool = False


@runtime_checkable
class LabelledTask(Protocol):
    """The settings of a task, a frozen dataclass that makes examples."""

    @property
    def about(self) -> About:
        """What it is."""
        ...

    @property
    def examples(self) -> int:
        """Examples of the split `train`."""
        ...

    @property
    def held_out(self) -> int:
        """Examples of each other split."""
        ...

    def example(self, split: str, number: int) -> Labelled:
        """Makes one example, which depends on the settings, the split and its number alone."""
        ...


def draw(task: LabelledTask, split: str) -> Labelled:
    """Makes all examples of a split, stacked; shorter ones end in what has no weight."""
    count = task.examples if split == "train" else task.held_out
    return stack([task.example(split, number) for number in range(count)])


def stack(examples: list[Labelled], length: int = 0) -> Labelled:
    """Stacks examples of at most `length` tokens, or as long as the longest."""
    length = max(length, *(one.inputs.shape[-1] for one in examples))

    def pad(x: np.ndarray) -> np.ndarray:
        return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])])

    return Labelled(*(np.stack([pad(x) for x in some]) for some in zip(*examples, strict=True)))


def check_counts(task: object):
    """Raises ValueError unless the settings that all tasks have can be."""
    for name, least in (("examples", 1), ("held_out", 1), ("seed", 0)):
        if getattr(task, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(task, name)}")
