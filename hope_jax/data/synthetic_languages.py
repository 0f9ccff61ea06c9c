"""Made-up languages with a grammar and a dictionary, their manuals, and sentences to translate."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

NOUNS = ("dog", "cat", "child", "farmer", "king", "teacher", "horse", "bird", "fish", "tree")
NOUNS += ("house", "river", "stone", "boat", "apple", "book", "door", "knife", "song", "fire")
VERBS = ("see", "find", "follow", "carry", "love", "fear", "paint", "lift", "guard", "visit")
ADJECTIVES = ("big", "small", "old", "young", "red", "green", "quick", "quiet", "good", "cold")
PLURALS = {"child": "children", "fish": "fish", "knife": "knives"}
PASTS = {
    "see": "saw",
    "find": "found",
    "carry": "carried",
    "love": "loved",
    "guard": "guarded",
    "fear": "feared",
}
ORDERS = ("SVO", "SOV", "VSO", "VOS", "OSV", "OVS")
NAMES = {"S": "subject", "V": "verb", "O": "object"}

Order = Literal["SVO", "SOV", "VSO", "VOS", "OSV", "OVS"]


class Phrase(NamedTuple):
    """Who does something, or whom it is done to.

    Attributes:
      noun: In English.
      adjective: In English, or "".
      plural: Whether there are several.
    """

    noun: str
    adjective: str
    plural: bool


class Sentence(NamedTuple):
    """What is said in any language.

    Attributes:
      subject: Who does it.
      verb: What, in English.
      past: Whether it is over.
      object: To whom.
    """

    subject: Phrase
    verb: str
    past: bool
    object: Phrase

    def english(self) -> str:
        """The sentence in English."""
        verb = self.verb
        if self.past:
            verb = PASTS.get(verb, f"{verb}ed")
        elif not self.subject.plural:
            verb = f"{verb[:-1]}ies" if verb == "carry" else f"{verb}s"
        return f"{_english(self.subject)} {verb} {_english(self.object)}".capitalize() + "."


@dataclass(frozen=True, kw_only=True)
class Language:
    """A language.

    Attributes:
      name: Of its own making.
      words: Of each English word.
      order: Of subject, verb and object.
      adjective_first: Whether an adjective stands before its noun.
      plural: The ending of several.
      past: The ending of what is over.
      object: The ending of whom something is done to.
    """

    name: str
    words: dict[str, str]
    order: Order
    adjective_first: bool
    plural: str
    past: str
    object: str

    def say(self, sentence: Sentence) -> str:
        """The sentence in this language."""
        parts = {
            "S": self._phrase(sentence.subject, ""),
            "V": self.words[sentence.verb] + self.past * sentence.past,
            "O": self._phrase(sentence.object, self.object),
        }
        return " ".join(parts[one] for one in self.order).capitalize() + "."

    def manual(self, examples: list[Sentence]) -> str:
        """All there is to know, with some examples."""
        order = ", then the ".join(NAMES[one] for one in self.order)
        place = "before" if self.adjective_first else "after"
        lines = [
            f"A manual of {self.name}.",
            f"{self.name} has no articles. First comes the {order}.",
            f"An adjective stands {place} its noun.",
            f"The ending -{self.plural} on a noun means that there are several.",
            f"The ending -{self.object} on a noun, after that of several, marks the object.",
            f"The ending -{self.past} on a verb means the past.",
            f"A dictionary of {self.name}:",
            *(f"{word} = {english}" for english, word in self.words.items()),
            f"Examples of {self.name}:",
            *(self.question(one) + f" {one.english()}" for one in examples),
        ]
        return "\n".join(lines)

    def question(self, sentence: Sentence) -> str:
        """Asks for a translation."""
        return f"{self.name}: {self.say(sentence)} English:"

    def _phrase(self, phrase: Phrase, ending: str) -> str:
        noun = self.words[phrase.noun] + self.plural * phrase.plural + ending
        if not phrase.adjective:
            return noun
        adjective = self.words[phrase.adjective]
        return f"{adjective} {noun}" if self.adjective_first else f"{noun} {adjective}"


def make_language(random: np.random.Generator) -> Language:
    """Makes a language; no two words are the same, and no ending begins or is another."""
    used: set[str] = set()

    def word(syllables: int) -> str:
        while (made := "".join(_syllable(random) for _ in range(syllables))) in used:
            pass
        used.add(made)
        return made

    endings = random.permutation(["ka", "lo", "mi", "nu", "pe", "ro", "su", "ti"])[:3].tolist()
    return Language(
        name=word(3).capitalize(),
        words={one: word(2) for one in (*NOUNS, *VERBS, *ADJECTIVES)},
        order=ORDERS[random.integers(len(ORDERS))],
        adjective_first=bool(random.integers(2)),
        plural=endings[0],
        past=endings[1],
        object=endings[2],
    )


def make_sentence(random: np.random.Generator) -> Sentence:
    """Draws something to say."""

    def phrase() -> Phrase:
        adjective = ADJECTIVES[random.integers(len(ADJECTIVES))] if random.integers(2) else ""
        return Phrase(NOUNS[random.integers(len(NOUNS))], adjective, bool(random.integers(2)))

    verb = VERBS[random.integers(len(VERBS))]
    return Sentence(phrase(), verb, bool(random.integers(2)), phrase())


def _english(phrase: Phrase) -> str:
    noun = phrase.noun
    if phrase.plural:
        noun = PLURALS.get(noun, f"{noun}s")
    return f"the {phrase.adjective} {noun}" if phrase.adjective else f"the {noun}"


def _syllable(random: np.random.Generator) -> str:
    return "bdfghjvwz"[random.integers(9)] + "aeiou"[random.integers(5)] + "nrs"[random.integers(3)]
