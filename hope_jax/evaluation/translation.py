"""Languages that are learned from a manual while it is read: one alone, and two in a row."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from hope_jax.data.synthetic_languages import Language, Sentence, make_language, make_sentence
from hope_jax.evaluation.answers import ask_each, digest, known_answers
from hope_jax.evaluation.page import draw_grid, write_page
from hope_jax.evaluation.subject import Results, Subject, encode
from hope_jax.models.adapt import read, repeat, settle
from hope_jax.models.decoder import Memory
from hope_jax.models.generate import generate

LONGEST = 6
"""Characters of the longest pieces that chrF compares."""

PLANS = {"first": [0], "second": [1], "both": [0, 1]}
"""The languages whose manuals are read, in order, before each of them is asked for."""


class Reading(NamedTuple):
    """What is read before translations are asked for.

    Attributes:
      plan: One of `PLANS`.
    """

    plan: str


@dataclass(frozen=True, kw_only=True)
class Translation:
    """Reads the manual of a made-up language, then translates from it.

    A manual has the grammar, the dictionary and examples. Sentences that are asked for are none of
    the examples, and each is asked behind the same memory of the manual. Two languages are learned
    alone and one after the other: what the first loses by the second is forgetting. The score is
    chrF, in per cent, of the likeliest continuation up to its first line's end; what knows the
    languages has 100, a fresh model what nonsense has in common with English, some per cent.

    Attributes:
      examples: Sentences with translations in a manual.
      questions: Sentences to translate from each language.
      batch: Questions that are asked at once.
      seed: Another seed, other languages.

    References:
      Behrouz et al., "Nested Learning", 2025 (continual translation of a novel language); Popović,
      "chrF: character n-gram F-score for automatic MT evaluation", 2015.
    """

    examples: int = 40
    questions: int = 32
    batch: int = 16
    seed: int = 0

    def __post_init__(self):
        for name, least in (("examples", 0), ("questions", 1), ("batch", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def run(self, subject: Subject) -> Results:
        """Reads and translates; returns chrF of each language alone and behind both manuals."""
        lessons = [self._lesson(number) for number in range(2)]
        settings = {name: value for name, value in asdict(self).items() if name != "batch"}
        file = subject.folder / f"translation-{digest(subject.model, settings)}.jsonl"

        def ask(one: Reading) -> dict[str, list[list[str]]]:
            numbers = PLANS[one.plan]
            memory = _learn(subject, "\n".join(lessons[number][1] for number in numbers) + "\n")
            pairs = ((lessons[number][0], lessons[number][2]) for number in numbers)
            return {"said": [self._translate(subject, *pair, memory) for pair in pairs]}

        known = known_answers(file, Reading)
        missing = [Reading(name) for name in PLANS if Reading(name) not in known]
        known |= ask_each(subject, file, missing, ask)
        found: dict[str, float] = {}
        texts: list[str] = []
        for name, numbers in PLANS.items():
            for number, said in zip(numbers, known[Reading(name)]["said"], strict=True):
                language, _, asked = lessons[number]
                key = (
                    f"chrf_{('first', 'second')[number]}_{'of_two' if name == 'both' else 'alone'}"
                )
                found[key] = chrf(said, [one.english() for one in asked])
                texts.append(f"{language.question(asked[0])} {said[0]}")
        found["forgotten"] = found["chrf_first_alone"] - found["chrf_first_of_two"]
        return {**found, "texts": texts, "page": str(self._draw(subject.folder, found))}

    def _draw(self, folder: Path, found: dict[str, float]) -> Path:
        languages, behind = ("first", "second"), ("alone", "of_two")
        grid = np.array([[found[f"chrf_{one}_{after}"] for one in languages] for after in behind])
        about = f"chrF / 100 of {self.questions} sentences behind one manual and behind two."
        axes = ("manuals", ("its own", "both")), ("language", languages)
        picture = draw_grid("translation", about, grid / 100, *axes)
        return write_page(folder, "translation", about, [picture], found)

    def _lesson(self, number: int) -> tuple[Language, str, list[Sentence]]:
        """A language, its manual and what is asked for, all by the seed."""
        random = np.random.default_rng((self.seed, number))
        language = make_language(random)
        examples = [make_sentence(random) for _ in range(self.examples)]
        asked: list[Sentence] = []
        while len(asked) < self.questions:
            one = make_sentence(random)
            if one not in (*examples, *asked):
                asked.append(one)
        return language, language.manual(examples), asked

    def _translate(
        self, subject: Subject, language: Language, asked: list[Sentence], memory: Memory
    ) -> list[str]:
        tokenizer = subject.tokenizer
        longest = max(len(encode(tokenizer, one.english(), "a sentence")) for one in asked)
        said: list[str] = []
        for start in range(0, len(asked), self.batch):
            part = asked[start : start + self.batch]
            prompts = [
                encode(tokenizer, language.question(one), "a question").tolist() for one in part
            ]
            written = generate(
                subject.model,
                prompts,
                key=jax.random.key(0),
                max_tokens=longest + 8,
                temperature=0,
                stop=tokenizer.bos,
                vocabulary=tokenizer.vocabulary,
                memory=repeat(memory, len(part)),
            )
            said += [tokenizer.decode(row).strip().split("\n")[0] for row in written]
        return said


def chrf(said: Sequence[str], references: Sequence[str], *, beta: float = 2.0) -> float:
    """The character n-gram F-score of a corpus, in per cent.

    Pieces of one to six characters are counted without white space, over all texts together; the
    score is the mean over their lengths of the F-score that weighs recall `beta` times as much as
    precision. What sacrebleu says, but for texts shorter than a piece, which here count in full.

    Args:
      said: Translations.
      references: One for each.
      beta: See above.
    """
    scores = []
    for size in range(1, LONGEST + 1):
        there, wanted, common = 0, 0, 0
        for one, other in zip(said, references, strict=True):
            ours, theirs = _pieces(one, size), _pieces(other, size)
            there, wanted = there + ours.total(), wanted + theirs.total()
            common += (ours & theirs).total()
        if not there or not wanted:
            continue
        precision, recall = common / there, common / wanted
        weight = beta**2 * precision + recall
        scores.append((1 + beta**2) * precision * recall / weight if weight else 0.0)
    return 100 * float(np.mean(scores)) if scores else 0.0


def _pieces(text: str, size: int) -> Counter[str]:
    bare = "".join(text.split())
    return Counter(bare[i : i + size] for i in range(len(bare) - size + 1))


def _learn(subject: Subject, text: str) -> Memory:
    """The memory of a text that begins a document."""
    tokens = encode(subject.tokenizer, text, "a manual")
    whole = np.concatenate([[subject.tokenizer.bos], tokens]).astype(np.int32)[None]
    return settle(subject.model, read(subject.model, whole))
