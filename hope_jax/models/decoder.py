"""The language model: every kind is this tower around another sequence layer."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from hope_jax.modules.attention import AttentionConfig
from hope_jax.modules.continuum import ContinuumConfig, ContinuumMemory
from hope_jax.modules.layers import Embedding, RMSNorm, learn_by
from hope_jax.modules.memory import AssociativeConfig
from hope_jax.modules.nonparametric import NonparametricConfig
from hope_jax.modules.self_reference import SelfModifyingTitansConfig
from hope_jax.modules.titans import TitansConfig
from hope_jax.shapes import Activations, Logits, Starts, Tokens
from hope_jax.sharding import constrain

MixerConfig = (
    SelfModifyingTitansConfig
    | AttentionConfig
    | TitansConfig
    | AssociativeConfig
    | NonparametricConfig
)
Memory = Any  # a pytree: `BlockMemory` with the layers stacked in front

REMAT = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A tower of `layers` blocks, each a sequence layer and a continuum of feed-forward memories.

    HOPE has the mixer `self_modifying_titans`, Hope-Attention and Transformer++ `attention`, the
    Titans baseline `titans`, Gated DeltaNet and FastKV-HOPE `associative`.

    Attributes:
      mixer: The sequence layer.
      continuum: The feed-forward memories.
      width: Features of the residual stream.
      layers: Blocks.
      vocabulary: Token ids; None takes the tokenizer's.
      tie: Whether the embedding also scores the next token.
      norm_epsilon: What the norms of the residual stream add to its mean square.
      dtype: What activations are computed in; parameters and memories are float32.
      objective: What the weights of dense layers learn by: "dot" is the loss, "l2" makes the
        optimizer "dgd" delta gradient descent, "huber" goes with "ggd"; see `hope_jax.ops.linear`.
        All tokens of a batch count alike in it.
      remat: What the backward pass computes again: "none", all but matrix products ("dots"), or
        "full" (everything but the blocks' inputs).
    """

    mixer: MixerConfig
    continuum: ContinuumConfig
    width: int = 128
    layers: int = 2
    vocabulary: int | None = None
    tie: bool = True
    norm_epsilon: float = 1e-6
    objective: Literal["dot", "l2", "huber"] = "dot"
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "full"] = "none"

    def __post_init__(self):
        for name in ("width", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.norm_epsilon <= 0:
            raise ValueError(f"norm_epsilon must be above 0, got {self.norm_epsilon}")
        if self.vocabulary is not None and self.vocabulary < 1:
            raise ValueError(f"vocabulary must be at least 1, got {self.vocabulary}")
        if getattr(self.mixer, "head_width", None) is None and self.width % self.mixer.heads:
            raise ValueError(f"mixer.heads must divide width={self.width}, got {self.mixer.heads}")

    def build(self, *, seed: int | Int[Array, ""] = 0) -> "Decoder":
        """Makes the model; equal seeds make equal models.

        Raises:
          ValueError: The vocabulary is not known yet.
        """
        self.known_vocabulary()
        # Compiled, for hundreds of small arrays are made one after another.
        return jax.jit(partial(Decoder, self))(key=jax.random.key(seed))

    def known_vocabulary(self) -> int:
        """Returns the vocabulary; raises ValueError where it was left to a tokenizer."""
        if self.vocabulary is None:
            raise ValueError("vocabulary must be set before a model can be built, got null")
        return self.vocabulary

    def parameters(self) -> int:
        """Counts the parameters without allocating any."""
        model = jax.eval_shape(partial(self.build, seed=0))
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.split(model, nnx.Param)[1]))

    def flops_per_token(self, context: int) -> float:
        """FLOPs of a forward pass for each token of a sequence of `context` tokens.

        Two for each parameter that a token meets in a matrix product, and what sequence layer and
        continuum do with fast weights. A training step costs three times that; what
        rematerialisation repeats is not counted.
        """
        table = self.known_vocabulary() * self.width
        products = self.parameters() - (0 if self.tie else table)
        fast = self.mixer.flops(self.width, context) + self.continuum.flops(self.width)
        return 2 * products + self.layers * fast


class BlockMemory(NamedTuple):
    """What a block carries from call to call.

    Attributes:
      mixer: The sequence layer's memory.
      continuum: One entry for each level, None for those that learn nothing in context.
    """

    mixer: Any
    continuum: tuple[Any, ...]


