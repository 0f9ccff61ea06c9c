"""Tokenizers give back what they were given, and are the same after a save."""

import random
from pathlib import Path

import numpy as np
import pytest

from hope_jax.data import tokenizer
from hope_jax.data.tokenizer import (
    BytesConfig,
    SentencePieceConfig,
    SymbolsConfig,
    load,
)

CODE = [path.read_text("utf-8") for path in sorted(Path(tokenizer.__file__).parent.glob("*.py"))]
NASTY = [
    "",
    " ",
    "  two  spaces  ",
    "\ttab\r\nline\n\n\n",
    "\0",
    "\ufeffmark",
    "a\u0301",
    "\u2028",
    "\u2581\u2581 \u2581x",
    "<s></s><unk><0x0A>",
    "日本語 Ελληνικά 🎉🏽",
    "\U0010ffff",
]


@pytest.fixture(scope="module", params=["bytes", "sentencepiece"])
def texts_tokenizer(request):
    return BytesConfig().build() if request.param == "bytes" else _pieces()


def _pieces(vocabulary=700):
    return SentencePieceConfig(vocabulary=vocabulary).build(CODE)


def _random_text(draw):
    """Characters from all of Unicode, but for the halves of surrogate pairs."""
    kinds = [
        lambda: draw.randrange(128),
        lambda: draw.randrange(0xD800),
        lambda: draw.randrange(0xE000, 0x110000),
        lambda: draw.choice(b" \n\t"),
        lambda: 0x2581,
    ]
    return "".join(chr(draw.choice(kinds)()) for _ in range(draw.randrange(60)))


def test_any_text_comes_back(texts_tokenizer):
    draw = random.Random(0)
    for text in [*NASTY, *CODE, *(_random_text(draw) for _ in range(300))]:
        ids = texts_tokenizer.encode(text)
        assert texts_tokenizer.decode(ids) == text
        assert not np.any(ids == texts_tokenizer.bos)
        assert np.all((ids >= 0) & (ids < texts_tokenizer.vocabulary))


def test_any_ids_decode_and_bos_is_silent(texts_tokenizer):
    draw = random.Random(0)
    for _ in range(300):
        size = draw.randrange(20)
        texts_tokenizer.decode([draw.randrange(texts_tokenizer.vocabulary) for _ in range(size)])
    ids = texts_tokenizer.encode("é\u2581").tolist()
    assert texts_tokenizer.decode([texts_tokenizer.bos, *ids]) == "é\u2581"
    cut = BytesConfig().build().encode("é")[:1]
    assert BytesConfig().build().decode(cut) == "\ufffd"


def test_half_a_surrogate_pair_is_refused(texts_tokenizer):
    with pytest.raises(ValueError, match=r"half a surrogate pair '\\ud800' at character 2"):
        texts_tokenizer.encode("ab\ud800")


def test_a_saved_tokenizer_is_the_same(texts_tokenizer, tmp_path):
    texts_tokenizer.save(tmp_path / "new" / "folder")
    again = load(tmp_path / "new" / "folder")
    assert again.fingerprint == texts_tokenizer.fingerprint
    assert (again.bos, again.vocabulary) == (texts_tokenizer.bos, texts_tokenizer.vocabulary)
    np.testing.assert_array_equal(again.encode(CODE[0]), texts_tokenizer.encode(CODE[0]))


def test_a_damaged_tokenizer_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing"):
        load(tmp_path)
    _pieces().save(tmp_path)
    _pieces(600).save(tmp_path / "other")
    (tmp_path / "other" / "tokenizer.model").replace(tmp_path / "tokenizer.model")
    with pytest.raises(ValueError, match="not the one that was saved"):
        load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        load(tmp_path)


def test_learning_is_deterministic_whatever_the_order_of_the_documents():
    for budget in (10_000_000, 5_000):
        config = SentencePieceConfig(vocabulary=400, sample_bytes=budget)
        assert config.build(CODE).fingerprint == config.build(CODE[::-1]).fingerprint


