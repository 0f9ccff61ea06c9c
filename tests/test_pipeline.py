"""Batches come in one order, whoever reads them; nothing is lost, and nothing counted twice."""

import itertools
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from hope_jax import sharding
from hope_jax.data import DataConfig, pipeline
from hope_jax.data.sources import (
    MixtureConfig,
    PartConfig,
    SplitConfig,
    TextConfig,
)
from hope_jax.data.synthetic import RecallConfig
from hope_jax.data.tokenizer import Bytes, BytesConfig, SentencePieceConfig, SymbolsConfig

TEXTS = [f"document {i} " * (i % 5 + 1) for i in range(80)]
WIKITEXT = Path(__file__).parents[2] / "shared" / "data" / "wikitext2"


@pytest.fixture
def make(tmp_path):
    """Builds data of TEXTS with any settings."""
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(TEXTS))

    def make(**settings):
        defaults = {
            "source": TextConfig(train=str(path), document="line"),
            "split": SplitConfig(valid=0.2, test=0.2),
            "window": 16,
            "batch": 8,
            "cache": str(tmp_path / "cache"),
        }
        return DataConfig(**{**defaults, **settings})

    return make


def _take(batches, count):
    """Returns some batches as arrays, and closes."""
    with batches:
        taken = [next(batches) for _ in range(count)]
    return [[None if x is None else np.asarray(x) for x in batch] for batch in taken]


def _all(batches):
    return _take(batches, batches.steps)


def _same(first, second):
    assert len(first) == len(second)
    for ours, theirs in zip(first, second, strict=True):
        for x, y in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(x, y)


def _stream(data, split):
    return data.documents(split).read(0, data.info(split).tokens)


def test_a_run_that_stopped_goes_on_with_the_next_batch(make):
    data = make().build()
    steps = _take(data.train(), 60)
    for start in (1, 7, 31, 59):
        _same(_take(data.train(start), 60 - start), steps[start:])
    _same(_take(make().build().train(), 60), steps)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_order_does_not_depend_on_the_workers(make, workers):
    expected = _take(make().build().train(3), 20)
    _same(_take(make(workers=workers).build().train(3), 20), expected)


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_the_order_does_not_depend_on_the_processes(make, processes):
    config = make()
    data = config.build()
    expected = _take(data.train(), 6)
    share = config.batch // processes
    readers = [
        pipeline.TrainingBatches(
            [part["train"] for part in data._streams],
            weights=[1.0],
            config=config,
            rows=np.arange(process * share, (process + 1) * share),
        )
        for process in range(processes)
    ]
    for step, batch in enumerate(expected):
        pieces = [reader[step] for reader in readers]
        np.testing.assert_array_equal(np.concatenate([x.tokens for x in pieces]), batch[0])
        np.testing.assert_array_equal(np.concatenate([x.starts for x in pieces]), batch[1])


PROCESS = """
    import sys
    import jax
    import numpy as np
    from hope_jax import sharding
    from hope_jax.data import DataConfig
    from hope_jax.data.sources import TextConfig

    port, process, path, folder = sys.argv[1:]
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
    source = TextConfig(train=path, document="line")
    with sharding.use(sharding.MeshConfig().build()):
        data = DataConfig(source=source, window=16, batch=8, cache=folder).build()
    with data.train(2) as train, data.valid() as valid:
        for batch in (next(train), next(valid)):
            assert batch.tokens.shape == (8, 17)
            (shard,) = batch.tokens.addressable_shards
            print(shard.index[0].start or 0, np.asarray(shard.data).tolist())
    jax.distributed.shutdown()
"""


