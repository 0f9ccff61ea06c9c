"""What answers behind a prompt cost, and which questions were answered before."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from hope_jax.data.tokenizer import Tokenizer
from hope_jax.evaluation.score import score
from hope_jax.evaluation.subject import TaskError, encode
from hope_jax.models.adapt import repeat
from hope_jax.models.decoder import Decoder, Memory
from hope_jax.shapes import Batch

Question = TypeVar("Question")
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


def known_answers(
    file: Path, kind: Callable[..., Question], fields: Sequence[str]
) -> dict[Question, dict[str, Any]]:
    """What a file of answers knows by question; a line that was cut off is left out.

    Args:
      file: JSON, an object a line, with the fields of a question and what was found.
      kind: Makes a question of its fields.
      fields: Their names.
    """
    known: dict[Question, dict[str, Any]] = {}
    for line in file.read_text("utf-8").splitlines() if file.exists() else []:
        try:
            answer = json.loads(line)
        except ValueError:
            continue
        known[kind(*(answer.pop(name) for name in fields))] = answer
    return known
