"""Texts and what they are about: CLINC150, Banking77 and DBpedia-14, as they are published."""

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Array, Int

Name = Literal["clinc150", "banking77", "dbpedia14"]
Text = tuple[str, str]
"""A text, and the name of its class."""

FILES = {
    "clinc150": (("clinc150.json",),),
    "banking77": (("banking77_train.csv", "banking77_test.csv"),),
    "dbpedia14": (
        ("dbpedia_csv/train.csv", "dbpedia_csv/test.csv"),
        (
            "dbpedia_14/train-00000-of-00001.parquet",
            "dbpedia_14/test-00000-of-00001.parquet",
        ),
    ),
}
"""For each dataset the files it may be in: any one of these groups is enough."""

WHERE = {
    "clinc150": "https://github.com/clinc/oos-eval, data/data_full.json",
    "banking77": "https://github.com/PolyAI-LDN/task-specific-datasets, banking_data",
    "dbpedia14": (
        "https://github.com/zhangxiangxiao/Crepe (unpack dbpedia_csv.tar.gz), or the folder "
        "dbpedia_14 of https://huggingface.co/datasets/fancyzhx/dbpedia_14"
    ),
}
DBPEDIA = (
    "Company",
    "Educational institution",
    "Artist",
    "Athlete",
    "Office holder",
    "Mean of transportation",
    "Building",
    "Natural place",
    "Village",
    "Animal",
    "Plant",
    "Album",
    "Film",
    "Written work",
)
"""The classes of DBpedia-14 in the order of their numbers."""


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
    """Text classification: the bytes of an utterance or an article, one of 150, 77 or 14 classes.

    CLINC150's utterances out of scope are left out, its validation part is not used. An article of
    DBpedia-14 is its title, a colon and its first sentences.

    Attributes:
      dataset: Which one.
      folder: Where its files lie, with the names in `FILES`.
      length: Bytes that are read of a text; the rest is cut off.
      most: Texts of each class that are used, the first of them; None for all.

    References:
      Larson et al., "An Evaluation Dataset for Intent Classification and Out-of-Scope Prediction",
      2019; Casanueva et al., "Efficient Intent Detection with Dual Sentence Encoders", 2020; Zhang
      et al., "Character-level Convolutional Networks for Text Classification", 2015.
    """

    kind: Literal["intents"] = "intents"
    dataset: Name
    folder: str = "data/intents"
    length: int = 96
    most: int | None = None

    def __post_init__(self):
        for name in ("length", "most"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    @property
    def symbols(self) -> int:
        """Ids of the inputs."""
        return 256

    def load(self) -> tuple[Classes, Classes]:
        """Reads the training and the test part; classes are numbered by their names' order.

        Raises:
          FileNotFoundError: A file is missing; the message says where to get it.
          ModuleNotFoundError: The files are Parquet, and pyarrow is not installed.
          ValueError: A file is not what was published.
        """
        parts = self.texts()
        number = {name: i for i, name in enumerate(names(parts[0]))}
        train, test = (self._encode(some, number) for some in parts)
        return train, test

    def texts(self) -> tuple[list[Text], list[Text]]:
        """Reads the training and the test part as they are; raises what `load` does."""
        paths = self._paths()
        if self.dataset == "clinc150":
            whole = json.loads(paths[0].read_text("utf-8"))
            parts = [map(tuple, whole[name]) for name in ("train", "test")]
        else:
            read = _banking if self.dataset == "banking77" else _dbpedia
            parts = [read(path) for path in paths]
        train, test = (list(_first(part, self.most)) for part in parts)
        return train, test

    def _paths(self) -> list[Path]:
        folder = Path(self.folder).expanduser()
        groups = [[folder / name for name in some] for some in FILES[self.dataset]]
        for paths in groups:
            if all(path.is_file() for path in paths):
                return paths
        path = next(path for path in groups[0] if not path.is_file())
        raise FileNotFoundError(
            f"dataset {self.dataset!r} needs the file {str(path)!r}: get it from "
            f"{WHERE[self.dataset]}"
        )

    def _encode(self, rows: list[Text], number: dict[str, int]) -> Classes:
        texts = [text.strip().encode()[: self.length] or b" " for text, _ in rows]
        inputs = np.zeros((len(rows), self.length), np.int32)
        for row, text in zip(inputs, texts, strict=True):
            row[: len(text)] = np.frombuffer(text, np.uint8)
        lengths = np.array([len(text) for text in texts], np.int32)
        return Classes(inputs, lengths, np.array([number[label] for _, label in rows], np.int32))


def names(texts: Iterable[Text]) -> list[str]:
    """The names of the classes, in their order."""
    return sorted({label for _, label in texts})


def split(
    labels: Int[np.ndarray, " N"] | Sequence[int], groups: int, seed: int
) -> list[Int[np.ndarray, " C"]]:
    """Deals the classes out to groups of one size or nearly so, in an order of the seed's."""
    order = np.random.default_rng((seed, 0)).permutation(np.unique(labels))
    return np.array_split(order, groups)


def _first(texts: Iterable[Text], most: int | None) -> Iterator[Text]:
    seen: Counter[str] = Counter()
    for text, label in texts:
        seen[label] += 1
        if most is None or seen[label] <= most:
            yield text, label


def _banking(path: Path) -> Iterator[Text]:
    with path.open(encoding="utf-8", newline="") as file:
        yield from ((row["text"], row["category"]) for row in csv.DictReader(file))


def _dbpedia(path: Path) -> Iterator[Text]:
    """Classes are numbered from 1 in the CSV files and from 0 in the Parquet ones."""
    csv_file = path.suffix == ".csv"
    rows = _csv_rows(path) if csv_file else _parquet_rows(path)
    for place, row in enumerate(rows, 1):
        number = str(row[0]) if row else ""
        if len(row) != 3 or not number.isdigit() or not 0 <= int(number) - csv_file < len(DBPEDIA):
            raise ValueError(
                f"{path} row {place} must be the number of one of {len(DBPEDIA)} classes, a title "
                f"and a text, got {row}"
            )
        yield f"{row[1].strip()}: {row[2].strip()}", DBPEDIA[int(number) - csv_file]


def _csv_rows(path: Path) -> Iterator[list]:
    with path.open(encoding="utf-8", newline="") as file:
        yield from csv.reader(file)


def _parquet_rows(path: Path) -> Iterator[list]:
    try:
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path} needs pyarrow: pip install 'hope_jax[parquet]'"
        ) from error
    with ParquetFile(path) as file:
        for batch in file.iter_batches(columns=["label", "title", "content"]):
            yield from (list(row.values()) for row in batch.to_pylist())
