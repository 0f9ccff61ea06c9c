"""Text that a model reads and learns from, and the memory of it in a file."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from hope_jax.evaluation.subject import Results, Subject, TaskError, encode, read_text
from hope_jax.models.adapt import norms, read
from hope_jax.models.memory_file import load_memory, save_memory


@dataclass(frozen=True, kw_only=True)
class Read:
    """Reads a text file, and writes what the model made of it to a file that other tasks take.

    Attributes:
      file: A UTF-8 text.
      out: The memory's file, say memory.safetensors; one that is there is replaced.
      memory: Such a file to go on from; without one the text begins a document.
    """

    file: str | None = None
    out: str | None = None
    memory: str | None = None

    def run(self, subject: Subject) -> Results:
        """Reads; returns `tokens`, and the length of each level's deltas, as a mean over layers."""
        if self.file is None or self.out is None:
            raise TaskError(f"file and out must be given, got file={self.file} out={self.out}")
        if not Path(self.out).parent.is_dir():
            raise TaskError(f"out must lie in a folder that is there, got {self.out!r}")
        model = subject.model
        tokens = text_tokens(subject, self.file, begin=self.memory is None)
        try:
            before = None if self.memory is None else load_memory(self.memory, model)
        except ValueError as error:
            raise TaskError(str(error)) from error
        memory = read(model, tokens, before, track=subject.track)
        save_memory(self.out, model, memory)
        lengths = {f"level_{index}": float(norm.mean()) for index, norm in norms(memory).items()}
        return {"tokens": tokens.shape[1], **lengths}


def text_tokens(subject: Subject, file: str, *, begin: bool) -> Int[np.ndarray, "1 T"]:
    """The tokens of a text file, behind the one that begins a document if `begin`.

    Raises:
      TaskError: The file cannot be read, or holds no token.
    """
    tokens = encode(subject.tokenizer, read_text(Path(file)), file)
    if not len(tokens):
        raise TaskError(f"a text must hold at least 1 token, {file} holds 0")
    first = [subject.tokenizer.bos] if begin else []
    return np.concatenate([first, tokens]).astype(np.int32)[None]
