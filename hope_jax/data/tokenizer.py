"""Text to ids and back: bytes, SentencePiece, byte pairs, and bare symbols for synthetic tasks."""

import hashlib
import heapq
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from hope_jax.data.byte_pairs import Encoding

PART = 1_000_000
"""Characters that SentencePiece encodes at a time; longer texts are cut at line ends."""

_SPACE_MARK = "\u2581"
"""What SentencePiece writes for a space, so that the character itself has to go as bytes."""


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of the project knows of a tokenizer.

    Attributes:
      bos: The id in front of every document; no text ever encodes to it.
      vocabulary: The number of ids.
      fingerprint: Equal for two tokenizers exactly if they encode alike.
    """

    bos: int
    vocabulary: int
    fingerprint: str

    def encode(self, text: str) -> Int[np.ndarray, " T"]:
        """Returns the ids of a text, without `bos`.

        Raises:
          ValueError: The text holds half of a surrogate pair, which is no character.
        """
        ...

    def decode(self, ids: Sequence[int] | Int[np.ndarray, " T"]) -> str:
        """Returns the text of any ids; `bos` is silent, broken UTF-8 becomes U+FFFD."""
        ...

    def save(self, folder: str | os.PathLike) -> None:
        """Writes what `load` needs into a folder, which is made where it is missing."""
        ...


@dataclass(frozen=True, kw_only=True)
class BytesConfig:
    """UTF-8 bytes as they are; id 256 begins a document."""

    kind: Literal["bytes"] = "bytes"

    @property
    def vocabulary(self) -> int:
        """The number of ids."""
        return 257

    def build(self) -> "Bytes":
        """Returns the tokenizer."""
        return Bytes()


@dataclass(frozen=True, kw_only=True)
class SymbolsConfig:
    """Ids without a text behind them, written as numbers: for synthetic tasks.

    Attributes:
      symbols: Ids 0 to `symbols - 1` are free for the task; `symbols` begins a document.
    """

    kind: Literal["symbols"] = "symbols"
    symbols: int

    def __post_init__(self):
        if self.symbols < 1:
            raise ValueError(f"symbols must be at least 1, got {self.symbols}")

    @property
    def vocabulary(self) -> int:
        """The number of ids."""
        return self.symbols + 1

    def build(self) -> "Symbols":
        """Returns the tokenizer."""
        return Symbols(self.symbols)


@dataclass(frozen=True, kw_only=True)
class SentencePieceConfig:
    """Byte-pair pieces, learned from the corpus or read from a `.model` file.

    Learned pieces give back any text exactly: nothing is normalized, runs of spaces have pieces
    of their own, and what no piece covers is spelled in bytes.

    Attributes:
      vocabulary: The number of ids; for a `model` it has to be that of the file.
      model: An existing model file; None learns one from the training split.
      sample_bytes: At most this much text is learned from, drawn evenly over the documents.
      split_digits: Whether learned pieces hold one digit at most. Numbers of few pieces are easier
        to copy, of many easier to reckon with.
    """

    kind: Literal["sentencepiece"] = "sentencepiece"
    vocabulary: int = 4096
    model: str | None = None
    sample_bytes: int = 10_000_000
    split_digits: bool = True

    def __post_init__(self):
        if self.vocabulary < 260:
            raise ValueError(
                "vocabulary must be at least 260 (256 bytes, the specials and a piece), "
                f"got {self.vocabulary}"
            )
        if self.sample_bytes < 1:
            raise ValueError(f"sample_bytes must be at least 1, got {self.sample_bytes}")

    def build(self, texts: Iterable[str] = ()) -> "SentencePiece":
        """Reads `model`, or learns one.

        Args:
          texts: The documents to learn from; not looked at where there is a `model`.

        Raises:
          FileNotFoundError: There is no file `model`.
          ValueError: `model` is no SentencePiece model or one of another vocabulary; or the
            texts hold too few pieces or too many characters for `vocabulary`.
        """
        if self.model is None:
            sample = _sample(texts, self.sample_bytes)
            return SentencePiece(_learn(_lines(sample), self.vocabulary, self.split_digits))
        path = Path(self.model).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"tokenizer model {str(path)!r} is not a file")
        tokenizer = SentencePiece(path.read_bytes(), name=str(path))
        if tokenizer.vocabulary != self.vocabulary:
            raise ValueError(
                f"tokenizer vocabulary must be {tokenizer.vocabulary}, that of {str(path)!r}, "
                f"got {self.vocabulary}"
            )
        return tokenizer


@dataclass(frozen=True, kw_only=True)
class BytePairsConfig:
    """Byte pairs by the rules of a published `tokenizer.json`.

    Attributes:
      file: The file.
      vocabulary: The number of its ids.
      bos: The special token that begins a document.
    """

    kind: Literal["byte_pairs"] = "byte_pairs"
    file: str
    vocabulary: int
    bos: int

    def build(self) -> "BytePairs":
        """Reads the file.

        Raises:
          FileNotFoundError: It is missing.
          ValueError: It has rules that are not known, or another vocabulary.
        """
        path = Path(self.file).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"tokenizer file {str(path)!r} is not a file")
        tokenizer = BytePairs(path.read_bytes(), bos=self.bos, name=str(path))
        if tokenizer.vocabulary != self.vocabulary:
            raise ValueError(
                f"tokenizer vocabulary must be {tokenizer.vocabulary}, that of {str(path)!r}, "
                f"got {self.vocabulary}"
            )
        return tokenizer


TokenizerConfig = BytesConfig | SentencePieceConfig | SymbolsConfig | BytePairsConfig


class Bytes:
    """See `BytesConfig` and `Tokenizer`."""

    bos = 256
    vocabulary = 257
    fingerprint = "bytes"

    def encode(self, text: str) -> Int[np.ndarray, " T"]:
        """Returns the UTF-8 bytes."""
        return np.frombuffer(_utf8(text), np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int] | Int[np.ndarray, " T"]) -> str:
        """Reads bytes as UTF-8."""
        return bytes(int(i) for i in ids if i != self.bos).decode("utf-8", errors="replace")

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `tokenizer.json`."""
        _describe(folder, self, {"kind": "bytes"})


