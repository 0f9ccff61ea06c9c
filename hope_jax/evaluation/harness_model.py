"""A model as the lm-evaluation-harness sees it; the only file that imports it at its head."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int
from lm_eval.api.model import LM

from hope_jax.evaluation.score import place, whole_rows
from hope_jax.evaluation.subject import Subject, encode
from hope_jax.models.generate import generate

LEAST = 64
"""The shortest sequences that are compiled for; longer ones are rounded up to a power of two."""


class Span(NamedTuple):
    """Tokens of which the last are scored.

    Attributes:
      tokens: All of them, behind `bos`.
      scored: How many, from the end.
    """

    tokens: list[int]
    scored: int


class HarnessModel(LM):
    """Answers the requests of the harness; every text begins a document, and nothing is cut off."""

    def __init__(self, subject: Subject, batch: int):
        super().__init__()
        self._subject = subject
        self._batch = batch

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:  # noqa: D102
        return self._score("loglikelihood", requests, [self._span(*one.args) for one in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:  # noqa: D102
        spans = [self._span("", *one.args) for one in requests]
        return self._score("loglikelihood_rolling", requests, spans)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:  # noqa: D102
        said = [""] * len(requests)
        by_settings: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            by_settings.setdefault(repr(request.args[1]), []).append(i)
        for same in by_settings.values():
            same.sort(key=lambda i: len(requests[i].args[0]))
            for start in range(0, len(same), self._batch):
                part = same[start : start + self._batch]
                texts = self._write([requests[i].args[0] for i in part], requests[part[0]].args[1])
                for i, text in zip(part, texts, strict=True):
                    said[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return said

    def _span(self, context: str, text: str) -> Span:
        """The tokens of a context and of what goes on behind it.

        Spaces at the context's end belong to what goes on, since tokenizers put them in front of
        words; both are encoded in one, and what begins in the context belongs to it.
        """
        bare = context.rstrip()
        whole = self._encode(context + text)
        before = len(self._encode(bare)) if bare else 0
        return Span([self._subject.tokenizer.bos, *whole], len(whole) - before)

    def _score(self, kind: str, requests: Sequence[Any], spans: list[Span]) -> list[Any]:
        """The log-likelihood of each span; "loglikelihood" adds whether it would be written.

        Each is kept at once where the harness keeps what it was told.
        """
        order = sorted(range(len(spans)), key=lambda i: len(spans[i].tokens))
        found: list[Any] = [None] * len(spans)
        rows = whole_rows(self._batch)
        starts = range(0, len(order), rows)
        for start in self._subject.track(starts):
            part = order[start : start + rows]
            longest = max(len(spans[i].tokens) for i in part) - 1
            width = max(LEAST, 1 << max(longest - 1, 0).bit_length())
            tokens = np.zeros((rows, width + 1), np.int32)
            scored = np.zeros((rows, width), bool)
            for row, i in enumerate(part):
                size = len(spans[i].tokens)
                tokens[row, :size] = spans[i].tokens
                scored[row, size - 1 - spans[i].scored : size - 1] = True
            nats, greedy = self._judge(tokens, scored)
            for row, i in enumerate(part):
                likelihood = -float(nats[row])
                found[i] = (
                    (likelihood, bool(greedy[row])) if kind == "loglikelihood" else likelihood
                )
                self.cache_hook.add_partial(kind, requests[i].args, found[i])
        return found

    def _judge(self, tokens: np.ndarray, scored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        graphdef, params = nnx.split(self._subject.model, nnx.Param)
        known = self._subject.tokenizer.vocabulary
        nats, right = _judge(graphdef, nnx.to_pure_dict(params), *place((tokens, scored)), known)
        return np.asarray(nats), np.asarray(right)

    def _write(self, contexts: list[str], settings: dict[str, Any]) -> list[str]:
        """Goes on behind each context, up to the first of the texts that end it."""
        tokenizer = self._subject.tokenizer
        ends = settings.get("until") or []
        ends = [ends] if isinstance(ends, str) else list(ends)
        sampled = settings.get("do_sample", False)
        written = generate(
            self._subject.model,
            [[tokenizer.bos, *self._encode(context)] for context in contexts],
            key=jax.random.key(0),
            max_tokens=int(settings.get("max_gen_toks", 256)),
            temperature=float(settings.get("temperature", 1.0)) if sampled else 0.0,
            top_p=float(settings.get("top_p", 1.0)),
            stop=tokenizer.bos,
            vocabulary=tokenizer.vocabulary,
        )
        return [_until(tokenizer.decode(tokens), ends) for tokens in written]

    def _encode(self, text: str) -> list[int]:
        return encode(self._subject.tokenizer, text, "a text of the harness").tolist()


@partial(jax.jit, static_argnames="graphdef")
def _judge(
    graphdef: nnx.GraphDef,
    params: dict,
    tokens: Int[Array, "B _longer"],
    scored: Bool[Array, "B T"],
    known: int | Int[Array, ""],
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """Nats of the scored targets of each row, and whether each of them is the likeliest token."""
    model = nnx.merge(graphdef, params)
    hidden, _ = model.hidden(tokens[:, :-1])
    table = model.unembedding.astype(hidden.dtype)
    allowed = jnp.arange(len(table)) < known

    def step(sums, part):  # a few places at once: all their logits fit
        hidden, targets, scored = part
        logits = jnp.einsum("BCD,ND->BCN", hidden, table, preferred_element_type=jnp.float32)
        own = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        nats = jax.nn.logsumexp(logits, axis=-1) - own
        right = jnp.argmax(jnp.where(allowed, logits, -jnp.inf), -1) == targets
        total, greedy = sums
        return (total + jnp.sum(nats * scored, 1), greedy & jnp.all(right | ~scored, 1)), None

    def cut(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(len(x), -1, LEAST, *x.shape[2:]), 1, 0)

    start = jnp.zeros(len(tokens)), jnp.ones(len(tokens), bool)
    return jax.lax.scan(step, start, (cut(hidden), cut(tokens[:, 1:]), cut(scored)))[0]


def _until(text: str, ends: Iterable[str]) -> str:
    """Cuts a text before the first of `ends`."""
    places = [text.find(end) for end in ends if end]
    return text[: min((place for place in places if place >= 0), default=len(text))]
