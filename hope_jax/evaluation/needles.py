"""What a model finds again in a long text: needles and stories, by length and depth."""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from hope_jax.data.synthetic_needles import (
    NEEDLES,
    NOISE,
    STORIES,
    Quiz,
    assemble,
    needle_quiz,
    score,
    story_quiz,
)
from hope_jax.evaluation.answers import ask_each, behind, costs, digest, known_answers
from hope_jax.evaluation.page import Picture, draw_grid, write_page
from hope_jax.evaluation.subject import Results, Subject, TaskError, encode, read_text
from hope_jax.models.adapt import read, settle
from hope_jax.models.generate import generate

Name = Literal[
    "single_1",
    "single_2",
    "single_3",
    "multikey_1",
    "multikey_2",
    "multikey_3",
    "multivalue",
    "multiquery",
    "qa1",
    "qa2",
    "qa3",
    "qa4",
    "qa5",
]

MORE = ("tasks", "lengths", "depths", "samples")
"""Settings that say how many questions there are, and change none of them."""


@dataclass(frozen=True, kw_only=True)
class Needles:
    """Hides sentences in a text, asks for them right behind it, and lets the model write.

    Needles are RULER's, stories and their questions BABILong's. The score is of the likeliest
    continuation of the prompt, nothing in between: the share of the answers that it contains, for
    stories whether its first sentence names the right one of all possible answers and no other. A
    fresh model scores 0, of stories about one in the answers there are at most. Beside it stands
    the share of questions whose answer is the likeliest of `others` + 1. Each answer is kept in the
    run's folder, so that the same question is asked once.

    Attributes:
      tasks: What is asked.
      lengths: Tokens of the prompts: at most, and not a sentence less than fits.
      depths: The share of the text before the first needle that is asked for. Stories have none.
      samples: Questions at each length and depth.
      split: Whose prose needles and facts lie in, of the run's data, where no file is given.
      file: A UTF-8 text to take the prose from. A shorter text than is needed begins again.
      others: The most wrong answers whose likelihood is compared.
      seed: Another seed, other questions.
    """

    tasks: tuple[Name, ...] = ("single_1", "single_2", "single_3")
    lengths: tuple[int, ...] = (1024, 4096)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 5
    split: Literal["train", "valid", "test"] = "valid"
    file: str | None = None
    others: int = 7
    seed: int = 0

    def __post_init__(self):
        for name in ("tasks", "lengths", "depths"):
            if not getattr(self, name):
                raise ValueError(f"{name} must have at least one entry, got none")
        for name, least in (("samples", 1), ("others", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for depth in self.depths:
            if not 0 <= depth <= 1:
                raise ValueError(f"depths must lie in [0, 1], got {depth}")

    def run(self, subject: Subject) -> Results:
        """Asks; returns the mean score of each task at each length, and that of the ranks."""
        questions = list(self._questions())
        settings = {name: value for name, value in asdict(self).items() if name not in MORE}
        file = subject.folder / f"needles-{digest(subject.model, settings)}.jsonl"
        known = known_answers(file, Question)
        missing = [one for one in questions if one not in known]
        sentences: list[str] = []
        if any(one.task in STORIES or NEEDLES[one.task].text == "essay" for one in missing):
            sentences = self._prose(subject)
        shortest = {one.task: one for one in sorted(missing, key=lambda one: -one.length)}
        for one in shortest.values():  # what cannot be asked is said before anything is
            self._pose(subject, one, sentences)
        known |= ask_each(
            subject, file, missing, lambda one: ask(subject, *self._pose(subject, one, sentences))
        )
        return self._report(subject, {one: known[one] for one in questions})

    def _questions(self) -> Iterator["Question"]:
        for task, length in product(self.tasks, self.lengths):
            depths = (0.0,) if task in STORIES else self.depths
            for depth, sample in product(depths, range(self.samples)):
                yield Question(task, length, depth, sample)

    def _prose(self, subject: Subject) -> list[str]:
        """The sentences of the text that hides."""
        if self.file is not None:
            text = read_text(Path(self.file))
        else:
            stream = subject.stream(self.split)
            most = min(stream.info.tokens, 2 * max(self.lengths))
            text = subject.tokenizer.decode(stream.read(0, most).tokens)
        pieces = re.split(r"(?<=[.!?])\s+", text)
        sentences = [piece for piece in (" ".join(piece.split()) for piece in pieces) if piece]
        if not sentences:
            raise TaskError("the text that hides must hold at least 1 sentence, got none")
        return sentences

    def _pose(
        self, subject: Subject, one: "Question", sentences: list[str]
    ) -> tuple[Quiz, list[int]]:
        """A question and its prompt, which depend on its numbers and the settings alone."""
        place = [*NEEDLES, *STORIES].index(one.task)
        numbers = (self.seed, place, one.length, round(1000 * one.depth), one.sample)
        random = np.random.default_rng(numbers)
        if one.task in STORIES:
            quiz, noise = story_quiz(one.task, random), False
        else:
            quiz = needle_quiz(one.task, random, one.depth, others=self.others)
            noise = NEEDLES[one.task].text == "noise"
        if noise or quiz.background is not None:
            background = cycle([NOISE])
        else:
            background = islice(cycle(sentences), int(random.integers(len(sentences))), None)

        def count(text: str) -> int:
            return len(encode(subject.tokenizer, text, "the prompt"))

        try:
            text = assemble(quiz, background, count, one.length - 1)
        except ValueError as error:
            raise TaskError(f"{one.task}: {error}") from error
        tokens = encode(subject.tokenizer, text, "the prompt").tolist()
        return quiz, [subject.tokenizer.bos, *tokens]

    def _report(self, subject: Subject, known: "dict[Question, dict[str, Any]]") -> Results:
        found: Results = {}
        pictures: list[Picture] = []
        for task in self.tasks:
            mine = {one: answer for one, answer in known.items() if one.task == task}
            for length in self.lengths:
                some = [answer for one, answer in mine.items() if one.length == length]
                found[f"{task}_{length}"] = float(np.mean([x["score"] for x in some]))
                found[f"{task}_{length}_likeliest"] = float(np.mean([x["rank"] == 1 for x in some]))
            depths = sorted({one.depth for one in mine})
            grid = np.array(
                [
                    [
                        np.mean([a["score"] for q, a in mine.items() if q[1:3] == (length, depth)])
                        for length in self.lengths
                    ]
                    for depth in depths
                ]
            )
            names = ["anywhere"] if task in STORIES else depths
            rows, columns = ("depth", names), ("tokens", self.lengths)
            pictures.append(draw_grid(f"needles-{task}", task, grid, rows, columns))
        about = f"{self.samples} questions each; prose of {self.file or f'split {self.split!r}'}."
        page = write_page(subject.folder, "needles", about, pictures, found)
        return found | {"questions": len(known), "page": str(page)}


class Question(NamedTuple):
    """Which question it is.

    Attributes:
      task: What is asked.
      length: Tokens of the prompt.
      depth: Of the first needle.
      sample: Its number.
    """

    task: str
    length: int
    depth: float
    sample: int


def ask(subject: Subject, quiz: Quiz, prompt: list[int]) -> dict[str, Any]:
    """Reads a prompt once, writes behind it, and compares what might have been written.

    Returns:
      The score, the rank of the first answer among `quiz.others` (1 is the likeliest), and what
      was said.
    """
    model, tokenizer = subject.model, subject.tokenizer
    memory = settle(model, read(model, np.array([prompt[:-1]], np.int32)))
    whole = behind(tokenizer, quiz.question, ", ".join(quiz.answers))
    (said,) = generate(
        model,
        [prompt[-1:]],
        key=jax.random.key(0),
        max_tokens=2 * len(whole) + 8,
        temperature=0,
        stop=tokenizer.bos,
        vocabulary=tokenizer.vocabulary,
        memory=memory,
    )
    text = tokenizer.decode(said)
    wanted = [
        behind(tokenizer, quiz.question, answer) for answer in (quiz.answers[0], *quiz.others)
    ]
    nats = costs(model, prompt[-1:], wanted, memory)
    return {"score": score(quiz, text), "rank": int(np.sum(nats <= nats[0])), "said": text}
