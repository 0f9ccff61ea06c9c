"""Needles lie where they should, are asked for right behind the text, and scored as published."""

import json
import re
import sys
from dataclasses import replace
from itertools import count as numbers
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
from toy_model import Toy, ToyConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import needles_data
from hope_jax.data.packing import Piece, SplitInfo
from hope_jax.data.synthetic_needles import (
    NEEDLES,
    STORIES,
    Quiz,
    assemble,
    needle_quiz,
    score,
    story_quiz,
)
from hope_jax.data.tokenizer import BytesConfig, SymbolsConfig
from hope_jax.evaluation import Needles, needles
from hope_jax.evaluation.subject import Subject, TaskError

PROSE = " ".join(f"The {word} fox saw dog number {i}." for i, word in enumerate("abcdefghij"))
TASK = Needles(tasks=("single_2", "qa1"), lengths=(700,), depths=(0.0, 1.0), samples=2, others=3)


class Text:
    """A stream of one text in bytes."""

    info = SplitInfo(len(PROSE), 1, len(PROSE), 1)

    def read(self, start, stop):
        tokens = np.frombuffer(PROSE.encode(), np.uint8)[start:stop].astype(np.int32)
        return Piece(tokens, np.zeros(len(tokens), bool))


def subject(folder, **options):
    model = Toy(ToyConfig(vocabulary=257))
    return Subject(model, BytesConfig().build(), lambda _: Text(), 8, folder=folder, **options)


def quiz(task, seed=0, depth=0.5):
    random = np.random.default_rng(seed)
    return (
        story_quiz(task, random) if task in STORIES else needle_quiz(task, random, depth, others=5)
    )


def prompt(one, budget=3000):
    return assemble(one, cycle(re.split(r"(?<=\.) ", PROSE)), len, budget)


@pytest.mark.parametrize("task", NEEDLES)
def test_every_answer_is_in_the_text_once_and_only_there(task):
    for seed in range(10):
        one = quiz(task, seed)
        text = prompt(one)
        spec = NEEDLES[task]
        assert len(one.answers) == spec.values * spec.queries
        for answer in one.answers:
            assert text.count(answer) == 1
            assert answer not in one.question + one.intro
        assert not any(other in text for other in one.others)
        assert len(set(one.answers + one.others)) == len(one.answers) + 5
        assert text.endswith(one.question)
        there = text.count("One of the special magic")
        assert there == spec.keys * spec.values or (spec.text == "needles" and there > 15)


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_needle_lies_at_its_depth(depth):
    one = quiz("single_2", depth=depth)
    text = prompt(one).removeprefix(one.intro).removesuffix(one.question)
    where = text.index(one.facts[0][1]) / (len(text) - len(one.facts[0][1]))
    assert abs(where - depth) < 0.02


@pytest.mark.parametrize("task", [*NEEDLES, *STORIES])
def test_prompts_are_as_long_as_they_may_be(task):
    for budget in (2500, 4000):
        text = prompt(quiz(task), budget)
        assert budget - 250 < len(text) <= budget


def test_what_does_not_fit_is_an_error():
    one = quiz("single_1")
    with pytest.raises(ValueError, match=r"length must be at least \d+, .* got 100"):
        prompt(one, 100)


