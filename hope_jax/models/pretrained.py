"""Published Llama weights as Hope-Attention, and back; one table of names serves both ways."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding, SingleDeviceSharding
from jaxtyping import Array
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from hope_jax.models.decoder import Decoder, ModelConfig
from hope_jax.models.generate import Track
from hope_jax.modules.attention import AttentionConfig, LinearScaling, Llama3Scaling
from hope_jax.modules.continuum import ContinuumConfig, LevelConfig
from hope_jax.sharding import named

Dtype = Literal["float32", "bfloat16", "float16"]
Split = Literal["copies", "depth", "units"]

SHARD_BYTES = 4 * 2**30
"""No file that is written holds more than this, except for one tensor that is larger."""


class Published(NamedTuple):
    """Where a parameter lies in published files.

    Attributes:
      names: One tensor for each part that the parameter stacks; `{}` is the number of the block.
      matrix: Whether they are (out, in) there and (in, out) here.
    """

    names: tuple[str, ...]
    matrix: bool = False


_BLOCK = "model.layers.{}."
TOWER = {
    "embedding.table": Published(("model.embed_tokens.weight",)),
    "blocks.norm.scale": Published((f"{_BLOCK}input_layernorm.weight",)),
    "blocks.mixer.query.weight": Published((f"{_BLOCK}self_attn.q_proj.weight",), matrix=True),
    "blocks.mixer.key_value.weight": Published(
        (f"{_BLOCK}self_attn.k_proj.weight", f"{_BLOCK}self_attn.v_proj.weight"), matrix=True
    ),
    "blocks.mixer.out.weight": Published((f"{_BLOCK}self_attn.o_proj.weight",), matrix=True),
    "norm.scale": Published(("model.norm.weight",)),
    "head.table": Published(("lm_head.weight",)),
}
"""All parameters but the continuum's."""

LEVEL = {
    "norm.scale": Published((f"{_BLOCK}post_attention_layernorm.weight",)),
    "up": Published((f"{_BLOCK}mlp.gate_proj.weight", f"{_BLOCK}mlp.up_proj.weight"), matrix=True),
    "down": Published((f"{_BLOCK}mlp.down_proj.weight",), matrix=True),
}
"""The parameters of a level, under `blocks.continuum.levels.N`."""

SETTINGS = {
    "width": ("hidden_size", int, None),
    "layers": ("num_hidden_layers", int, None),
    "vocabulary": ("vocab_size", int, None),
    "tie": ("tie_word_embeddings", bool, False),
    "norm_epsilon": ("rms_norm_eps", float, 1e-6),
}
"""Settings of a model: their name, type and default in `config.json`."""

MIXER = {
    "heads": ("num_attention_heads", int, None),
    "window": ("max_position_embeddings", int, 2048),
}
"""Settings of its attention, likewise."""

ROTARY = {
    "linear": (LinearScaling, {"factor": ("factor", float, None)}),
    "llama3": (
        Llama3Scaling,
        {
            "factor": ("factor", float, None),
            "low_frequency": ("low_freq_factor", float, None),
            "high_frequency": ("high_freq_factor", float, None),
            "original_window": ("original_max_position_embeddings", int, None),
        },
    ),
}
"""What stretches its rotary embedding, by the type there, with its settings, likewise."""

WANTED = {
    "model_type": ("llama", "blocks of other architectures differ"),
    "hidden_act": ("silu", "no other function gates the hidden units of a Llama"),
    "attention_bias": (False, "projections have no bias here"),
    "mlp_bias": (False, "levels have no bias here"),
    "quantization_config": (None, "weights must be floating-point numbers"),
}
"""Settings that must be so, with the reason; what is absent is so, but for the first."""


