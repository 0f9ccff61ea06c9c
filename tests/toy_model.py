"""The smallest model with the interface of a decoder, for tests of what reads and writes."""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hope_jax.models.decoder import Decoder
from hope_jax.modules.continuum import ContinuumConfig, LevelConfig

CONTINUUM = ContinuumConfig(levels=(LevelConfig(hidden=1),))


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    vocabulary: int = 17
    window: int = 8
    width: int = 12
    period: int = 3
    continuum: ContinuumConfig = CONTINUUM


class ToyMemory(NamedTuple):
    state: jax.Array
    held: jax.Array
    position: jax.Array


class Toy(Decoder):
    """A recurrent network whose slow half moves every `period` tokens, so that phase matters.

    `traces` counts how often the class was traced or run.
    """

    traces = 0

    def __init__(self, config: ToyConfig = ToyConfig(), *, seed: int = 0):
        self.config = config
        shapes = {"recur": (config.width,) * 2, "first": (1, config.width)}
        shapes["embed"] = shapes["head"] = config.vocabulary, config.width
        for i, (name, shape) in enumerate(sorted(shapes.items())):
            values = jax.random.normal(jax.random.fold_in(jax.random.key(seed), i), shape)
            setattr(self, name, nnx.Param(0.7 * values))

    @property
    def unembedding(self):
        return self.head[...]

    def initial_memory(self, batch):
        first = jnp.broadcast_to(self.first[...], (batch, self.config.width))
        return ToyMemory(first[None], first[None], jnp.zeros(1, jnp.int32))

    def hidden(self, tokens, memory=None, starts=None):
        Toy.traces += 1
        memory = self.initial_memory(tokens.shape[0]) if memory is None else memory
        starts = jnp.zeros(tokens.shape, bool) if starts is None else starts

        def step(memory, token):
            x, start = token
            state = jnp.where(start[:, None], self.first[...], memory.state[0])
            held = jnp.where(start[:, None], self.first[...], memory.held[0])
            state = jnp.tanh(state @ self.recur[...] + held + x)
            position = memory.position + 1
            held = jnp.where(position % self.config.period == 0, state, held)
            return ToyMemory(state[None], held[None], position), state

        inputs = jnp.swapaxes(self.embed[...][tokens], 0, 1), starts.T
        memory, hidden = jax.lax.scan(step, memory, inputs)
        return jnp.swapaxes(hidden, 0, 1), memory

    def for_steps(self, memory):
        return self, memory

    def after_steps(self, memory):
        return memory

    def __call__(self, tokens, memory=None, starts=None):
        hidden, memory = self.hidden(tokens, memory, starts)
        return hidden @ self.unembedding.T, memory


@cache
def toy() -> Toy:
    return Toy()
