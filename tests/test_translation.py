"""A manual says all that its language needs, and translations are scored as others score them."""

import re
from dataclasses import replace

import numpy as np
import pytest
from toy_model import Toy, ToyConfig

from hope_jax.data.synthetic_languages import Phrase, Sentence, make_language, make_sentence
from hope_jax.data.tokenizer import BytesConfig
from hope_jax.evaluation import Translation, translation
from hope_jax.evaluation.subject import Subject
from hope_jax.evaluation.translation import chrf

TASK = Translation(examples=3, questions=5, batch=2)


def subject(folder):
    model = Toy(ToyConfig(vocabulary=257))
    return Subject(model, BytesConfig().build(), lambda _: None, 8, folder=folder)


def translate(manual, name, text):
    """Translates with nothing but a manual."""
    own = manual[manual.index(f"A manual of {name}.") :]
    own = own[: own.find("A manual of", 5)] if "A manual of" in own[5:] else own
    words = dict(reversed(line.split(" = ")) for line in re.findall(r"^\w+ = \w+$", own, re.M))
    words = {word: english for english, word in words.items()}
    endings = dict(
        zip(("plural", "object", "past"), re.findall(r"The ending -(\w+)", own), strict=True)
    )
    order = re.search(r"First comes the (.*)\.", own)[1].split(", then the ")
    first = "stands before" in own
    tokens = text.lower().rstrip(".").split()
    stems = []
    for token in tokens:
        marks = set()
        for _ in range(2):
            for mark, ending in endings.items():
                if token not in words and token.endswith(ending):
                    token, marks = token.removesuffix(ending), marks | {mark}
        stems.append((words[token], marks))
    verb = next(i for i, (word, _) in enumerate(stems) if word in VERBS)
    at = order.index("verb")
    groups = {"verb": stems[verb : verb + 1]}
    rest = stems[:verb] + stems[verb + 1 :]
    nouns = [i for i, (word, _) in enumerate(rest) if word not in ADJECTIVES]
    cut = verb if at == 1 else nouns[0] + 1 if first else nouns[1]
    for name, group in zip(
        (x for x in order if x != "verb"), (rest[:cut], rest[cut:]), strict=True
    ):
        groups[name] = group
    phrases = {}
    for name in ("subject", "object"):
        (noun,) = (one for one in groups[name] if one[0] not in ADJECTIVES)
        adjective = "".join(word for word, _ in groups[name] if word in ADJECTIVES)
        assert ("object" in noun[1]) == (name == "object")
        phrases[name] = Phrase(noun[0], adjective, "plural" in noun[1])
    word, marks = groups["verb"][0]
    return Sentence(phrases["subject"], word, "past" in marks, phrases["object"]).english()


VERBS = {"see", "find", "follow", "carry", "love", "fear", "paint", "lift", "guard", "visit"}
ADJECTIVES = {"big", "small", "old", "young", "red", "green", "quick", "quiet", "good", "cold"}


def test_a_manual_is_enough_to_translate():
    orders = set()
    for seed in range(30):
        random = np.random.default_rng(seed)
        language = make_language(random)
        orders.add(language.order)
        manual = language.manual([make_sentence(random)])
        for _ in range(10):
            one = make_sentence(random)
            assert translate(manual, language.name, language.say(one)) == one.english()
    assert len(orders) == 6


def test_english_is_english():
    dogs, child = Phrase("dog", "big", True), Phrase("child", "", False)
    said = {
        Sentence(dogs, "see", True, child): "The big dogs saw the child.",
        Sentence(child, "carry", False, dogs): "The child carries the big dogs.",
        Sentence(dogs, "visit", False, child): "The big dogs visit the child.",
        Sentence(child, "visit", True, child._replace(plural=True)): (
            "The child visited the children."
        ),
    }
    for one, text in said.items():
        assert one.english() == text


def test_chrf_is_that_of_sacrebleu():
    # Figures of sacrebleu 2.5's CHRF().corpus_score.
    texts = [("The big dog sees the cat.", "The big dogs saw the cat.")]
    assert chrf(*zip(*texts, strict=True)) == pytest.approx(68.13202327714713)
    assert chrf(["a"], ["ab"]) == pytest.approx(55.55555555555556)
    assert chrf(["same text", "and"], ["same text", "and"]) == 100
    assert chrf(["xyz"], ["abc"]) == 0
    assert chrf([""], ["abc"]) == 0
    assert chrf(["", "abc"], ["abc", "abc"]) < 60


def test_a_fresh_model_says_little_and_languages_go_by_the_seed_alone(tmp_path):
    found = TASK.run(subject(tmp_path))
    again = replace(TASK, batch=5).run(subject(tmp_path / "again"))
    assert found.pop("page") != again.pop("page")
    assert found == again
    assert (tmp_path / "translation.html").read_text().count("data:image/png;base64,") == 1
    assert len(found["texts"]) == 4
    for name in ("first_alone", "second_alone", "first_of_two", "second_of_two"):
        assert 0 <= found[f"chrf_{name}"] < 25
    other = replace(TASK, seed=1).run(subject(tmp_path))
    assert other["texts"][0].split(":")[0] != found["texts"][0].split(":")[0]


def test_what_learns_a_manual_has_100_and_is_asked_right_behind_it(monkeypatch, tmp_path):
    tokenizer = BytesConfig().build()
    seen, counts = [], []

    def read(_, tokens):
        assert tokens[0, 0] == tokenizer.bos
        seen.append(tokenizer.decode(tokens[0]))

    def generate(_, prompts, **__):
        counts.append(len(prompts))
        texts = [tokenizer.decode(prompt) for prompt in prompts]
        assert all(text.endswith(" English:") and text not in seen[-1] for text in texts)
        pairs = [text.removesuffix(" English:").split(": ") for text in texts]
        return [tokenizer.encode(f" {translate(seen[-1], *pair)}\nmore").tolist() for pair in pairs]

    monkeypatch.setattr(translation, "read", read)
    monkeypatch.setattr(translation, "settle", lambda *_: None)
    monkeypatch.setattr(translation, "repeat", lambda *_: None)
    monkeypatch.setattr(translation, "generate", generate)
    found = TASK.run(subject(tmp_path))
    assert TASK.run(subject(tmp_path)) == found  # from what was kept: nothing is asked again
    assert {value for name, value in found.items() if "chrf" in name} == {100.0}
    assert found["forgotten"] == 0
    assert counts == [2, 2, 1] * 4
    assert [text.count("A manual of") for text in seen] == [1, 1, 2]


def test_settings_that_cannot_be_are_errors():
    with pytest.raises(ValueError, match="questions must be at least 1, got 0"):
        Translation(questions=0)