@dataclass(frozen=True, kw_only=True)
class Stacking:
    """How the levels of a continuum begin as the feed-forward networks of a published model.

    Each way computes the published model, as long as no level learns in context.

    Attributes:
      levels: How many levels.
      split: "copies" chains the levels, and the slowest has the network. The faster ones have
        copies of its norm and of its projections to the hidden units, and zeros for the projection
        out of them: they add exactly 0, and learn to add more. "depth" does so with the fastest
        level in the first blocks, and so on to the slowest in the last ones. "units" gives each
        level its share of the hidden units, all read the same input and what they say is added
        (variant "independent"): the same sum, which may be rounded in another order.

    References:
      Behrouz et al., "Nested Learning", 2025, section 7.3.
    """

    levels: int = 1
    split: Split = "copies"

    def __post_init__(self):
        if self.levels < 1:
            raise ValueError(f"levels must be at least 1, got {self.levels}")


def describe(folder: Path, stacking: Stacking) -> ModelConfig:
    """Finds the model that computes what a published Llama computes.

    Its activations are bfloat16 if the weights were published so, else float32.

    Args:
      folder: Has a `config.json`.
      stacking: The levels of the continuum.

    Raises:
      OSError: There is no such file.
      ValueError: Hope-Attention cannot compute that model, or the levels do not fit it.
    """
    settings = _json(folder / "config.json")
    for name, (wanted, reason) in WANTED.items():
        found = settings.get(name)
        if found != wanted and (found is not None or name == "model_type"):
            raise ValueError(f"config.json: {name} must be {wanted}, got {found!r}: {reason}")
    main = {ours: _get(settings, *there) for ours, there in SETTINGS.items()}
    mixer = {ours: _get(settings, *there) for ours, there in MIXER.items()}
    head = _get(settings, "head_dim", int, main["width"] // max(mixer["heads"], 1))
    base, scaling = _rotary(settings)
    dtype = settings.get("dtype") or settings.get("torch_dtype")
    return ModelConfig(
        mixer=AttentionConfig(
            groups=_get(settings, "num_key_value_heads", int, mixer["heads"]),
            head_width=None if head * mixer["heads"] == main["width"] else head,
            rotary_base=base,
            rotary_scaling=scaling,
            **mixer,
        ),
        continuum=_continuum(_get(settings, "intermediate_size", int), main["layers"], stacking),
        dtype="bfloat16" if dtype == "bfloat16" else "float32",
        **main,
    )


def load(
    folder: Path, config: ModelConfig, split: Split, *, seed: int = 0, track: Track = iter
) -> Decoder:
    """Reads a published model and lays it out on the mesh in use.

    Each tensor goes at once to where it stays: beside the model, the host holds what a device has
    of one parameter (stacked over the blocks).

    Args:
      folder: Has `model.safetensors`, or `model.safetensors.index.json` and the files it names.
      config: From `describe`, maybe with other settings that leave the shapes alone.
      split: That of the `Stacking`.
      seed: Of parameters that no published model has, as in what a level learns by in context.
      track: Passes the parameters on and may show how many are done.

    Raises:
      OSError: A file is missing.
      ValueError: A file is damaged, or the files are not of the model in `config`.
    """
    graphdef, variables = nnx.split(nnx.eval_shape(partial(config.build, seed=seed)), nnx.Param)
    tree = nnx.to_pure_dict(variables, lambda variable: variable)
    wanted = _leaves(tree)
    rows, tensors = _rows(config, split), _Tensors(folder)
    _compare(rows, wanted, tensors, split)
    params = {path: _lay(rows[path], wanted[path], tensors) for path in track(list(rows))}
    params |= _fresh(config, seed, {path: x for path, x in wanted.items() if path not in rows})
    placed = [params[path] for path in wanted]
    return nnx.merge(graphdef, jax.tree.unflatten(_structure(tree), placed))


def save(
    model: Decoder, folder: Path, *, dtype: Dtype, bos: int | None = None, track: Track = iter
):
    """Writes a model as a Llama: `config.json`, and safetensors in one or more files.

    What `load` read comes out bit for bit where `dtype` is what it was stored in. A Llama has no
    window: texts up to the model's own are what both agree on.

    Args:
      model: Softmax attention, and levels that are gated by silu and do not learn in context. In a
        chain, a single level of each block may have more to say than zero.
      folder: Empty or missing; it is there as a whole or not at all.
      dtype: What numbers are stored in.
      bos: The token in front of every document, which therefore ends one as well.
      track: Passes the numbers of the blocks on and may show how many are done.

    Raises:
      OSError: A file cannot be written.
      ValueError: The model is no Llama, a number is too large for `dtype`, or the folder is taken.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} must be empty or missing")
    config = model.config
    mixer = _check_llama(config)
    params = _leaves(nnx.to_pure_dict(nnx.split(model, nnx.Param)[1]))
    holders = _holders(config, params)
    sizes = [level.hidden for level in config.continuum.levels]
    hidden = sizes[holders[0]] if config.continuum.variant == "sequential" else sum(sizes)
    about = _to_json(config, mixer, hidden) | {"torch_dtype": dtype}
    if bos is not None:
        about |= {"bos_token_id": bos, "eos_token_id": bos}
    with _whole(folder) as new:
        _write(new, _published(config, params, holders, track), dtype)
        (new / "config.json").write_text(json.dumps(about, indent=2) + "\n", "utf-8")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} must hold a mapping, got a {type(found).__name__}")
    return found


def _get(settings: dict[str, Any], name: str, kind: type, default: Any = None) -> Any:
    """A setting of `config.json`; what is null has its default, as what is absent."""
    value = settings.get(name)
    value = default if value is None else value
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        words = {int: "a whole number", float: "a number", bool: "true or false"}
        raise ValueError(f"config.json: {name} must be {words[kind]}, got {value!r}")
    return value


def _rotary(settings: dict[str, Any]) -> tuple[float, LinearScaling | Llama3Scaling | None]:
    """The base of the rotary embedding and how it is stretched, in either spelling."""
    about = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    base = _get({**settings, **about}, "rope_theta", float, 10_000.0)
    if about.get("partial_rotary_factor", settings.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("config.json: partial_rotary_factor must be 1.0: all features are rotated")
    kind = about.get("rope_type", about.get("type", "default"))
    if kind == "default":
        return base, None
    if kind not in ROTARY:
        raise ValueError(
            f"config.json: the rope type {kind!r} is not among those that attention computes; "
            f"choices: default, {', '.join(ROTARY)}"
        )
    scaling, names = ROTARY[kind]
    return base, scaling(**{ours: _get(about, *there) for ours, there in names.items()})


def _continuum(hidden: int, layers: int, stacking: Stacking) -> ContinuumConfig:
    count = stacking.levels
    if stacking.split == "units" and hidden % count:
        raise ValueError(f"levels must divide the {hidden} hidden units, got {count}")
    if stacking.split == "depth" and count > layers:
        raise ValueError(f"levels must be at most the {layers} blocks, got {count}")
    units = stacking.split == "units"
    level = LevelConfig(hidden=hidden // count if units else hidden, gated=True)
    variant = "independent" if units else "sequential"
    return ContinuumConfig(variant=variant, levels=(level,) * count)


def _to_json(config: ModelConfig, mixer: AttentionConfig, hidden: int) -> dict[str, Any]:
    """Undoes `describe`."""
    about: dict[str, Any] = {"architectures": ["LlamaForCausalLM"]}
    about |= {name: wanted for name, (wanted, _) in WANTED.items() if wanted is not None}
    about |= {name: getattr(config, ours) for ours, (name, *_) in SETTINGS.items()}
    about |= {name: getattr(mixer, ours) for ours, (name, *_) in MIXER.items()}
    about |= {
        "num_key_value_heads": mixer.groups or mixer.heads,
        "head_dim": mixer.head_width or config.width // mixer.heads,
        "intermediate_size": hidden,
        "rope_theta": mixer.rotary_base,
    }
    for kind, (scaling, names) in ROTARY.items():
        if isinstance(mixer.rotary_scaling, scaling):
            values = {name: getattr(mixer.rotary_scaling, o) for o, (name, *_) in names.items()}
            about["rope_scaling"] = {"rope_type": kind, **values}
    return about


class _Row(NamedTuple):
    """What a parameter is read from.

    Attributes:
      published: The tensors.
      unit: The first of the hidden units that it has.
      blocks: Those in which it is not zero.
    """

    published: Published
    unit: int
    blocks: range


def _rows(config: ModelConfig, split: Split) -> dict[str, _Row]:
    """The table for a model: where each parameter comes from that a published model has."""
    everywhere = range(config.layers)
    rows = {path: _Row(published, 0, everywhere) for path, published in TOWER.items()}
    if config.tie:
        del rows["head.table"]
    unit, levels = 0, config.continuum.levels
    for index, level in enumerate(levels):
        speaks = everywhere
        if split == "copies":
            speaks = everywhere if index == len(levels) - 1 else range(0)
        elif split == "depth":
            first, last = (-(-i * config.layers // len(levels)) for i in (index, index + 1))
            speaks = range(first, last)
        for name, published in LEVEL.items():
            blocks = speaks if name == "down" else everywhere
            rows[f"blocks.continuum.levels.{index}.{name}"] = _Row(published, unit, blocks)
        unit += level.hidden if split == "units" else 0
    return rows


class _Tensors:
    """The tensors in a folder of safetensors; nothing but their names and shapes is read yet."""

    def __init__(self, folder: Path):
        index = folder / "model.safetensors.index.json"
        names = ["model.safetensors"]
        if index.is_file():
            names = sorted(set(_json(index).get("weight_map", {}).values()))
        elif not (folder / names[0]).is_file():
            pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pth"))
            why = "; weights in pickle files can run code and are never read" if pickled else ""
            raise FileNotFoundError(f"there is no {names[0]}{why}")
        self._files = {}
        for name in names:
            if Path(name).name != name:
                raise ValueError(f"{index.name} must name files of its folder, got {name!r}")
            try:
                file = safe_open(folder / name, framework="np")
                self._files |= dict.fromkeys(file.keys(), file)
            except SafetensorError as error:
                raise ValueError(f"{name} is damaged: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def check(self, name: str, shape: tuple[int, ...]):
        """Raises ValueError unless there is such a tensor of floating-point numbers."""
        if name not in self._files:
            raise ValueError(f"tensor {name} is missing")
        found = self._files[name].get_slice(name)
        if tuple(found.get_shape()) != shape:
            raise ValueError(f"tensor {name} must be {shape}, got {tuple(found.get_shape())}")
        if found.get_dtype() not in ("F32", "BF16", "F16"):
            raise ValueError(f"tensor {name} must be F32, BF16 or F16, got {found.get_dtype()}")

    def read(self, name: str, bounds: list[tuple[int, int]]) -> np.ndarray:
        """Reads a part of a tensor."""
        return self._files[name].get_slice(name)[tuple(slice(*bound) for bound in bounds)]


def _compare(rows: dict[str, _Row], wanted: dict[str, nnx.Param], tensors: _Tensors, split: Split):
    """Raises ValueError unless the files hold what the rows need, and nothing else."""
    units = sum(x.shape[-2] for path, x in wanted.items() if path.endswith(".down"))
    known = set()
    for path, row in rows.items():
        if path not in wanted:
            raise ValueError(f"the model must have a parameter {path}, as a Llama has")
        inner = _inner(wanted[path])
        shape = list(wanted[path].shape[-len(inner) :])
        if split == "units" and "mlp" in inner:
            shape[inner.index("mlp")] = units
        if row.published.matrix:
            shape.reverse()
        for block in row.blocks:
            for name in row.published.names:
                tensors.check(name.format(block), tuple(shape))
                known.add(name.format(block))
    # Some files repeat a tied head, and older ones hold what follows from the settings.
    for name in tensors:
        if name not in known | {"lm_head.weight"} and not name.endswith("rotary_emb.inv_freq"):
            raise ValueError(f"tensor {name} is none of the model that config.json describes")


def _inner(variable: nnx.Param) -> tuple[str | None, ...]:
    """The axes of one published tensor: without those that stack blocks and parts."""
    return tuple(variable.get_metadata("axes"))[-2:]


def _sharding(variable: nnx.Param) -> Sharding:
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return SingleDeviceSharding(jax.devices()[0])
    return named(variable.get_metadata("axes"), variable.shape, mesh)


def _lay(row: _Row, variable: nnx.Param, tensors: _Tensors) -> Array:
    """Makes a parameter, each device's part straight from the files."""
    inner = _inner(variable)
    step = -1 if row.published.matrix else 1

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        cuts = zip(index or (), variable.shape, strict=True)
        bounds = [cut.indices(n)[:2] for cut, n in cuts]
        stacked, within = bounds[: -len(inner)], bounds[-len(inner) :]
        within = [
            (a + row.unit, b + row.unit) if axis == "mlp" else (a, b)
            for axis, (a, b) in zip(inner, within, strict=True)
        ]
        out = np.zeros([b - a for a, b in bounds], np.float32)
        for place in np.ndindex(*out.shape[: len(stacked)]):
            at = [first + i for (first, _), i in zip(stacked, place, strict=True)]
            block = at[0] if at else 0
            if block in row.blocks:
                name = row.published.names[at[1] if len(at) > 1 else 0].format(block)
                found = tensors.read(name, within[::step])
                out[place] = found.T if row.published.matrix else found
        return out

    return jax.make_array_from_callback(variable.shape, _sharding(variable), part)


def _fresh(config: ModelConfig, seed: int, wanted: dict[str, nnx.Param]) -> dict[str, Array]:
    """Makes parameters as a new model has them; the others are never computed."""
    if not wanted:
        return {}

    def make() -> dict[str, Array]:
        model = nnx.split(config.build(seed=seed), nnx.Param)[1]
        return {path: x for path, x in _leaves(nnx.to_pure_dict(model)).items() if path in wanted}

    return jax.jit(make, out_shardings={path: _sharding(x) for path, x in wanted.items()})()


def _check_llama(config: ModelConfig) -> AttentionConfig:
    """Returns the attention; raises ValueError where no Llama can compute what the model does."""
    if not isinstance(config.mixer, AttentionConfig):
        kind = config.mixer.kind
        raise ValueError(f"a Llama's mixer must be attention, that of this model is {kind}")
    continuum = config.continuum
    if continuum.variant not in ("sequential", "independent"):
        raise ValueError(f"a Llama's levels are no {continuum.variant} continuum")
    plain = ContinuumConfig(variant=continuum.variant, levels=continuum.levels)
    _check_same("the continuum", asdict(continuum), asdict(plain))
    for index, level in enumerate(continuum.levels):
        plain = LevelConfig(hidden=level.hidden, gated=True)
        _check_same(f"level {index}", asdict(level), asdict(plain))
    return config.mixer


def _check_same(what: str, found: dict[str, Any], wanted: dict[str, Any]):
    for name, value in wanted.items():
        if found[name] != value:
            raise ValueError(f"{what} of a Llama must have {name}={value}, got {found[name]}")


def _holders(config: ModelConfig, params: dict[str, Array]) -> list[int]:
    """The level that says something in each block of a chain.

    Raises:
      ValueError: There are two of them.
    """
    count = len(config.continuum.levels)
    if config.continuum.variant != "sequential":
        return [0] * config.layers
    down = [params[f"blocks.continuum.levels.{index}.down"] for index in range(count)]
    speaks = np.stack([np.asarray(jnp.any(x != 0, axis=(1, 2))) for x in down])
    for block in range(config.layers):
        both = np.flatnonzero(speaks[:, block]).tolist()
        if len(both) > 1:
            raise ValueError(
                f"levels {both} of block {block} all say something (their `down` is not zero): "
                "a Llama's block has one network, and a chain of several is not one"
            )
    sizes = {config.continuum.levels[index].hidden for index in speaks.argmax(axis=0)}
    if len(sizes) > 1:
        raise ValueError(f"a Llama's networks are of one size, here they have {sizes} hidden units")
    return speaks.argmax(axis=0).tolist()


def _published(
    config: ModelConfig, params: dict[str, Array], holders: list[int], track: Track
) -> Iterator[tuple[str, np.ndarray]]:
    """Names and tensors as they are published, one after the other."""
    for path, published in TOWER.items():
        if path in params and not path.startswith("blocks."):
            yield published.names[0], np.asarray(params[path])
    for block in track(range(config.layers)):
        here = {p: np.asarray(x[block]) for p, x in params.items() if p.startswith("blocks.")}
        table = {path: (published, here[path]) for path, published in TOWER.items() if path in here}
        network = _network(config, here, holders[block])
        table |= {name: (published, network[name]) for name, published in LEVEL.items()}
        for published, value in table.values():
            parts = value if value.ndim == 3 else value[None]
            for name, part in zip(published.names, parts, strict=True):
                yield name.format(block), part.T if published.matrix else part


def _network(
    config: ModelConfig, here: dict[str, np.ndarray], holder: int
) -> dict[str, np.ndarray]:
    """Makes one network of the levels of a block."""
    levels = [
        {name: here[f"blocks.continuum.levels.{index}.{name}"] for name in LEVEL}
        for index in range(len(config.continuum.levels))
    ]
    if config.continuum.variant == "sequential":
        return levels[holder]
    weights = np.asarray(jax.nn.softmax(here["blocks.continuum.mixture"]) * len(levels))
    norm = levels[0]["norm.scale"]
    ups = [level["up"] for level in levels]
    if any(not np.array_equal(level["norm.scale"], norm) for level in levels):
        ups = [level["norm.scale"][:, None] * level["up"] for level in levels]
        norm = np.ones_like(norm)
    downs = [weight * level["down"] for weight, level in zip(weights, levels, strict=True)]
    return {
        "norm.scale": norm,
        "up": np.concatenate(ups, axis=-1),
        "down": np.concatenate(downs, axis=0),
    }


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """Gives a folder that takes its name when all went well, and is deleted otherwise."""
    new = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        new.replace(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _write(folder: Path, tensors: Iterator[tuple[str, np.ndarray]], dtype: Dtype):
    """Writes files, and their index where there are several."""
    files: list[list[str]] = []
    shard: dict[str, np.ndarray] = {}
    total = size = 0

    def close():
        path = folder / f"{len(files)}.safetensors"
        save_file(shard, path, metadata={"format": "pt"})
        files.append([*shard])

    for name, tensor in tensors:
        stored = _stored(name, tensor, dtype)
        if shard and size + stored.nbytes > SHARD_BYTES:
            close()
            shard, size = {}, 0
        shard[name] = stored
        size += stored.nbytes
        total += stored.nbytes
    close()
    where = {}
    for number, names in enumerate(files):
        name = f"model-{number + 1:05}-of-{len(files):05}.safetensors"
        name = name if len(files) > 1 else "model.safetensors"
        (folder / f"{number}.safetensors").rename(folder / name)
        where |= dict.fromkeys(names, name)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, "utf-8")


def _stored(name: str, tensor: np.ndarray, dtype: Dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(tensor.astype(jnp.dtype(dtype)))
    if not np.isfinite(stored).all():
        raise ValueError(f"tensor {name} has numbers that are not finite in {dtype}")
    return stored


def _leaves(tree: dict[str, Any]) -> dict[str, Any]:
    """Leaves by dotted path, in the order of `jax.tree`."""
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_variable)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in found}


def _structure(tree: dict[str, Any]) -> jax.tree_util.PyTreeDef:
    return jax.tree.structure(tree, is_leaf=_is_variable)


def _is_variable(x: object) -> bool:
    return isinstance(x, nnx.Variable)
