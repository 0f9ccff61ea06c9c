"""From a data config to batches on the mesh, in an order that depends on the seed alone."""

import contextlib
import queue
import threading
import weakref
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Int

from hope_jax import sharding
from hope_jax.data import cache, sources
from hope_jax.data.packing import Chain, Piece, SplitInfo, Stream, Windows, count, padded, weigh
from hope_jax.data.sources import (
    MixtureConfig,
    PartConfig,
    SingleSource,
    SourceConfig,
    SplitConfig,
    StdlibConfig,
)
from hope_jax.data.synthetic import RecallConfig
from hope_jax.data.tokenizer import (
    BytesConfig,
    SentencePieceConfig,
    Tokenizer,
    TokenizerConfig,
)
from hope_jax.shapes import Batch

_STEPS = 1 << 40
"""Training never ends by itself."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a model reads.

    Attributes:
      source: Where documents come from.
      tokenizer: How text becomes ids.
      split: What is held out where the source does not say.
      window: Targets in a row of a training batch (T); a batch holds one token more.
      batch: Rows of a batch (B), over all processes.
      isolate_documents: Whether a document's start closes the memory; otherwise a batch has no
        `starts` and a model reads on.
      seed: The order of the training windows.
      workers: Processes that read ahead; 0 reads with threads, which is enough for text.
      prefetch: Batches that wait on the device.
      cache: Where tokenized text and learned tokenizers are kept.
    """

    source: SourceConfig = field(default_factory=StdlibConfig)
    tokenizer: TokenizerConfig = field(default_factory=BytesConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    window: int = 256
    batch: int = 16
    isolate_documents: bool = True
    seed: int = 0
    workers: int = 0
    prefetch: int = 2
    cache: str = "~/.cache/hope_jax"

    def __post_init__(self):
        for name, least in (("window", 1), ("batch", 1), ("seed", 0), ("workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.prefetch < 1:
            raise ValueError(f"prefetch must be at least 1, got {self.prefetch}")
        for part in _parts(self.source):
            if isinstance(part.source, RecallConfig):
                _check_synthetic(part.source, self.tokenizer, self.window)

    @property
    def vocabulary(self) -> int:
        """The number of ids, known without a look at the corpus."""
        return self.tokenizer.vocabulary

    def build_tokenizer(self) -> Tokenizer:
        """Returns the tokenizer, which is learned first where it has to be.

        Raises:
          FileNotFoundError: A file is missing.
          ValueError: The corpus cannot be read, or does not fit the vocabulary.
        """
        if not isinstance(self.tokenizer, SentencePieceConfig) or self.tokenizer.model:
            return self.tokenizer.build()
        corpora = [
            part.source for part in _parts(self.source) if not isinstance(part.source, RecallConfig)
        ]
        return cache.learned(self.tokenizer, corpora, self.split, folder=self._folder)

    def build(self, *, tokenizer: Tokenizer | None = None) -> "Data":
        """Tokenizes the corpus, or finds it in the cache, for the mesh that is in use.

        Args:
          tokenizer: The one that a run was trained with; None builds it from the config.

        Raises:
          FileNotFoundError: A file is missing.
          ModuleNotFoundError: A source needs an optional package.
          ValueError: The corpus cannot be read, is empty or shorter than a window, or the batch
            cannot be split over the devices.
        """
        mesh = jax.sharding.get_mesh()
        placement = _place(self, None if mesh.empty else mesh)
        tokenizer = self.build_tokenizer() if tokenizer is None else tokenizer
        if tokenizer.vocabulary != self.vocabulary:
            raise ValueError(
                f"tokenizer must have the config's vocabulary of {self.vocabulary}, "
                f"got {tokenizer.vocabulary}"
            )
        streams = [self._streams(part.source, tokenizer) for part in _parts(self.source)]
        return Data(self, tokenizer, streams, placement)

    def abstract(self, *, weighted: bool | None = None) -> Batch:
        """The shapes of a batch, and their shardings on the mesh in use, without any data.

        Args:
          weighted: Whether targets count differently, as in `Data.valid`; None for a batch of
            training, where the source says it.

        Raises:
          ValueError: The batch or the window cannot be split over the devices.
        """
        mesh = jax.sharding.get_mesh()
        _place(self, mesh)
        if weighted is None:
            weighted = any(isinstance(part.source, RecallConfig) for part in _parts(self.source))

        def lay(width: int, dtype: type) -> Any:
            shape = self.batch, width
            return jax.ShapeDtypeStruct(shape, dtype, sharding=_sharding(shape, mesh))

        long, weights = self.window + 1, lay(self.window, np.float32) if weighted else None
        starts = lay(long, bool) if self.isolate_documents else None
        return Batch(lay(long, np.int32), starts, weights)

    def _streams(self, source: SingleSource, tokenizer: Tokenizer) -> dict[str, Stream]:
        if isinstance(source, RecallConfig):
            return {split: source.stream(split, bos=tokenizer.bos) for split in sources.SPLITS}
        found = cache.tokenized(source, self.split, tokenizer, folder=self._folder)
        total = sum(stream.info.documents for stream in found.values())
        if total == 0:
            raise ValueError(f"the corpus is empty: {source} holds no text")
        for split, stream in found.items():
            if stream.info.documents == 0:
                raise ValueError(
                    f"split {split!r} is empty: it got none of {total} documents of {source}; "
                    "name files for it, set data.split.by=position, or change its share"
                )
        if count(found["train"].info.tokens, self.window) < 1:
            raise ValueError(
                f"split 'train' must hold a window of {self.window + 1} tokens (data.window + 1), "
                f"got {found['train'].info.tokens} tokens of {source}"
            )
        return dict(found)

    @property
    def _folder(self) -> Path:
        return Path(self.cache).expanduser()


class Data:
    """The corpus of a run, ready to be read; made by `DataConfig.build`.

    Attributes:
      config: What it was built from.
      tokenizer: How its ids become text again.
      splits: The names of its splits.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        streams: Sequence[Mapping[str, Stream]],
        placement: "Placement",
    ):
        self.config = config
        self.tokenizer = tokenizer
        self.splits = tuple(
            split for split in sources.SPLITS if any(split in part for part in streams)
        )
        self._streams = streams
        self._placement = placement

    def info(self, split: str) -> SplitInfo:
        """Returns how much a split holds, all sources of a mixture together."""
        return self.documents(split).info

    def documents(self, split: str) -> Stream:
        """Returns a split as it lies, the sources of a mixture one after the other.

        Raises:
          ValueError: There is no such split.
        """
        streams = [part[split] for part in self._streams if split in part]
        if not streams:
            raise ValueError(f"split must be one of {', '.join(self.splits)}, got {split!r}")
        return Chain(streams)

    def train(self, start_step: int = 0) -> "Batches":
        """Reads shuffled windows without end, each source once before any of it comes again.

        Batch number `step` is the same whatever was read before it, however many processes or
        workers read it: a run that stopped after `step` batches goes on with `train(step)`.

        Args:
          start_step: The number of the first batch.
        """
        import grain

        config = self.config
        streams = [part["train"] for part in self._streams]
        batches = TrainingBatches(
            streams,
            weights=[part.weight for part in _parts(config.source)],
            config=config,
            rows=self._placement.rows,
            start=start_step,
        )
        options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
        pieces = grain.MapDataset.source(batches).to_iter_dataset(options)
        if config.workers:
            _parse_flags()
            pieces = pieces.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=config.workers, per_worker_buffer_size=config.prefetch
                )
            )
        return Batches(iter(pieces), self._placement, ahead=config.prefetch)

    def valid(self, split: str = "valid") -> "Batches":
        """Reads a split once, window after window, each with fresh memory.

        Every token but the very first is a target once. What fills up the last window and the
        last batch has weight 0.

        Args:
          split: One of `splits`.
        """
        stream, window, batch = self.documents(split), self.config.window, self.config.batch
        windows = -(-(stream.info.tokens - 1) // window)
        steps = -(-windows // batch)

        def pieces() -> Generator[Piece, None, None]:
            for step in range(steps):
                read = [
                    padded(stream, index * window, window=window, bos=self.tokenizer.bos)
                    for index in (step * batch + self._placement.rows).tolist()
                ]
                yield _stack(read, weighted=True)

        return Batches(pieces(), self._placement, ahead=self.config.prefetch, steps=steps)


class TrainingBatches:
    """What one process reads of each batch, by number; the batches are `packing.Piece`s."""

    def __init__(
        self,
        streams: Sequence[Stream],
        *,
        weights: Sequence[float],
        config: DataConfig,
        rows: Int[np.ndarray, " R"],
        start: int = 0,
    ):
        """Takes the training streams of a mixture.

        Args:
          streams: One for each source.
          weights: How often each is read, relative to the others.
          config: The size and the seed of the batches.
          rows: The rows to read, of all that a batch has.
          start: The number of the batch at index 0.
        """
        import grain

        shuffled = [
            grain.MapDataset.source(Windows(stream, window=config.window))
            .seed(config.seed)
            .shuffle()
            .repeat()
            for stream in streams
        ]
        self._windows = grain.MapDataset.mix(shuffled, weights)
        self._weighted = any(stream.read(0, 1).weights is not None for stream in streams)
        self._config = config
        self._rows = rows
        self._start = start

    def __len__(self) -> int:
        return _STEPS

    def __getitem__(self, index: int) -> Piece:
        first = (self._start + int(index)) * self._config.batch
        read = [self._windows[first + row] for row in self._rows.tolist()]
        return _stack(read, weighted=self._weighted)

    # See `Windows`.
    def __repr__(self) -> str:
        return f"TrainingBatches(start={self._start})"


class Batches:
    """Batches in order, read and laid on the devices ahead of time by a thread.

    Attributes:
      steps: How many there are; None where they never end.
    """

    def __init__(
        self,
        pieces: "Pieces",
        placement: "Placement",
        *,
        ahead: int,
        steps: int | None = None,
    ):
        """Begins to read.

        Args:
          pieces: What this process reads of each batch.
          placement: How a piece becomes a batch.
          ahead: How many batches may wait.
          steps: How many there are.
        """
        self.steps = steps
        self._ready: queue.Queue = queue.Queue(ahead)
        stopped = threading.Event()
        feed = threading.Thread(
            target=_feed,
            args=(pieces, placement, self._ready, stopped),
            name="hope_jax batches",
            daemon=True,
        )
        # Runs at `close`, when this object is gone, or when Python ends, whichever is first.
        self._finalizer = weakref.finalize(self, _stop, feed, stopped)
        feed.start()

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        if not self._finalizer.alive:
            raise StopIteration
        batch = self._ready.get()
        if isinstance(batch, Batch):
            return batch
        self.close()
        raise batch

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the thread and the workers; there is no next batch."""
        self._finalizer()


@runtime_checkable
class Pieces(Protocol):
    """What this process reads of each batch, in order."""

    def __next__(self) -> Piece: ...

    def __iter__(self) -> "Pieces": ...

    def close(self) -> None:
        """Ends the reading."""
        ...


class Placement(NamedTuple):
    """Which rows of a batch this process reads, and where they go.

    Attributes:
      rows: Their numbers.
      batch: How many rows a batch has, over all processes.
      isolate: Whether documents are told apart.
      mesh: The devices; None for the default device.
    """

    rows: Int[np.ndarray, " R"]
    batch: int
    isolate: bool
    mesh: Mesh | None

    def put(self, piece: Piece) -> Batch:
        """Lays what this process read on its devices."""
        weights = None if piece.weights is None else self._put(piece.weights[:, 1:])
        starts = self._put(piece.starts) if self.isolate else None
        return Batch(self._put(piece.tokens), starts, weights)

    def _put(self, local: np.ndarray) -> jax.Array:
        if self.mesh is None:
            return jax.device_put(local)
        shape = (self.batch, *local.shape[1:])
        return jax.make_array_from_process_local_data(_sharding(shape, self.mesh), local, shape)


def _place(config: DataConfig, mesh: Mesh | None) -> Placement:
    """Finds the rows of a batch that lie on devices of this process."""
    batch, isolate = config.batch, config.isolate_documents
    if mesh is None:
        if jax.process_count() > 1:
            raise ValueError("several processes need a mesh in use: `with sharding.use(mesh):`")
        return Placement(np.arange(batch), batch, isolate, None)
    for name, axis, size in (("batch", "batch", batch), ("window", "time", config.window)):
        pieces = sharding.pieces(axis, mesh)
        if size % pieces:
            raise ValueError(
                f"{name} must be divisible by {pieces}, the devices that share it "
                f"({' x '.join(sharding.RULES[axis])}), got {size}"
            )
    shape = (batch, 1)
    shards = _sharding(shape, mesh).addressable_devices_indices_map(shape).values()
    rows = {row for index in shards if index for row in range(*index[0].indices(batch))}
    return Placement(np.array(sorted(rows)), batch, isolate, mesh)


def _sharding(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    # A row of ids is small and has one token more than a window: every device has it whole.
    return sharding.named(("batch", None), shape, mesh)


def _stack(pieces: Sequence[Piece], *, weighted: bool) -> Piece:
    """Makes one piece with a leading axis of many, as a batch needs it."""
    tokens = np.stack([piece.tokens for piece in pieces])
    starts = np.stack([piece.starts for piece in pieces])
    return Piece(tokens, starts, np.stack([weigh(p) for p in pieces]) if weighted else None)


def _feed(
    pieces: Pieces, placement: Placement, ready: queue.Queue, stopped: threading.Event
) -> None:
    """Fills the queue with batches, then with what ended them."""
    try:
        for piece in pieces:
            _offer(placement.put(piece), ready, stopped)
            if stopped.is_set():
                break
        _offer(StopIteration(), ready, stopped)
    # Whatever goes wrong belongs to the thread that asks for the batch.
    except BaseException as error:
        _offer(error, ready, stopped)
    finally:
        pieces.close()


def _offer(item: Batch | BaseException, ready: queue.Queue, stopped: threading.Event) -> None:
    while not stopped.is_set():
        with contextlib.suppress(queue.Full):
            return ready.put(item, timeout=0.1)
    return None


def _stop(feed: threading.Thread, stopped: threading.Event) -> None:
    stopped.set()
    # The garbage collector may run this in any thread.
    if feed is not threading.current_thread():
        feed.join()


def _parts(source: SourceConfig) -> tuple[PartConfig, ...]:
    return source.parts if isinstance(source, MixtureConfig) else (PartConfig(source=source),)


def _check_synthetic(source: RecallConfig, tokenizer: TokenizerConfig, window: int) -> None:
    """Says what a source of symbols asks of the rest of the config."""
    free = 0 if isinstance(tokenizer, SentencePieceConfig) else tokenizer.vocabulary - 1
    if source.symbols > free:
        raise ValueError(
            f"tokenizer must have {source.symbols} symbols for source {source.kind!r} "
            f"(kind: symbols, symbols: {source.symbols}), got {free} with kind {tokenizer.kind!r}"
        )
    if window % source.length:
        raise ValueError(
            f"window must be a multiple of an episode of source {source.kind!r}, "
            f"{source.length} tokens, got {window}"
        )


def _parse_flags() -> None:
    """Lets grain's workers start in a program that has no absl flags."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
