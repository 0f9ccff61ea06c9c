"""Writes texts with needles or stories, their questions and answers, to fine-tune a model on:

    python -m benchmarks.needles_data data/needles.jsonl 30000 data/wikitext2/train.txt

One JSON object a line with the field `text`: a prompt of `eval.py RUN needles`, its answers, and
lines that answer the same or another question about the same text. How long a text is and how much
is hidden and asked is drawn evenly on a logarithmic scale: beside long texts that are asked for one
needle there are many that hold little else, from which the model learns first. The needles are
others than those that are asked for in evaluation, and so should be the prose: give the training
part.
"""

import json
import re
import sys
from itertools import count as numbers
from itertools import cycle
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hope_jax.data.synthetic_needles import (
    NEEDLES,
    NOISE,
    STORIES,
    Quiz,
    assemble,
    needle_quiz,
    story_quiz,
)

SIZES = 300, 3600
"""Characters of a document; those that do not fit what has to be said are longer."""
HIDDEN, ASKED = 8, 16
"""The most quizzes hidden in a text, and the most answers behind it."""
TASKS = *NEEDLES, *3 * ("single_1", "single_2", "single_3"), "stories"


def sentences(path: Path) -> list[str]:
    text = " ".join(path.read_text("utf-8").split())
    return [piece for piece in re.split(r"(?<=[.!?])\s+", text) if piece]


def document(number: int, prose: list[str]) -> str:
    random = np.random.default_rng((number,))
    task, size = TASKS[random.integers(len(TASKS))], between(*SIZES, random)
    quizzes = hidden(task, size, random)
    first, least = quizzes[0], shortest(quizzes)
    more = ""
    for one in random.integers(len(quizzes), size=between(1, ASKED, random) - 1):
        line = "\n" + answered(quizzes[one], quizzes[one].question.split("? ")[-1])
        if least + len(more) + len(line) > size:
            break
        more += line
    if NEEDLES.get(task) and NEEDLES[task].text == "noise":
        background = cycle([NOISE])
    else:
        begin = int(random.integers(len(prose)))
        background = (prose[i % len(prose)] for i in numbers(begin))
    facts = sorted((fact for quiz in quizzes for fact in quiz.facts), key=lambda fact: fact[0])
    whole = first._replace(facts=tuple(facts))
    prompt = assemble(whole, background, len, max(size - len(more), least))
    return answered(first, prompt) + more


def hidden(task: str, size: int, random: np.random.Generator) -> list[Quiz]:
    """What a text holds: one story, or needles of a task, which may fill half of it."""
    if task == "stories":
        return [story_quiz(STORIES[random.integers(len(STORIES))], random)]
    most = between(1, HIDDEN, random)
    quizzes: list[Quiz] = []
    while not quizzes or (len(quizzes) < most and shortest(quizzes) < size / 2):
        quizzes.append(needle_quiz(task, random, random.random(), others=0))
    return quizzes


def between(low: int, high: int, random: np.random.Generator) -> int:
    """A number from `low` to `high`, each octave as likely."""
    return int(np.exp(random.uniform(np.log(low), np.log(high + 1))))


def shortest(quizzes: list[Quiz]) -> int:
    """Characters that a prompt has at least: what the quizzes need beside any prose."""
    facts = [fact for quiz in quizzes for _, fact in quiz.facts]
    return sum(len(part) + 1 for part in (quizzes[0].intro, *facts, quizzes[0].question))


def answered(quiz: Quiz, question: str) -> str:
    return f"{question} {', '.join(quiz.answers)}."


def main(out: str, count: str, text: str):
    prose = sentences(Path(text))
    with Path(out).open("w", encoding="utf-8") as file:
        for number in tqdm(range(int(count)), delay=1):
            file.write(json.dumps({"text": document(number, prose)}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
