"""Digits drawn from a built-in font, noisy and out of place, read by an MLP or a small ViT."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from hope_jax.comparison.problem import CHANGEABLE, Batches, Params, Problem, Sums, check
from hope_jax.optimizers import ParamInfo

# Ten glyphs of 7 rows and 5 columns, a digit a pixel row: its bits from left to right.
FONT = (
    (14, 17, 19, 21, 25, 17, 14),
    (4, 12, 4, 4, 4, 4, 14),
    (14, 17, 1, 2, 4, 8, 31),
    (31, 2, 4, 2, 1, 17, 14),
    (2, 6, 10, 18, 31, 2, 2),
    (31, 16, 30, 1, 1, 17, 14),
    (6, 8, 16, 30, 17, 17, 14),
    (31, 1, 2, 4, 8, 8, 8),
    (14, 17, 17, 14, 17, 17, 14),
    (14, 17, 17, 15, 1, 2, 12),
)
SIDE = 16
PATCH = 4
SPLITS = {"train": 0, "valid": 1, "test": 2}
HELD_OUT = 1024


class Digits(NamedTuple):
    """Some images and what they show."""

    images: Float[Array | np.ndarray, "N side side"]
    labels: Int[Array | np.ndarray, " N"]


@dataclass(frozen=True, kw_only=True)
class DigitsTask:
    """Ten digits of 10 x 14 pixels, anywhere in 16 x 16.

    The glyphs are the ten of a 5 x 7 font in this file: no data set of handwriting, but data that
    is there without a download. Contrast varies by a factor of two. Training images are drawn anew
    in every step, the same ones for all runs; 1,024 are held out for validation, and as many for
    the test. Judged by cross-entropy in nats; accuracy is reported as well.

    Attributes:
      model: "mlp" reads the pixels, "vit" reads 4 x 4 patches with attention.
      width: Of the hidden layers.
      layers: Hidden layers, or blocks of attention and MLP.
      noise: Deviation of the noise on each pixel, where ink is 1/2 to 1.
      batch: Images in a step.
    """

    kind: Literal["digits"] = "digits"
    name: str | None = None
    model: Literal["mlp", "vit"] = "mlp"
    width: int = 32
    layers: int = 2
    noise: float = 0.5
    batch: int = 32
    steps: int = 300
    every: int = 25
    goal: float | None = None

    def __post_init__(self):
        check(self)
        for name in ("layers", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.width < 4 or self.width % 4:
            raise ValueError(f"width must be a multiple of 4, got {self.width}")
        if self.noise < 0:
            raise ValueError(f"noise must be at least 0, got {self.noise}")

    def identity(self) -> dict[str, Any]:
        """See `Task`."""
        return {key: value for key, value in asdict(self).items() if key not in CHANGEABLE}

    def build(self) -> Problem:
        """See `Task`."""
        first, info, logits = _mlp(self) if self.model == "mlp" else _vit(self)

        def losses(params: Params, batch: Digits) -> Float[Array, " N"]:
            found = logits(params, batch.images)
            return optax.softmax_cross_entropy_with_integer_labels(found, batch.labels)

        def measure(params: Params, batch: Digits) -> Sums:
            found = logits(params, batch.images)
            nats = optax.softmax_cross_entropy_with_integer_labels(found, batch.labels)
            right = jnp.argmax(found, -1) == batch.labels
            count = jnp.full((), float(batch.labels.size))
            return {"loss": (jnp.sum(nats), count), "accuracy": (jnp.sum(right * 1.0), count)}

        def train() -> Batches:
            step = 0
            while True:
                yield draw(self.batch, (SPLITS["train"], step), noise=self.noise)
                step += 1

        def evaluate(split: str) -> Batches:
            yield draw(HELD_OUT, (SPLITS[split],), noise=self.noise)

        count = sum(x.size for x in jax.tree.leaves(jax.eval_shape(first, 0)))
        return Problem(
            init=first,
            loss=lambda params, batch: jnp.mean(losses(params, batch)),
            measure=measure,
            train=train,
            evaluate=evaluate,
            info=info,
            keep_best=True,
            about={"parameters": count},
        )


def draw(count: int, seed: tuple[int, ...], *, noise: float) -> Digits:
    """Draws images of random digits.

    Args:
      count: How many.
      seed: Equal ones draw equal images.
      noise: Deviation of the noise on each pixel.
    """
    random = np.random.default_rng(seed)
    glyphs = np.array([[[row >> bit & 1 for bit in (4, 3, 2, 1, 0)] for row in g] for g in FONT])
    glyphs = glyphs.repeat(2, axis=1).repeat(2, axis=2)
    labels = random.integers(10, size=count)
    tall, wide = glyphs.shape[1:]
    row = random.integers(SIDE - tall + 1, size=count)[:, None] + np.arange(tall)
    column = random.integers(SIDE - wide + 1, size=count)[:, None] + np.arange(wide)
    images = np.zeros((count, SIDE, SIDE))
    images[np.arange(count)[:, None, None], row[:, :, None], column[:, None, :]] = glyphs[labels]
    images = images * random.uniform(0.5, 1, size=(count, 1, 1))
    images = images + noise * random.normal(size=images.shape)
    return Digits(images.astype(np.float32), labels.astype(np.int32))


def _matrix(key: Array, into: int, out: int) -> Float[Array, "into out"]:
    return jax.random.normal(key, (into, out)) / into**0.5


def _info(params: Params) -> Any:
    """Matrices are stacked in front; the embedding of places and biases are vectors."""

    def one(path: tuple, x: jax.ShapeDtypeStruct) -> ParamInfo:
        name = path[-1].key
        role = "vector" if name in ("bias", "places", "scale") else "matrix"
        return ParamInfo((None,) * min(x.ndim, 2 if role == "matrix" else x.ndim), role)

    return jax.tree_util.tree_map_with_path(one, params)


def _mlp(task: DigitsTask) -> tuple:
    """Parameters of a seed, their metadata, and logits."""
    widths = (SIDE * SIDE, *[task.width] * task.layers, 10)

    def first(seed: Int[Array, ""]) -> Params:
        keys = jax.random.split(jax.random.key(seed), len(widths) - 1)
        return [
            {"weight": _matrix(key, into, out), "bias": jnp.zeros(out)}
            for key, into, out in zip(keys, widths, widths[1:], strict=False)
        ]

    def logits(params: Params, images: Float[Array, "N side side"]) -> Float[Array, "N 10"]:
        x = images.reshape(len(images), -1)
        for layer in params[:-1]:
            x = jax.nn.gelu(x @ layer["weight"] + layer["bias"])
        return x @ params[-1]["weight"] + params[-1]["bias"]

    return first, _info(jax.eval_shape(first, 0)), logits


def _vit(task: DigitsTask) -> tuple:
    """Parameters of a seed, their metadata, and logits."""
    width, heads, places = task.width, 4, (SIDE // PATCH) ** 2

    def block(key: Array) -> Params:
        keys = jax.random.split(key, 6)
        shrink = (2 * task.layers) ** -0.5
        return {
            "project": jnp.stack([_matrix(k, width, width) for k in keys[:3]]),
            "out": shrink * _matrix(keys[3], width, width),
            "up": _matrix(keys[4], width, 2 * width),
            "down": shrink * _matrix(keys[5], 2 * width, width),
            "scale": jnp.ones((2, width)),
        }

    def first(seed: Int[Array, ""]) -> Params:
        keys = jax.random.split(jax.random.key(seed), task.layers + 3)
        return {
            "patch": _matrix(keys[0], PATCH * PATCH, width),
            "places": 0.1 * jax.random.normal(keys[1], (places, width)),
            "head": _matrix(keys[2], width, 10),
            "blocks": [block(key) for key in keys[3:]],
        }

    def norm(x: Array) -> Array:
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)

    def attend(layer: Params, x: Float[Array, "N P D"]) -> Float[Array, "N P D"]:
        q, k, v = jnp.einsum("NPD,CDE->CNPE", x, layer["project"])
        q, k, v = (y.reshape(*y.shape[:2], heads, -1) for y in (q, k, v))
        return jax.nn.dot_product_attention(q, k, v).reshape(x.shape) @ layer["out"]

    def logits(params: Params, images: Float[Array, "N side side"]) -> Float[Array, "N 10"]:
        grid = images.reshape(len(images), SIDE // PATCH, PATCH, SIDE // PATCH, PATCH)
        patches = jnp.swapaxes(grid, 2, 3).reshape(len(images), places, PATCH * PATCH)
        x = patches @ params["patch"] + params["places"]
        for layer in params["blocks"]:
            x = x + attend(layer, norm(x) * layer["scale"][0])
            hidden = jax.nn.gelu((norm(x) * layer["scale"][1]) @ layer["up"])
            x = x + hidden @ layer["down"]
        return norm(jnp.mean(x, axis=1)) @ params["head"]

    return first, _info(jax.eval_shape(first, 0)), logits
