"""Evaluation scores every target once, by the model's own function, and counts honestly."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import MODELS
from toy_model import Toy, ToyConfig, toy

from hope_jax import sharding
from hope_jax.data.packing import Piece, SplitInfo
from hope_jax.data.tokenizer import BytesConfig, SymbolsConfig
from hope_jax.evaluation import TASKS, Perplexity, Sample
from hope_jax.evaluation.perplexity import Document, summary
from hope_jax.evaluation.score import Total, lanes, total, whole_rows, windows
from hope_jax.evaluation.subject import Subject, TaskError
from hope_jax.models.generate import generate
from hope_jax.training import step as training

BOS = 16


class Documents:
    """Random documents of given lengths, `bos` included."""

    def __init__(self, lengths, *, weighted=False):
        random = np.random.default_rng(len(lengths))
        self._tokens = random.integers(0, BOS, sum(lengths)).astype(np.int32)
        self._starts = np.zeros(sum(lengths), bool)
        self._starts[np.cumsum([0, *lengths[:-1]])] = True
        self._tokens[self._starts] = BOS
        self._weights = random.random(sum(lengths)).astype(np.float32) if weighted else None
        self.info = SplitInfo(sum(lengths), len(lengths), 0, 0)

    def read(self, start, stop):
        part = slice(start, stop)
        weights = None if self._weights is None else self._weights[part]
        return Piece(self._tokens[part], self._starts[part], weights)


def subject(stream, **options):
    return Subject(toy(), SymbolsConfig(symbols=BOS).build(), lambda _: stream, 8, **options)


@jax.jit
def logits_of(tokens, starts):
    return toy()(tokens[None], None, starts[None])[0][0]


def direct(stream, start, stop, *, isolate=True):
    """The nats of targets start+1 to stop, from the whole logits of one fresh reading."""
    piece = stream.read(start, stop + 1)
    tokens, starts = np.zeros(64, np.int32), np.zeros(64, bool)
    tokens[: stop - start], starts[: stop - start] = piece.tokens[:-1], piece.starts[:-1] & isolate
    nats = -jax.nn.log_softmax(logits_of(tokens, starts))
    return np.asarray(nats[np.arange(stop - start), piece.tokens[1:]], np.float64)


LENGTHS = (5, 1, 30, 2, 13, 9)


@pytest.mark.parametrize("batch", [1, 3, 100])
@pytest.mark.parametrize("isolate", [True, False])
def test_window_perplexity_is_that_of_fresh_readings(batch, isolate):
    stream = Documents(LENGTHS)
    results = Perplexity(batch=batch).run(subject(stream, isolate=isolate))
    parts = [direct(stream, t, min(t + 8, 59), isolate=isolate) for t in range(0, 59, 8)]
    nats = np.concatenate(parts).mean()
    np.testing.assert_allclose(results["nats_per_token"], nats, rtol=1e-6)
    np.testing.assert_allclose(results["perplexity"], math.exp(nats), rtol=1e-5)
    assert results["tokens"] == 59
    assert results["documents"] == len(LENGTHS)


@pytest.mark.parametrize("isolate", [True, False])
def test_one_lane_is_one_whole_reading(isolate):
    stream = Documents(LENGTHS)
    task = Perplexity(context="stream", batch=1)
    results = task.run(subject(stream, isolate=isolate))
    nats = direct(stream, 0, 59, isolate=isolate).mean()
    np.testing.assert_allclose(results["nats_per_token"], nats, rtol=1e-6)


def test_hope_streamed_in_windows_that_cut_its_chunks_is_one_whole_reading():
    stream, model = Documents((23, 17)), MODELS["hope"].build()
    plan = lanes(stream, window=5, rows=1)
    cost = total(model, stream, plan, carry=True)
    cost_whole = total(model, stream, windows(40, window=39, rows=1), carry=False)
    assert len(plan) == 8
    np.testing.assert_allclose(cost.nats, cost_whole.nats, rtol=1e-5)


@pytest.mark.parametrize("rows", [2, 3, 7])
def test_each_lane_is_one_whole_reading(rows):
    stream = Documents((9, 4, 20, 8, 8, 11, 3))
    plan = lanes(stream, window=8, rows=rows)
    cost = total(toy(), stream, plan, carry=True)
    edges = [(row.start, max(rows[i].stop for rows in plan)) for i, row in enumerate(plan[0])]
    nats = [direct(stream, start, stop) for start, stop in edges if stop > start]
    assert len(nats) > 1
    np.testing.assert_allclose(cost.nats, np.concatenate(nats).sum(), rtol=1e-6)
    assert cost.targets == stream.info.tokens - 1


def test_memory_that_is_not_carried_shows():
    stream = Documents((60,))
    window, whole = (
        Perplexity(context=context).run(subject(stream))["nats_per_token"]
        for context in ("window", "stream")
    )
    assert abs(window - whole) > 1e-3


def test_documents_that_are_not_isolated_are_one_lane():
    stream = Documents(LENGTHS)
    nats = [
        Perplexity(context="stream", batch=batch).run(subject(stream, isolate=False))
        for batch in (1, 4)
    ]
    assert nats[0] == nats[1]


@pytest.mark.parametrize("tokens", [2, 3, 8, 9, 10, 17, 64, 65])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_windows_and_lanes_foretell_every_token_but_the_first_once(tokens, rows):
    lengths = [3] * (tokens // 3) + [tokens % 3] * (tokens % 3 > 0)
    plans = windows(tokens, window=8, rows=rows), lanes(Documents(lengths), window=8, rows=rows)
    for plan in plans:
        targets = [position + 1 for batch in plan for row in batch for position in row]
        assert sorted(targets) == list(range(1, tokens))
        assert {len(batch) for batch in plan} == {rows}
        assert max(len(row) for batch in plan for row in batch) <= 8


def test_lanes_begin_with_documents_and_share_the_work():
    stream = Documents([7] * 100)
    first = lanes(stream, window=8, rows=5)[0]
    assert all(stream.read(row.start, row.start + 1).starts[0] for row in first)
    assert len(lanes(stream, window=8, rows=5)) <= 20
    assert [len(row) > 0 for row in lanes(Documents([100]), window=8, rows=3)[0]] == [1, 0, 0]


def test_targets_count_by_their_weight():
    stream = Documents(LENGTHS, weighted=True)
    cost = total(toy(), stream, windows(60, window=100, rows=1), carry=False)
    weights = stream.read(0, 60).weights[1:]
    np.testing.assert_allclose(cost.targets, weights.sum(), rtol=1e-6)
    np.testing.assert_allclose(cost.nats, weights @ direct(stream, 0, 59), rtol=1e-5)


def test_the_loss_is_that_of_training():
    stream = Documents((40,))
    graphdef, params = nnx.split(toy(), nnx.Param)
    piece = stream.read(0, 9)
    batch = training.Batch(jnp.asarray(piece.tokens[None]), jnp.asarray(piece.starts[None]))
    nats, _ = training.losses(graphdef, nnx.to_pure_dict(params), batch)
    cost = total(toy(), stream, [[range(8)]], carry=False)
    np.testing.assert_allclose(cost.nats, nats.sum(), rtol=1e-6)


@pytest.mark.parametrize("context", ["window", "stream"])
def test_eight_devices_say_what_one_says(context):
    stream, task = Documents([11] * 20), Perplexity(context=context, batch=8)
    alone = task.run(subject(stream))
    with sharding.use(sharding.MeshConfig().build()):
        together = task.run(subject(stream))
    for name, value in alone.items():
        np.testing.assert_allclose(together[name], value, rtol=1e-6)


def test_rows_are_added_until_the_devices_share_them_evenly():
    assert whole_rows(3) == 3
    with sharding.use(sharding.MeshConfig(tensor=2).build()):
        assert [whole_rows(rows) for rows in (1, 4, 5)] == [4, 4, 8]


def test_words_and_bytes_are_counted_in_the_text(tmp_path):
    # 12 characters, 13 bytes, 4 words; each byte costs log(257) under a model that knows nothing.
    path = tmp_path / "text.txt"
    path.write_bytes("né  to\r\nbe 1".encode())
    model = Toy(ToyConfig(vocabulary=257))
    model.head[...] = jnp.zeros_like(model.head[...])
    examined = Subject(model, BytesConfig().build(), lambda _: None, 8)
    results = Perplexity(file=str(path)).run(examined)
    assert [results[name] for name in ("tokens", "bytes", "words")] == [13, 13, 4]
    np.testing.assert_allclose(results["perplexity"], 257, rtol=1e-5)
    np.testing.assert_allclose(results["bits_per_byte"], math.log2(257), rtol=1e-5)
    np.testing.assert_allclose(results["word_perplexity"], 257 ** (13 / 4), rtol=1e-4)


def test_numbers_that_a_text_does_not_have_are_left_out():
    assert "word_perplexity" not in summary(Total(8.0, 4), SplitInfo(5, 1, 4, 0))
    assert "bits_per_byte" not in summary(Total(8.0, 4), SplitInfo(5, 1, 0, 0))
    assert summary(Total(5000.0, 4), SplitInfo(5, 1, 4, 1))["word_perplexity"] == math.inf


def test_progress_is_told_batch_by_batch():
    seen = []

    def track(steps):
        for one in steps:
            seen.append(len(steps))
            yield one

    Perplexity(batch=2).run(subject(Documents((33,)), track=track))
    assert seen == [2, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read: No such file"), (b"\xff", "is not UTF-8"), (b"", "holds 0")],
)
def test_a_file_that_holds_no_text_is_an_error(tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    examined = Subject(toy(), BytesConfig().build(), lambda _: None, 8)
    with pytest.raises(TaskError, match=message):
        Perplexity(file=str(path)).run(examined)


def test_a_file_that_the_tokenizer_cannot_encode_is_an_error(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("1 2 seventeen")
    with pytest.raises(TaskError, match="'seventeen'"):
        Document(path, SymbolsConfig(symbols=BOS).build())


def test_a_sample_continues_its_prompt_by_seed():
    texts = [
        Sample(prompt="1 2 3", max_tokens=6, batch=2, seed=seed).run(subject(None))["texts"]
        for seed in (0, 0, 1)
    ]
    assert all(text.startswith("1 2 3 ") for text in texts[0])
    assert texts[0] == texts[1]
    assert len({*texts[0], *texts[2]}) == 4


def test_a_sample_without_prompt_begins_a_document():
    sample = Sample(max_tokens=5, temperature=0)
    likeliest = logits_of(jnp.array([BOS]), jnp.array([True]))[0].argmax()
    assert sample.run(subject(None))["texts"][0].split()[0] == str(likeliest)
    assert sample.text(toy(), subject(None).tokenizer) == sample.run(subject(None))["texts"][0]


def test_a_prompt_is_the_beginning_of_a_document_with_nothing_after_it():
    results = Sample(prompt="3 1", max_tokens=8).run(subject(None))
    (written,) = generate(toy(), [[BOS, 3, 1]], key=jax.random.key(0), max_tokens=8, stop=BOS)
    assert results["texts"] == [" ".join(map(str, [3, 1, *written]))]


def test_a_sample_counts_the_tokens_that_are_new(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("7 8 9\n")
    results = Sample(prompt_file=str(path), max_tokens=40, batch=3).run(subject(None))
    assert sum(len(text.split()) - 3 for text in results["texts"]) == results["tokens"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": ""}, "prompt must hold at least 1 token, got '': leave it out"),
        ({"prompt": "1", "prompt_file": "x"}, "must not both"),
        ({"prompt_file": "nowhere.txt"}, "'nowhere.txt' cannot be read"),
        ({"prompt": "  "}, "prompt must hold at least 1 token"),
        ({"prompt": "one"}, "'one'"),
        ({"batch": 0}, "batch"),
        ({"seed": -1}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_a_sample_that_cannot_be_is_an_error(settings, message):
    with pytest.raises(ValueError, match=message):
        Sample(**settings).run(subject(None))


def test_tasks_are_frozen_and_have_defaults():
    for name, task in TASKS.items():
        settings = task()
        assert name == task.__name__.lower()
        with pytest.raises(AttributeError):
            settings.batch = 2
