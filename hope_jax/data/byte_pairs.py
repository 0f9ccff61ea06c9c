"""Byte-pair encoding by the rules of a published `tokenizer.json`, as newer Llamas have it."""

import json
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, lru_cache
from itertools import groupby, pairwise
from math import inf
from typing import Any

_USUAL = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""How GPT-2 cuts a text, and every file that does not say how."""

_SPACES = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
"""White space of Unicode; Python's own \\s has four separators more."""


class Encoding:
    """Cuts texts into pieces whose bytes were often seen together.

    Patterns cut a text into parts. In each part, the two neighbours that were learned first are
    joined, until none are left that were learned. Tokens that were added to the vocabulary by hand
    are not looked for: a text that spells one is but a text.

    Attributes:
      vocabulary: One more than the largest id.
      special: Ids that stand for no text.
    """

    def __init__(self, data: bytes):
        """Takes the bytes of the file.

        Raises:
          ValueError: They are not of such a file, or of one with other rules than these.
        """
        try:
            about = json.loads(data)
            model = about["model"]
            self._patterns = [re.compile(_python(rule)) for rule in _rules(about)]
            self._ids: dict[str, int] = dict(model["vocab"])
            merges = [tuple(x.split(" ") if isinstance(x, str) else x) for x in model["merges"]]
            added = {token["id"]: token for token in about["added_tokens"]}
            letters = {letter: byte for byte, letter in enumerate(_letters())}
            self._bytes = {
                i: bytes(letters[letter] for letter in token)
                for token, i in self._ids.items()
                if i not in added
            }
        except (AttributeError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise ValueError(f"it describes no byte-pair encoding: {error!r}") from error
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._takes_whole = bool(model.get("ignore_merges"))
        for i, token in added.items():
            self._bytes[i] = b"" if token["special"] else token["content"].encode()
        self.vocabulary = max(self._bytes) + 1
        self.special = {i for i, token in added.items() if token["special"]}
        self._join = lru_cache(1 << 16)(self._joined)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text."""
        parts: Iterable[str] = [text] if text else []
        for pattern in self._patterns:
            parts = [piece for part in parts for piece in _cut(pattern, part)]
        return [i for part in parts for i in self._join(part)]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids; special tokens are silent, broken UTF-8 becomes U+FFFD."""
        return b"".join(self._bytes.get(i, b"") for i in ids).decode("utf-8", errors="replace")

    def _joined(self, part: str) -> tuple[int, ...]:
        pieces = [_letters()[byte] for byte in part.encode("utf-8")]
        if self._takes_whole and "".join(pieces) in self._ids:
            return (self._ids["".join(pieces)],)
        while len(pieces) > 1:
            first = min(pairwise(pieces), key=lambda pair: self._ranks.get(pair, inf))
            if first not in self._ranks:
                break
            before, pieces = pieces, []
            for piece in before:
                if pieces and (pieces[-1], piece) == first:
                    pieces[-1] += piece
                else:
                    pieces.append(piece)
        # A byte that no piece covers has no id: it is left out, as its authors do.
        return tuple(self._ids[piece] for piece in pieces if piece in self._ids)


def _rules(about: dict[str, Any]) -> Iterator[str]:
    """The patterns that cut a text, one after the other.

    Raises:
      ValueError: Something else than these patterns and the merges of bytes is to be done.
    """
    model, cutter = about["model"], about["pre_tokenizer"] or {"type": None}
    refused = "dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"
    odd = [name for name in refused if model.get(name)]
    if model.get("unk_token") and not set(_letters()) <= model["vocab"].keys():
        odd.append("unk_token")
    if model["type"] != "BPE" or odd:
        raise ValueError(f"it must be plain BPE of bytes, got {model['type']} {' '.join(odd)}")
    if about["normalizer"]:
        raise ValueError(f"texts must not be changed, got normalizer {about['normalizer']['type']}")
    steps = cutter["pretokenizers"] if cutter["type"] == "Sequence" else [cutter]
    if steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        raise ValueError("texts must end up as their bytes, without a space in front")
    for step in steps:
        if step["type"] == "Digits":
            yield r"\p{N}" if step["individual_digits"] else r"\p{N}+"
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            pattern = step["pattern"]
            yield pattern["Regex"] if "Regex" in pattern else re.escape(pattern["String"])
        elif step["type"] != "ByteLevel":
            raise ValueError(f"texts must be cut by patterns and digits, got {step['type']}")
        elif step.get("use_regex", True):
            yield _USUAL


def _cut(pattern: re.Pattern[str], text: str) -> Iterator[str]:
    """What a pattern finds, and what lies between."""
    end = 0
    for found in pattern.finditer(text):
        if found.start() > end:
            yield text[end : found.start()]
        if found.end() > found.start():
            yield found[0]
        end = found.end()
    if end < len(text):
        yield text[end:]


def _python(pattern: str) -> str:
    """Spells out the classes of characters that Python's patterns do not know.

    Raises:
      ValueError: It has something that cannot be spelled so.
    """
    out, inside = [], False
    for token in re.findall(r"\\[pP]\{\w+\}|\\.|.", pattern, re.DOTALL):
        if token == r"\S" and not inside:
            out.append(f"[^{_SPACES}]")
        elif token == r"\s" or re.fullmatch(r"\\p\{[A-Z]\}", token):
            members = _SPACES if token == r"\s" else _members(token[3])
            out.append(members if inside else f"[{members}]")
        elif token == r"\S" or token[:2] in (r"\p", r"\P"):
            raise ValueError(f"the pattern {pattern!r} has {token}, which is not known here")
        else:
            inside = (inside or token == "[") and token != "]"
            out.append(token)
    return "".join(out)


@cache
def _members(category: str) -> str:
    """The characters of a category of Unicode, for a class in a pattern."""
    ranges, code = [], 0
    kinds = (unicodedata.category(chr(code))[0] for code in range(sys.maxunicode + 1))
    for kind, group in groupby(kinds):
        count = sum(1 for _ in group)
        if kind == category:
            ranges.append(f"\\U{code:08x}-\\U{code + count - 1:08x}")
        code += count
    return "".join(ranges)


@cache
def _letters() -> Sequence[str]:
    """The letter that stands for each byte: its own if it can be seen, else one above 255."""
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in seen else next(others)) for byte in range(256)]
