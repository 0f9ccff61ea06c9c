"""Writes texts with needles or stories, their questions and answers, to fine-tune a model on:

    python -m benchmarks.needles_data data/needles.jsonl 20000 data/wikitext2/train.txt

One JSON object a line with the field `text`: a prompt of `eval.py RUN needles`, of up to 3600
characters, and its answers. The needles are others than those that are asked for in evaluation, and
so should be the prose: give the training part.
"""

import json
import re
import sys
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hope_jax.data.synthetic_needles import (
    NEEDLES,
    NOISE,
    STORIES,
    assemble,
    needle_quiz,
    story_quiz,
)

SIZES = 600, 3600
TASKS = *NEEDLES, *STORIES


def sentences(path: Path) -> list[str]:
    text = " ".join(path.read_text("utf-8").split())
    return [piece for piece in re.split(r"(?<=[.!?])\s+", text) if piece]


def document(number: int, prose: list[str]) -> str:
    random = np.random.default_rng((number,))
    task = TASKS[random.integers(len(TASKS))]
    if task in STORIES:
        quiz, noise = story_quiz(task, random), False
    else:
        quiz = needle_quiz(task, random, random.random(), others=0)
        noise = NEEDLES[task].text == "noise"
    begin = int(random.integers(len(prose)))
    background = cycle([NOISE]) if noise else islice(cycle(prose), begin, None)
    least = shortest(quiz)
    prompt = assemble(quiz, background, len, int(random.integers(least, max(*SIZES, least) + 1)))
    return f"{prompt} {', '.join(quiz.answers)}."


def shortest(quiz) -> int:
    """Characters that a prompt has at least: what the quiz needs beside any prose."""
    parts = [quiz.intro, *(fact for _, fact in quiz.facts), quiz.question]
    return max(SIZES[0], sum(len(part) + 1 for part in parts))


def main(out: str, count: str, text: str):
    prose = sentences(Path(text))
    with Path(out).open("w", encoding="utf-8") as file:
        for number in tqdm(range(int(count)), delay=1):
            file.write(json.dumps({"text": document(number, prose)}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
