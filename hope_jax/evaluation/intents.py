"""Classes that are learned from examples in the context alone, and which of them are forgotten."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from hope_jax.data.intents import IntentsConfig, Name, Text, names, split
from hope_jax.evaluation.answers import ask_each, behind, costs, digest, known_answers
from hope_jax.evaluation.page import draw_grid, write_page
from hope_jax.evaluation.subject import Results, Subject, TaskError, encode
from hope_jax.models.adapt import read, settle

PROMPT = "Text: {}\nLabel:"


@dataclass(frozen=True, kw_only=True)
class Intents:
    """Reads labelled examples, group of classes by group, and labels other texts after each.

    What `python -m hope_jax continual` trains, with the same groups, and no weight trained: the
    examples are read as one stream. Behind those of a group, texts of the test part of all groups
    so far are asked for, each behind the same memory. The answer is the likeliest of the names of
    all classes so far, its line's end included; nothing is generated, and which group a text is of
    is not told. A fresh model says the same name to nearly every text, and is right once in as many
    times as there are classes. Each answer is kept in the run's folder, so that the same question
    is asked once.

    Attributes:
      dataset: Which one; see `hope_jax.data.intents`.
      folder: Where its files lie.
      groups: How many; the classes are dealt out to them by the seed.
      shots: Examples of each class that are read.
      questions: Texts of each class that are asked for.
      length: Characters of a text; the rest is cut off.
      seed: Of the order of classes, of examples and of questions.
    """

    dataset: Name = "banking77"
    folder: str = "data/intents"
    groups: int = 7
    shots: int = 4
    questions: int = 2
    length: int = 200
    seed: int = 0

    def __post_init__(self):
        least = {"groups": 1, "shots": 1, "questions": 1, "length": 1, "seed": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} must be at least {value}, got {getattr(self, name)}")

    def run(self, subject: Subject) -> Results:
        """Reads and asks; returns what `summary` makes of the accuracies, and chance at the end."""
        try:
            data = IntentsConfig(dataset=self.dataset, folder=self.folder)
            train, test = (self._by_class(part) for part in data.texts())
        except (OSError, ValueError, ModuleNotFoundError) as error:
            raise TaskError(str(error)) from error
        labels = [*train]
        if self.groups > len(labels):
            raise TaskError(f"groups must be at most {len(labels)}, got {self.groups}")
        groups = split(range(len(labels)), self.groups, self.seed)
        settings = {name: value for name, value in asdict(self).items() if name != "questions"}
        file = subject.folder / f"intents-{digest(subject.model, settings)}.jsonl"
        known = known_answers(file, Question)
        every = list(self._questions(groups, test, labels))
        missing = [one for one in every if one not in known]
        reader = _Reader(subject, [self._lesson(mine, train, labels) for mine in groups], labels)

        def ask(one: Question) -> dict[str, int]:
            seen = np.concatenate(groups[: one.stage + 1])
            text = test[labels[one.label]][one.number]
            return {"said": reader.label(one.stage, text, seen)}

        known |= ask_each(subject, file, missing, ask)
        return self._report(subject, {one: known[one] for one in every}, len(labels))

    def _by_class(self, texts: list[Text]) -> dict[str, list[str]]:
        """The texts of each class as they are read, in an order of the seed's."""
        found: dict[str, list[str]] = {name: [] for name in names(texts)}
        for text, label in texts:
            found[label].append(" ".join(text.split())[: self.length])
        for number, some in enumerate(found.values()):
            np.random.default_rng((self.seed, 2, number)).shuffle(some)
        return found

    def _lesson(
        self, mine: Int[np.ndarray, " C"], train: dict[str, list[str]], labels: list[str]
    ) -> list[str]:
        """The examples of a group, a line each, in an order of the seed's."""
        lines = [
            f"{PROMPT.format(text)} {spoken(labels[label])}\n"
            for label in mine
            for text in train[labels[label]][: self.shots]
        ]
        np.random.default_rng((self.seed, 3, *mine)).shuffle(lines)
        return lines

    def _questions(
        self, groups: list[np.ndarray], test: dict[str, list[str]], labels: list[str]
    ) -> Iterator["Question"]:
        for stage in range(self.groups):
            for group in range(stage + 1):
                for label in groups[group].tolist():
                    count = min(self.questions, len(test[labels[label]]))
                    yield from (Question(stage, group, label, i) for i in range(count))

    def _report(
        self, subject: Subject, known: "dict[Question, dict[str, Any]]", classes: int
    ) -> Results:
        grid = np.zeros((self.groups, self.groups))
        for stage, group in {one[:2] for one in known}:
            right = [
                answer["said"] == one.label
                for one, answer in known.items()
                if one[:2] == (stage, group)
            ]
            grid[stage, group] = np.mean(right)
        found: Results = {**summary(grid), "chance": 1 / classes, "questions": len(known)}
        order = range(1, self.groups + 1)
        about = f"{self.dataset}, {self.shots} examples of each class in the context."
        rows, columns = ("read up to group", order), ("asked for", order)
        picture = draw_grid("intents", about, grid, rows, columns)
        page = write_page(subject.folder, "intents", about, [picture], found)
        return found | {"page": str(page)}


