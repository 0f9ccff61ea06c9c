"""Where documents come from, and into which split each goes."""

import glob
import gzip
import hashlib
import json
import re
import sysconfig
import tokenize
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hope_jax.data.synthetic import RecallConfig

SPLITS = ("train", "valid", "test")
_NOT_THE_LIBRARY = {
    "__pycache__",
    "dist-packages",
    "idle_test",
    "site-packages",
    "test",
    "tests",
}


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """What is held out of a source that names no files for `valid` and `test`.

    Attributes:
      valid: The share of `valid`.
      test: The share of `test`.
      by: "content" sends whole documents to a split by their hash, so that equal documents stay
        together and new ones move none. "position" cuts each document: its first part is
        trained on, the next is `valid`, the last is `test`; for corpora of one long document.
    """

    valid: float = 0.05
    test: float = 0.05
    by: Literal["content", "position"] = "content"

    def __post_init__(self):
        for name in ("valid", "test"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be a share in [0, 1), got {getattr(self, name)}")
        if self.valid + self.test >= 1:
            raise ValueError(
                f"valid + test must leave a share below 1 for train, got {self.valid} + {self.test}"
            )

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that get something."""
        return tuple(name for name in SPLITS if name == "train" or getattr(self, name) > 0)

    def assign(self, text: str) -> Iterator[tuple[str, str]]:
        """Yields the split of a document, or of each part of it."""
        if self.by == "position":
            ends = [round(len(text) * (1 - self.valid - self.test))]
            ends += [round(len(text) * (1 - self.test)), len(text)]
            for name, start, end in zip(SPLITS, [0, *ends], ends, strict=False):
                yield name, text[start:end]
            return
        digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"hope_jax split").digest()
        place = int.from_bytes(digest, "big") / 2**64
        if place < self.test:
            yield "test", text
        elif place < self.test + self.valid:
            yield "valid", text
        else:
            yield "train", text


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """UTF-8 text files, plain or compressed (.gz, .zst).

    Attributes:
      train: Paths and patterns (`**` descends), relative to the working directory; a pattern's
        files are read in alphabetical order.
      valid: The same for validation; see `SplitConfig` for what happens without.
      test: The same for testing.
      document: What one document is: a whole "file", a "line" (blank ones are none), what lies
        between "blank_line"s, or what begins at a line in which `pattern` is found.
      pattern: A regular expression, such as `^ = [^=].* = $` for the articles of WikiText.
    """

    kind: Literal["text"] = "text"
    train: str | tuple[str, ...]
    valid: str | tuple[str, ...] = ()
    test: str | tuple[str, ...] = ()
    document: Literal["file", "line", "blank_line", "pattern"] = "file"
    pattern: str = ""

    def __post_init__(self):
        _check_paths(self)
        if (self.document == "pattern") != bool(self.pattern):
            raise ValueError(
                "pattern must be given exactly if document is 'pattern', got "
                f"document={self.document!r} pattern={self.pattern!r}"
            )
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(
                f"pattern must be a regular expression, got {self.pattern!r}: {error}"
            ) from error

    def read(self, path: Path) -> Iterator[str]:
        """Yields the documents of a file.

        Raises:
          ValueError: The file is no UTF-8, or its compression is broken.
        """
        lines = _lines(path)
        if self.document == "line":
            yield from (line.rstrip("\r\n") for line in lines if line.strip())
            return
        begins = re.compile(self.pattern).search if self.document == "pattern" else None
        document: list[str] = []
        for line in lines:
            # Blank lines in front of the first document belong to it.
            if begins and begins(line) and any(map(str.strip, document)):
                yield "".join(document)
                document = []
            if self.document == "blank_line" and not line.strip():
                yield "".join(document)
                document = []
            else:
                document.append(line)
        yield "".join(document)


@dataclass(frozen=True, kw_only=True)
class JsonlConfig:
    """Files of one JSON object a line, plain or compressed (.gz, .zst).

    Attributes:
      train: Paths and patterns, as in `TextConfig`.
      valid: The same for validation; see `SplitConfig` for what happens without.
      test: The same for testing.
      field: The name under which a line has its document.
    """

    kind: Literal["jsonl"] = "jsonl"
    train: str | tuple[str, ...]
    valid: str | tuple[str, ...] = ()
    test: str | tuple[str, ...] = ()
    field: str = "text"

    def __post_init__(self):
        _check_paths(self)

    def read(self, path: Path) -> Iterator[str]:
        """Yields the documents of a file; blank lines are none.

        Raises:
          ValueError: A line is no JSON object with the field, or the field is no text.
        """
        for number, line in enumerate(_lines(path), 1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where} is not JSON: {error}") from error
            if not isinstance(record, dict):
                raise ValueError(f"{where} must be a JSON object, got {type(record).__name__}")
            if self.field not in record:
                raise ValueError(
                    f"{where} has no field {self.field!r}; its fields are {_names(record)}"
                )
            yield _text(record[self.field], f"{where} field {self.field!r}")


@dataclass(frozen=True, kw_only=True)
class ParquetConfig:
    """Parquet files with a column of documents (needs the extra `parquet`).

    Attributes:
      train: Paths and patterns, as in `TextConfig`.
      valid: The same for validation; see `SplitConfig` for what happens without.
      test: The same for testing.
      column: The column of the documents.
    """

    kind: Literal["parquet"] = "parquet"
    train: str | tuple[str, ...]
    valid: str | tuple[str, ...] = ()
    test: str | tuple[str, ...] = ()
    column: str = "text"

    def __post_init__(self):
        _check_paths(self)

    def read(self, path: Path) -> Iterator[str]:
        """Yields the documents of a file.

        Raises:
          ModuleNotFoundError: pyarrow is not installed.
          ValueError: The file is no Parquet, lacks the column, or a row of it is no text.
        """
        try:
            import pyarrow
            import pyarrow.parquet
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "source kind 'parquet' needs pyarrow: pip install 'hope_jax[parquet]'"
            ) from error
        try:
            file = pyarrow.parquet.ParquetFile(path)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{path} is not a Parquet file: {error}") from error
        with file:
            names = file.schema_arrow.names
            if self.column not in names:
                raise ValueError(
                    f"{path} has no column {self.column!r}; its columns are {_names(names)}"
                )
            batches = file.iter_batches(columns=[self.column])
            values = (value for batch in batches for value in batch.column(0).to_pylist())
            for row, value in enumerate(values):
                yield _text(value, f"{path} row {row} column {self.column!r}")


@dataclass(frozen=True, kw_only=True)
class HuggingFaceConfig:
    """A dataset of the Hugging Face hub (needs the extra `datasets`).

    Attributes:
      name: As in `datasets.load_dataset`, such as "Salesforce/wikitext".
      subset: Its configuration, such as "wikitext-103-raw-v1".
      revision: A branch, tag or commit of the dataset.
      train: Its name for the training split; `datasets` slices such as "train[:1%]" work.
      valid: The same for validation; see `SplitConfig` for what happens without.
      test: The same for testing.
      field: The column of the documents.
    """

    kind: Literal["huggingface"] = "huggingface"
    name: str
    subset: str | None = None
    revision: str | None = None
    train: str = "train"
    valid: str = ""
    test: str = ""
    field: str = "text"

    def __post_init__(self):
        if not self.train:
            raise ValueError("train must name a split of the dataset, got ''")

    def fingerprint(self, split: str) -> str:
        """Returns what changes with the dataset's content."""
        return self._load(split)._fingerprint

    def documents(self, split: str) -> Iterator[str]:
        """Yields the documents of a split.

        Raises:
          ModuleNotFoundError: The package `datasets` is not installed.
          ValueError: The field is missing or no text.
        """
        for row, record in enumerate(self._load(split)):
            where = f"dataset {self.name!r} split {getattr(self, split)!r} row {row}"
            if self.field not in record:
                raise ValueError(
                    f"{where} has no field {self.field!r}; its fields are {_names(record)}"
                )
            yield _text(record[self.field], f"{where} field {self.field!r}")

    def _load(self, split: str):
        try:
            import datasets  # pyrefly: ignore[missing-import]
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "source kind 'huggingface' needs datasets: pip install 'hope_jax[datasets]'"
            ) from error
        return datasets.load_dataset(
            self.name, self.subset, split=getattr(self, split), revision=self.revision
        )


