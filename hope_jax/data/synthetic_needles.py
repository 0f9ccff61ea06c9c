"""Questions about sentences hidden in a long text: needles by RULER, stories by BABILong."""

import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DEPTHS = np.linspace(0, 1, 40)
"""Where needles may lie that are not placed, as shares of the text before them."""

_CONSONANTS, _VOWELS = "bcdfghjklmnprstvz", "aeiou"
PEOPLE = ("Mary", "John", "Sandra", "Daniel")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
THINGS = ("apple", "football", "milk")
SIDES = {"north": "south", "south": "north", "east": "west", "west": "east"}


class Quiz(NamedTuple):
    """A question, and the sentences that answer it.

    Attributes:
      intro: What stands before the text; may be empty.
      facts: Sentences, and the share of the text before each, in order.
      question: What stands behind the text, up to the word before the answer.
      answers: What has to be said, in any order.
      labels: The words that answer questions of its kind; empty where there are too many to list.
      others: Wrong answers of the same kind.
      background: Makes another sentence of the text; None where any text will do.
    """

    intro: str
    facts: tuple[tuple[float, str], ...]
    question: str
    answers: tuple[str, ...]
    labels: tuple[str, ...]
    others: tuple[str, ...]
    background: Callable[[], str] | None = None


@dataclass(frozen=True, kw_only=True)
class Needle:
    """What a task of RULER asks.

    Attributes:
      text: "noise", "essay", or "needles" for nothing but other needles.
      key: "word" or "uuid".
      value: "number" (seven digits) or "uuid".
      keys: Needles with different keys.
      values: Needles for each key.
      queries: Keys that are asked for.
    """

    text: str = "essay"
    key: str = "word"
    value: str = "number"
    keys: int = 1
    values: int = 1
    queries: int = 1


NEEDLES = {
    "single_1": Needle(text="noise"),
    "single_2": Needle(),
    "single_3": Needle(value="uuid"),
    "multikey_1": Needle(keys=4),
    "multikey_2": Needle(text="needles"),
    "multikey_3": Needle(text="needles", key="uuid", value="uuid"),
    "multivalue": Needle(values=4),
    "multiquery": Needle(keys=4, queries=4),
}
STORIES = ("qa1", "qa2", "qa3", "qa4", "qa5")


def needle_quiz(task: str, random: np.random.Generator, depth: float, *, others: int) -> Quiz:
    """Makes a question of RULER.

    Words are two made-up ones with a hyphen, and every key and value is new, wrong ones too.

    Args:
      task: One of `NEEDLES`.
      random: Decides the rest.
      depth: The share of the text before the first needle that is asked for; the others lie at
        depths of `DEPTHS`, each once.
      others: Wrong answers to make.

    References:
      Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language Models?",
      2024.
    """
    spec = NEEDLES[task]
    used: set[str] = set()

    def new(kind: str) -> str:
        while (made := _MAKE[kind](random)) in used:
            pass
        used.add(made)
        return made

    def line(key: str, value: str) -> str:
        return f"One of the special magic {spec.value}s for {key} is: {value}."

    keys = [new(spec.key) for _ in range(spec.keys)]
    values = {key: [new(spec.value) for _ in range(spec.values)] for key in keys}
    lines = [line(key, value) for key in keys for value in values[key]]
    depths = [depth, *random.permutation(DEPTHS)[: len(lines) - 1].tolist()]
    asked = keys[: spec.queries]
    answers = tuple(value for key in asked for value in values[key])
    query = " and ".join([", ".join(asked[:-1]), asked[-1]] if len(asked) > 1 else asked)
    one = len(answers) == 1
    what = f"special magic {spec.value}{'' if one else 's'}"
    of = f"{what} for {query} mentioned in the provided text {'is' if one else 'are'}"
    return Quiz(
        intro=(
            f"{'A' if one else 'Some'} {what} {'is' if one else 'are'} hidden within the following "
            f"text. Make sure to memorize it. I will quiz you about the {what} afterwards."
        ),
        facts=tuple(zip(depths, lines, strict=True)),
        question=(
            f"What {'is' if one else 'are all'} the {what} for {query} mentioned in the provided "
            f"text? The {of}"
        ),
        answers=answers,
        labels=(),
        others=tuple(new(spec.value) for _ in range(others)),
        background=(
            (lambda: line(new(spec.key), new(spec.value))) if spec.text == "needles" else None
        ),
    )


