"""The Continuum Memory System: a chain of feed-forward memories, each with its own pace."""

from dataclasses import dataclass
from itertools import pairwise
from math import log, sqrt
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PRNGKeyArray

from hope_jax.modules.layers import RMSNorm, dense, normal, parameter
from hope_jax.ops.continuum import (
    ACTIVATIONS,
    KEPT,
    Activation,
    LevelMemory,
    Matrices,
    Pace,
    continuum_level,
    fresh_level,
    held_level,
)
from hope_jax.ops.gated import hidden_units
from hope_jax.ops.leaky import leaky_average
from hope_jax.ops.linear import dense_beside
from hope_jax.ops.norm import add_norm
from hope_jax.shapes import Activations, Starts
from hope_jax.sharding import constrain

CHAINED = ("sequential", "nested")
LEAKY = ("leaky", "flow")
"""Variants whose levels read what the one before added, and those with averages for a memory."""

RATIO = 4
"""How much slower each level of a spread is than the one before."""

PRESETS: dict[str, dict[str, float]] = {
    "balanced": {"rate": 0.5, "retain": 0.98, "momentum": 0.0},
    "fast_adapt": {"rate": 0.95, "retain": 0.9, "momentum": 0.0},
    "high_retention": {"rate": 0.5, "retain": 0.998, "momentum": 0.8},
}
"""How levels move at first: half a step and half of it kept for 34 chunks; nearly whole steps, half
kept for 7; half steps smoothed over 5 chunks, half kept for 346."""