class Question(NamedTuple):
    """Which question it is.

    Attributes:
      stage: Groups that were read, but one.
      group: Of the text that is asked for.
      label: Of that text.
      number: Among the texts of its class.
    """

    stage: int
    group: int
    label: int
    number: int


class _Reader:
    """Reads lesson after lesson, and labels texts behind them."""

    def __init__(self, subject: Subject, lessons: list[list[str]], labels: list[str]):
        tokenizer = subject.tokenizer
        self._subject, self._lessons = subject, lessons
        ends = [f"{spoken(label)}\n" for label in labels]
        self._answers = [behind(tokenizer, PROMPT.format(""), end) for end in ends]
        self._stage = -1
        self._memory: Any = None
        self._settled: Any = None

    def label(self, stage: int, text: str, seen: Int[np.ndarray, " C"]) -> int:
        """The likeliest label of a text behind the lessons up to `stage`, which never falls."""
        model = self._subject.model
        while self._stage < stage:
            self._stage += 1
            lines = [self._encode(line) for line in self._lessons[self._stage]]
            first = [[self._subject.tokenizer.bos]] if self._memory is None else []
            tokens = np.concatenate([*first, *lines]).astype(np.int32)[None]
            self._memory = read(model, tokens, self._memory)
            self._settled = settle(model, self._memory)
        prompt = self._encode(PROMPT.format(text))
        nats = costs(model, prompt, self._answers, self._settled)
        return int(seen[np.argmin(nats[seen])])

    def _encode(self, text: str) -> list[int]:
        return encode(self._subject.tokenizer, text, "a text").tolist()


def spoken(label: str) -> str:
    """The name of a class as a text has it."""
    return " ".join(label.replace("_", " ").split())


def summary(matrix: Float[np.ndarray, "groups groups"]) -> dict[str, float]:
    """Names what an accuracy matrix comes to.

    Args:
      matrix: Entry [t, j] is the accuracy on group j's test after learning group t.

    Returns:
      average (over groups, at the end), forgetting (how far each group but the last fell from the
      best it was before), backward (what later groups changed of each group's accuracy right
      after its own), learned (the accuracy of each group right after its own).

    References:
      Lopez-Paz and Ranzato, "Gradient Episodic Memory", 2017; Chaudhry et al., "Riemannian Walk for
      Incremental Learning", 2018.
    """
    last, own = matrix[-1], np.diag(matrix)
    found = {"average": float(last.mean()), "learned": float(own.mean())}
    if len(matrix) > 1:
        best = np.array([matrix[j:-1, j].max() for j in range(len(matrix) - 1)])
        found["forgetting"] = float(np.mean(best - last[:-1]))
        found["backward"] = float(np.mean(last[:-1] - own[:-1]))
    return found