def story_quiz(task: str, random: np.random.Generator, *, events: int = 12) -> Quiz:
    """Makes a story in which people walk and hand things around, and asks about it.

    qa1 asks where somebody is, qa2 where a thing is, qa3 where a thing was before it came to a
    place, qa4 what lies on a side of a room, qa5 who gave what to whom. Facts lie at uniformly
    drawn places of the text, in their order.

    Args:
      task: One of `STORIES`.
      random: Decides the rest.
      events: Facts of a story; qa4 has two.

    References:
      Weston et al., "Towards AI-Complete Question Answering", 2015; Kuratov et al., "BABILong",
      2024.
    """
    while True:
        made = _rooms(random) if task == "qa4" else _story(task, random, events)
        if made is not None:
            break
    facts, question, answer, labels = made
    depths = np.sort(random.random(len(facts))).tolist()
    return Quiz(
        intro="",
        facts=tuple(zip(depths, facts, strict=True)),
        question=f"Question: {question} Answer:",
        answers=(answer,),
        labels=labels,
        others=tuple(label for label in labels if label != answer),
    )


def assemble(
    quiz: Quiz, background: Iterable[str], count: Callable[[str], int], budget: int
) -> str:
    """Hides the facts between sentences of a background, as many as there is room for.

    Args:
      quiz: What is hidden and asked.
      background: Sentences, without end; not read where the quiz has its own.
      count: The tokens of a text.
      budget: The most tokens, as the sum of the parts'.

    Returns:
      The prompt, which ends before the answer.

    Raises:
      ValueError: Not even the facts and the question fit.
    """
    frame = [quiz.intro, *(fact for _, fact in quiz.facts), quiz.question]
    room = budget - sum(count(f"{part} ") for part in frame if part)
    if room < 0:
        raise ValueError(
            f"length must be at least {budget - room}, the tokens of the question alone, "
            f"got {budget}"
        )
    sentences: list[str] = []
    own = quiz.background
    source: Iterator[str] = iter(background) if own is None else iter(own, "")
    for sentence in source:
        room -= count(f"{sentence} ")
        if room < 0:
            break
        sentences.append(sentence)
    places = [round(depth * len(sentences)) for depth, _ in quiz.facts]
    pairs = sorted(zip(places, quiz.facts, strict=True), key=lambda pair: pair[0])
    for place, (_, fact) in reversed(pairs):  # facts at one place keep their order
        sentences.insert(place, fact)
    return "\n".join(part for part in (quiz.intro, " ".join(sentences), quiz.question) if part)


def score(quiz: Quiz, said: str) -> float:
    """The share of the answers that are in what was said, whatever their case.

    Of questions with labels, exactly the right one of all has to be in the first sentence.
    """
    if quiz.labels:
        first = said.lower().replace("\n", ".").split(".")[0]
        return float([x for x in quiz.labels if x.lower() in first] == [*quiz.answers])
    return float(np.mean([answer.lower() in said.lower() for answer in quiz.answers]))


def _word(random: np.random.Generator) -> str:
    def half() -> str:
        return "".join(
            _CONSONANTS[random.integers(len(_CONSONANTS))] + _VOWELS[random.integers(len(_VOWELS))]
            for _ in range(3)
        )

    return f"{half()}-{half()}"


def _number(random: np.random.Generator) -> str:
    return str(random.integers(10**6, 10**7))


def _uuid(random: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=random.bytes(16), version=4))


_MAKE = {"word": _word, "number": _number, "uuid": _uuid}


def _pick(random: np.random.Generator, some: Iterable[str]) -> str:
    choices = list(some)
    return choices[random.integers(len(choices))]