class Symbols:
    """See `SymbolsConfig` and `Tokenizer`."""

    def __init__(self, symbols: int):
        self.bos = symbols
        self.vocabulary = symbols + 1
        self.fingerprint = f"symbols-{symbols}"

    def encode(self, text: str) -> Int[np.ndarray, " T"]:
        """Reads numbers between spaces.

        Raises:
          ValueError: A word is no number below `bos`.
        """
        words = text.split()
        for word in words:
            if not (word.isascii() and word.isdigit() and int(word) < self.bos):
                raise ValueError(f"symbol must be a number from 0 to {self.bos - 1}, got {word!r}")
        return np.array([int(word) for word in words], np.int32)

    def decode(self, ids: Sequence[int] | Int[np.ndarray, " T"]) -> str:
        """Writes numbers with spaces between them."""
        return " ".join(str(int(i)) for i in ids if i != self.bos)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `tokenizer.json`."""
        _describe(folder, self, {"kind": "symbols", "symbols": self.bos})


class SentencePiece:
    """See `SentencePieceConfig` and `Tokenizer`.

    A foreign model encodes as its authors meant it; whether a text survives it is up to its
    normalization.
    """

    def __init__(self, model: bytes, *, name: str = "the model"):
        """Takes the bytes of a model file; `name` is for errors.

        Raises:
          ValueError: The bytes are no model, or one without an id that can begin a document.
        """
        # Imported here and in `_learn`: `import hope_jax` and the bytes tokenizer need none.
        import sentencepiece

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"{name!r} is not a SentencePiece model: {error}") from error
        self._model = model
        self.vocabulary = self._processor.vocab_size()
        self.bos = self._processor.bos_id()
        if self.bos < 0:
            self.bos = self._processor.eos_id()
        if self.bos < 0:
            raise ValueError(f"{name!r} must have a <s> or </s> piece to begin documents with")
        self._mark = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in b"\xe2\x96\x81"]
        self._spells = all(self._processor.is_byte(i) for i in self._mark)
        self.fingerprint = "sentencepiece-" + hashlib.sha256(model).hexdigest()[:32]

    def encode(self, text: str) -> Int[np.ndarray, " T"]:
        """Returns the ids of the pieces."""
        _utf8(text)
        ids: list[int] = []
        for part in _parts(text):
            first, *rest = part.split(_SPACE_MARK) if self._spells else [part]
            ids += self._processor.encode(first)
            for piece in rest:
                ids += self._mark + self._processor.encode(piece)
        return np.array(ids, np.int32)

    def decode(self, ids: Sequence[int] | Int[np.ndarray, " T"]) -> str:
        """Joins the pieces."""
        return self._processor.decode([int(i) for i in ids if i != self.bos])

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `tokenizer.json` and `tokenizer.model`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "tokenizer.model").write_bytes(self._model)
        _describe(folder, self, {"kind": "sentencepiece"})


class BytePairs:
    """See `BytePairsConfig` and `Tokenizer`; texts come back exactly."""

    def __init__(self, data: bytes, *, bos: int, name: str = "the file"):
        """Takes the bytes of a `tokenizer.json`; `name` is for errors.

        Raises:
          ValueError: Its rules are not known, or `bos` is not one of its special tokens.
        """
        try:
            self._encoding = Encoding(data)
        except ValueError as error:
            raise ValueError(f"{name!r} is no tokenizer that can be read: {error}") from error
        if bos not in self._encoding.special:
            raise ValueError(f"bos must be a special token of {name!r}, got {bos}")
        self._data = data
        self.bos = bos
        self.vocabulary = self._encoding.vocabulary
        self.fingerprint = f"byte_pairs-{bos}-{hashlib.sha256(data).hexdigest()[:32]}"

    def encode(self, text: str) -> Int[np.ndarray, " T"]:
        """Returns the ids of the pieces."""
        _utf8(text)
        return np.array(self._encoding.encode(text), np.int32)

    def decode(self, ids: Sequence[int] | Int[np.ndarray, " T"]) -> str:
        """Joins the pieces."""
        return self._encoding.decode(int(i) for i in ids)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `tokenizer.json` and `byte_pairs.json`, which is the published file."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "byte_pairs.json").write_bytes(self._data)
        _describe(folder, self, {"kind": "byte_pairs", "bos": self.bos})


def load(folder: str | os.PathLike) -> Tokenizer:
    """Returns the tokenizer that was saved into a folder.

    Raises:
      FileNotFoundError: The folder holds none.
      ValueError: What it holds is damaged.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer in {str(folder)!r}: {path.name} is missing")
    try:
        about = json.loads(path.read_text("utf-8"))
        if about["kind"] == "bytes":
            tokenizer = Bytes()
        elif about["kind"] == "symbols":
            tokenizer = Symbols(about["symbols"])
        elif about["kind"] == "byte_pairs":
            file = folder / "byte_pairs.json"
            tokenizer = BytePairs(file.read_bytes(), bos=about["bos"], name=str(file))
        else:
            model = folder / "tokenizer.model"
            tokenizer = SentencePiece(model.read_bytes(), name=str(model))
        if tokenizer.fingerprint != about["fingerprint"]:
            raise ValueError("the model is not the one that was saved")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"tokenizer in {str(folder)!r} is damaged: {error}") from error
    return tokenizer


