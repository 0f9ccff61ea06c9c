"""Formal languages and word problems of groups: what a model must be able to keep count of."""

from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import Literal

import numpy as np

from hope_jax.data.synthetic_labels import About, Labelled, check_counts

PERIODS = {
    "parity": 1,
    "aa_star": 2,
    "abab_star": 4,
    "a_n_b_n": 2,
    "a_n_b_n_c_n": 3,
    "shuffle_2": 2,
}
"""Languages, and what the length of a string is a multiple of."""


@dataclass(frozen=True, kw_only=True)
class FormalConfig:
    """Strings of a formal language with a label after each symbol.

    In parity, of strings of 0 and 1, the label is the parity of the ones so far. In (aa)*, (abab)*,
    a^n b^n, a^n b^n c^n and shuffle-2, two kinds of brackets that may cross, it names the set of
    what may follow: symbols, and the end. Lengths are uniform among those the language has within
    a bin. The first bin is that of training; from it `valid` is drawn too, on which settings are
    chosen. A string counts only if all its labels are right. Five of the languages have 12 to 25
    strings in the first bin (shuffle-2 and parity have more), so there training and test agree.

    Attributes:
      language: One of `PERIODS`.
      bins: Least and greatest length of each test.
      examples: Strings of training.
      held_out: Strings of each other split.
      seed: Another seed, other strings.

    References:
      Bhattamishra et al., "On the Ability and Limitations of Transformers to Recognize Formal
      Languages", 2020; Irie et al., "Practical Computational Power of Linear Transformers", 2023.
    """

    kind: Literal["formal"] = "formal"
    language: Literal["parity", "aa_star", "abab_star", "a_n_b_n", "a_n_b_n_c_n", "shuffle_2"]
    bins: tuple[tuple[int, int], ...] = ((2, 50), (51, 100))
    examples: int = 10_000
    held_out: int = 1_000
    seed: int = 0

    def __post_init__(self):
        check_counts(self)
        _check_bins(self.bins, PERIODS[self.language])

    @property
    def about(self) -> About:
        """See `LabelledTask`; of no string but parity's shortest are all labels guessed."""
        sure = 0.5 if self.language == "parity" else 0.0
        return About(self.language, 4, *_scores(self.bins, sure))

    def example(self, split: str, number: int) -> Labelled:
        """See `LabelledTask`."""
        random, low, high = _begin(self, split, number)
        period = PERIODS[self.language]
        size = period * int(random.integers(-(-low // period), high // period + 1))
        inputs, labels = STRINGS[self.language](random, size)
        return _labelled(inputs, labels, high)


@dataclass(frozen=True, kw_only=True)
class WordsConfig:
    """Word problems: which element of a group is the product of all that were read?

    What tracks S5 or A5 over any length can follow any finite state machine.

    Attributes:
      group: "s5" has the 120 permutations of five things, "a5" the 60 even ones.
      bins: Least and greatest length of each test; the first is that of training.
      examples: Words of training.
      held_out: Words of each other split.
      seed: Another seed, other words.

    References:
      Merrill et al., "The Illusion of State in State-Space Models", 2024.
    """

    kind: Literal["words"] = "words"
    group: Literal["s5", "a5"]
    bins: tuple[tuple[int, int], ...] = ((2, 16), (17, 32))
    examples: int = 100_000
    held_out: int = 1_000
    seed: int = 0

    def __post_init__(self):
        check_counts(self)
        _check_bins(self.bins, 1)

    @property
    def about(self) -> About:
        """See `LabelledTask`."""
        elements = len(table(self.group))
        return About(self.group, elements, *_scores(self.bins, 1 / elements))

    def example(self, split: str, number: int) -> Labelled:
        """See `LabelledTask`."""
        random, low, high = _begin(self, split, number)
        inputs = random.integers(len(table(self.group)), size=random.integers(low, high + 1))
        product, labels = 0, []  # permutations are in order: number 0 is the identity
        for element in inputs.tolist():
            product = int(table(self.group)[product, element])
            labels.append(product)
        return _labelled(inputs, np.array(labels), high)


@cache
def table(group: str) -> np.ndarray:
    """The multiplication table of a group: entry [p, q] is q after p."""
    elements = list(permutations(range(5)))
    if group == "a5":
        elements = [p for p in elements if _is_even(p)]
    number = {p: i for i, p in enumerate(elements)}
    return np.array([[number[tuple(q[i] for i in p)] for q in elements] for p in elements])


def _parity(random: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    bits = random.integers(2, size=size)
    return bits, np.cumsum(bits) % 2


def _aa_star(_: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    place = np.arange(1, size + 1)
    return np.zeros(size, int), (place % 2 == 0).astype(int)  # {a}, {a, end}


def _abab_star(_: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    place = np.arange(1, size + 1) % 4
    return np.arange(size) % 2, np.array([2, 1, 0, 1])[place]  # {a, end}, {b}, {a}, {b}


def _a_n_b_n(_: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    inputs = np.repeat([0, 1], size // 2)
    labels = inputs.copy()  # {a, b}, then {b}
    labels[-1] = 2  # {end}
    return inputs, labels


def _a_n_b_n_c_n(_: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    inputs = np.repeat([0, 1, 2], size // 3)
    labels = inputs.copy()  # {a, b}, {b}, {c}
    labels[2 * size // 3 - 1], labels[-1] = 2, 3  # {c}, {end}
    return inputs, labels


def _shuffle_2(random: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    depth, inputs, labels = [0, 0], [], []
    for left in range(size, 0, -1):
        opens = sum(depth) == 0 or (sum(depth) < left and random.random() < 0.5)
        choices = [0, 1] if opens else [kind for kind in (0, 1) if depth[kind]]
        kind = choices[random.integers(len(choices))]
        depth[kind] += 1 if opens else -1
        inputs.append(2 * kind + (not opens))
        labels.append((depth[0] > 0) + 2 * (depth[1] > 0))  # which brackets may close
    return np.array(inputs), np.array(labels)


STRINGS = {
    "parity": _parity,
    "aa_star": _aa_star,
    "abab_star": _abab_star,
    "a_n_b_n": _a_n_b_n,
    "a_n_b_n_c_n": _a_n_b_n_c_n,
    "shuffle_2": _shuffle_2,
}
"""Language -> a string of some length, with its labels."""


def _begin(
    config: FormalConfig | WordsConfig, split: str, number: int
) -> tuple[np.random.Generator, int, int]:
    """The generator of an example, and the bin that its length is from."""
    splits = ("train", "valid", *config.about.tests)
    place = splits.index(split)
    low, high = config.bins[max(place - 2, 0)]
    return np.random.default_rng((config.seed, place, number)), low, high


def _scores(
    bins: tuple[tuple[int, int], ...], sure: float
) -> tuple[tuple[str, ...], Literal["strings"], float]:
    """Tests, score and chance, where a label is guessed with probability `sure`."""
    low, high = bins[0]
    chance = float(np.mean(sure ** np.arange(low, high + 1.0)))
    return tuple(f"bin{i}" for i in range(len(bins))), "strings", chance


def _labelled(inputs: np.ndarray, labels: np.ndarray, length: int) -> Labelled:
    """Fills up to `length` with what has no weight."""
    room = (0, length - len(inputs))
    weights = np.pad(np.ones(len(inputs), np.float32), room)
    return Labelled(
        np.pad(inputs, room).astype(np.int32), np.pad(labels, room).astype(np.int32), weights
    )


def _check_bins(bins: tuple[tuple[int, int], ...], period: int):
    if not bins:
        raise ValueError("bins must have at least one entry, got none")
    for low, high in bins:
        if not 1 <= low <= high or high // period < -(-low // period):
            raise ValueError(
                f"bins must hold a multiple of {period} from 1 on, got {low} to {high}"
            )


def _is_even(p: tuple[int, ...]) -> bool:
    return sum(p[i] > p[j] for j in range(5) for i in range(j)) % 2 == 0
