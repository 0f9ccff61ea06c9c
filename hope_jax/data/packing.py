"""Streams of tokens, and the windows of T+1 that are cut from them."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int


class Piece(NamedTuple):
    """Some tokens in a row.

    Attributes:
      tokens: Their ids.
      starts: True where a token is the first of its document.
      weights: How much predicting each token counts; None where all count alike.
    """

    tokens: Int[np.ndarray, " N"]
    starts: Bool[np.ndarray, " N"]
    weights: Float[np.ndarray, " N"] | None = None


class SplitInfo(NamedTuple):
    """How much a split holds; what losses in nats are divided by.

    Attributes:
      tokens: Ids, one `bos` for each document among them. All but the very first are predicted.
      documents: Documents.
      bytes: UTF-8 bytes of the text, 0 where a split was never text.
      words: Words between white space, 0 where a split was never text.
    """

    tokens: int
    documents: int
    bytes: int
    words: int


@runtime_checkable
class Stream(Protocol):
    """The documents of a split, one after another, each behind its `bos`.

    Attributes:
      info: How much it holds.
    """

    info: SplitInfo

    def read(self, start: int, stop: int) -> Piece:
        """Returns tokens `start` to `stop - 1`, which have to be there."""
        ...


class Chain:
    """Several streams as one.

    Attributes:
      info: The sum of the parts.
    """

    def __init__(self, streams: Sequence[Stream]):
        self._streams = streams
        self._ends = list(itertools.accumulate(stream.info.tokens for stream in streams))
        self.info = SplitInfo(*np.sum([stream.info for stream in streams], axis=0).tolist())

    def read(self, start: int, stop: int) -> Piece:
        """Returns tokens `start` to `stop - 1`, which have to be there."""
        pieces = []
        for stream, end in zip(self._streams, self._ends, strict=True):
            begin = end - stream.info.tokens
            if start < end and stop > begin:
                pieces.append(stream.read(max(start - begin, 0), min(stop, end) - begin))
        weights = None
        if any(piece.weights is not None for piece in pieces):
            weights = np.concatenate([weigh(piece) for piece in pieces])
        tokens = np.concatenate([piece.tokens for piece in pieces])
        return Piece(tokens, np.concatenate([piece.starts for piece in pieces]), weights)


class Windows:
    """The training windows of a stream: each token but the first is a target in one of them.

    Neighbouring windows share one token, the last of one is the first that the next one reads.
    What is left at the end, less than a window, is not trained on.
    """

    def __init__(self, stream: Stream, *, window: int):
        self._stream = stream
        self._window = window

    def __len__(self) -> int:
        return count(self._stream.info.tokens, self._window)

    def __getitem__(self, index: int) -> Piece:
        start = int(index) * self._window
        return self._stream.read(start, start + self._window + 1)

    # grain writes it into a checkpoint and into errors: it must not show an address.
    def __repr__(self) -> str:
        return f"Windows(window={self._window}, tokens={self._stream.info.tokens})"


def count(tokens: int, window: int) -> int:
    """Returns how many whole training windows a stream holds."""
    return max(tokens - 1, 0) // window


def padded(stream: Stream, start: int, *, window: int, bos: int) -> Piece:
    """Reads a window that may reach past the end of the stream, or lie behind it.

    Returns:
      T+1 tokens with weights. What is not there is `bos` with weight 0.
    """
    stop = min(start + window + 1, stream.info.tokens)
    tokens = np.full(window + 1, bos, np.int32)
    starts = np.zeros(window + 1, bool)
    weights = np.zeros(window + 1, np.float32)
    # A single token is no target, and the last window's last token is not read twice.
    if stop - start > 1:
        piece = stream.read(start, stop)
        size = stop - start
        tokens[:size], starts[:size], weights[:size] = piece.tokens, piece.starts, weigh(piece)
    return Piece(tokens, starts, weights)


def weigh(piece: Piece) -> Float[np.ndarray, " N"]:
    """Returns the weights of a piece, ones where it has none."""
    if piece.weights is None:
        return np.ones(len(piece.tokens), np.float32)
    return piece.weights