def _describe(folder: str | os.PathLike, tokenizer: Tokenizer, about: dict[str, str | int]):
    about = {**about, "fingerprint": tokenizer.fingerprint}
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "tokenizer.json").write_text(json.dumps(about) + "\n", "utf-8")


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            "text must be Unicode characters, got half a surrogate pair "
            f"{text[error.start]!r} at character {error.start}"
        ) from error


def _parts(text: str) -> Iterator[str]:
    """Cuts a long text after line ends, which no learned piece reaches across."""
    start = 0
    while len(text) - start > PART:
        end = text.rfind("\n", start, start + PART) + 1 or start + PART
        yield text[start:end]
        start = end
    yield text[start:]


def _sample(texts: Iterable[str], budget: int) -> list[str]:
    """Draws documents evenly in one pass, the same ones in whatever order they come.

    The documents with the smallest hashes are kept until they are `budget` bytes; the last of
    them is cut.
    """
    heap: list[tuple[int, bytes]] = []
    total = 0
    for text in texts:
        data = _utf8(text)
        rank = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
        heapq.heappush(heap, (-rank, data[:budget]))
        total += min(len(data), budget)
        while total - len(heap[0][1]) >= budget:
            total -= len(heapq.heappop(heap)[1])
    sample = [data for _, data in sorted(heap)]
    if total > budget:
        sample[0] = sample[0][: budget - total]
    return [data.decode("utf-8", errors="ignore") for data in sample]


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Sentences to learn from, short and without the characters that the trainer refuses."""
    for text in texts:
        for line in re.split(f"[\0\t\n\r{_SPACE_MARK}]+", text):
            for start in range(0, len(line), 1000):
                yield line[start : start + 1000]


def _learn(sentences: Iterator[str], vocabulary: int, split_digits: bool) -> bytes:
    """Returns the bytes of a new model."""
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocabulary,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=split_digits,
            unk_id=0,
            bos_id=1,
            eos_id=-1,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(_reason(str(error), vocabulary)) from error
    return model.getvalue()


def _reason(error: str, vocabulary: int) -> str:
    """Says in our words why SentencePiece would not learn."""
    if most := re.search(r"set it to a value <= (\d+)", error):
        return (
            f"tokenizer vocabulary must be at most {most[1]}, the largest that the training text "
            f"can make, got {vocabulary}"
        )
    if least := re.search(r"required_chars. \d+ vs (\d+)", error):
        return (
            f"tokenizer vocabulary must be at least {least[1]}, which the characters of the "
            f"training text take, got {vocabulary}"
        )
    if "sentences_.empty()" in error:
        return "the corpus is empty: a tokenizer has no text to learn from"
    return f"SentencePiece could not learn a tokenizer: {error}"
