"""Text that a model writes, after a prompt or out of nothing."""

from dataclasses import dataclass
from pathlib import Path

import jax

from hope_jax.data.tokenizer import Tokenizer
from hope_jax.evaluation.subject import (
    Results,
    Subject,
    TaskError,
    encode,
    read_text,
    recall,
)
from hope_jax.models.decoder import Decoder
from hope_jax.models.generate import Track, check_sampling, generate


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Continues a prompt, or begins a document where there is none.

    Attributes:
      prompt: What the text begins with.
      prompt_file: A UTF-8 file that holds the prompt instead.
      memory: A file that `read` left: the prompt goes on from there, and begins a document only
        where there is none.
      temperature: See `generate`; 0 takes the likeliest token.
      top_k: Sample among so many likeliest tokens. 0 is no limit.
      top_p: Sample among the likeliest tokens that hold this share of the probability.
      seed: Another seed, another text.
      max_tokens: The most tokens written; a text may end earlier.
      batch: Texts.
    """

    prompt: str | None = None
    prompt_file: str | None = None
    memory: str | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    max_tokens: int = 256
    batch: int = 1

    def __post_init__(self):
        if self.prompt is not None and self.prompt_file is not None:
            raise ValueError("prompt and prompt_file must not both be given")
        if self.prompt == "":
            raise ValueError(_no_token("prompt", ""))
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, got {self.batch}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        check_sampling(self.max_tokens, self.temperature, self.top_k, self.top_p)

    def run(self, subject: Subject) -> Results:
        """Writes; returns the `texts`, prompt included, and how many `tokens` are new."""
        prompt = self._prompt(subject.tokenizer)
        written = self._write(subject.model, subject.tokenizer, prompt, subject.track)
        return {
            "texts": [subject.tokenizer.decode([*prompt, *row]) for row in written],
            "tokens": sum(map(len, written)),
        }

    def text(self, model: Decoder, tokenizer: Tokenizer) -> str:
        """Writes while a model is trained: the first text, prompt included."""
        prompt = self._prompt(tokenizer)
        return tokenizer.decode([*prompt, *self._write(model, tokenizer, prompt)[0]])

    def _prompt(self, tokenizer: Tokenizer) -> list[int]:
        """Returns the prompt's tokens behind the one that begins every document."""
        text, name = self.prompt, "prompt"
        if self.prompt_file is not None:
            text, name = read_text(Path(self.prompt_file)), "prompt_file"
        if text is None:
            return [tokenizer.bos]
        tokens = encode(tokenizer, text, name).tolist()
        if not tokens:
            raise TaskError(_no_token(name, self.prompt_file or text))
        return tokens if self.memory is not None else [tokenizer.bos, *tokens]

    def _write(
        self, model: Decoder, tokenizer: Tokenizer, prompt: list[int], track: Track = iter
    ) -> list[list[int]]:
        return generate(
            model,
            [prompt] * self.batch,
            key=jax.random.key(self.seed),
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            stop=tokenizer.bos,
            vocabulary=tokenizer.vocabulary,
            memory=None if self.memory is None else recall(model, self.memory, self.batch),
            track=track,
        )


def _no_token(name: str, value: str) -> str:
    return (
        f"{name} must hold at least 1 token, got {value!r}: "
        "leave it out to write from the beginning of a document"
    )
