"""The language model: every kind is this tower around another sequence layer."""

from dataclasses import dataclass
from functools import partial
from operator import itemgetter
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
from hope_jax.ops.continuum import KEPT
from hope_jax.ops.fused import READ
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


def _is_product(primitive: Any, *operands: Any, **parameters: Any) -> bool:
    if primitive.name == "dot_product_attention_fwd_wrapper":  # cuDNN's attention
        return True
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(
        primitive, *operands, **parameters
    )


_names = jax.checkpoint_policies.save_only_these_names
REMAT = {
    "dots": jax.checkpoint_policies.save_from_both_policies(_is_product, _names(KEPT, READ)),
    "full": _names(KEPT),
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
      remat: What the backward pass computes again: "none", all but matrix products and kernels of
        sequence layers ("dots"), or "full" (everything but the blocks' inputs). Neither goes from
        chunk to chunk again in levels that learn in context: for each its answers are kept, and up
        to twice as much of what it learned.
      unroll: Whether layers are compiled one by one rather than as a loop. A GPU then need not copy
        what is kept for the backward pass into and out of stacks, a tenth of a training step, nor
        memories when text is written; to compile takes longer, and memories that text is written
        with are there twice.
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
    unroll: bool = False

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
        x, normed = self.norm.beside(x)
        y, mixer = self.mixer(normed, mixer, starts)
        y = constrain(y, ("batch", "time", "embed_out"))
        x, continuum = self.continuum(x, continuum, starts, before=y)
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
        self.blocks: Any = jax.vmap(lambda one: Block(config, key=one))(
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
        if x.shape[1] == 1 and memory is not None:
            return self._step(x, memory, starts)

        def layer(x, block_and_memory):
            block, memory = block_and_memory
            return block(x, memory, starts)

        # A policy that saves all would also save what ops mean to compute again.
        remat, unroll = self.config.remat, self.config.unroll
        if remat != "none":
            # In a loop the forward pass is out of the compiler's sight. Outside of one it may take
            # from there what costs it nothing, but for "full" that would be everything.
            barrier = unroll and remat == "full"
            layer = jax.checkpoint(layer, policy=REMAT[remat], prevent_cse=barrier)
        x, memory = jax.lax.scan(layer, x, (self.blocks, memory), unroll=unroll)
        return self.norm(x), memory

    def _step(
        self, x: Float[Array, "B 1 D"], memory: Memory, starts: Starts | None
    ) -> tuple[Float[Array, "B 1 D"], Memory]:
        """`tower` for one token, whose cost is memory: each layer's is changed where it lies."""
        if isinstance(memory, list):
            after = []
            for block, own in zip(self.blocks, memory, strict=True):
                x, own = block(x, own, starts)
                after.append(own)
            return self.norm(x), after

        def layer(x_and_memory, block_and_index):
            (x, memory), (block, index) = x_and_memory, block_and_index
            own = jax.tree.map(
                lambda stack: jax.lax.dynamic_index_in_dim(stack, index, keepdims=False), memory
            )
            x, own = block(x, own, starts)
            put = partial(jax.lax.dynamic_update_index_in_dim, index=index, axis=0)
            return (x, jax.tree.map(put, memory, own)), None

        layers = self.blocks, jnp.arange(self.config.layers)
        (x, memory), _ = jax.lax.scan(layer, (x, memory), layers, unroll=self.config.unroll)
        return self.norm(x), memory

    def for_steps(self, memory: Memory) -> tuple["Decoder", Memory]:
        """Lays this model and a memory out for many calls with one token each, which say the same.

        Matrices and tables are rounded once, as every product with them would. Where layers are
        unrolled they lie apart, and so do their memories: of a stack each call would copy them.
        """
        graphdef, params = nnx.split(self, nnx.Param)
        dtype = jnp.dtype(self.config.dtype)

        def rounded(leaf):
            product = leaf.get_metadata("role") in ("matrix", "embedding")
            return leaf.replace(leaf[...].astype(dtype)) if product else leaf

        params = jax.tree.map(rounded, params, is_leaf=lambda x: isinstance(x, nnx.Variable))
        model = nnx.merge(graphdef, params)
        if not self.config.unroll:
            return model, memory

        def layers(stacks):
            return [jax.tree.map(itemgetter(i), stacks) for i in range(self.config.layers)]

        blocks = layers(model.blocks)
        model.blocks = nnx.List(blocks)
        return model, layers(memory)

    def after_steps(self, memory: Memory) -> Memory:
        """The memory that other calls take, of one that `for_steps` has laid out."""
        return jax.tree.map(lambda *own: jnp.stack(own), *memory) if self.config.unroll else memory

    def __call__(
        self, tokens: Tokens, memory: Memory = None, starts: Starts | None = None
    ) -> tuple[Logits, Memory]:
        """Returns float32 logits of the next tokens, and the memory to go on with."""
        hidden, memory = self.hidden(tokens, memory, starts)
        table = self.unembedding.astype(hidden.dtype)
        accumulate = jnp.promote_types(hidden.dtype, jnp.float32)
        logits = jnp.einsum("BTD,ND->BTN", hidden, table, preferred_element_type=accumulate)
        return logits, memory