def _story(task: str, random: np.random.Generator, events: int) -> tuple | None:
    """Facts, question, answer and labels; None where the story came to no question."""
    where: dict[str, str] = {}
    holder: dict[str, str] = {}
    path: dict[str, list[str]] = {thing: [] for thing in THINGS}  # rooms that a thing was in
    gifts: list[tuple[str, str, str]] = []
    facts: list[str] = []

    def note(thing: str, room: str | None):
        if room is not None and path[thing][-1:] != [room]:
            path[thing].append(room)

    while len(facts) < events:
        person = _pick(random, PEOPLE)
        mine = [thing for thing in THINGS if holder.get(thing) == person]
        free = [thing for thing in THINGS if thing not in holder]
        kinds = ["go"]
        if task != "qa1":
            kinds += ["take"] * bool(free and person in where) + ["drop"] * bool(mine)
        if task == "qa5":
            kinds += ["give"] * (3 * bool(mine))
        kind = _pick(random, kinds)
        if kind == "go":
            where[person] = _pick(random, (x for x in PLACES if x != where.get(person)))
            verb = _pick(random, ("moved", "went", "travelled", "journeyed"))
            facts.append(f"{person} {verb} to the {where[person]}.")
            for thing in mine:
                note(thing, where[person])
        elif kind == "take":
            # Things lie where they were left, and new ones where they are found.
            here = [thing for thing in free if path[thing][-1:] in ([], [where[person]])]
            if not here:
                continue
            thing = _pick(random, here)
            holder[thing] = person
            note(thing, where[person])
            facts.append(f"{person} picked up the {thing}.")
        elif kind == "drop":
            thing = _pick(random, mine)
            del holder[thing]
            facts.append(f"{person} put down the {thing}.")
        else:
            thing, other = _pick(random, mine), _pick(random, (x for x in PEOPLE if x != person))
            holder[thing] = other
            where[other] = where[person]
            gifts.append((person, thing, other))
            facts.append(f"{person} gave the {thing} to {other}.")
    return _ask(task, random, facts, where, path, gifts)


def _ask(task, random, facts, where, path, gifts) -> tuple | None:
    if task == "qa1":
        person = _pick(random, where)
        return facts, f"Where is {person}?", where[person], PLACES
    if task == "qa2":
        known = [thing for thing in THINGS if path[thing]]
        if not known:
            return None
        thing = _pick(random, known)
        return facts, f"Where is the {thing}?", path[thing][-1], PLACES
    if task == "qa3":
        moved = [thing for thing in THINGS if len(path[thing]) > 1]
        known = [thing for thing in moved if path[thing][-1] not in path[thing][:-1]]
        if not known:
            return None
        thing = _pick(random, known)
        *_, before, last = path[thing]
        return facts, f"Where was the {thing} before the {last}?", before, PLACES
    asks = [(f"What did {giver} give to {taker}?", thing) for giver, thing, taker in gifts]
    asks += [(f"Who gave the {thing} to {taker}?", giver) for giver, thing, taker in gifts]
    asks += [(f"Who received the {thing} from {giver}?", taker) for giver, thing, taker in gifts]
    known = [ask for ask in asks if all(ask[1] == a for q, a in asks if q == ask[0])]
    if not known:
        return None
    question, answer = known[random.integers(len(known))]
    return facts, question, answer, (*PEOPLE, *THINGS)


def _rooms(random: np.random.Generator) -> tuple:
    """Two rooms beside a third, and what lies on one side of what."""
    one, middle, other = random.permutation(PLACES)[:3].tolist()
    first, second = random.permutation([*SIDES])[:2].tolist()
    facts = [f"The {one} is {first} of the {middle}.", f"The {other} is {second} of the {middle}."]
    facts = [facts[i] for i in random.permutation(2)]
    asks = [
        (f"What is {first} of the {middle}?", one),
        (f"What is {second} of the {middle}?", other),
        (f"What is the {one} {first} of?", middle),
    ]
    question, answer = asks[random.integers(len(asks))]
    return facts, question, answer, PLACES
