"""Utterances and what their speakers want: CLINC150 and Banking77, as they are published."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Array, Int

FILES = {
    "clinc150": ("clinc150.json",),
    "banking77": ("banking77_train.csv", "banking77_test.csv"),
}
WHERE = {
    "clinc150": "https://github.com/clinc/oos-eval, data/data_full.json",
    "banking77": "https://github.com/PolyAI-LDN/task-specific-datasets, banking_data",
}


class Classes(NamedTuple):
    """Sequences of symbols, each of a class.

    Attributes:
      inputs: Symbols; behind a sequence's length they mean nothing.
      lengths: Symbols of each sequence, at least 1.
      labels: Numbers of the classes.
    """

    inputs: Int[Array | np.ndarray, "N T"]
    lengths: Int[Array | np.ndarray, " N"]
    labels: Int[Array | np.ndarray, " N"]


@dataclass(frozen=True, kw_only=True)
class IntentsConfig:
    """Intent classification: the bytes of an utterance, and one of 150 or 77 intents.

    CLINC150's utterances out of scope are left out, its validation part is not used.

    Attributes:
      dataset: Which one.
      folder: Where its files lie, with the names in `FILES`.
      length: Bytes that are read of an utterance; the rest is cut off.

    References:
      Larson et al., "An Evaluation Dataset for Intent Classification and Out-of-Scope Prediction",
      2019; Casanueva et al., "Efficient Intent Detection with Dual Sentence Encoders", 2020.
    """

    kind: Literal["intents"] = "intents"
    dataset: Literal["clinc150", "banking77"]
    folder: str = "data/intents"
    length: int = 96

    def __post_init__(self):
        if self.length < 1:
            raise ValueError(f"length must be at least 1, got {self.length}")

    @property
    def symbols(self) -> int:
        """Ids of the inputs."""
        return 256

    def load(self) -> tuple[Classes, Classes]:
        """Reads the training and the test part; classes are numbered by their names' order.

        Raises:
          FileNotFoundError: A file is missing; the message says where to get it.
        """
        parts = [self._path(name) for name in FILES[self.dataset]]
        if self.dataset == "clinc150":
            whole = json.loads(parts[0].read_text("utf-8"))
            rows = [[(text, label) for text, label in whole[name]] for name in ("train", "test")]
        else:
            rows = [_table(path) for path in parts]
        names = sorted({label for _, label in rows[0]})
        number = {name: i for i, name in enumerate(names)}
        train, test = (self._encode(some, number) for some in rows)
        return train, test

    def _path(self, name: str) -> Path:
        path = Path(self.folder).expanduser() / name
        if not path.is_file():
            raise FileNotFoundError(
                f"dataset {self.dataset!r} needs the file {str(path)!r}: get it from "
                f"{WHERE[self.dataset]}"
            )
        return path

    def _encode(self, rows: list[tuple[str, str]], number: dict[str, int]) -> Classes:
        texts = [text.strip().encode()[: self.length] or b" " for text, _ in rows]
        inputs = np.zeros((len(rows), self.length), np.int32)
        for row, text in zip(inputs, texts, strict=True):
            row[: len(text)] = np.frombuffer(text, np.uint8)
        lengths = np.array([len(text) for text in texts], np.int32)
        return Classes(inputs, lengths, np.array([number[label] for _, label in rows], np.int32))


def _table(path: Path) -> list[tuple[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [(row["text"], row["category"]) for row in csv.DictReader(file)]
