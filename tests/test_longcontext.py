"""A long stream is read as one, whatever its pieces, goes on where it was, and counts by place."""

import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from small_models import MODELS, VOCABULARY
from test_evaluation import Documents

from hope_jax.data.tokenizer import SymbolsConfig
from hope_jax.evaluation import LongContext
from hope_jax.evaluation.longcontext import State, around
from hope_jax.evaluation.score import score
from hope_jax.evaluation.subject import Subject, TaskError
from hope_jax.modules.continuum import ContinuumConfig, LevelConfig
from hope_jax.shapes import Batch

STREAM = Documents((40, 60, 30))
TASK = LongContext(length=110, segment=32, points=4, keep=1)


def subject(folder, *, kind="hope", stream=STREAM, track=iter):
    tokenizer = SymbolsConfig(symbols=VOCABULARY - 1).build()
    model = MODELS[kind].build()
    return Subject(model, tokenizer, lambda _: stream, 16, track=track, folder=folder)


def whole(kind="hope"):
    """The nats of targets 1 to 110, read at once."""
    tokens = STREAM.read(0, 111).tokens[None]
    batch = Batch(jax.numpy.asarray(tokens), jax.numpy.zeros(tokens.shape, bool))
    return np.asarray(score(MODELS[kind].build(), batch)[0][0], np.float64)


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    return folder, TASK.run(subject(folder))


def test_a_stream_in_segments_is_one_whole_reading(read):
    _, found = read
    nats = whole()
    assert found["tokens"] == 110
    np.testing.assert_allclose(found["nats_per_token"], nats.mean(), rtol=1e-5)
    # Target number n, from 1, has n tokens before it.
    for low, high in ((1, 1), (2, 3), (16, 31), (64, 127)):
        mean = nats[low - 1 : high].mean()
        np.testing.assert_allclose(found[f"perplexity_{low}_to_{high}"], np.exp(mean), rtol=1e-4)


def test_a_page_and_pictures_are_left_and_nothing_else(read):
    folder, found = read
    page = (folder / "longcontext.html").read_text()
    assert found["page"] == str(folder / "longcontext.html")
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r"(src|href)=.(?!data:)", page)
    assert {path.suffix for path in folder.iterdir()} == {".html", ".png"}
    assert found["tokens_per_second"] > 0
    assert found["memory_bytes"] > 0


def test_it_goes_on_where_it_was(read, tmp_path):
    steps = []

    def stop(ends):
        for end in ends[:2]:
            steps.append(end)
            yield end
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TASK.run(subject(tmp_path, track=stop))
    (kept,) = tmp_path.iterdir()
    assert {path.name for path in kept.iterdir()} == {"state.json", f"{steps[1]}.safetensors"}
    found = TASK.run(subject(tmp_path, track=lambda ends: steps.extend(ends) or ends))
    assert steps == [14, 46, 78, 110]
    for name, value in read[1].items():
        if name.startswith(("nats", "perplexity", "tokens", "memory")) and "second" not in name:
            np.testing.assert_allclose(found[name], value, rtol=1e-5)
    assert not kept.exists()


def test_attention_reads_on_in_its_window(tmp_path):
    found = TASK.run(subject(tmp_path, kind="transformer"))
    np.testing.assert_allclose(found["nats_per_token"], whole("transformer").mean(), rtol=1e-5)


def test_what_is_carried_does_not_grow(read, tmp_path):
    longer = replace(TASK, length="0.3k", repeat=True, keep=1000).run(subject(tmp_path))
    assert longer["tokens"] == 300
    assert longer["memory_bytes"] == read[1]["memory_bytes"]


def test_a_text_begins_again_only_where_that_is_said(tmp_path):
    with pytest.raises(TaskError, match="length must be at most 129 for split 'valid', got 130"):
        replace(TASK, length=130).run(subject(tmp_path))
    piece = around(STREAM, 100, 300)
    tokens = STREAM.read(0, 130).tokens
    np.testing.assert_array_equal(piece.tokens, np.tile(tokens, 3)[100:300])


def test_lengths_are_read_as_people_write_them():
    lengths = {one: LongContext(length=one).tokens for one in (5, "5", "100k", "1.5M", "2G")}
    assert [*lengths.values()] == [5, 5, 100_000, 1_500_000, 2_000_000_000]
    for wrong in ("ten", "5K", 0, "-3"):
        with pytest.raises(ValueError, match="length must be"):
            LongContext(length=wrong)


def test_places_are_counted_by_powers_of_two():
    state = State().add(np.ones(3), np.ones(3)).add(np.full(4, 2.0), np.array([1.0, 0.0, 1.0, 1.0]))
    assert state.position == 7
    assert state.targets[:4].tolist() == [1, 2, 3, 0]
    assert state.nats[:4].tolist() == [1, 2, 6, 0]


def test_only_what_learns_the_next_token_can_be_asked_to(tmp_path):
    with pytest.raises(TaskError, match="objective must be next_token"):
        replace(TASK, learn=True).run(subject(tmp_path))


def test_the_clock_in_context_can_be_off_or_drive_the_fastest_levels(tmp_path):
    chunks = (32, None, 4, 8)
    levels = tuple(LevelConfig(hidden=4, chunk=chunk) for chunk in chunks)
    model = replace(MODELS["attention_in_context"], continuum=ContinuumConfig(levels=levels))
    model = replace(model, layers=1).build()

    def clock(count):
        wound = replace(TASK, levels=count)._wind(model)
        return [level.config.chunk for level in wound.blocks.continuum.levels]

    assert clock(None) == clock(3) == [32, None, 4, 8]
    assert [clock(count) for count in range(3)] == [
        [None, None, None, None],
        [None, None, 4, None],
        [None, None, 4, 8],
    ]
    asked = subject(tmp_path)._replace(model=model)
    found = replace(TASK, levels=1, length=20).run(asked)
    assert [name for name in found if name.startswith("level")] == ["level 2_length"]
    with pytest.raises(TaskError, match=r"levels must be at most 3, .* got 4"):
        replace(TASK, levels=4).run(asked)
    with pytest.raises(ValueError, match="levels must be at least 1, got 0"):
        LongContext(learn=True, levels=0)


def test_a_text_that_the_run_has_no_ids_for_is_an_error(tmp_path):
    (tmp_path / "text.txt").write_text("words")
    with pytest.raises(TaskError, match="the tokenizer cannot encode"):
        replace(TASK, file=str(tmp_path / "text.txt")).run(subject(tmp_path))
