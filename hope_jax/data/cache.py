"""Work done once for a corpus and kept on disk: tokenized splits and learned tokenizers."""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hope_jax.data import sources
from hope_jax.data.packing import Piece, SplitInfo
from hope_jax.data.sources import HuggingFaceConfig, SplitConfig, TextSource
from hope_jax.data.tokenizer import SentencePieceConfig, Tokenizer, load

_VERSION = 1
"""A change of what is written, or of how text is cut, takes another number."""

_SETTLED = 2_000_000_000
"""Nanoseconds after which no second change of a file can hide behind the same time stamp."""

_log = logging.getLogger(__name__)


class TokenFile:
    """A tokenized split on disk, read through a memory map; see `packing.Stream`."""

    def __init__(self, folder: Path, split: str, dtype: str, info: SplitInfo):
        self.info = info
        self._folder = folder
        self._split = split
        self._dtype = dtype
        self._open()

    def read(self, start: int, stop: int) -> Piece:
        """Returns tokens `start` to `stop - 1`, which have to be there."""
        begins = np.zeros(stop - start, bool)
        first, last = np.searchsorted(self._offsets, [start, stop])
        begins[self._offsets[first:last] - start] = True
        return Piece(self._tokens[start:stop].astype(np.int32), begins)

    def _open(self) -> None:
        path = self._folder / self._split
        self._tokens = _map(path.with_suffix(".tokens"), self._dtype)
        self._offsets = _map(path.with_suffix(".offsets"), "int64")

    # A worker process opens its own maps instead of receiving the tokens.
    def __getstate__(self) -> dict[str, object]:
        return {name: x for name, x in vars(self).items() if name not in ("_tokens", "_offsets")}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._open()


def tokenized(
    source: TextSource, shares: SplitConfig, tokenizer: Tokenizer, *, folder: Path
) -> dict[str, TokenFile]:
    """Returns the splits of a source as tokens, from the cache or made now.

    Several processes may ask at once: one works, the others wait. A process that dies leaves
    nothing that another would take for whole.

    Args:
      source: What to read.
      shares: What to hold out where the source does not say.
      tokenizer: What to encode with.
      folder: The cache.

    Raises:
      FileNotFoundError: A file of the source is missing.
      OSError: The cache cannot be written.
      ValueError: A file is not what the source says.
    """
    key = _key("tokens", _content(source, shares, folder), tokenizer.fingerprint)
    entry = _once(
        folder / key, lambda into: _tokenize(source, shares, tokenizer, into), _whole_tokens
    )
    about = _about(entry)
    return {
        split: TokenFile(entry, split, about["dtype"], SplitInfo(**info))
        for split, info in about["splits"].items()
    }


def learned(
    config: SentencePieceConfig, corpora: list[TextSource], shares: SplitConfig, *, folder: Path
) -> Tokenizer:
    """Returns a tokenizer that learned from the training splits, from the cache or now.

    Args:
      config: What to learn.
      corpora: The sources.
      shares: What to hold out where a source does not say.
      folder: The cache.

    Raises:
      FileNotFoundError: A file of a source is missing.
      OSError: The cache cannot be written.
      ValueError: The corpora are too small or too varied for the vocabulary, or not readable.
    """

    def learn(into: Path) -> None:
        config.build(
            text
            for corpus in corpora
            for split, text in _watched(corpus, shares, "reading for a tokenizer")
            if split == "train"
        ).save(into)

    content = [_content(corpus, shares, folder) for corpus in corpora]
    key = _key("tokenizer", content, asdict(config))
    return load(_once(folder / key, learn, _whole_tokenizer))


def _tokenize(source: TextSource, shares: SplitConfig, tokenizer: Tokenizer, into: Path) -> None:
    """Writes ids and the places of the documents' first ones, each split to files of its own."""
    dtype = np.uint16 if tokenizer.vocabulary <= 1 << 16 else np.uint32
    names = sources.splits(source, shares)
    found = dict.fromkeys(names, SplitInfo(0, 0, 0, 0))
    offsets = {name: array("q") for name in names}
    with ExitStack() as stack:
        out = {name: stack.enter_context((into / f"{name}.tokens").open("wb")) for name in names}
        for name, text in _watched(source, shares, "tokenizing"):
            ids = np.concatenate([[tokenizer.bos], tokenizer.encode(text)])
            out[name].write(ids.astype(dtype).tobytes())
            offsets[name].append(found[name].tokens)
            new = SplitInfo(len(ids), 1, len(text.encode()), len(text.split()))
            found[name] = SplitInfo(*map(sum, zip(found[name], new, strict=True)))
    for name in names:
        (into / f"{name}.offsets").write_bytes(offsets[name].tobytes())
    about = {
        "dtype": np.dtype(dtype).name,
        "splits": {name: info._asdict() for name, info in found.items()},
    }
    (into / "about.json").write_text(json.dumps(about), "utf-8")


