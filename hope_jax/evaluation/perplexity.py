"""How well a model foretells text: perplexity by token and by word, and bits per byte."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from hope_jax.data.packing import Piece, SplitInfo, Stream, weigh
from hope_jax.data.tokenizer import Tokenizer
from hope_jax.evaluation.score import Total, lanes, total, whole_rows, windows
from hope_jax.evaluation.subject import (
    Results,
    Subject,
    TaskError,
    encode,
    read_text,
    recall,
)
from hope_jax.models.adapt import learn
from hope_jax.models.memory_file import load_memory


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Perplexity of a split of the run's data, or of a text file.

    Every token but the very first is foretold exactly once, the `bos` that ends a document among
    them, and nothing is inserted. Words and bytes are those of the text: what tokens cost in all
    is divided by another number, so that models with different tokenizers can be compared.

    Attributes:
      split: Which part of the run's data.
      context: "window" reads each window of the training length with fresh memory; "stream" reads
        on with the memory of the text before, as far as the document reaches; "learn" reads all
        documents as one stream, and levels learn the next token from each chunk once it is scored.
      file: A UTF-8 text of one's own to read as one document instead of a split.
      memory: A file that `read` left: the text goes on from there, each window with "window", and
        documents in it follow one another.
      batch: Rows that are read side by side; devices may add some. With "stream", rows begin where
        documents do; data without isolated documents, or of one document, is a single row.
    """

    split: Literal["train", "valid", "test"] = "valid"
    context: Literal["window", "stream", "learn"] = "window"
    file: str | None = None
    memory: str | None = None
    batch: int = 8

    def __post_init__(self):
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, got {self.batch}")

    def run(self, subject: Subject) -> Results:
        """Reads the text; see `summary` for the names of the numbers."""
        if self.file is None:
            stream, name = subject.stream(self.split), f"split {self.split!r}"
        else:
            stream, name = Document(Path(self.file), subject.tokenizer), self.file
        tokens = stream.info.tokens
        if tokens < 2:
            raise TaskError(f"a text must hold at least 1 token to foretell, {name} holds 0")
        if self.context == "learn":
            return summary(self._learn(subject, stream), stream.info)
        carry = self.context == "stream"
        isolate = subject.isolate and self.memory is None
        rows = whole_rows(self.batch) if isolate or not carry else 1
        cut = lanes(stream, window=subject.window, rows=rows) if carry else None
        cost = total(
            subject.model,
            stream,
            cut or windows(tokens, window=subject.window, rows=rows),
            carry=carry,
            isolate=isolate,
            memory=None if self.memory is None else recall(subject.model, self.memory, rows),
            track=subject.track,
        )
        return summary(cost, stream.info)

    def _learn(self, subject: Subject, stream: Stream) -> Total:
        piece = stream.read(0, stream.info.tokens)
        try:
            before = None if self.memory is None else load_memory(self.memory, subject.model)
            losses, _ = learn(subject.model, piece.tokens[None], before, track=subject.track)
        except ValueError as error:
            raise TaskError(str(error)) from error
        weights = weigh(piece)[1:]
        return Total(float(np.sum(losses[0, 1:] * weights, dtype=np.float64)), float(weights.sum()))


def summary(cost: Total, info: SplitInfo) -> Results:
    """Names the numbers that a stream's cost comes to.

    Returns:
      nats_per_token, perplexity (its exponential), tokens (those foretold), documents; and for
      text bits_per_byte, word_perplexity, bytes, words (between white space).
    """
    nats = cost.nats / cost.targets
    results: Results = {"nats_per_token": nats, "perplexity": _exp(nats)}
    if info.bytes:
        results["bits_per_byte"] = cost.nats / math.log(2) / info.bytes
    if info.words:
        results["word_perplexity"] = _exp(cost.nats / info.words)
    results["tokens"] = round(cost.targets)
    results["documents"] = info.documents
    if info.bytes:
        results |= {"words": info.words, "bytes": info.bytes}
    return results


class Document:
    """A text file as a stream of one document; see `Stream`.

    Attributes:
      info: How much it holds.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer):
        """Reads and encodes the file.

        Raises:
          TaskError: There is no such file, it is no UTF-8, or the tokenizer cannot encode it.
        """
        text = read_text(path)
        tokens = encode(tokenizer, text, str(path))
        self._tokens = np.concatenate([[tokenizer.bos], tokens]).astype(np.int32)
        self.info = SplitInfo(len(self._tokens), 1, len(text.encode()), len(text.split()))

    def read(self, start: int, stop: int) -> Piece:
        """Returns tokens `start` to `stop - 1`, which have to be there."""
        return Piece(self._tokens[start:stop], np.arange(start, stop) == 0)


def _exp(nats: float) -> float:
    """Exponential that says infinity where a float ends."""
    return math.exp(nats) if nats < 700 else math.inf
