"""Made-up examples ask what they say: rules written another way give every label."""

from itertools import pairwise, permutations

import numpy as np
import pytest

from hope_jax.data.synthetic import RecallConfig
from hope_jax.data.synthetic_formal import PERIODS, FormalConfig, WordsConfig
from hope_jax.data.synthetic_labels import draw
from hope_jax.data.synthetic_mad import SIZES, MadConfig

FORMAL = [FormalConfig(language=one, examples=60, held_out=30) for one in PERIODS]
WORDS = [WordsConfig(group=one, examples=60, held_out=30) for one in ("s5", "a5")]
MAD = [MadConfig(task=one, examples=60, held_out=30) for one in SIZES]
RECALL = RecallConfig(examples=60, held_out=30)
ALL = [*FORMAL, *WORDS, *MAD, RECALL]


def named(task):
    return task.about.title


def follows(language, prefix):
    """The symbols that may follow a prefix of a word, and whether the word may end."""
    a, b, c = (prefix.count(i) for i in range(3))
    if language == "aa_star":
        return frozenset({"0", "end"} if a % 2 == 0 else {"0"})
    if language == "abab_star":
        return frozenset({str(len(prefix) % 2)} | ({"end"} if len(prefix) % 4 == 0 else set()))
    if language == "a_n_b_n":
        return frozenset({"0", "1"} if b == 0 else {"1"} if b < a else {"end"})
    if language == "a_n_b_n_c_n":
        if b == 0:
            return frozenset({"0", "1"})
        return frozenset({"1"} if b < a else {"2"} if c < a else {"end"})
    open_round, open_square = a - b, c - prefix.count(3)
    assert min(open_round, open_square) >= 0
    close = ({"1"} if open_round else set()) | ({"3"} if open_square else set())
    return frozenset({"0", "2"} | close | (set() if close else {"end"}))


@pytest.mark.parametrize("task", FORMAL[1:], ids=named)
def test_a_label_is_a_name_of_what_may_follow(task):
    meaning = {}
    for split in ("train", "bin1"):
        for word, label, weight in zip(*draw(task, split), strict=True):
            size = int(weight.sum())
            said = label[:size].tolist()
            for i in range(size):
                after = follows(task.language, word[: i + 1].tolist())
                assert meaning.setdefault(said[i], after) == after
                if i + 1 < size:
                    assert str(word[i + 1]) in after
            assert "end" in after
    assert len(set(meaning.values())) == len(meaning)


def test_parity_is_that_of_the_ones_so_far():
    words, labels, weights = draw(FORMAL[0], "train")
    np.testing.assert_array_equal(labels * weights, (words.cumsum(-1) % 2) * weights)


@pytest.mark.parametrize("task", [*FORMAL, *WORDS], ids=named)
def test_lengths_are_those_of_the_bins(task):
    for split, (low, high) in zip(
        ("train", "bin0", "bin1"), (task.bins[0], *task.bins), strict=True
    ):
        weights = draw(task, split).weights
        lengths = weights.sum(-1)
        assert weights.shape[-1] == high
        assert lengths.min() >= low
        assert np.all(weights == (np.arange(high) < lengths[:, None]))


@pytest.mark.parametrize(("task", "count"), [*zip(FORMAL[1:5], (25, 12, 25, 16), strict=True)])
def test_languages_have_as_many_strings_as_they_should(task, count):
    words, _, weights = draw(FormalConfig(language=task.language, examples=600), "train")
    found = {(*word.tolist(), size) for word, size in zip(words, weights.sum(-1), strict=True)}
    assert len(found) == count


@pytest.mark.parametrize("task", WORDS, ids=named)
def test_a_word_is_multiplied_out(task):
    elements = [
        p
        for p in permutations(range(5))
        if task.group == "s5" or np.linalg.det(np.eye(5)[list(p)]) > 0
    ]
    assert len(elements) == task.about.symbols
    for word, label, weight in zip(*draw(task, "bin1"), strict=True):
        product = np.eye(5)
        for element, said in zip(word[weight > 0], label[weight > 0], strict=True):
            product = product @ np.eye(5)[list(elements[element])]
            np.testing.assert_array_equal(product, np.eye(5)[list(elements[said])])