def _watched(source: TextSource, shares: SplitConfig, doing: str) -> Iterator[tuple[str, str]]:
    """Yields the documents of a source, with a progress bar if that takes a while."""
    # `disable=None` keeps the bar out of files.
    look = {"unit": "B", "unit_scale": True, "delay": 1, "leave": False, "disable": None}
    with tqdm(desc=doing, total=sources.size(source), **look) as bar:
        for split, text in sources.documents(source, shares):
            yield split, text
            bar.update(len(text.encode()))


def _once(entry: Path, write: Callable[[Path], None], whole: Callable[[Path], bool]) -> Path:
    """Returns a folder that is written once, whoever asks and whatever dies meanwhile.

    Args:
      entry: The folder.
      write: Fills a new folder, which is then moved to `entry` in one step.
      whole: Tells whether `entry` is there and undamaged.
    """
    if whole(entry):
        return entry
    entry.parent.mkdir(parents=True, exist_ok=True)
    with _lock(entry.with_suffix(".lock")) as alone:
        if whole(entry):
            return entry
        for path in entry.parent.glob(f"{entry.name}.*.partial") if alone else ():
            shutil.rmtree(path, ignore_errors=True)
        if entry.exists():
            _log.warning("%s is damaged and is made anew", entry)
            shutil.rmtree(entry)
        partial = Path(
            tempfile.mkdtemp(prefix=f"{entry.name}.", suffix=".partial", dir=entry.parent)
        )
        try:
            write(partial)
            partial.rename(entry)
        except OSError:
            # Where locks do not work another process may have been faster, with the same result.
            if not whole(entry):
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return entry


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Waits until nobody else holds `path`; yields False where the file system has no locks."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.info("waiting for another process that writes %s", path.with_suffix(""))
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True


def _content(source: TextSource, shares: SplitConfig, folder: Path) -> object:
    """Returns what the documents of each split depend on, but not where the files lie."""
    settings = {name: x for name, x in asdict(source).items() if name not in sources.SPLITS}
    content = {split: _digests(paths, folder) for split, paths in sources.files(source).items()}
    if isinstance(source, HuggingFaceConfig):
        named = [split for split in sources.SPLITS if getattr(source, split)]
        content = {split: [source.fingerprint(split)] for split in named}
    return [settings, content, asdict(shares) if list(content) == ["train"] else None]


def _digests(paths: list[Path], folder: Path) -> list[str]:
    """Returns the hashes of files; those of files that did not change are remembered."""
    memory = folder / _key("files", [str(path.resolve()) for path in paths])
    known, written = {}, 0
    with suppress(OSError, ValueError):
        known, written = json.loads(memory.read_text("utf-8")), memory.stat().st_mtime_ns
    digests, stale = {}, False
    for path in paths:
        stat = path.stat()
        mark = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        *old_mark, digest = known.get(str(path), [None])
        if mark != old_mark or max(mark[1:]) + _SETTLED > written:
            stale = True
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "blake2b").hexdigest()
        digests[str(path)] = [*mark, digest]
    if stale:
        _replace(memory, json.dumps(digests))
    return [digest for *_, digest in digests.values()]


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


def _key(kind: str, *content: object) -> str:
    data = json.dumps([_VERSION, *content], sort_keys=True).encode()
    return f"{kind}-{hashlib.blake2b(data, digest_size=16).hexdigest()}"


def _whole_tokens(entry: Path) -> bool:
    """Tells whether every file of an entry is there and as long as it says."""
    try:
        about = _about(entry)
        width = np.dtype(about["dtype"]).itemsize
        sizes = {f"{name}.tokens": x["tokens"] * width for name, x in about["splits"].items()}
        sizes |= {f"{name}.offsets": x["documents"] * 8 for name, x in about["splits"].items()}
        return all((entry / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _whole_tokenizer(entry: Path) -> bool:
    try:
        load(entry)
    except (OSError, ValueError):
        return False
    return True


def _about(entry: Path) -> dict:
    return json.loads((entry / "about.json").read_text("utf-8"))


def _map(path: Path, dtype: str) -> np.ndarray:
    # An empty file cannot be mapped.
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)
    return np.asarray(np.memmap(path, dtype, "r"))
