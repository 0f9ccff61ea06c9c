"""Experiments: YAML and dotted overrides become frozen dataclasses, or a line that says why not."""

import difflib
import json
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union

import pydantic
import yaml

from hope_jax.data import DataConfig
from hope_jax.models.decoder import ModelConfig
from hope_jax.optimizers import OptimizerConfig
from hope_jax.sharding import MeshConfig
from hope_jax.training import CHANGEABLE, TrainingConfig


class ConfigError(ValueError):
    """A setting is wrong; the message is one line that names it, its value and what would do."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that decides what a run computes, and where it lies.

    Attributes:
      model: What learns.
      data: From what.
      optimizer: By which rule.
      training: How long, and what happens on the way.
      mesh: On which devices; "auto" chooses by their number and the sizes above, and says why.
      seed: Of the parameters; data and tasks have their own.
      name: Of the run and of its folder; the config file's by default.
    """

    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    mesh: MeshConfig | Literal["auto"] = field(default_factory=MeshConfig)
    seed: int = 0
    name: str = "run"

    def __post_init__(self):
        if not self.name or self.name != Path(self.name).name:
            raise ValueError(f"name must be that of a folder, without slashes, got {self.name!r}")
        if self.data.batch % self.training.accumulate:
            raise ValueError(
                f"training.accumulate must divide data.batch={self.data.batch}, "
                f"got {self.training.accumulate}"
            )
        if self.training.accumulate > 1 and self.model.objective != "dot":
            raise ValueError(
                "training.accumulate must be 1 where dense layers learn by "
                f"model.objective={self.model.objective}, got {self.training.accumulate}"
            )
        ids = self.data.tokenizer.vocabulary
        if self.model.vocabulary is not None and self.model.vocabulary < ids:
            raise ValueError(
                f"model.vocabulary must be at least {ids}, which the tokenizer has, "
                f"got {self.model.vocabulary}"
            )

    @property
    def folder(self) -> Path:
        """Where the run lies."""
        return Path(self.training.folder) / self.name