def told(facts, question):
    """Answers a story's question from its sentences, by other rules than made it."""
    people, things, gifts, rooms = {}, {}, [], {}
    for fact in facts:
        words = fact.rstrip(".").split()
        if words[0] == "The":
            rooms[words[1], words[3]] = words[-1]
            continue
        who = words[0]
        if words[1] in ("moved", "went", "travelled", "journeyed"):
            people[who] = words[-1]
        elif words[1] == "picked":
            things.setdefault(words[-1], [])
            people[who, "has"] = people.get((who, "has"), set()) | {words[-1]}
        elif words[1] == "put":
            people[who, "has"].remove(words[-1])
        else:
            gifts.append((who, words[3], words[-1]))
            people[who, "has"].remove(words[3])
            people[words[-1], "has"] = people.get((words[-1], "has"), set()) | {words[3]}
        for thing in people.get((who, "has"), ()):
            if who in people and things[thing][-1:] != [people[who]]:
                things[thing].append(people[who])
    words = question.replace("Question: ", "").replace("? Answer:", "").split()
    if words[:2] == ["Where", "is"]:
        return people[words[2]] if words[2] in people else things[words[3]][-1]
    if words[0] == "Where":
        path = things[words[3]]
        return path[path.index(words[-1]) - 1]
    if words[:2] == ["What", "did"]:
        (found,) = {thing for a, thing, b in gifts if (a, b) == (words[2], words[-1])}
    elif words[:2] == ["Who", "gave"]:
        (found,) = {a for a, thing, b in gifts if (thing, b) == (words[3], words[-1])}
    elif words[0] == "Who":
        (found,) = {b for a, thing, b in gifts if (a, thing) == (words[-1], words[3])}
    elif words[-1] == "of":
        found = rooms[words[3], words[4]]
    else:
        (found,) = (a for (a, side), b in rooms.items() if (side, b) == (words[2], words[-1]))
    return found


@pytest.mark.parametrize("task", STORIES)
def test_stories_answer_their_questions(task):
    answers = set()
    for seed in range(100):
        one = quiz(task, seed)
        facts = [fact for _, fact in one.facts]
        assert [*one.facts] == sorted(one.facts, key=lambda pair: pair[0])
        assert (told(facts, one.question),) == one.answers
        assert {*one.others, *one.answers} == {*one.labels}
        text = prompt(one)
        assert [fact for fact in re.split(r"(?<=\.)\s", text) if fact in facts] == facts
        answers.add(one.answers)
    assert len(answers) > 3


def test_scores_are_those_of_the_definitions():
    one = Quiz("", (), "", ("12", "ab"), (), ())
    assert [score(one, said) for said in ("12 AB", "x12", "1 2", "ab12")] == [1, 0.5, 0, 1]
    story = Quiz("", (), "", ("garden",), ("garden", "kitchen"), ("kitchen",))
    said = ("The garden. Not the kitchen.", "kitchen", "garden or kitchen", "", "so.\ngarden")
    assert [score(story, one) for one in said] == [1, 0, 0, 0, 0]