@dataclass(frozen=True, kw_only=True)
class StdlibConfig:
    """The source of the running Python's standard library, some 10 MB that every machine has.

    One file is one document; tests are left out. Another Python has another library: what has
    to be the same everywhere needs files.
    """

    kind: Literal["stdlib"] = "stdlib"

    def read(self, path: Path) -> Iterator[str]:
        """Yields the file.

        Raises:
          ValueError: The file is not in the encoding that it declares.
        """
        with path.open("rb") as file:
            encoding = tokenize.detect_encoding(file.readline)[0]
        data = path.read_bytes()
        try:
            yield data.decode(encoding)
        except UnicodeDecodeError as error:
            raise ValueError(
                _undecodable(path, encoding, error.start, data[error.start])
            ) from error


TextSource = TextConfig | JsonlConfig | ParquetConfig | HuggingFaceConfig | StdlibConfig
SingleSource = TextSource | RecallConfig


@dataclass(frozen=True, kw_only=True)
class PartConfig:
    """A source and its share in a mixture.

    Attributes:
      source: What to read.
      weight: Its share of the training windows, relative to the other parts' weights.
    """

    source: SingleSource
    weight: float = 1.0

    def __post_init__(self):
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"weight must be above 0 and finite, got {self.weight}")


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """Several sources, each read as often as its weight says.

    Windows never mix sources. Evaluation reads what each part holds out, one after the other.

    Attributes:
      parts: The sources and their weights.
    """

    kind: Literal["mixture"] = "mixture"
    parts: tuple[PartConfig, ...]

    def __post_init__(self):
        if not self.parts:
            raise ValueError("parts must name at least 1 source, got none")