def load(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Reads a config file.

    Args:
      path: YAML (with `1e-3` a number and `no` a word, unlike YAML 1.1).
      overrides: Each `dotted.key=value`, the value in YAML; numbers index lists.

    Raises:
      ConfigError: The file or a setting is wrong.
    """
    experiment = read(Experiment, path, overrides)
    if experiment.model.vocabulary is None:
        known = replace(experiment.model, vocabulary=experiment.data.tokenizer.vocabulary)
        experiment = replace(experiment, model=known)
    return experiment


def read(cls: type, path: str | Path, overrides: Sequence[str] = ()) -> Any:
    """Reads a file of settings as a dataclass, which is named after the file if not by it.

    Args:
      cls: The dataclass; it has a field `name`.
      path: See `load`.
      overrides: See `load`.

    Raises:
      ConfigError: The file or a setting is wrong.
    """
    path = Path(path)
    try:
        settings = _read(path)
        for override in overrides:
            settings = _override(settings, override)
        return parse(cls, {"name": path.stem, **settings})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def change(experiment: Experiment, overrides: Sequence[str]) -> Experiment:
    """Returns an experiment with other settings.

    Args:
      experiment: Stays as it is.
      overrides: See `load`.

    Raises:
      ConfigError: A setting is wrong.
    """
    settings = _plain(experiment)
    for override in overrides:
        settings = _override(settings, override)
    return parse(Experiment, settings)


def dump(experiment: Experiment, path: Path):
    """Writes every setting, so that `load` gives back an equal experiment."""
    text = yaml.dump(_plain(experiment), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    path.write_text(text, "utf-8")


def claim(experiment: Experiment) -> Path:
    """Makes the run's folder, or finds it as a run of the same settings.

    Returns:
      The folder, with config.yaml in it.

    Raises:
      ConfigError: The folder holds a run that was trained with other settings, or parameters that
        were imported for another model.
    """
    path = experiment.folder / "config.yaml"
    if path.exists() and any((experiment.folder / "checkpoints").glob("[0-9]*")):
        before, now = _flat(_plain(load(path))), _flat(_plain(experiment))
        trained = any((experiment.folder / "checkpoints").glob("[1-9]*"))
        free = CHANGEABLE if trained else ("data", "optimizer", "training", "mesh", "seed")
        different = [
            f"{key}={_show(before.get(key))} (now {_show(now.get(key))})"
            for key in dict.fromkeys([*before, *now])
            if before.get(key) != now.get(key)
            and not _is_under(key, ("name", "training.folder", *free))
        ]
        if different:
            raise ConfigError(
                f"{experiment.folder} was {'trained' if trained else 'imported'} with "
                f"{', '.join(different)}: start another run with name=..., or keep its settings, "
                f"or delete the folder; a run can go on with other {', '.join(free)}"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    dump(experiment, path)
    return experiment.folder


def arguments(cls: type, overrides: Sequence[str]) -> Any:
    """Builds a dataclass from nothing but overrides.

    Args:
      cls: A dataclass with a default for every field.
      overrides: Each `key=value`. Where a setting may be any text, the value is that text as it
        stands; elsewhere it is YAML.

    Raises:
      ConfigError: A setting is wrong.
    """
    settings: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if equals and str in _options(_hints(cls).get(key)):
            settings[key] = text
        else:
            settings = _override(settings, override)
    return parse(cls, settings)


def settings(cls: type, where: str = "") -> Iterator[str]:
    """Lists every setting of a dataclass with its type and default, one a line."""
    hints = _hints(cls)
    for spec in fields(cls):
        name, options = _join(where, spec.name), _options(hints[spec.name])
        yield from _settings_of(_options(_element(hints[spec.name])), f"{name}.0")
        classes = [option for option in options if is_dataclass(option)]
        default = _default(spec)
        yield from _settings_of(classes, name)
        if len(classes) < len(options):
            shown = "" if default is MISSING else f" = {_show(_plain(default))}"
            yield f"{name}: {_describe(hints[spec.name])}{shown}"


def _settings_of(options: Sequence[Any], where: str) -> Iterator[str]:
    """Lists the settings of each class among some types, with its kind if there are several."""
    classes = [option for option in options if is_dataclass(option)]
    for option in classes:
        kind = f"[{_kinds(option)[0]}]" if len(classes) > 1 else ""
        yield from settings(option, f"{where}{kind}")


@contextmanager
def blame(section: str) -> Iterator[None]:
    """Turns what goes wrong while a section is built into an error that names it.

    Raises:
      ConfigError: A file, a package or a value is not as the section says.
    """
    try:
        yield
    except ConfigError:
        raise
    except (ImportError, OSError, ValueError) as error:
        raise ConfigError(f"{section}: {error}") from error


def parse(wanted: Any, value: Any, where: str = "", default: Any = MISSING) -> Any:
    """Builds a value of a type from what YAML gave.

    A mapping becomes a dataclass. It is laid over the field's default where that is of the same
    class; among several classes its `kind` chooses. All else must be of its type exactly, but a
    whole number does for a float.

    Args:
      wanted: The type.
      value: Mappings, lists, texts, numbers, booleans and None.
      where: The dotted key, for errors.
      default: The default of the field that this is for.

    Raises:
      ConfigError: It does not fit.
    """
    options = _options(wanted)
    classes = [option for option in options if is_dataclass(option)]
    if value is None and types.NoneType in options:
        return None
    if classes and (isinstance(value, Mapping) or value is None or len(classes) == len(options)):
        return _parse_class(classes, {} if value is None else value, where, default)
    element = _element(wanted)
    if element is not None and isinstance(value, list):
        return tuple(parse(element, x, f"{where}.{i}") for i, x in enumerate(value))
    return _parse_leaf(wanted, value, where)


def _parse_class(classes: list[type], value: Any, where: str, default: Any) -> Any:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}={_show(value)} must be a mapping of settings")
    cls = _choose(classes, value, where, default)
    hints, known = _hints(cls), {f.name: f for f in fields(cls) if f.init}
    for key in value:
        if key not in known:
            raise ConfigError(_unknown(key, value[key], where, cls, classes))
    settings = {}
    for name, spec in known.items():
        given = getattr(default, name) if type(default) is cls else _default(spec)
        if name in value:
            settings[name] = parse(hints[name], value[name], _join(where, name), given)
        elif given is not MISSING:
            settings[name] = given
        else:
            raise ConfigError(f"{_join(where, name)} is missing")
    try:
        return cls(**settings)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}" if where else str(error)) from error


def _choose(classes: list[type], value: Mapping, where: str, default: Any) -> type:
    """The class that a mapping is for."""
    if len(classes) == 1:
        return classes[0]
    by_kind = {kind: cls for cls in classes for kind in _kinds(cls)}
    if "kind" not in value:
        if type(default) in classes:
            return type(default)
        raise ConfigError(f"{where}.kind is missing; choices: {', '.join(by_kind)}")
    if value["kind"] not in by_kind:
        raise ConfigError(_unfit(f"{where}.kind", value["kind"], list(by_kind)))
    return by_kind[value["kind"]]


def _parse_leaf(wanted: Any, value: Any, where: str) -> Any:
    try:
        # In JSON, strict validation takes lists for tuples and texts for paths, as YAML means them.
        return _adapter(wanted).validate_json(json.dumps(value), strict=True)
    except TypeError as error:
        raise ConfigError(f"{where}={_show(value)} is nothing that a setting can be") from error
    except pydantic.ValidationError as error:
        choices = [choice for option in _options(wanted) for choice in _literals(option)]
        if choices:
            raise ConfigError(_unfit(where, value, choices)) from error
        raise ConfigError(f"{where}={_show(value)} must be {_describe(wanted)}") from error


_TYPES = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    types.NoneType: "null",
}


def _describe(wanted: Any) -> str:
    """A type in words."""
    words = []
    for option in _options(wanted):
        if _literals(option):
            words += [str(choice) for choice in _literals(option)]
        elif is_dataclass(option):
            words.append("a mapping of settings")
        elif typing.get_origin(option) is tuple:
            parts = [part for part in typing.get_args(option) if part is not ...]
            words.append(f"a list of {' and '.join(map(_describe, parts))}")
        else:
            words.append(_TYPES.get(option, getattr(option, "__name__", str(option))))
    return " or ".join(dict.fromkeys(words))


def _unknown(key: Any, value: Any, where: str, cls: type, classes: list[type]) -> str:
    """Says why a key is no setting of a class, and which would be."""
    there = _join(where, str(key))
    for other in classes:
        if key in {f.name for f in fields(other)}:
            ours, theirs = _kinds(cls)[0], _kinds(other)[0]
            return (
                f"{there}={_show(value)} is a setting of kind {theirs}, not of {ours}: replace the "
                f"whole section, as in {where}='{{kind: {ours}}}'"
            )
    names = [f.name for f in fields(cls) if f.init]
    return f"{there}={_show(value)} is no setting; {_nearest(key, names)}"


def _unfit(where: str, value: Any, choices: Sequence[Any]) -> str:
    return f"{where}={_show(value)} is no choice; {_nearest(value, choices)}"


def _nearest(wrong: Any, choices: Sequence[Any]) -> str:
    names = [str(choice) for choice in choices]
    close = difflib.get_close_matches(str(wrong), names, n=1, cutoff=0.5)
    return (f"did you mean {close[0]}? " if close else "") + f"choices: {', '.join(names)}"


def _override(settings: dict[str, Any], override: str) -> dict[str, Any]:
    """Sets one dotted key; returns new settings."""
    key, equals, text = override.partition("=")
    keys = key.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {override!r} must have the form dotted.key=value")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r} is no YAML: {_reason(error)}") from error
    return _set(settings, keys, value, override)


def _set(settings: Any, keys: list[str], value: Any, override: str) -> Any:
    if not keys:
        return value
    key, *rest = keys
    if isinstance(settings, list):
        if not key.isdigit() or int(key) >= len(settings):
            raise ConfigError(
                f"override {override!r}: {key} must be an index below {len(settings)}, the "
                "length of the list there"
            )
        new = _set(settings[int(key)], rest, value, override)
        return [*settings[: int(key)], new, *settings[int(key) + 1 :]]
    if settings is None and key.isdigit():
        raise ConfigError(f"override {override!r}: there is no list to index; give the whole list")
    if not isinstance(settings, dict | None):
        raise ConfigError(f"override {override!r}: {_show(settings)} has no setting {key}")
    settings = settings or {}
    return {**settings, key: _set(settings.get(key), rest, value, override)}


def _read(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.load(path.read_text("utf-8"), Loader=_Loader)
    except FileNotFoundError as error:
        beside = sorted(str(p) for p in path.parent.glob("*.yaml"))
        hint = f"; {_nearest(path, beside)}" if beside else ""
        raise ConfigError(f"there is no such file{hint}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"is no YAML: {_reason(error)}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"must be a mapping of settings, got {_show(settings)}")
    return settings


def _reason(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
    return f"{getattr(error, 'problem', None) or error}{place}"


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars, and an error for a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Returns the mapping of a node."""
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                problem = f"key {key.value} stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would take for something else."""


_INT = r"[-+]?(?:0|[1-9][0-9_]*)"
_FLOAT = r"[-+]?(?:[0-9][0-9_]*)?(?:\.[0-9]*(?:[eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+)"
_SCALARS = (
    ("bool", "true|false", "tf"),
    ("int", _INT, "-+0123456789"),
    ("float", rf"(?!\.$|[-+]\.$){_FLOAT}|[-+]?\.inf|\.nan", "-+.0123456789"),
    ("null", "null|~|", ["n", "~", ""]),
    ("merge", "<<", "<"),
)
for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}
    for _name, _pattern, _first in _SCALARS:
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), list(_first)
        )


