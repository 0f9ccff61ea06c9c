"""A corpus is tokenized once; what has changed, died or decayed is never taken for it."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from hope_jax.data import cache
from hope_jax.data.sources import SplitConfig, TextConfig
from hope_jax.data.tokenizer import Bytes, BytesConfig, SentencePieceConfig, Symbols

SHARES = SplitConfig(valid=0.2, test=0.2)
TEXTS = [f"document {i} " * (i % 7 + 1) for i in range(60)]


class Counting(Bytes):
    """Counts the documents it encodes."""

    def __init__(self):
        self.count = 0

    def encode(self, text):
        self.count += 1
        return super().encode(text)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(TEXTS))
    return TextConfig(train=str(path), document="line")


def _tokens(streams):
    return {split: x.read(0, x.info.tokens).tokens.tolist() for split, x in streams.items()}


def test_every_document_is_there_behind_its_bos(corpus, tmp_path):
    streams = cache.tokenized(corpus, SHARES, Bytes(), folder=tmp_path / "cache")
    texts = []
    for stream in streams.values():
        piece = stream.read(0, stream.info.tokens)
        np.testing.assert_array_equal(piece.starts, piece.tokens == 256)
        parts = np.split(piece.tokens, np.flatnonzero(piece.starts))[1:]
        texts += [Bytes().decode(part) for part in parts]
        mine = texts[-len(parts) :]
        assert stream.info.documents == len(parts)
        assert stream.info.bytes == sum(len(text.encode()) for text in mine)
        assert stream.info.words == sum(len(text.split()) for text in mine)
    assert sorted(texts) == sorted(TEXTS)
    assert {"train", "valid", "test"} == set(streams)


def test_any_part_of_a_stream_equals_that_part_of_the_whole(corpus, tmp_path):
    stream = cache.tokenized(corpus, SHARES, Bytes(), folder=tmp_path)["train"]
    whole = stream.read(0, stream.info.tokens)
    for start, stop in ((0, 1), (5, 9), (13, 14), (1, 200), (40, stream.info.tokens)):
        piece = stream.read(start, stop)
        np.testing.assert_array_equal(piece.tokens, whole.tokens[start:stop])
        np.testing.assert_array_equal(piece.starts, whole.starts[start:stop])


def test_the_work_is_done_once(corpus, tmp_path):
    tokenizer = Counting()
    first = cache.tokenized(corpus, SHARES, tokenizer, folder=tmp_path / "cache")
    second = cache.tokenized(corpus, SHARES, tokenizer, folder=tmp_path / "cache")
    assert tokenizer.count == len(TEXTS)
    assert _tokens(first) == _tokens(second)


def test_a_corpus_that_moved_is_the_same_corpus(corpus, tmp_path):
    tokenizer = Counting()
    cache.tokenized(corpus, SHARES, tokenizer, folder=tmp_path / "cache")
    os.rename(corpus.train, tmp_path / "moved.txt")
    moved = TextConfig(train=str(tmp_path / "moved.txt"), document="line")
    cache.tokenized(moved, SHARES, tokenizer, folder=tmp_path / "cache")
    assert tokenizer.count == len(TEXTS)


@pytest.mark.parametrize("settled", [False, True])
def test_a_changed_file_is_read_again(corpus, tmp_path, settled, monkeypatch):
    if settled:
        monkeypatch.setattr(cache, "_SETTLED", 0)
    folder = tmp_path / "cache"
    before = cache.tokenized(corpus, SHARES, Bytes(), folder=folder)
    stat = os.stat(corpus.train)
    if settled:
        time.sleep(0.05)
    with open(corpus.train, "r+") as file:
        file.write("D")
    # The same size and the same time stamp hide nothing.
    os.utime(corpus.train, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = cache.tokenized(corpus, SHARES, Bytes(), folder=folder)
    assert _tokens(before) != _tokens(after)


def test_hashes_of_settled_files_are_remembered(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_SETTLED", 0)
    folder = tmp_path / "cache"
    time.sleep(0.05)
    cache.tokenized(corpus, SHARES, Bytes(), folder=folder)
    monkeypatch.setattr(cache.hashlib, "file_digest", None)
    cache.tokenized(corpus, SHARES, Bytes(), folder=folder)


def test_a_file_written_a_moment_ago_is_hashed_again(corpus, tmp_path, monkeypatch):
    hashed, digest = [], cache.hashlib.file_digest

    def watched(*arguments):
        hashed.append(arguments)
        return digest(*arguments)

    monkeypatch.setattr(cache.hashlib, "file_digest", watched)
    for _ in range(2):
        cache.tokenized(corpus, SHARES, Bytes(), folder=tmp_path / "cache")
    assert len(hashed) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda source, shares: (TextConfig(train=source.train), shares, Bytes()),
        lambda source, _: (source, SplitConfig(valid=0.3, test=0.2), Bytes()),
        lambda source, shares: (source, shares, Renamed()),
    ],
    ids=["reading", "shares", "tokenizer"],
)
def test_other_settings_are_another_entry(corpus, tmp_path, change):
    before = cache.tokenized(corpus, SHARES, Bytes(), folder=tmp_path)
    after = cache.tokenized(*change(corpus, SHARES), folder=tmp_path)
    assert before["train"]._folder != after["train"]._folder


class Renamed(Bytes):
    fingerprint = "bytes of another kind"


def test_large_vocabularies_take_wide_numbers(corpus, tmp_path):
    class Wide(Symbols):
        def encode(self, text):
            return np.array([65_536, len(text)], np.int32)

    for symbols, dtype in ((65_535, "uint16"), (70_000, "uint32")):
        streams = cache.tokenized(corpus, SHARES, Wide(symbols), folder=tmp_path)
        assert streams["train"]._dtype == dtype
    piece = streams["train"].read(0, 3)
    assert piece.tokens.dtype == np.int32
    assert piece.tokens[:2].tolist() == [70_000, 65_536]


@pytest.mark.parametrize("name", ["train.tokens", "valid.offsets", "about.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_entry_is_made_anew(corpus, tmp_path, name, damage, caplog):
    before = cache.tokenized(corpus, SHARES, Bytes(), folder=tmp_path)
    path = before["train"]._folder / name
    expected = _tokens(before)
    del before
    path.unlink() if damage == "gone" else os.truncate(path, path.stat().st_size - 2)
    assert _tokens(cache.tokenized(corpus, SHARES, Bytes(), folder=tmp_path)) == expected
    assert "is damaged and is made anew" in caplog.text


def test_an_error_on_the_way_leaves_nothing(corpus, tmp_path):
    class Failing(Bytes):
        def encode(self, _):
            raise OSError(28, "No space left on device")

    folder = tmp_path / "cache"
    with pytest.raises(OSError, match="No space left"):
        cache.tokenized(corpus, SHARES, Failing(), folder=folder)
    assert not [path for path in folder.iterdir() if path.is_dir()]
    assert cache.tokenized(corpus, SHARES, Bytes(), folder=folder)["train"].info.documents


DYING = """
    import os, signal, sys
    from pathlib import Path
    from hope_jax.data import cache
    from hope_jax.data.sources import SplitConfig, TextConfig
    from hope_jax.data.tokenizer import Bytes

    path, folder, moment = sys.argv[1:]

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    class Dying(Bytes):
        count = 0
        def encode(self, text):
            self.count += 1
            if moment == "tokens" and self.count == 30:
                die()
            return super().encode(text)

    if moment == "about":
        dumps = cache.json.dumps
        cache.json.dumps = lambda x, **options: die() if "dtype" in x else dumps(x, **options)
    if moment == "rename":
        Path.rename = die
    source = TextConfig(train=path, document="line")
    cache.tokenized(source, SplitConfig(valid=0.2, test=0.2), Dying(), folder=Path(folder))