class Block(nnx.Module):
    """A sequence layer and a continuum of feed-forward memories, both residual."""

    def __init__(self, config: ModelConfig, *, key: PRNGKeyArray):
        mixer, continuum = jax.random.split(key)
        self.norm = RMSNorm(config.width, epsilon=config.norm_epsilon)
        self.mixer = config.mixer.build(config.width, depth=config.layers, key=mixer)
        self.continuum: ContinuumMemory = config.continuum.build(
            config.width, depth=config.layers, epsilon=config.norm_epsilon, key=continuum
        )

    def initial_memory(self, batch: int, dtype: jnp.dtype) -> BlockMemory:
        """What `memory=None` means."""
        return BlockMemory(
            self.mixer.initial_memory(batch, dtype), self.continuum.initial_memory(batch, dtype)
        )

    def __call__(
        self, x: Activations, memory: BlockMemory | None = None, starts: Starts | None = None
    ) -> tuple[Activations, BlockMemory]:
        """Returns the residual stream after the block, and what its memories carry on."""
        mixer, continuum = (None, None) if memory is None else memory
        y, mixer = self.mixer(self.norm(x), mixer, starts)
        x = constrain(x + y, ("batch", "time", "embed_out"))
        x, continuum = self.continuum(x, continuum, starts)
        return x, BlockMemory(mixer, continuum)


class Decoder(nnx.Module):
    """A causal language model that carries its memories from call to call.

    Training, evaluation, streaming and decoding are this one function.
    """

    def __init__(self, config: ModelConfig, *, key: PRNGKeyArray):
        self.config = config
        embed, blocks, head = jax.random.split(key, 3)
        ids = config.known_vocabulary()
        self.embedding = Embedding(ids, config.width, key=embed)
        # One block with every parameter stacked over the layers: compile time is flat in depth.
        self.blocks = jax.vmap(lambda one: Block(config, key=one))(
            jax.random.split(blocks, config.layers)
        )
        learn_by(self.blocks, config.objective)
        self.norm = RMSNorm(config.width, epsilon=config.norm_epsilon)
        if not config.tie:
            self.head = Embedding(ids, config.width, key=head)

    @property
    def unembedding(self) -> Float[Array, "vocabulary D"]:
        """The matrix that scores the next token."""
        return (self.embedding if self.config.tie else self.head).table[...]

    def initial_memory(self, batch: int) -> Memory:
        """What `memory=None` means, as values: leaves `[layers, B, ...]` or `[layers]`."""
        dtype = jnp.dtype(self.config.dtype)
        return jax.vmap(lambda block: block.initial_memory(batch, dtype))(self.blocks)

    def hidden(
        self, tokens: Tokens, memory: Memory = None, starts: Starts | None = None
    ) -> tuple[Activations, Memory]:
        """Returns the vectors that score the next tokens, and the memory to go on with.

        Args:
          tokens: Ids below the vocabulary.
          memory: What an earlier call returned; None where nothing was read before.
          starts: True where a document begins. Nothing before it is seen after it.
        """
        return self.tower(self.embedding(tokens, jnp.dtype(self.config.dtype)), memory, starts)

    def tower(
        self, x: Activations, memory: Memory = None, starts: Starts | None = None
    ) -> tuple[Activations, Memory]:
        """`hidden` from the embedded tokens on."""

        def layer(x, block_and_memory):
            block, memory = block_and_memory
            return block(x, memory, starts)

        # A policy that saves all would also save what ops mean to compute again.
        if self.config.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT[self.config.remat], prevent_cse=False)
        x, memory = jax.lax.scan(layer, x, (self.blocks, memory))
        return self.norm(x), memory

    def __call__(
        self, tokens: Tokens, memory: Memory = None, starts: Starts | None = None
    ) -> tuple[Logits, Memory]:
        """Returns float32 logits of the next tokens, and the memory to go on with."""
        hidden, memory = self.hidden(tokens, memory, starts)
        table = self.unembedding.astype(hidden.dtype)
        accumulate = jnp.promote_types(hidden.dtype, jnp.float32)
        logits = jnp.einsum("BTD,ND->BTN", hidden, table, preferred_element_type=accumulate)
        return logits, memory