@pytest.mark.parametrize("task", ALL, ids=named)
def test_an_example_depends_on_its_number_alone_and_splits_differ(task):
    whole = draw(task, "train")
    again = task.example("train", 17)
    for one, many in zip(again, whole, strict=True):
        np.testing.assert_array_equal(one, many[17][: len(one)])
        assert many.dtype == one.dtype
    other = draw(task, "valid")
    assert not np.array_equal(whole.labels[:30], other.labels)
    assert max(whole.inputs.max(), whole.labels.max()) < task.about.symbols


def recalled(inputs, labels, weights, kinds):
    """Checks recall by looking each question up in the pairs before it; counts questions."""
    key, value, known, count = (), (), {}, 0
    for i, (token, label, weight) in enumerate(zip(inputs, labels, weights, strict=True)):
        kind = kinds(token)
        if kind == "key":
            if value:
                known[key] = value
                key, value = (), ()
            key = (*key, token)
        elif kind == "value":
            value = (*value, token)
        if weight:
            assert known[key][len(value)] == label
            if i + 1 < len(inputs):
                assert inputs[i + 1] == label
            count += 1
    return count, known


@pytest.mark.parametrize("task", MAD[:3], ids=named)
def test_recall_asks_for_every_value_whose_key_came_before(task):
    def kind(token):
        return "key" if token < 8 else "value" if token < 16 else "noise"

    noise = []
    for example in zip(*draw(task, "test"), strict=True):
        count, known = recalled(*example, kind)
        assert count > 20
        assert len(known) <= 8
        keys = sorted(known)
        assert not any(b[: len(a)] == a for a, b in pairwise(keys))
        noise.append(np.mean(example[0] >= 16))
    assert (np.mean(noise) > 0.08) == (task.task == "noisy_recall")


def test_copying_asks_for_the_symbols_in_their_order():
    for inputs, labels, weights in zip(*draw(MAD[3], "test"), strict=True):
        assert inputs[inputs < 14].tolist() == labels[weights > 0].tolist()
        assert np.flatnonzero(weights).tolist() == [*range(240, 256)]
        assert set(inputs[-16:].tolist()) == {15}


def test_what_is_memorized_is_the_same_everywhere():
    known = {}
    for split in ("train", "test"):
        for inputs, labels, weights in zip(*draw(MAD[4], split), strict=True):
            assert set(inputs[1::2].tolist()) == {255}
            assert np.flatnonzero(weights).tolist() == [*range(1, 32, 2)]
            for key, value in zip(inputs[::2].tolist(), labels[1::2].tolist(), strict=True):
                assert known.setdefault(key, value) == value
    assert len(set(known.values())) == len(known) > 100


def test_compression_asks_for_all_that_was_read():
    inputs, labels, weights = draw(MAD[5], "test")
    np.testing.assert_array_equal(inputs[:, :-1], labels[:, :-1])
    assert set(inputs[:, -1].tolist()) == {15}
    assert weights.sum(-1).tolist() == [31] * 30


def test_recall_asks_what_its_stream_asks():
    example = RECALL.example("test", 3)
    length = RECALL.length
    piece = RECALL.stream("test", bos=96).read(3 * length, 4 * length)
    np.testing.assert_array_equal(example.labels, piece.tokens[2:])
    assert example.weights.sum() == RECALL.keys


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FormalConfig(language="abab_star", bins=((2, 3),)), "multiple of 4"),
        (lambda: FormalConfig(language="parity", bins=()), "at least one entry"),
        (lambda: WordsConfig(group="s5", bins=((5, 4),)), "5 to 4"),
        (lambda: MadConfig(task="compression", examples=0), "examples must be at least 1, got 0"),
    ],
)
def test_settings_that_cannot_be_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
