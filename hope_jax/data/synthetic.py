"""Token streams that are made up while they are read, to ask a model one precise thing."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from hope_jax.data.packing import Piece, SplitInfo, weigh
from hope_jax.data.synthetic_labels import About, Labelled


@dataclass(frozen=True, kw_only=True)
class RecallConfig:
    """Associative recall with overwrites: which value was a key given last?

    An episode is `bos`, then `keys + overwrites` pairs of a key and its value in random order,
    then every key once more, each followed by the answer. Only answers are scored; what forgets
    everything guesses one of `value_symbols`.

    Symbols 0 to `key_symbols - 1` are keys, the `value_symbols` after them are values. An
    episode depends on `seed`, the split and its number, and on nothing else.

    Attributes:
      keys: Different keys in an episode.
      overwrites: Pairs whose key is in the episode already; they bring a value of their own.
      key_symbols: The symbols that keys are drawn from.
      value_symbols: The symbols that values are drawn from.
      examples: Episodes of the split `train`, after which it repeats.
      held_out: Episodes of each of the splits `valid` and `test`.
      seed: Another seed, other episodes.
    """

    kind: Literal["recall"] = "recall"
    keys: int = 12
    overwrites: int = 4
    key_symbols: int = 48
    value_symbols: int = 48
    examples: int = 10_000_000
    held_out: int = 512
    seed: int = 0

    def __post_init__(self):
        for name in ("keys", "value_symbols", "examples", "held_out"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("overwrites", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.key_symbols < self.keys:
            raise ValueError(
                f"key_symbols must be at least keys ({self.keys}), got {self.key_symbols}"
            )

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that there are."""
        return ("train", "valid", "test")

    @property
    def symbols(self) -> int:
        """How many ids the task needs below `bos`."""
        return self.key_symbols + self.value_symbols

    @property
    def length(self) -> int:
        """Tokens of an episode, `bos` among them."""
        return 1 + 2 * (self.keys + self.overwrites) + 2 * self.keys

    @property
    def about(self) -> About:
        """See `synthetic_labels.LabelledTask`."""
        return About(
            "associative_recall", self.symbols, ("test",), "accuracy", 1 / self.value_symbols
        )

    def example(self, split: str, number: int) -> Labelled:
        """An episode without its `bos`."""
        start = number * self.length
        piece = self.stream(split, bos=self.symbols).read(start, start + self.length)
        return Labelled(piece.tokens[1:-1], piece.tokens[2:], weigh(piece)[2:])

    def stream(self, split: str, *, bos: int) -> "RecallStream":
        """Returns the episodes of a split, one after another."""
        return RecallStream(self, split, bos)


class RecallStream:
    """The episodes of a `RecallConfig`; see `packing.Stream`."""

    def __init__(self, config: RecallConfig, split: str, bos: int):
        episodes = config.examples if split == "train" else config.held_out
        self.info = SplitInfo(episodes * config.length, episodes, 0, 0)
        self._config = config
        self._stream = config.splits.index(split)
        self._bos = bos

    def read(self, start: int, stop: int) -> Piece:
        """Returns tokens `start` to `stop - 1`, which have to be there."""
        length = self._config.length
        episodes = range(start // length, -(-stop // length))
        tokens = np.concatenate([self._episode(number) for number in episodes])
        starts = np.tile(np.arange(length) == 0, len(episodes))
        # The answers are every second token at an episode's end.
        questions = length - 2 * self._config.keys
        answer = (np.arange(length) > questions) & ((np.arange(length) - questions) % 2 == 1)
        weights = np.tile(answer.astype(np.float32), len(episodes))
        cut = slice(start - episodes.start * length, stop - episodes.start * length)
        return Piece(tokens[cut], starts[cut], weights[cut])

    def _episode(self, number: int) -> np.ndarray:
        config = self._config
        random = np.random.default_rng((config.seed, self._stream, number))
        keys = random.permutation(config.key_symbols)[: config.keys]
        again = random.choice(keys, config.overwrites)
        written = random.permutation(np.concatenate([keys, again]))
        values = config.key_symbols + random.integers(config.value_symbols, size=len(written))
        latest = dict(zip(written.tolist(), values.tolist(), strict=True))
        asked = random.permutation(keys)
        answers = np.array([latest[key] for key in asked.tolist()])
        pairs = [np.stack([written, values], 1).ravel(), np.stack([asked, answers], 1).ravel()]
        return np.concatenate([[self._bos], *pairs]).astype(np.int32)