@dataclass(frozen=True, kw_only=True)
class LevelConfig:
    """One level: `W1 s(W2 x)`, or `W1 (s(W2 x) * W3 x)` where it is gated.

    Attributes:
      hidden: Hidden units of each layer.
      activation: s.
      gated: Whether a second projection multiplies the first hidden units (SwiGLU with silu).
      depth: Hidden layers.
      rank: Of what each token adds to the last matrix for itself, `W1 + sum_r u_r(x) v_r(x)^T`, a
        self-modifying MLP; 0 for nothing.
      chunk: Tokens between two moves of the level inside a sequence; None for a level that learns
        nothing there, and whose weights the outer optimizer alone moves.
      rate: The share of a chunk's whole step that the level takes at first (learned, below 1); with
        the objective "next_token" the step along the mean gradient, which is not learned.
      retain: What survives of its deltas at a move, at first.
      momentum: What survives of its momentum at a move, at first; 0 for none.
    """

    hidden: int
    activation: Activation = "silu"
    gated: bool = False
    depth: int = 1
    rank: int = 0
    chunk: int | None = None
    rate: float = 0.5
    retain: float = 0.98
    momentum: float = 0.0

    def __post_init__(self):
        for name in ("hidden", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.rank < 0:
            raise ValueError(f"rank must be at least 0, got {self.rank}")
        if self.chunk is not None and self.chunk < 2:
            raise ValueError(f"chunk must be at least 2, or null for none, got {self.chunk}")
        if self.rank and self.chunk is not None:
            raise ValueError(f"rank must be 0 for a level that learns in chunks, got {self.rank}")
        if not self.rate > 0:
            raise ValueError(f"rate must be above 0, got {self.rate}")
        if not 0 < self.retain < 1:
            raise ValueError(f"retain must lie between 0 and 1, got {self.retain}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {self.momentum}")


@dataclass(frozen=True, kw_only=True)
class SpreadConfig:
    """Shorthand for levels of one size, each `RATIO` times as slow as the one before.

    Attributes:
      levels: How many.
      lowest_frequency: Tokens between two moves of the slowest.
      hidden: Hidden units of each.
      gated: Whether they are, see `LevelConfig`.
      preset: How they move, one of `PRESETS`.
    """

    levels: int
    lowest_frequency: int
    hidden: int
    gated: bool = False
    preset: Literal["balanced", "fast_adapt", "high_retention"] = "balanced"

    def __post_init__(self):
        if self.levels < 1:
            raise ValueError(f"levels must be at least 1, got {self.levels}")
        fastest = RATIO ** (self.levels - 1)
        if self.lowest_frequency % fastest or self.lowest_frequency < 2 * fastest:
            raise ValueError(
                f"lowest_frequency must be a multiple of {fastest}, at least twice that, for "
                f"{self.levels} levels, got {self.lowest_frequency}"
            )

    def build(self) -> tuple[LevelConfig, ...]:
        """Makes the levels, fastest first."""
        slower = range(self.levels - 1, -1, -1)
        chunks = [self.lowest_frequency // RATIO**steps for steps in slower]
        return tuple(
            LevelConfig(
                hidden=self.hidden,
                gated=self.gated,
                chunk=chunk,
                rate=PRESETS[self.preset]["rate"],
                retain=PRESETS[self.preset]["retain"],
                momentum=PRESETS[self.preset]["momentum"],
            )
            for chunk in chunks
        )


@dataclass(frozen=True, kw_only=True)
class ContinuumConfig:
    """Levels, fastest first.

    Attributes:
      variant: "sequential" chains the levels (eqs. 70, 73); "nested" chains them too, and each
        level carries the deltas that the one before it begins with after each of its chunks
        (eq. 72); "independent" lets each read the same input and sums what they say with learned
        softmax weights (eq. 74); "headwise" does so with a share of the features for each;
        "leaky" averages what each says over its last `chunk` tokens or so, with learned leaks,
        before they are summed; "flow" does too, and each level reads the average of the one before,
        so that ever longer contexts flow into ever slower levels. Levels of these two learn nothing
        in context.
      levels: At least one. One level is the feed-forward network of a transformer.
      spread: Makes the levels where they are not named: `{levels: 4, lowest_frequency: 4096,
        hidden: 512}` moves four of them every 64, 256, 1024 and 4096 tokens.
      objective: What levels with a chunk learn in context: "local", to say at each token a learned
        view of what the continuum reads at the next, inside every call of the model; "next_token",
        to lower the model's own loss, which `hope_jax.read` does (see `models.adapt`).
      adapt: Which matrices of a level move in context: its "output" alone, which costs half the
        memory and no second pass through the level, or "all".
      dgd: Whether moves are those of delta gradient descent.
      surprise: The root mean square error below which a level writes nothing; with "next_token" the
        root of the mean loss.
      replay: Chunks that a reading with "next_token" stores to learn them again; 0 for none.
      replay_ratio: Their share of a gradient.
      replay_steps: How many of them are learned again with each new chunk.
    """

    variant: Literal["sequential", "nested", "independent", "headwise", "leaky", "flow"] = (
        "sequential"
    )
    levels: tuple[LevelConfig, ...] = ()
    spread: SpreadConfig | None = None
    objective: Literal["local", "next_token"] = "local"
    adapt: Literal["output", "all"] = "output"
    dgd: bool = False
    surprise: float = 0.0
    replay: int = 0
    replay_ratio: float = 0.5
    replay_steps: int = 1

    def __post_init__(self):
        if self.spread is not None:
            if self.levels:
                raise ValueError("levels and spread must not both be given")
            object.__setattr__(self, "levels", self.spread.build())
            object.__setattr__(self, "spread", None)
        if not self.levels:
            raise ValueError("levels must name at least one level, got none")
        if self.surprise < 0:
            raise ValueError(f"surprise must be at least 0, got {self.surprise}")
        self._check_replay()
        chunks = [level.chunk for level in self.levels]
        if self.variant in ("nested", *LEAKY) and None in chunks:
            raise ValueError(f"every level must have a chunk in a {self.variant} continuum")
        if self.variant == "nested":
            _check_nesting([chunk for chunk in chunks if chunk is not None])
        if self.objective == "local":
            for level in self.levels:
                if level.rate >= 1:
                    raise ValueError(f"rate must be below 1, got {level.rate}")
        elif self.variant == "nested" or self.dgd:
            raise ValueError("objective must be local for a nested continuum or dgd")
        else:
            _check_multiples([chunk for chunk in chunks if chunk is not None])

    def _check_replay(self):
        if self.replay < 0 or self.replay_steps < 1:
            raise ValueError(
                "replay must be at least 0 and replay_steps at least 1, got "
                f"{self.replay} and {self.replay_steps}"
            )
        if not 0 <= self.replay_ratio <= 1:
            raise ValueError(f"replay_ratio must lie in [0, 1], got {self.replay_ratio}")
        if self.replay and self.objective == "local":
            raise ValueError("replay must come with objective next_token, got local")

    def build(
        self, width: int, *, depth: int, epsilon: float, key: PRNGKeyArray
    ) -> "ContinuumMemory":
        """Makes the layer for a model of `width` and `depth` layers; `epsilon` is its norms'.

        Raises:
          ValueError: The features cannot be shared out between the levels.
        """
        if self.variant == "headwise" and width % len(self.levels):
            raise ValueError(
                f"the number of levels must divide width={width} in a headwise continuum, "
                f"got {len(self.levels)}"
            )
        return ContinuumMemory(self, width, depth=depth, epsilon=epsilon, key=key)

    def learns(self) -> bool:
        """Whether some level moves inside a sequence."""
        return self.variant not in LEAKY and any(level.chunk for level in self.levels)

    def flops(self, width: int) -> float:
        """FLOPs a token of a forward pass beside two for each parameter: reading and moving deltas.

        Two for a delta's part in the answer and two for its gradient; where all matrices move,
        four more for the way back through each but the first layer.
        """
        if not self.learns():
            return 0
        width = width // len(self.levels) if self.variant == "headwise" else width
        total = 0
        for level in self.levels:
            first = (2 if level.gated else 1) * width * level.hidden
            behind = (level.depth - 1) * level.hidden**2 + width * level.hidden
            fast = 4 * first + 8 * behind if self.adapt == "all" else 4 * width * level.hidden
            total += 0 if level.chunk is None else fast
        return total


def auto_scale(
    dataset_tokens: int,
    tasks: int = 1,
    *,
    hidden: int,
    objective: Literal["local", "next_token"] = "local",
) -> ContinuumConfig:
    """Sets levels, chunks, retention and replay by how much there is to read.

    The rule, with n the tokens of a task (`dataset_tokens / tasks`):
      - The fastest level moves every 64 tokens, each further one `RATIO` times as slowly, as long
        as it moves at least 64 times in a task and there are at most six.
      - A level keeps half of what it learned for 64 of its chunks, the slowest for the whole data
        if that is longer, so that it still has half of the first task at the end.
      - With several tasks a "next_token" reading stores 8 chunks for each, and one of them is
        learned again with each new chunk, at a share of `1 - 1 / tasks`, at most half.

    Args:
      dataset_tokens: What will be read in one stream.
      tasks: Parts of it that differ.
      hidden: Hidden units of each level.
      objective: What levels learn in context.

    Returns:
      A sequential continuum.

    Raises:
      ValueError: A number is below 1.
    """
    for name, number in (("dataset_tokens", dataset_tokens), ("tasks", tasks)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    each, chunks = dataset_tokens // tasks, [64]
    while len(chunks) < 6 and chunks[-1] * RATIO * 64 <= each:
        chunks.append(chunks[-1] * RATIO)
    lives = [64 * chunk for chunk in chunks]
    lives[-1] = max(lives[-1], dataset_tokens)
    replay = objective == "next_token" and tasks > 1
    return ContinuumConfig(
        levels=tuple(
            LevelConfig(hidden=hidden, chunk=chunk, retain=0.5 ** (chunk / life))
            for chunk, life in zip(chunks, lives, strict=True)
        ),
        objective=objective,
        replay=8 * tasks if replay else 0,
        replay_ratio=min(0.5, 1 - 1 / tasks) if replay else 0.5,
    )


class Level(nnx.Module):
    """A memory made of a feed-forward network: what it stores is in its weights.

    The weights are parameters. What a level learns in a sequence is added to them, and comes in and
    goes out with the call.
    """

    learns_by = "dot"

    def __init__(
        self,
        config: LevelConfig,
        continuum: ContinuumConfig,
        width: int,
        *,
        index: int,
        branches: int,
        epsilon: float,
        key: PRNGKeyArray,
    ):
        self.config, self.continuum = config, continuum
        hidden = config.hidden
        into, out = jax.random.split(key)
        count = 2 if config.gated else 1
        self.norm = RMSNorm(width, epsilon=epsilon)
        self.up = parameter(
            normal(into, (count, width, hidden), 1 / sqrt(width)), (None, "embed", "mlp"), "matrix"
        )
        self.down = parameter(
            normal(out, (hidden, width), 1 / sqrt(branches * hidden)), ("mlp", "embed"), "matrix"
        )
        own = [self.norm.scale, self.up, self.down]
        if config.depth > 1:
            shape = (config.depth - 1, hidden, hidden)
            middle = normal(jax.random.fold_in(key, 1), shape, 1 / sqrt(hidden))
            self.middle = parameter(middle, (None, None, "mlp"), "matrix")
            own.append(self.middle)
        if config.rank:
            reads, says = jax.random.split(jax.random.fold_in(key, 2))
            scale = 1 / sqrt(width)
            self.reads = parameter(
                normal(reads, (config.rank, width, hidden), scale), (None, "embed", "mlp"), "matrix"
            )
            self.says = parameter(
                normal(says, (config.rank, width, width), scale / sqrt(branches * config.rank)),
                (None, "embed", None),
                "matrix",
            )
            own += [self.reads, self.says]
        if continuum.variant in LEAKY:
            leak = jnp.full(width, _logit(1 - 1 / (config.chunk or 2)))
            self.leak = parameter(leak, ("embed",), "vector")
            own.append(self.leak)
        elif config.chunk is not None and continuum.objective == "local":
            self.pace = parameter(jnp.asarray(self._logits()), (None,), "vector")
            own.append(self.pace)
        for weight in own:
            weight.set_metadata(level=index)

    def _logits(self) -> list[float]:
        """Rate, retention and momentum if there is one, before their sigmoids."""
        config = self.config
        numbers = [config.rate, config.retain, *([config.momentum] if config.momentum else [])]
        return [_logit(number) for number in numbers]

    def initial_memory(self, batch: int, dtype: jnp.dtype, *, carried: bool) -> Any:
        """What no memory means; None for a level that carries nothing from call to call."""
        width = self.norm.scale.shape[0]
        if self.continuum.variant in LEAKY:
            return jnp.zeros((batch, width))
        if self.config.chunk is None:
            return None
        local = self.continuum.objective == "local"
        moving = self._moving()
        return fresh_level(
            moving,
            moving[0].shape[1] if local else 0,
            batch,
            dtype,
            momentum=self.config.momentum > 0,
            outer=carried,
        )

    def __call__(
        self,
        x: Activations,
        memory: Any = None,
        starts: Starts | None = None,
        *,
        values: Activations | None = None,
        carrier: "Level | None" = None,
        units: Float[Array, "B T P F"] | None = None,
    ) -> tuple[Activations, Any]:
        """Returns what the level recalls for each token, and what it carries on.

        Args:
          x: The tokens, normalised.
          memory: What earlier ones left behind.
          starts: Where documents begin.
          values: What should have been said one token before, where that is learned.
          carrier: The slower level that carries what this one's deltas begin with, if any.
          units: What `up` makes of x, if that is known; x is then not read.
        """
        config = self.config
        if self.continuum.variant in LEAKY:
            return leaky_average(self._recall(x), jax.nn.sigmoid(self.leak[...]), memory, starts)
        if config.chunk is None:
            return self._recall(x, units), None
        inputs = self._hidden(x, units) if self.continuum.adapt == "output" else x
        if values is None:
            return held_level(inputs, self._moving(), memory, starts, activation=config.activation)
        return continuum_level(
            inputs,
            values,
            self._moving(),
            self.learned_pace(carrier),
            memory,
            starts,
            chunk=config.chunk,
            outer=None if carrier is None else carrier.config.chunk,
            activation=config.activation,
            dgd=self.continuum.dgd,
            surprise=self.continuum.surprise,
        )

    def learned_pace(self, carrier: "Level | None" = None) -> Pace:
        """How the level moves."""
        numbers = jax.nn.sigmoid(self.pace[...])
        pace = Pace(numbers[0], numbers[1], numbers[2] if len(numbers) == 3 else None)
        if carrier is None:
            return pace
        slower = carrier.learned_pace()
        return pace._replace(outer_rate=slower.rate, outer_retain=slower.retain)

    def _moving(self) -> Matrices:
        """The weights that move in context, as the op has them."""
        down = self.down[...][None]
        if self.continuum.adapt == "output":
            return (down,)
        middle = [layer[None] for layer in self.middle[...]] if self.config.depth > 1 else []
        return (self.up[...], *middle, down)

    def _hidden(
        self, x: Activations, units: Float[Array, "B T P F"] | None = None
    ) -> Float[Array, "B T F"]:
        """Returns the last hidden units."""
        activation = ACTIVATIONS[self.config.activation]
        hidden = dense(x, self.up[...], self.learns_by) if units is None else units
        hidden = constrain(hidden, ("batch", "time", None, "mlp"))
        active = hidden_units(hidden, activation)
        for layer in self.middle[...] if self.config.depth > 1 else ():
            active = activation(dense(active, layer, self.learns_by))
        return active

    def _recall(self, x: Activations, units: Float[Array, "B T P F"] | None = None) -> Activations:
        """Reads with the slow weights alone, and what each token adds to them for itself."""
        hidden = self._hidden(x, units)
        y = dense(hidden, self.down[...], self.learns_by)
        return y + self._modify(x, hidden) if self.config.rank else y

    def _modify(self, x: Activations, hidden: Float[Array, "B T F"]) -> Activations:
        """What the token's own change of the last matrix adds to its answer."""
        reads = dense(x, self.reads[...], self.learns_by)
        found = jnp.einsum("BTF,BTRF->BTR", hidden, reads) / sqrt(self.config.hidden)
        return jnp.einsum("BTR,BTRD->BTD", found, dense(x, self.says[...], self.learns_by))


class ContinuumMemory(nnx.Module):
    """Feed-forward memories at several paces, residual and normalised on the way in.

    References:
      Behrouz et al., "Nested Learning", 2025, section 7.1.
    """

    learns_by = "dot"

    def __init__(
        self,
        config: ContinuumConfig,
        width: int,
        *,
        depth: int,
        epsilon: float,
        key: PRNGKeyArray,
    ):
        self.config = config
        count = len(config.levels)
        self.levels = nnx.List(
            Level(
                level,
                config,
                width // count if config.variant == "headwise" else width,
                index=index,
                branches=2 * depth * count,
                epsilon=epsilon,
                key=one,
            )
            for index, (level, one) in enumerate(
                zip(config.levels, jax.random.split(key, count), strict=True)
            )
        )
        if config.variant not in CHAINED:
            self.mixture = parameter(jnp.zeros(count), (None,), "vector")
        if config.learns() and config.objective == "local":
            self.norm = RMSNorm(width, epsilon=epsilon)
            view = normal(jax.random.fold_in(key, 1), (width, width), 1 / sqrt(width))
            self.view = parameter(view, ("embed", None), "matrix")

    def _look(
        self, x: Activations, y: Activations | None
    ) -> tuple[Activations, Activations, Float[Array, "B T P F"] | None]:
        """Returns `x + y`, the view of it, and what the first level makes of it before activating.

        These have norms of their own, which differ in their scales alone: where nothing else sees
        what is scaled, the weights behind are, and x is normalised once. Else the last is None.
        """
        first, learns = self.levels[0], self.learns_by
        alone = self.config.variant not in CHAINED or self.config.adapt == "all"
        if alone or first.config.rank or learns != "dot":
            x, seen = self.norm.beside(x, y)
            return x, dense(seen, self.view[...], learns), None
        x, unit = add_norm(x, y, jnp.ones(x.shape[-1]), epsilon=self.norm.epsilon)
        weights = (
            n.scale[...][:, None] * w[...]
            for n, w in ((self.norm, self.view), (first.norm, first.up))
        )
        return x, *dense_beside(unit, *weights)

    def _carriers(self) -> list[Level | None]:
        """For each level the slower one that carries what its deltas begin with."""
        if self.config.variant == "nested":
            return [*self.levels[1:], None]
        return [None] * len(self.levels)

    def _shared_out(self, x: Activations) -> list[Float[Array, "B T part"]]:
        """What each level sees of features: all, or its share in a headwise continuum."""
        if self.config.variant == "headwise":
            return jnp.split(x, len(self.levels), axis=-1)
        return [x] * len(self.levels)

    def initial_memory(self, batch: int, dtype: jnp.dtype) -> tuple[Any, ...]:
        """What `memory=None` means: for each level what it carries, None for nothing."""
        return tuple(
            level.initial_memory(batch, dtype, carried=carrier is not None)
            for level, carrier in zip(self.levels, self._carriers(), strict=True)
        )

    def __call__(
        self,
        x: Activations,
        memory: tuple[Any, ...] | None = None,
        starts: Starts | None = None,
        *,
        before: Activations | None = None,
    ) -> tuple[Activations, tuple[LevelMemory | Array | None, ...]]:
        """Adds what the levels recall to `x`; returns also what they carry on.

        Args:
          x: The residual stream.
          memory: What earlier tokens left behind.
          starts: Where documents begin.
          before: What is still to be added to `x` before the levels read it; None for nothing.
        """
        memory = memory or (None,) * len(self.levels)
        chained = self.config.variant in CHAINED
        y, values, units = before, [None] * len(self.levels), None
        if hasattr(self, "view"):
            x, seen, units = self._look(x, y)
            y, values = None, self._shared_out(checkpoint_name(seen, KEPT))
        if not chained and y is not None:
            x = x + y
        inputs = self._shared_out(x)
        recalled, after = [], []
        for level, carrier, part, wanted, carried in zip(
            self.levels, self._carriers(), inputs, values, memory, strict=True
        ):
            if self.config.variant == "flow" and recalled:
                part = recalled[-1]
            if not chained:
                part = level.norm(part)
            elif units is None:
                x, part = level.norm.beside(x, y)
            options = {"values": wanted, "carrier": carrier, "units": units}
            (y, carried), units = level(part, carried, starts, **options), None
            after.append(carried)
            recalled.append(y)
        if chained:
            x = x + recalled[-1]
        else:
            weights = jax.nn.softmax(self.mixture[...]).astype(x.dtype) * len(self.levels)
            weighted = [w * y for w, y in zip(weights, recalled, strict=True)]
            joined = self.config.variant == "headwise"
            x = x + (jnp.concatenate(weighted, axis=-1) if joined else sum(weighted))
        return constrain(x, ("batch", "time", "embed_out")), tuple(after)


def _logit(share: float) -> float:
    return log(share / (1 - share))


def _check_nesting(chunks: list[int]) -> None:
    for fast, slow in pairwise(chunks):
        if slow % fast or slow == fast:
            raise ValueError(
                f"the chunk of a level must be a multiple of the one before, which is {fast}, "
                f"in a nested continuum, got {slow}"
            )


def _check_multiples(chunks: list[int]) -> None:
    for chunk in chunks:
        if chunk % min(chunks):
            raise ValueError(
                f"chunks must be multiples of the shortest, which is {min(chunks)}, "
                f"with objective next_token, got {chunk}"
            )
