"""What answers behind a prompt cost, and which questions were answered before."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from hope_jax.data.tokenizer import Tokenizer
from hope_jax.evaluation.score import score
from hope_jax.evaluation.subject import Subject, TaskError, encode
from hope_jax.models.adapt import repeat
from hope_jax.models.decoder import Decoder, Memory
from hope_jax.models.memory_file import fingerprint
from hope_jax.shapes import Batch

Question = TypeVar("Question", bound=Any)  # a named tuple
Answer = dict[str, Any]
LEAST = 16
"""The shortest rows that are compiled for; longer ones are rounded up to a power of two."""


def behind(tokenizer: Tokenizer, question: str, answer: str) -> list[int]:
    """The tokens of an answer as they stand behind a question and a space.

    Raises:
      TaskError: The tokenizer joins the answer with the question.
    """
    before = encode(tokenizer, question, "the question").tolist()
    after = encode(tokenizer, f"{question} {answer}", "the answer").tolist()
    if after[: len(before)] != before:
        raise TaskError(f"the tokenizer must not join words, got one that joins {answer!r}")
    return after[len(before) :]


def costs(
    model: Decoder, prompt: Sequence[int], answers: Sequence[Sequence[int]], memory: Memory
) -> Float[np.ndarray, " N"]:
    """The nats of each answer.

    Args:
      model: The model.
      prompt: What stands before each, at least a token.
      answers: Tokens.
      memory: What was read before the prompt, as one sequence.
    """
    longest = len(prompt) - 1 + max(map(len, answers))
    width = max(LEAST, 1 << (longest - 1).bit_length())
    tokens = np.zeros((len(answers), width + 1), np.int32)
    weights = np.zeros((len(answers), width))
    for row, answer in enumerate(answers):
        end = len(prompt) + len(answer)
        tokens[row, :end] = [*prompt, *answer]
        weights[row, len(prompt) - 1 : end - 1] = 1
    batch = Batch(jnp.asarray(tokens), jnp.zeros(tokens.shape, bool))
    own = jax.tree.map(jnp.copy, memory)  # scoring gives it away
    losses, _ = score(model, batch, repeat(own, len(answers)))
    return np.sum(np.asarray(losses, np.float64) * weights, axis=1)


def digest(model: Decoder, settings: Mapping[str, Any]) -> str:
    """A short name for a model and what it is asked, as JSON has it."""
    text = json.dumps([fingerprint(model), settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def ask_each(
    subject: Subject, file: Path, questions: Sequence[Question], ask: Callable[[Question], Answer]
) -> dict[Question, Answer]:
    """Asks questions, and adds each with its answer to a file at once, as an object a line.

    Args:
      subject: Shows how many are answered.
      file: Made where it is missing.
      questions: Named tuples.
      ask: Finds what can be said by name.
    """
    found: dict[Question, Answer] = {}
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        for one in subject.track(questions):
            found[one] = ask(one)
            lines.write(json.dumps({**one._asdict(), **found[one]}) + "\n")
            lines.flush()
    return found


def known_answers(file: Path, kind: type[Question]) -> dict[Question, Answer]:
    """What `ask_each` left in a file; a line that was cut off is left out."""
    known: dict[Question, Answer] = {}
    for line in file.read_text("utf-8").splitlines() if file.exists() else []:
        try:
            answer = json.loads(line)
        except ValueError:
            continue
        known[kind(*(answer.pop(name) for name in kind._fields))] = answer
    return known