def _options(wanted: Any) -> list[Any]:
    """The members of a union, or the type itself."""
    if typing.get_origin(wanted) in (Union, types.UnionType):
        return [option for part in typing.get_args(wanted) for option in _options(part)]
    return [wanted]


def _element(wanted: Any) -> Any:
    """What a tuple of any length holds; None for other types."""
    for option in _options(wanted):
        if typing.get_origin(option) is tuple and typing.get_args(option)[1:] == (...,):
            return typing.get_args(option)[0]
    return None


def _literals(wanted: Any) -> tuple[Any, ...]:
    return typing.get_args(wanted) if typing.get_origin(wanted) is Literal else ()


def _kinds(cls: type) -> tuple[str, ...]:
    """What `kind` may be in a class; its name where it has none."""
    return _literals(_hints(cls).get("kind")) or (cls.__name__,)


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


@cache
def _adapter(wanted: Any) -> pydantic.TypeAdapter:
    return pydantic.TypeAdapter(wanted)


def _default(spec: Field) -> Any:
    return spec.default_factory() if spec.default_factory is not MISSING else spec.default


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _show(value: Any) -> str:
    """A value on one line, as YAML."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=1000, allow_unicode=True)
    text = text.removesuffix("...\n").strip().replace("\n", " ")
    return text if len(text) <= 80 else f"{text[:77]}..."


def _plain(value: Any) -> Any:
    """Dataclasses and tuples as YAML has them."""
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    return [_plain(x) for x in value] if isinstance(value, tuple) else value


def _flat(value: Any, where: str = "") -> dict[str, Any]:
    """Dotted keys and their values."""
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    flat: dict[str, Any] = {}
    for key, part in parts:
        name = _join(where, str(key))
        flat |= _flat(part, name) if isinstance(part, dict | list) and part else {name: part}
    return flat


def _is_under(key: str, names: Iterable[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)
