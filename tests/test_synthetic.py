"""Made-up streams ask what they say, the same whoever reads them."""

import numpy as np
import pytest

from hope_jax.data.pipeline import DataConfig
from hope_jax.data.synthetic import RecallConfig
from hope_jax.data.tokenizer import BytesConfig, SentencePieceConfig, SymbolsConfig

RECALL = RecallConfig(keys=5, overwrites=3, key_symbols=9, value_symbols=11, held_out=40)
BOS = RECALL.symbols


def _episodes(count, config=RECALL, split="train"):
    piece = config.stream(split, bos=BOS).read(0, count * config.length)
    return [x.reshape(count, config.length) for x in piece]


def test_the_answer_is_the_value_that_the_key_was_given_last():
    tokens, starts, weights = _episodes(200)
    for episode, start, weight in zip(tokens.tolist(), starts, weights, strict=True):
        assert episode[0] == BOS
        assert start.tolist() == [True] + [False] * (RECALL.length - 1)
        pairs = [tuple(episode[i : i + 2]) for i in range(1, RECALL.length, 2)]
        written, asked = pairs[:8], pairs[8:]
        assert asked == [(key, dict(written)[key]) for key, _ in asked]
        assert len({key for key, _ in asked}) == len({key for key, _ in written}) == 5
        assert all(key < 9 <= value < 20 for key, value in pairs)
        assert weight.tolist() == [0] * 17 + [0, 1] * 5


def test_overwrites_matter_and_answers_cannot_be_guessed():
    tokens = _episodes(2000)[0]
    written, asked = tokens[:, 1:17].reshape(-1, 8, 2), tokens[:, 17:].reshape(-1, 5, 2)
    first = [
        dict(reversed(pairs))[key] == value
        for pairs, questions in zip(written.tolist(), asked.tolist(), strict=True)
        for key, value in questions
    ]
    assert 0.5 < np.mean(first) < 0.8
    for question in range(5):
        share = np.bincount(asked[:, question, 1] - 9, minlength=11) / len(tokens)
        assert np.all(np.abs(share - 1 / 11) < 0.03)


def test_an_episode_depends_on_its_number_alone():
    stream = RECALL.stream("train", bos=BOS)
    whole = stream.read(0, 10 * RECALL.length)
    for start, stop in ((0, 1), (3, 50), (26, 27), (27, 54), (28, 200)):
        for part, all_of_it in zip(stream.read(start, stop), whole, strict=True):
            np.testing.assert_array_equal(part, all_of_it[start:stop])


def test_splits_and_seeds_have_episodes_of_their_own():
    kinds = [_episodes(20, RECALL, split)[0] for split in ("train", "valid", "test")]
    kinds.append(_episodes(20, RecallConfig(**{**vars(RECALL), "seed": 1}))[0])
    rows = {tuple(row) for tokens in kinds for row in tokens.tolist()}
    assert len(rows) == 80
    assert RECALL.stream("valid", bos=BOS).info.documents == 40


def test_no_overwrites_and_a_single_key_are_episodes_too():
    for config in (
        RecallConfig(keys=1, overwrites=0, key_symbols=1, value_symbols=1),
        RecallConfig(keys=3, overwrites=0),
    ):
        assert config.stream("train", bos=99).read(0, 100).tokens.shape == (100,)


def _data(tmp_path, **settings):
    defaults = {
        "source": RECALL,
        "tokenizer": SymbolsConfig(symbols=RECALL.symbols),
        "window": RECALL.length,
        "batch": 4,
        "cache": str(tmp_path),
    }
    return DataConfig(**{**defaults, **settings})


def test_a_batch_scores_the_answers_of_whole_episodes(tmp_path):
    config = _data(tmp_path)
    assert config.vocabulary == 21
    with config.build().train() as batches:
        for _, batch in zip(range(3), batches, strict=False):
            assert batch.weights.shape == (4, RECALL.length)
            assert np.sum(batch.weights) == 4 * RECALL.keys
            assert np.all(batch.tokens[:, [0, -1]] == BOS)
            answers = np.asarray(batch.tokens[:, 1:])[np.asarray(batch.weights) > 0]
            assert np.all(answers >= RECALL.key_symbols)


def test_held_out_episodes_are_scored_once(tmp_path):
    data = _data(tmp_path, batch=7).build()
    for batches in (data.valid("valid"), data.valid("test")):
        assert sum(float(batch.weights.sum()) for batch in batches) == 40 * RECALL.keys


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 30}, r"window must be a multiple of an episode .* 27 tokens, got 30"),
        ({"tokenizer": SymbolsConfig(symbols=19)}, "must have 20 symbols .*, got 19"),
        ({"tokenizer": SentencePieceConfig()}, "must have 20 symbols .* kind 'sentencepiece'"),
    ],
)
def test_what_does_not_fit_the_task_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        _data(tmp_path, **settings)
    assert _data(tmp_path, tokenizer=BytesConfig(), window=2 * RECALL.length).vocabulary == 257


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keys": 0}, "keys must be at least 1, got 0"),
        ({"overwrites": -1}, "overwrites must be at least 0, got -1"),
        ({"key_symbols": 3}, r"key_symbols must be at least keys \(12\), got 3"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"examples": 0}, "examples must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RecallConfig(**settings)
