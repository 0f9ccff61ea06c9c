"""MAD: six small tasks that tell what a mixer of tokens can do from what it cannot."""

from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import numpy as np

from hope_jax.data.synthetic_labels import About, Labelled, check_counts


class Sizes(NamedTuple):
    """How large a task is.

    Attributes:
      vocabulary: Ids of its inputs.
      length: Tokens of an example.
      answers: Different answers to a question; what guesses is right once in so many times.
    """

    vocabulary: int
    length: int
    answers: int


SIZES = {
    "in_context_recall": Sizes(16, 128, 8),
    "fuzzy_recall": Sizes(16, 128, 8),
    "noisy_recall": Sizes(32, 128, 8),
    "selective_copying": Sizes(16, 256, 14),
    "memorization": Sizes(256, 32, 127),
    "compression": Sizes(16, 32, 15),
}
"""The tasks at the sizes of the paper's baseline."""

KEYS = 8
"""Keys, and values, of the recall tasks."""

COPIED = 16
"""Tokens that selective copying asks for."""


@dataclass(frozen=True, kw_only=True)
class MadConfig:
    """One of the six tasks of MAD.

    in_context_recall: pairs of a key and a value, drawn anew for each example; the label after a
    key that came before is its value. fuzzy_recall: keys and values are of one to three tokens; no
    key begins another one. noisy_recall: one slot in five holds noise, from symbols of its own.
    selective_copying: 16 symbols among blanks are to be said in order at the end, each at an
    `insert` token. memorization: the map from keys to values is the same in all examples and can
    only be learned; a value is to be said at the `insert` after its key. compression: all 31 random
    tokens are to be said from what the model has at the last one, by a decoder that is trained
    along.

    Where the paper leaves a choice (pairs of fuzzy recall: eight in an example) it is ours.

    Attributes:
      task: One of `SIZES`.
      examples: Of training.
      held_out: Of `valid`, and of `test`.
      seed: Another seed, other examples.

    References:
      Poli et al., "Mechanistic Design and Scaling of Hybrid Architectures", 2024.
    """

    kind: Literal["mad"] = "mad"
    task: Literal[
        "in_context_recall",
        "fuzzy_recall",
        "noisy_recall",
        "selective_copying",
        "memorization",
        "compression",
    ]
    examples: int = 12_800
    held_out: int = 1_280
    seed: int = 0

    def __post_init__(self):
        check_counts(self)

    @property
    def about(self) -> About:
        """See `LabelledTask`."""
        sizes = SIZES[self.task]
        summary = self.task == "compression"
        chance = 1 / sizes.answers
        return About(self.task, sizes.vocabulary, ("test",), "accuracy", chance, summary)

    def example(self, split: str, number: int) -> Labelled:
        """See `LabelledTask`."""
        splits = ("train", "valid", "test")
        random = np.random.default_rng((self.seed, splits.index(split), number))
        length = SIZES[self.task].length
        if self.task == "selective_copying":
            return _selective_copying(random, length)
        if self.task == "memorization":
            return _memorization(random, length, self.seed)
        if self.task == "compression":
            inputs = np.append(random.integers(15, size=length - 1), 15)
            return _labelled(inputs, inputs, np.arange(length) < length - 1)
        longest = 3 if self.task == "fuzzy_recall" else 1
        return _recall(random, length, longest, 0.2 if self.task == "noisy_recall" else 0.0)


def _recall(random: np.random.Generator, length: int, longest: int, noise: float) -> Labelled:
    """Pairs of motifs of at most `longest` tokens; a share of `noise` of the slots is neither."""
    keys = _motifs(random, longest)
    values = [KEYS + random.integers(KEYS, size=random.integers(longest) + 1) for _ in keys]
    inputs, labels, weights = [], [], []
    seen: set[int] = set()
    while len(inputs) < length:
        if random.random() < noise:
            one, said, asked = random.integers(2 * KEYS, 4 * KEYS, size=1), np.zeros(1), [0]
        else:
            which = int(random.integers(len(keys)))
            key, value = keys[which], values[which]
            one = np.concatenate([key, value])
            said = np.append(one[1:], 0)
            # A value is asked for from the key's last token on.
            asked = [0] * (len(key) - 1) + [which in seen] * len(value) + [0]
            seen.add(which)
        inputs += [*one]
        labels += [*said]
        weights += asked
    return _labelled(*(np.array(x[:length]) for x in (inputs, labels, weights)))


def _motifs(random: np.random.Generator, longest: int) -> list[np.ndarray]:
    """Draws eight keys, none of which begins another."""
    if longest == 1:
        return [np.array([key]) for key in range(KEYS)]
    found: list[tuple[int, ...]] = []
    while len(found) < KEYS:
        size = int(random.integers(longest)) + 1
        one = tuple(random.integers(KEYS, size=size).tolist())
        ends = [other[: len(one)] == one[: len(other)] for other in found]
        if not any(ends):
            found.append(one)
    return [np.array(one) for one in found]


def _selective_copying(random: np.random.Generator, length: int) -> Labelled:
    blank, insert = 14, 15
    inputs = np.full(length, blank)
    inputs[-COPIED:] = insert
    symbols = random.integers(blank, size=COPIED)
    inputs[np.sort(random.permutation(length - COPIED)[:COPIED])] = symbols
    labels = np.zeros(length)
    labels[-COPIED:] = symbols
    return _labelled(inputs, labels, inputs == insert)


def _memorization(random: np.random.Generator, length: int, seed: int) -> Labelled:
    values, insert = _fixed_map(seed), 255
    keys = random.integers(len(values), size=length // 2)
    inputs = np.stack([keys, np.full_like(keys, insert)], 1).ravel()
    labels = np.repeat(len(values) + values[keys], 2)
    return _labelled(inputs, labels, inputs == insert)


@cache
def _fixed_map(seed: int) -> np.ndarray:
    return np.random.default_rng((seed, 3)).permutation(SIZES["memorization"].answers)


def _labelled(inputs: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> Labelled:
    weighted = weights.astype(np.float32)
    return Labelled(
        inputs.astype(np.int32), np.where(weighted > 0, labels, 0).astype(np.int32), weighted
    )
