"""The alphabet of the project: one capital letter per axis, and the types made from it.

B batch, T time, D model width, H heads, K key width, V value width, C chunk, N chunks, L layers,
F hidden width of a feed-forward network, P tokens kept from before a call. The same letters stand
in signatures and in einsums.
"""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int

Tokens = Int[Array, "B T"]
Starts = Bool[Array, "B T"]
Activations = Float[Array, "B T D"]
Logits = Float[Array, "B T vocabulary"]


class Batch(NamedTuple):
    """Windows of text, one token longer than what a model reads.

    Attributes:
      tokens: The window; a model reads `tokens[:, :-1]` and predicts `tokens[:, 1:]`.
      starts: True where a token is the first of its document; None where none is told apart.
      weights: How much each target counts in the loss; None where all count the same.
    """

    tokens: Int[Array, "B T+1"]
    starts: Bool[Array, "B T+1"] | None
    weights: Float[Array, "B T"] | None = None

    def shifted(self) -> tuple[Tokens, Starts | None, Tokens]:
        """What a model reads, where documents start in that, and what it predicts."""
        starts = None if self.starts is None else self.starts[:, :-1]
        return self.tokens[:, :-1], starts, self.tokens[:, 1:]