SourceConfig = SingleSource | MixtureConfig


def splits(source: SingleSource, shares: SplitConfig) -> tuple[str, ...]:
    """Returns the names of the splits that a source is to have."""
    if isinstance(source, RecallConfig):
        return SPLITS
    return shares.splits if _named(source) == ("train",) else _named(source)


def documents(source: TextSource, shares: SplitConfig) -> Iterator[tuple[str, str]]:
    """Yields each document that is not empty, after the split it belongs to.

    Raises:
      FileNotFoundError: See `files`.
      ValueError: A file is not what the source says.
    """
    for split in _named(source):
        for text in _read(source, split):
            parts = shares.assign(text) if _named(source) == ("train",) else [(split, text)]
            yield from ((name, part) for name, part in parts if part)


def files(source: TextSource) -> dict[str, list[Path]]:
    """Returns the files that a source names, by split and in its order.

    Raises:
      FileNotFoundError: A path is no file, or a pattern fits none.
      ValueError: A file is in two splits.
    """
    if isinstance(source, HuggingFaceConfig):
        return {}
    found = {split: _files(source, split) for split in _named(source)}
    seen: dict[Path, str] = {}
    for split, paths in found.items():
        for path in paths:
            first = seen.setdefault(path.resolve(), split)
            if first != split:
                raise ValueError(
                    f"a file must be in one split only, {str(path)!r} is in {first} and {split}"
                )
    return found


def size(source: TextSource) -> int | None:
    """Returns how many bytes of text a source holds, None where that shows only in reading."""
    paths = [path for split in files(source).values() for path in split]
    plain = isinstance(source, TextConfig | StdlibConfig)
    if not plain or any(path.suffix in (".gz", ".zst") for path in paths):
        return None
    return sum(path.stat().st_size for path in paths)


