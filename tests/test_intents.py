"""Published classes are read as they are, and a context of examples is all that a model is told."""

import csv
import re
from dataclasses import replace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from toy_model import Toy, ToyConfig

from hope_jax.data.intents import DBPEDIA, IntentsConfig
from hope_jax.data.tokenizer import BytesConfig
from hope_jax.evaluation import Intents, intents
from hope_jax.evaluation.answers import behind, costs
from hope_jax.evaluation.subject import Subject, TaskError
from hope_jax.models.adapt import read

WORDS = ("card", "cash", "rate", "limit", "phone", "name")
TASK = Intents(groups=3, shots=3, questions=2)


@pytest.fixture
def banking(tmp_path):
    """Six classes; each text has the word of its class."""
    for part, count in (("train", 5), ("test", 4)):
        with (tmp_path / f"banking77_{part}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["text", "category"])
            for word in WORDS:
                rows.writerows([f"{part} {i}, my {word}", f"about_{word}"] for i in range(count))
    return replace(TASK, folder=str(tmp_path))


def subject(folder, **options):
    model = Toy(ToyConfig(vocabulary=257))
    return Subject(model, BytesConfig().build(), lambda _: None, 8, folder=folder, **options)


def articles(folder, first, rows):
    """Writes DBpedia-14 as one of its two publications has it."""
    for part in ("train", "test"):
        if first:
            path = folder / "dbpedia_csv" / f"{part}.csv"
            path.parent.mkdir(exist_ok=True)
            with path.open("w", newline="") as file:
                csv.writer(file, quoting=csv.QUOTE_NONNUMERIC).writerows(rows)
        else:
            path = folder / "dbpedia_14" / f"{part}-00000-of-00001.parquet"
            path.parent.mkdir(exist_ok=True)
            columns = zip(*rows, strict=True)
            names = ("label", "title", "content")
            table = {name: list(x) for name, x in zip(names, columns, strict=True)}
            pyarrow.parquet.write_table(pyarrow.table(table), path)


@pytest.mark.parametrize("first", [1, 0], ids=["csv", "parquet"])
def test_articles_are_read_as_they_were_published(first, tmp_path):
    rows = [[i % 14 + first, f"Title {i}", f' A "text" of é {i}.'] for i in range(42)]
    articles(tmp_path, first, rows)
    data = IntentsConfig(dataset="dbpedia14", folder=str(tmp_path), length=30)
    texts, _ = data.texts()
    assert texts[5] == ('Title 5: A "text" of é 5.', "Mean of transportation")
    assert [label for _, label in texts[:14]] == [*DBPEDIA]
    train, test = data.load()
    assert bytes(train.inputs[5, : train.lengths[5]].astype(np.uint8)) == texts[5][0].encode()
    assert np.bincount(train.labels).tolist() == [3] * 14
    assert sorted(DBPEDIA)[train.labels[5]] == "Mean of transportation"
    few = replace(data, most=2).load()
    assert [len(part.labels) for part in (train, test, *few)] == [42, 42, 28, 28]
    np.testing.assert_array_equal(few[0].inputs, train.inputs[:28])


def test_what_is_no_data_set_is_an_error(tmp_path):
    data = IntentsConfig(dataset="dbpedia14", folder=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"dbpedia_csv/train.csv': get it from https://"):
        data.load()
    articles(tmp_path, 1, [[14, "a", "b"], [15, "a", "b"]])
    with pytest.raises(ValueError, match="row 2 must be the number of one of 14 classes"):
        data.load()
    with pytest.raises(ValueError, match="most must be at least 1, got 0"):
        replace(data, most=0)


def reader(monkeypatch, labels, *, lessons):
    """A model that knows the words of its last lessons, and checks what it is given to read."""
    tokenizer, seen = BytesConfig().build(), []

    def read(_, tokens, memory):
        assert (tokens[0, 0] == tokenizer.bos) == (memory is None)
        seen.append(tokenizer.decode(tokens[0]))
        return len(seen)

    def costs(_, prompt, answers, memory):
        assert memory == len(seen)
        text = tokenizer.decode(prompt)
        word = re.fullmatch(r"Text: (test \d, my (\w+))\nLabel:", text)
        assert word[1] not in "".join(seen)
        assert [tokenizer.decode(one) for one in answers] == [f" {one}\n" for one in labels]
        known = re.findall(rf"my {word[2]}\nLabel:( .*\n)", "".join(seen[-lessons:]))
        texts = [tokenizer.decode(one) for one in answers]
        later = [text not in "".join(seen) for text in texts]  # are likely, and no choice yet
        right = [text in known for text in texts]
        return 1.0 - np.array(right) - 2.0 * np.array(later)

    monkeypatch.setattr(intents, "read", read)
    monkeypatch.setattr(intents, "settle", lambda _, memory: memory)
    monkeypatch.setattr(intents, "costs", costs)
    return seen


def test_what_learns_from_its_context_scores_one_and_what_forgets_is_found_out(
    banking, monkeypatch, tmp_path
):
    labels = sorted(f"about {word}" for word in WORDS)
    seen = reader(monkeypatch, labels, lessons=3)
    found = banking.run(subject(tmp_path / "all"))
    assert (found["average"], found["learned"], found["forgetting"]) == (1.0, 1.0, 0.0)
    assert found["questions"] == (2 + 4 + 6) * 2
    assert found["chance"] == pytest.approx(1 / 6)
    whole = "".join(seen)
    assert [whole.count(f"Label: {one}\n") for one in labels] == [3] * 6
    assert [lesson.count("Text: train") for lesson in seen] == [6, 6, 6]

    reader(monkeypatch, labels, lessons=1)
    found = banking.run(subject(tmp_path / "last"))
    assert found["learned"] == 1.0
    assert found["forgetting"] > 0.7
    assert found["average"] < 0.6


def test_a_fresh_model_guesses_and_each_question_is_asked_once(banking, tmp_path):
    asked = []

    def track(questions):
        asked.append(len(questions))
        return questions

    found = banking.run(subject(tmp_path, track=track))
    again = replace(banking, questions=3).run(subject(tmp_path, track=track))
    assert asked == [24, 12]
    assert abs(found["average"] - 1 / 6) < 0.2
    assert again["questions"] == 36
    page = (tmp_path / "intents.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert not re.search(r"(src|href)=.(?!data:)", page)


def test_an_answer_costs_the_same_beside_any_others():
    model, tokenizer = Toy(ToyConfig(vocabulary=257)), BytesConfig().build()
    memory = read(model, np.array([[256, 1, 2, 3, 4]]))
    prompt = tokenizer.encode("Text: a\nLabel:").tolist()
    answers = [behind(tokenizer, "Label:", text) for text in ("one\n", "a longer one\n", "b\n")]
    together = costs(model, prompt, answers, memory)
    alone = [costs(model, prompt, [answer], memory)[0] for answer in answers]
    np.testing.assert_allclose(alone, together, rtol=1e-5)
    logits = np.asarray(model(np.array([[*prompt, *answers[2]]]), memory)[0][0], np.float64)
    said = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    places = np.arange(len(prompt) - 1, len(prompt) - 1 + len(answers[2]))
    np.testing.assert_allclose(together[2], -said[places, answers[2]].sum(), rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"groups": 7}, "groups must be at most 6, got 7"),
        ({"shots": 0}, "shots must be at least 1, got 0"),
        ({"dataset": "clinc150"}, "clinc150.json': get it from https://github.com/clinc"),
    ],
)
def test_what_cannot_be_asked_is_an_error(banking, settings, message, tmp_path):
    with pytest.raises((ValueError, TaskError), match=message):
        replace(banking, **settings).run(subject(tmp_path / "eval"))
    assert not (tmp_path / "eval").exists()
