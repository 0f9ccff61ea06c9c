"""Published byte pairs: the ids that the tokenizers library gives, and texts that come back."""

import json
import random

import numpy as np
import pytest
from llama_fixtures import FOLDER, TEXTS, tokenizers

from hope_jax.data import load_tokenizer
from hope_jax.data.byte_pairs import Encoding
from hope_jax.data.tokenizer import BytePairsConfig

NAMES = ("llama3", "digits", "gpt2")


def build(name, **options):
    file = str(FOLDER / "tokenizers" / f"{name}.json")
    return BytePairsConfig(**({"file": file, "vocabulary": 340, "bos": 0} | options)).build()


def random_texts(count):
    draw = random.Random(0)
    kinds = [
        lambda: draw.randrange(128),
        lambda: draw.randrange(0x3000),
        lambda: draw.randrange(0x3000, 0xD800),
        lambda: draw.randrange(0xE000, 0x110000),
        lambda: ord(draw.choice(" \n\t\r'0129stST<|>")),
    ]
    for _ in range(count):
        yield "".join(chr(draw.choice(kinds)()) for _ in range(draw.randrange(60)))


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_those_of_the_library(name):
    expected = json.loads((FOLDER / "tokenizers" / "expected.json").read_text())[name]
    assert [text for text, _ in expected] == TEXTS
    tokenizer = build(name)
    for text, ids in expected:
        assert tokenizer.encode(text).tolist() == ids


@pytest.mark.parametrize("name", NAMES)
def test_any_text_comes_back_and_none_is_special(name):
    tokenizer = build(name)
    for text in [*TEXTS, *random_texts(300)]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert np.all(ids > 1)
    assert tokenizer.decode([0, *tokenizer.encode("a").tolist(), 1, 0]) == "a"
    assert tokenizer.decode([*tokenizer.encode("é")[:1].tolist(), 999]) in ("\ufffd", "é")
    with pytest.raises(ValueError, match="half a surrogate pair"):
        tokenizer.encode("\ud800")


def test_it_is_the_same_after_a_save(tmp_path):
    tokenizer = build("llama3")
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (again.bos, again.vocabulary, again.fingerprint) == (0, 340, tokenizer.fingerprint)
    assert again.encode(TEXTS[2]).tolist() == tokenizer.encode(TEXTS[2]).tolist()
    assert build("llama3", bos=1).fingerprint != tokenizer.fingerprint
    assert build("gpt2").fingerprint != tokenizer.fingerprint


def test_long_words_take_no_square_of_their_length():
    tokenizer = build("gpt2")
    text = "ab" * 100_000
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"normalizer": {"type": "NFC"}}, "texts must not be changed, got normalizer NFC"),
        ({"model": {"type": "Unigram"}}, "it must be plain BPE of bytes, got Unigram"),
        ({"model": {"type": "BPE", "byte_fallback": True}}, "plain BPE of bytes, got BPE byte_f"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "texts must end up as their bytes"),
        ({"pre_tokenizer": None}, "texts must end up as their bytes"),
        ({"model": {"type": "BPE"}}, "it describes no byte-pair encoding: KeyError('vocab')"),
    ],
)
def test_other_rules_are_refused_with_the_reason(changes, says):
    about = json.loads((FOLDER / "tokenizers" / "gpt2.json").read_text())
    with pytest.raises(ValueError) as error:  # noqa: PT011  what it says is looked at below
        Encoding(json.dumps(about | changes).encode())
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"file": "nowhere.json"}, FileNotFoundError, "'nowhere.json' is not a file"),
        ({"file": __file__}, ValueError, "is no tokenizer that can be read"),
        ({"vocabulary": 300}, ValueError, "vocabulary must be 340"),
        ({"bos": 5}, ValueError, "bos must be a special token"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, error, says):
    with pytest.raises(error, match=says):
        build("gpt2", **options)


def test_the_library_agrees_on_random_texts():
    pytest.importorskip("tokenizers")
    for name, theirs in tokenizers():
        theirs.encode_special_tokens = True
        ours = build(name)
        different = sum(
            theirs.encode(text).ids != ours.encode(text).tolist() for text in random_texts(3000)
        )
        # Letters that are newer than Python's tables of Unicode are cut otherwise.
        assert different <= 3