def test_pieces_hold_one_digit_or_as_many_as_are_asked_for():
    texts = [f"number {1234 * i} and {1234 * i}." for i in range(1, 50)]
    for split, vocabulary in ((True, 290), (False, 320)):
        learned = SentencePieceConfig(vocabulary=vocabulary, split_digits=split).build(texts)
        pieces = [learned.decode([i]) for i in learned.encode(" 1234 1234").tolist()]
        assert "".join(pieces) == " 1234 1234"
        assert (max(sum(map(str.isdigit, piece)) for piece in pieces) == 1) == split


def test_a_sample_is_no_larger_than_asked():
    for budget in (1, 999, 10_000, len("".join(CODE).encode()) - 1):
        sample = "".join(tokenizer._sample(CODE, budget)).encode()
        assert budget - 3 <= len(sample) <= budget
    assert sorted(tokenizer._sample(CODE, 10**9)) == sorted(CODE)


def test_a_long_text_encodes_as_its_parts_do(monkeypatch):
    pieces, text = _pieces(), "".join(CODE)
    whole = pieces.encode(text)
    monkeypatch.setattr(tokenizer, "PART", 300)
    np.testing.assert_array_equal(pieces.encode(text), whole)
    monkeypatch.setattr(tokenizer, "PART", 7)
    assert pieces.decode(pieces.encode(text)) == text


def test_code_takes_fewer_pieces_than_bytes():
    text = "def f(self):\n        return self.tokenizer\n"
    assert len(_pieces().encode(text)) < len(text) / 2


def test_a_vocabulary_that_the_text_cannot_make_names_one_that_it_can():
    texts = ["to be or not to be"]
    with pytest.raises(ValueError, match=r"must be at most (\d+), .* got 5000") as error:
        SentencePieceConfig(vocabulary=5000).build(texts)
    largest = int(str(error.value).split("at most ")[1].split(",")[0])
    assert SentencePieceConfig(vocabulary=largest).build(texts).vocabulary == largest
    with pytest.raises(ValueError, match=r"must be at least \d+, .* got 260"):
        SentencePieceConfig(vocabulary=260).build(["".join(map(chr, range(0x4E00, 0x4F00)))])


def test_nothing_to_learn_from_is_an_empty_corpus():
    for texts in ([], ["\n\n"]):
        with pytest.raises(ValueError, match="the corpus is empty"):
            SentencePieceConfig().build(texts)


def test_an_existing_model_is_read(tmp_path):
    _pieces().save(tmp_path)
    path = str(tmp_path / "tokenizer.model")
    assert SentencePieceConfig(vocabulary=700, model=path).build().fingerprint == (
        _pieces().fingerprint
    )
    with pytest.raises(ValueError, match=r"vocabulary must be 700, .* got 4096"):
        SentencePieceConfig(model=path).build()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        SentencePieceConfig(model=str(tmp_path / "nowhere.model")).build()
    (tmp_path / "text.model").write_text("no model")
    with pytest.raises(ValueError, match=r"text\.model' is not a SentencePiece model"):
        SentencePieceConfig(model=str(tmp_path / "text.model")).build()


def test_symbols_are_numbers(tmp_path):
    symbols = SymbolsConfig(symbols=12).build()
    assert symbols.encode("0 11 3").tolist() == [0, 11, 3]
    assert symbols.decode([symbols.bos, 0, 11, 3]) == "0 11 3"
    symbols.save(tmp_path)
    assert load(tmp_path).fingerprint == symbols.fingerprint
    for wrong in ("12", "-1", "x", "1.5"):
        with pytest.raises(ValueError, match=f"from 0 to 11, got '{wrong}'"):
            symbols.encode(wrong)


@pytest.mark.parametrize(
    "config", [BytesConfig(), SymbolsConfig(symbols=5), SentencePieceConfig(vocabulary=400)]
)
def test_the_config_knows_the_vocabulary(config):
    built = config.build(CODE) if config.kind == "sentencepiece" else config.build()
    assert config.vocabulary == built.vocabulary


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (SentencePieceConfig, {"vocabulary": 12}, "vocabulary must be at least 260"),
        (SentencePieceConfig, {"sample_bytes": 0}, "sample_bytes must be at least 1"),
        (SymbolsConfig, {"symbols": 0}, "symbols must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(config, settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)