def test_two_processes_read_the_two_halves_of_a_batch(make, tmp_path):
    data = make(split=SplitConfig()).build()
    expected = _take(data.train(2), 1) + _take(data.valid(), 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    program = [sys.executable, "-c", textwrap.dedent(PROCESS), port]
    paths = [str(tmp_path / "corpus.txt"), str(tmp_path / "shared")]
    environment = {"JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    environment["PYTHONPATH"] = ":".join(sys.path)
    running = [
        subprocess.Popen(
            [*program, str(process), *paths], stdout=subprocess.PIPE, env=environment, text=True
        )
        for process in range(2)
    ]
    try:
        lines = [process.communicate(timeout=90)[0].splitlines() for process in running]
    finally:
        for process in running:
            process.kill()
    for which, batch in enumerate(expected):
        for process in range(2):
            half = batch[0][4 * process : 4 * process + 4].tolist()
            assert lines[process][which] == f"{4 * process} {half}"


def test_a_mesh_holds_the_same_batch_in_shares(make):
    expected = _take(make().build().train(), 3)
    for mesh in (sharding.MeshConfig(), sharding.MeshConfig(data=2, fsdp=2, tensor=2)):
        with sharding.use(mesh.build()):
            data = make().build()
        with data.train() as batches:
            batch = next(batches)
        rows = {shard.data.shape[0] for shard in batch.tokens.addressable_shards}
        assert rows == {8 // (8 // mesh.tensor)}
        _same(_take(data.train(), 3), expected)
        _same(_all(data.valid()), _all(make().build().valid()))


@pytest.mark.parametrize("batch", [4, 12])
def test_a_batch_that_the_devices_cannot_share_is_refused_first(make, batch, tmp_path):
    with sharding.use(sharding.MeshConfig().build()):
        with pytest.raises(ValueError, match=rf"divisible by 8, .*data x fsdp\), got {batch}"):
            make(batch=batch).build()
        assert not (tmp_path / "cache").exists()


def test_an_epoch_trains_on_every_window_once(make):
    data = make(batch=1, window=7).build()
    stream = _stream(data, "train")
    windows = (len(stream.tokens) - 1) // 7
    expected = sorted(stream.tokens[7 * i : 7 * i + 8].tolist() for i in range(windows))
    seen = [batch[0][0].tolist() for batch in _take(data.train(), 2 * windows)]
    assert sorted(seen[:windows]) == sorted(seen[windows:]) == expected
    assert seen[:windows] != seen[windows:]
    assert seen[:windows] != expected


def test_another_seed_is_another_order(make):
    first, second = (_take(make(seed=seed).build().train(), 3) for seed in (0, 1))
    assert not np.array_equal(first[0][0], second[0][0])


@pytest.mark.parametrize("batch", [1, 3, 8, 200])
@pytest.mark.parametrize("window", [1, 5, 16, 900])
def test_validation_predicts_every_token_once_and_in_order(make, batch, window):
    data = make(batch=batch, window=window).build()
    stream, pairs = _stream(data, "valid"), []
    for tokens, _, weights in _all(data.valid()):
        assert tokens.shape == (batch, window + 1)
        inputs, targets = tokens[:, :-1][weights > 0], tokens[:, 1:][weights > 0]
        pairs += zip(inputs.tolist(), targets.tolist(), strict=True)
    assert pairs == list(itertools.pairwise(stream.tokens.tolist()))


def test_starts_mark_documents_unless_they_are_open(make):
    data = make().build()
    for tokens, starts, weights in _take(data.train(), 5) + _all(data.valid()):
        real = np.ones_like(starts) if weights is None else np.pad(weights, ((0, 0), (1, 0)))
        np.testing.assert_array_equal(starts & (real > 0), (tokens == 256) & (real > 0))
    data = make(isolate_documents=False).build()
    assert all(starts is None for _, starts, _ in _take(data.train(), 5) + _all(data.valid()))


def test_a_mixture_reads_its_parts_by_weight(make, tmp_path):
    parts = []
    for name, weight in (("a", 3.0), ("b", 1.0)):
        path = tmp_path / name
        path.write_text(f"{name}\n" * 500)
        parts.append(PartConfig(source=TextConfig(train=str(path)), weight=weight))
    split = SplitConfig(valid=0.1, test=0.0, by="position")
    data = make(source=MixtureConfig(parts=tuple(parts)), split=split).build()
    counts = {"a": 0, "b": 0}
    for tokens, *_ in _take(data.train(), 50):
        for row in tokens:
            (name,) = set(data.tokenizer.decode(row)) - {"\n"}
            counts[name] += 1
    assert counts == {"a": 300, "b": 100}
    assert data.info("valid") == (202, 2, 200, 100)
    text = data.tokenizer.decode(_stream(data, "valid").tokens)
    assert text == "a\n" * 50 + "b\n" * 50
    _same(_take(data.train(7), 3), _take(data.train(), 10)[7:])


def test_text_and_a_task_mix_and_all_targets_of_text_count(make):
    recall = RecallConfig(keys=2, overwrites=1)
    parts = (PartConfig(source=make().source), PartConfig(source=recall))
    data = make(source=MixtureConfig(parts=parts), window=recall.length).build()
    scored = {weights.sum() for *_, weights in _take(data.train(), 1) for weights in weights}
    assert scored == {recall.length, recall.keys}


def test_info_measures_the_text(make, tmp_path):
    text = "Zwölf  Boxkämpfer\njagen Viktor\n"
    path = tmp_path / "a.txt"
    path.write_text(text)
    data = make(source=TextConfig(train=str(path)), split=SplitConfig(valid=0.0, test=0.0)).build()
    size = len(text.encode())
    assert data.info("train") == (size + 1, 1, size, 4)
    assert data.splits == ("train",)
    with pytest.raises(ValueError, match="split must be one of train, got 'valid'"):
        data.info("valid")


def test_learned_pieces_go_the_same_way(make):
    config = make(tokenizer=SentencePieceConfig(vocabulary=290))
    data = config.build()
    assert config.vocabulary == data.tokenizer.vocabulary == 290
    assert config.build_tokenizer().fingerprint == data.tokenizer.fingerprint
    stream = _stream(data, "test")
    assert data.info("test").bytes > len(stream.tokens)
    texts = [
        data.tokenizer.decode(x) for x in np.split(stream.tokens, np.flatnonzero(stream.starts))
    ]
    assert set(texts[1:]) <= set(TEXTS)


def test_a_run_keeps_its_tokenizer(make):
    config = make(tokenizer=SentencePieceConfig(vocabulary=290))
    tokenizer = config.build_tokenizer()
    other = make(tokenizer=SentencePieceConfig(vocabulary=290, sample_bytes=700))
    assert other.build_tokenizer().fingerprint != tokenizer.fingerprint
    assert other.build(tokenizer=tokenizer).tokenizer is tokenizer
    with pytest.raises(ValueError, match="must have the config's vocabulary of 290, got 257"):
        config.build(tokenizer=Bytes())


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_an_empty_corpus_is_refused(make, tmp_path, text):
    path = tmp_path / "empty.txt"
    path.write_text(text)
    source = TextConfig(train=str(path), document="line")
    for tokenizer in (BytesConfig(), SentencePieceConfig()):
        with pytest.raises(ValueError, match="the corpus is empty"):
            make(source=source, tokenizer=tokenizer).build()


def test_a_corpus_shorter_than_a_window_is_refused(make, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("x" * 16)
    settings = {"source": TextConfig(train=str(path)), "split": SplitConfig(valid=0.0, test=0.0)}
    with pytest.raises(ValueError, match=r"must hold a window of 18 tokens .*, got 17 tokens"):
        make(window=17, **settings).build()
    assert len(_take(make(window=16, **settings).build().train(), 2)) == 2


def test_an_empty_split_is_refused_with_ways_out(make, tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("one document " * 100)
    source = TextConfig(train=str(path))
    with pytest.raises(ValueError, match=r"split '\w+' is empty: .*data\.split\.by=position"):
        make(source=source).build()
    split = SplitConfig(valid=0.2, test=0.2, by="position")
    assert make(source=source, split=split).build().info("valid").bytes == 260


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"prefetch": 0}, "prefetch must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        (
            {"source": RecallConfig(), "tokenizer": SymbolsConfig(symbols=96)},
            "window must be a multiple",
        ),
    ],
)
def test_impossible_settings_are_refused(make, settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_what_goes_wrong_ahead_reaches_the_reader(make, monkeypatch):
    data = make().build()
    read, failing = pipeline.padded, threading.Event()

    def fail(stream, start, **options):
        if start >= 16 * 8 * 2:
            failing.set()
            raise OSError("the disk is gone")
        return read(stream, start, **options)

    monkeypatch.setattr(pipeline, "padded", fail)
    batches = data.valid()
    assert next(batches).tokens.shape == next(batches).tokens.shape == (8, 17)
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    assert list(batches) == []


def _threads():
    return {thread for thread in threading.enumerate() if thread.name.startswith("hope_jax")}


def test_reading_ends_with_close_and_with_the_last_reference(make):
    data = make().build()
    batches = data.train()
    next(batches)
    assert _threads()
    batches.close()
    batches.close()
    assert not _threads()
    assert list(batches) == []
    batches = data.train()
    next(batches)
    del batches
    assert not _threads()


def test_batches_wait_on_the_device_and_no_more_than_asked(make, monkeypatch):
    data = make(prefetch=3).build()
    made, put = [], pipeline.Placement.put
    monkeypatch.setattr(pipeline.Placement, "put", lambda *x: (made.append(0), put(*x))[1])
    with data.train() as batches:
        next(batches)
        deadline = time.monotonic() + 10
        while len(made) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        # One is read, three wait, one is in hand.
        assert len(made) == 5
        assert isinstance(next(batches).tokens, jax.Array)


def test_the_package_is_light():
    program = (
        "import sys, hope_jax.data; print({'grain', 'sentencepiece', 'pyarrow'} & {*sys.modules})"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert result.stdout == b"set()\n"


@pytest.mark.skipif(not WIKITEXT.is_dir(), reason=f"needs WikiText-2 in {WIKITEXT}")
def test_wikitext_has_its_published_size(make):
    source = TextConfig(
        train=str(WIKITEXT / "valid.txt"),
        test=str(WIKITEXT / "test.txt"),
        document="pattern",
        pattern="^ = [^=].* = $",
    )
    data = make(source=source).build()
    # The published 217,646 and 245,569 count the end of each of 3,760 and 4,358 lines.
    assert data.info("train").words == 217_646 - 3_760
    assert data.info("test").words == 245_569 - 4_358
    assert data.info("test").bytes == (WIKITEXT / "test.txt").stat().st_size