"""


@pytest.mark.parametrize("moment", ["tokens", "about", "rename"])
def test_a_process_killed_while_it_writes_leaves_no_broken_cache(corpus, tmp_path, moment):
    expected = _tokens(cache.tokenized(corpus, SHARES, Bytes(), folder=tmp_path / "other"))
    folder = tmp_path / "cache"
    program = [sys.executable, "-c", textwrap.dedent(DYING), corpus.train, str(folder), moment]
    assert subprocess.run(program, timeout=60, check=False).returncode == -signal.SIGKILL
    assert [path for path in folder.iterdir() if path.suffix == ".partial"]
    assert _tokens(cache.tokenized(corpus, SHARES, Bytes(), folder=folder)) == expected
    assert not [path for path in folder.iterdir() if path.suffix == ".partial"]


RACING = """
    import json, sys, time
    from pathlib import Path
    from hope_jax.data import cache
    from hope_jax.data.sources import SplitConfig, TextConfig
    from hope_jax.data.tokenizer import Bytes

    path, folder = sys.argv[1:]

    class Slow(Bytes):
        count = 0
        def encode(self, text):
            self.count += 1
            time.sleep(0.01)
            return super().encode(text)

    tokenizer = Slow()
    source = TextConfig(train=path, document="line")
    shares = SplitConfig(valid=0.2, test=0.2)
    found = cache.tokenized(source, shares, tokenizer, folder=Path(folder))
    tokens = {split: x.read(0, x.info.tokens).tokens.tolist() for split, x in found.items()}
    print(json.dumps([tokenizer.count, tokens]))
"""


def test_of_several_processes_one_works_and_all_read_the_same(corpus, tmp_path):
    folder = tmp_path / "cache"
    program = [sys.executable, "-c", textwrap.dedent(RACING), corpus.train, str(folder)]
    running = [subprocess.Popen(program, stdout=subprocess.PIPE) for _ in range(3)]
    results = [json.loads(process.communicate(timeout=60)[0]) for process in running]
    assert sorted(count for count, _ in results) == [0, 0, len(TEXTS)]
    expected = _tokens(cache.tokenized(corpus, SHARES, Bytes(), folder=tmp_path / "other"))
    assert all(tokens == expected for _, tokens in results)


def test_a_tokenizer_learns_once_and_from_the_training_split_alone(corpus, tmp_path, monkeypatch):
    config = SentencePieceConfig(vocabulary=280)
    seen = []
    build = SentencePieceConfig.build

    def watched(self, texts=()):
        seen.append(list(texts))
        return build(self, seen[-1])

    monkeypatch.setattr(SentencePieceConfig, "build", watched)
    first = cache.learned(config, [corpus], SHARES, folder=tmp_path)
    again = cache.learned(config, [corpus], SHARES, folder=tmp_path)
    assert first.fingerprint == again.fingerprint
    streams = cache.tokenized(corpus, SHARES, BytesConfig().build(), folder=tmp_path)
    assert [len(texts) for texts in seen] == [streams["train"].info.documents]
    other = cache.learned(SentencePieceConfig(vocabulary=281), [corpus], SHARES, folder=tmp_path)
    assert other.fingerprint != first.fingerprint