def _named(source: TextSource) -> tuple[str, ...]:
    """The splits that a source names; all the others are held out of `train`."""
    if isinstance(source, StdlibConfig):
        return ("train",)
    return tuple(name for name in SPLITS if getattr(source, name))


def _files(source: TextSource, split: str) -> list[Path]:
    return _library() if isinstance(source, StdlibConfig) else _find(getattr(source, split))


def _library() -> list[Path]:
    folder = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*.py"))
    found = [folder / path for path in paths if not _NOT_THE_LIBRARY & set(path.parts)]
    if not found:
        raise FileNotFoundError(f"source kind 'stdlib' found no .py file below {str(folder)!r}")
    return found


def _find(patterns: str | tuple[str, ...]) -> list[Path]:
    found: list[str] = []
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        path = str(Path(pattern).expanduser())
        hits = [path] if Path(path).is_file() else sorted(glob.glob(path, recursive=True))
        hits = [hit for hit in hits if Path(hit).is_file()]
        if not hits:
            what = "no file fits the pattern" if glob.has_magic(path) else "there is no file"
            raise FileNotFoundError(f"{what} {pattern!r}, seen from {str(Path.cwd())!r}")
        found += hits
    return [Path(path) for path in dict.fromkeys(found)]


def _read(source: TextSource, split: str) -> Iterator[str]:
    if isinstance(source, HuggingFaceConfig):
        yield from source.documents(split)
        return
    for path in _files(source, split):
        yield from source.read(path)


def _check_paths(config: TextConfig | JsonlConfig | ParquetConfig) -> None:
    if not config.train:
        raise ValueError("train must name at least 1 file, got none")


def _lines(path: Path) -> Iterator[str]:
    """Yields the lines of a file as they are, with their ends."""
    start = 0
    try:
        for line in _raw_lines(path):
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                place = start + error.start
                raise ValueError(_undecodable(path, "UTF-8", place, line[error.start])) from error
            start += len(line)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be decompressed: {error}") from error


def _raw_lines(path: Path) -> Iterator[bytes]:
    if path.suffix == ".zst":
        yield from _zstd_lines(path)
    else:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield from file


def _zstd_lines(path: Path) -> Iterator[bytes]:
    pending: list[bytes] = []
    for chunk in _zstd_chunks(path):
        *lines, rest = chunk.split(b"\n")
        for line in lines:
            yield b"".join((*pending, line, b"\n"))
            pending = []
        pending.append(rest)
    if last := b"".join(pending):
        yield last


def _zstd_chunks(path: Path) -> Iterator[bytes]:
    """Decompresses frame by frame; zstandard's own reader takes a cut file for a whole one."""
    import zstandard

    frame = zstandard.ZstdDecompressor().decompressobj()
    whole = True
    with path.open("rb") as file:
        try:
            while data := file.read(1 << 20):
                while data:
                    yield frame.decompress(data)
                    whole, data = frame.eof, frame.unused_data
                    if whole:
                        frame = zstandard.ZstdDecompressor().decompressobj()
        except zstandard.ZstdError as error:
            raise ValueError(f"{path} cannot be decompressed: {error}") from error
    if not whole:
        raise ValueError(f"{path} cannot be decompressed: it ends inside a frame")


def _undecodable(path: Path, encoding: str, place: int, byte: int) -> str:
    return f"{path} is not {encoding}: byte 0x{byte:02x} at offset {place}"


def _text(value: object, where: str) -> str:
    """Returns a value that is to be a document, or says where it is none."""
    if not isinstance(value, str):
        raise ValueError(f"{where} must be text, got {type(value).__name__}")
    if half := re.search("[\ud800-\udfff]", value):
        raise ValueError(f"{where} holds half a surrogate pair, {half[0]!r}")
    return value


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"
