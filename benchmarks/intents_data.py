"""Writes labelled examples to learn from: texts of CLINC150 under names that change places.

    python -m benchmarks.intents_data data/intents_episodes.jsonl 20000 data/intents

One JSON object a line with the field `text`: an episode of up to 320 lines as `eval.py RUN intents`
reads them. In each the classes have each other's names in a new order, so that only the context
says what a name means. Texts are of the training part; ask for another dataset, such as Banking77.
"""

import json
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hope_jax.data.intents import IntentsConfig, Text
from hope_jax.evaluation.intents import PROMPT, spoken

CLASSES = 4, 40
SHOTS = 2, 8


def episode(number: int, texts: dict[str, list[str]]) -> str:
    random = np.random.default_rng((number,))
    names = random.permutation([*texts])[: random.integers(CLASSES[0], CLASSES[1] + 1)]
    lines = []
    for own, name in zip(names, random.permutation(names), strict=True):
        for i in random.permutation(len(texts[own]))[: random.integers(SHOTS[0], SHOTS[1] + 1)]:
            lines.append(f"{PROMPT.format(texts[own][i])} {spoken(name)}\n")
    return "".join(lines[i] for i in random.permutation(len(lines)))


def by_class(texts: list[Text]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for text, label in texts:
        found.setdefault(label, []).append(text)
    return found


def main(out: str, count: str, folder: str):
    texts = by_class(IntentsConfig(dataset="clinc150", folder=folder).texts()[0])
    with Path(out).open("w", encoding="utf-8") as file:
        for number in tqdm(range(int(count)), delay=1):
            file.write(json.dumps({"text": episode(number, texts)}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