def test_a_fresh_model_finds_nothing_and_each_question_is_asked_once(tmp_path):
    asked = []

    def track(questions):
        asked.append(len(questions))
        return questions

    found = TASK.run(subject(tmp_path, track=track))
    assert found["single_2_700"] == 0
    assert found["qa1_700"] <= 0.5
    assert found["questions"] == 6
    again = replace(TASK, samples=3).run(subject(tmp_path, track=track))
    assert asked == [6, 3]
    assert again["questions"] == 9
    page = (tmp_path / "needles.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r"(src|href)=.(?!data:)", page)


def test_a_reader_that_knows_the_text_scores_one_and_nothing_is_put_in_between(
    tmp_path, monkeypatch
):
    seen = {}
    tokenizer = BytesConfig().build()

    def read(model, tokens):
        seen["before"] = tokens[0].tolist()
        return model.initial_memory(1)

    def generate(model, prompts, **_):  # noqa: ARG001
        tokens = seen["before"] + prompts[0]
        assert tokens[0] == tokenizer.bos
        text = tokenizer.decode(tokens)
        intro, body = text.split("\n")[0], text.rsplit("\n", 1)
        assert text.endswith((" is", " are", "Answer:"))
        assert len(tokens) <= 3000
        if "magic" in intro:
            asked = re.search(r".* for (.*) mentioned in the provided text (is|are)$", body[1])[1]
            keys = asked.replace(" and ", ", ").split(", ")
            said = [v for key in keys for v in re.findall(rf"for {key} is: (\S+)\.", body[0])]
            return [tokenizer.encode(" " + ", ".join(said) + ".").tolist()]
        verbs = "moved|went|travelled|journeyed|picked|put|gave|is (north|south|east|west) of"
        line = rf"(?:Mary|John|Sandra|Daniel|The \w+) (?:{verbs})[^.]*\."
        facts = [found[0] for found in re.finditer(line, body[0])]
        return [tokenizer.encode(f" {told(facts, body[1])}.").tolist()]

    monkeypatch.setattr(needles, "read", read)
    monkeypatch.setattr(needles, "generate", generate)
    every = replace(TASK, tasks=(*NEEDLES, *STORIES), lengths=(3000,), depths=(0.5,))
    found = every.run(subject(tmp_path))
    assert {task: found[f"{task}_3000"] for task in every.tasks} == dict.fromkeys(every.tasks, 1.0)


def test_a_question_depends_on_its_numbers_alone(tmp_path):
    asked, sentences = subject(tmp_path), PROSE.split(". ")

    def pose(task, number):
        (one,) = [
            q for q in task._questions() if q[:3] == ("single_2", 700, 1.0) and q[3] == number
        ]
        quiz, prompt = task._pose(asked, one, sentences)
        return quiz.answers, quiz.others, prompt

    more = replace(TASK, tasks=("qa1", "single_2", "single_1"), lengths=(600, 700), samples=5)
    assert pose(TASK, 1) == pose(more, 1)
    assert len({pose(task, i)[0] for task in (more, replace(more, seed=1)) for i in range(5)}) == 10


def trained(count):
    return [needles_data.document(number, PROSE.split(". ")) for number in range(count)]


def test_what_is_trained_on_is_not_what_is_asked():
    asked = [quiz(task, (0, place, 700, 500, 0)) for place, task in enumerate(NEEDLES)]
    texts = "".join(trained(40))
    assert not any(answer in texts for one in asked for answer in one.answers)


def test_what_is_trained_on_answers_from_its_text():
    texts = [text for text in trained(80) if "magic" in text]
    form = r".* for (.*) mentioned in .* (?:is|are) (.*)\.$"
    lines, single = 0, 0
    for text in texts:
        _, body, *answers = text.split("\n")
        for line in answers:
            asked, said = re.search(form, line).groups()
            keys = asked.replace(" and ", ", ").split(", ")
            found = [v for key in keys for v in re.findall(rf"for {key} is: (\S+)\.", body)]
            assert sorted(found) == sorted(said.split(", "))
        lines += len(answers)
        single += len(answers) == text.count("One of the") == 1
    assert lines > 2 * len(texts)  # much is asked of some,
    assert single > 5  # and one needle of others, as in evaluation
    lengths = [len(text) for text in texts]
    assert min(lengths) < 450
    assert max(lengths) > 2500


def test_the_likeliest_answer_has_rank_one(tmp_path, monkeypatch):
    order = numbers(1)
    costs = iter([[1, 2, 3, 4], [2, 1, 3, 4]])
    monkeypatch.setattr(needles, "generate", lambda *_, **__: [[next(order)]])
    monkeypatch.setattr(needles, "costs", lambda *_: np.array(next(costs)))
    one = replace(TASK, tasks=("single_1",), depths=(0.5,))
    assert one.run(subject(tmp_path))["single_1_700_likeliest"] == 0.5
    (file,) = tmp_path.glob("*.jsonl")
    assert [json.loads(line)["rank"] for line in file.read_text().splitlines()] == [1, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lengths": (200,)}, r"single_2: length must be at least \d+"),
        ({"lengths": ()}, "lengths must have at least one entry"),
        ({"depths": (2.0,)}, "depths must lie in"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"file": "nowhere.txt"}, "'nowhere.txt' cannot be read"),
    ],
)
def test_what_cannot_be_asked_is_an_error(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        replace(TASK, **settings).run(subject(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_vocabulary_without_words_is_an_error(tmp_path):
    numbers_only = subject(tmp_path)._replace(tokenizer=SymbolsConfig(symbols=256).build())
    with pytest.raises(TaskError, match="the tokenizer cannot encode"):
        replace(TASK, tasks=("single_1",)).run(numbers_only)
