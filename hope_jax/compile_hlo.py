"""Reads what a compiled program moves: bytes of memory, and collectives by kind and size."""

import re
from collections import defaultdict
from math import prod
from typing import NamedTuple

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "iota", "while", "conditional", "call", "optimization-barrier",
)  # fmt: skip
"""Instructions that move nothing themselves."""

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "token": 0}
"""Of one element, where the type's name does not end with its bits."""

_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|true_computation|false_computation)"
    r"=(\{[^}]*\}|%[\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\s*\{"n":\s*"(\d+)"')
_GROUPS = re.compile(r"replica_groups=(\[[^\]]*\]|\{\{[^}]*\}|mesh\[[^\]]*\] \{[^}]*\})")
_CHANNEL = re.compile(r"channel_id=(\d+)")


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
      name: Of the result.
      shape: Of the result, as text.
      kind: The opcode.
      arguments: What stands in its parentheses, as text.
      rest: The attributes, as text.
    """

    name: str
    shape: str
    kind: str
    arguments: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """The names of its operands."""
        return _NAME.findall(self.arguments)


Computation = dict[str, Instruction]


class Collective(NamedTuple):
    """Collectives of one kind, size and number of partners.

    Attributes:
      kind: As in `COLLECTIVES`.
      bytes: Of the result on one device (of the operand for a reduce-scatter).
      partners: Devices that take part, 0 where that is not said.
      count: How often it happens in a step.
    """

    kind: str
    bytes: int
    partners: int
    count: int

    @property
    def wire(self) -> float:
        """Bytes that a device sends in all, by the algorithms of a ring."""
        others = (self.partners - 1) / self.partners if self.partners else 1.0
        shares = {"all-reduce": 2 * others, "collective-permute": 1.0, "collective-broadcast": 1.0}
        return self.count * self.bytes * shares.get(self.kind, others)


class Traffic(NamedTuple):
    """What a step moves.

    Attributes:
      memory: Bytes that a device reads from and writes to its memory.
      collectives: The largest first.
      unknown_loops: Loops whose trip count the program does not say; they count once.
    """

    memory: float
    collectives: list[Collective]
    unknown_loops: int


def read(text: str) -> Traffic:
    """Adds up a compiled program, each loop's body as often as it runs.

    Args:
      text: From `jax.stages.Compiled.as_text`.
    """
    computations, entry = parse(text)
    times, inlined, unknown = _times(computations, entry)
    memory = 0.0
    channels: dict[str, tuple[tuple[str, int, int], int]] = {}
    for name, count in times.items():
        for one in computations[name].values():
            kind = one.kind.removesuffix("-start")
            if kind in COLLECTIVES:
                kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else kind
                key = kind, _collective_bytes(one, kind, computations[name]), _partners(one)
                said = _CHANNEL.search(one.rest)
                # One that runs beside other kernels is written again in each of them.
                channels[said[1] if said else f"{name}.{one.name}"] = key, count
            if name not in inlined:
                memory += count * _moved(one, computations[name], computations)
    found: dict[tuple[str, int, int], int] = defaultdict(int)
    for key, count in channels.values():
        found[key] += count
    collectives = [Collective(*key, count) for key, count in found.items()]
    return Traffic(memory, sorted(collectives, key=lambda one: -one.wire), unknown)


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Returns the computations by name, and the name of the first one to run."""
    computations: dict[str, Computation] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if line.endswith("{") and line.startswith(("%", "ENTRY")):
            name = _NAME.search(line)
            if name is not None:
                current = computations.setdefault(name[1], {})
                entry = name[1] if line.startswith("ENTRY") else entry
        elif " = " in line and line.startswith("  "):
            one = _instruction(line)
            current[one.name] = one
    return computations, entry


def array_bytes(shape: str, *, in_memory: bool = False) -> float:
    """Bytes of a shape, all arrays of a tuple together.

    Args:
      shape: As the program writes it.
      in_memory: Whether to leave out arrays that are kept on the chip (memory spaces above 0).
    """
    total = 0.0
    for kind, sizes, layout in _ARRAY.findall(shape):
        if in_memory and re.search(r"S\([1-9]", layout):
            continue
        bits = re.search(r"\d+", kind)
        width = BYTES.get(kind, int(bits[0]) / 8 if bits else 0)
        total += width * prod(int(n) for n in sizes.split(",") if n)
    return total


def _instruction(line: str) -> Instruction:
    name, _, right = line.strip().removeprefix("ROOT ").partition(" = ")
    end = _closing(right) + 1 if right.startswith("(") else right.index(" ")
    shape, call = right[:end], right[end:].lstrip()
    kind, _, rest = call.partition("(")
    end = _closing("(" + rest)
    return Instruction(name.removeprefix("%"), shape, kind, rest[: end - 1], rest[end:])


def _closing(text: str) -> int:
    """Where the parenthesis that a text begins with is closed."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(text)


def _times(
    computations: dict[str, Computation], entry: str
) -> tuple[dict[str, int], set[str], int]:
    """How often each computation runs, which of them are parts of one kernel, and unknown loops."""
    times: dict[str, int] = defaultdict(int)
    inlined: set[str] = set()
    unknown = 0

    def visit(name: str, count: int, inside: bool):
        nonlocal unknown
        times[name] += count
        if inside:
            inlined.add(name)
        for one in computations[name].values():
            trips = 1
            if one.kind == "while":
                known = _trips(one, computations[name], computations)
                unknown += known is None
                trips = known or 1
            kernel = inside or one.kind not in ("while", "conditional", "call", "async-start")
            for called in _CALLED.findall(one.rest):
                for target in _NAME.findall(called):
                    if target in computations:
                        visit(target, count * trips, kernel)

    visit(entry, 1, False)
    return times, inlined, unknown


def _trips(loop: Instruction, outside: Computation, all_: dict[str, Computation]) -> int | None:
    """How often a loop runs: as the compiler says, or for a counter that a constant bounds."""
    said = _TRIPS.search(loop.rest)
    if said is not None:
        return int(said[1])
    name = re.search(r"condition=%([\w.\-]+)", loop.rest)
    condition = all_.get(name[1], {}) if name else {}
    last = list(condition.values())[-1] if condition else None
    if last is None or last.kind != "compare" or "direction=LT" not in last.rest:
        return None
    counter, bound = (condition.get(operand) for operand in last.operands)
    if counter is None or bound is None or bound.kind != "constant":
        return None
    place = re.search(r"index=(\d+)", counter.rest)
    state = outside.get(loop.operands[0])
    if place is None or state is None or state.kind != "tuple":
        return None
    first = outside.get(state.operands[int(place[1])])
    while first is not None and first.kind in ("copy", "bitcast"):
        first = outside.get(first.operands[0])
    start = int(first.arguments) if first is not None and first.kind == "constant" else 0
    return int(bound.arguments) - start


def _partners(one: Instruction) -> int:
    said = _GROUPS.search(one.rest)
    if said is None:
        return 0
    if said[1].startswith("mesh"):
        sizes = dict(re.findall(r"('\w+')=(\d+)", said[1]))
        return prod(int(sizes[axis]) for axis in re.findall(r"'\w+'", said[1].split("] ")[1]))
    if said[1].startswith("["):
        return int(said[1].strip("[]").split(",")[-1])
    return said[1].count(",") + 1


def _collective_bytes(one: Instruction, kind: str, computation: Computation) -> int:
    if kind == "reduce-scatter":
        return int(sum(array_bytes(computation[name].shape) for name in one.operands))
    if one.kind.endswith("-start") and kind in ("all-gather", "collective-permute"):
        return int(max(array_bytes(shape[0]) for shape in _ARRAY.finditer(one.shape)))
    return int(array_bytes(one.shape))


def _operands(one: Instruction, computation: Computation) -> float:
    shapes = (computation[name].shape for name in one.operands if name in computation)
    return sum(array_bytes(shape, in_memory=True) for shape in shapes)


def _moved(one: Instruction, computation: Computation, all_: dict[str, Computation]) -> float:
    """Bytes of memory that an instruction reads and writes."""
    if one.kind in FREE or one.kind.endswith("-done"):
        return 0
    result = array_bytes(one.shape, in_memory=True)
    if one.kind in ("dynamic-slice", "gather", "slice"):
        return 2 * result
    if one.kind in ("dynamic-update-slice", "scatter"):
        update = computation.get(one.operands[-1 if one.kind == "scatter" else 1])
        return 2 * array_bytes(update.shape, in_memory=True) if update else result
    if one.kind == "slice-start":
        parts = _ARRAY.findall(one.shape)
        return array_bytes(f"{parts[1][0]}[{parts[1][1]}]") if len(parts) > 1 else result
    if one.kind.endswith("-start"):
        return result  # a tuple that holds the operand as well
    if one.kind == "fusion":
        return _touched(one, computation, all_)
    return result + _operands(one, computation)


def _touched(one: Instruction, computation: Computation, all_: dict[str, Computation]) -> float:
    """What a fusion reads and writes: slices where it takes slices.

    Buffers of collectives that go on meanwhile are handed through; that moves nothing.
    """
    body = all_[_called(one)]
    total = in_place = 0.0
    for number, name in enumerate(one.operands):
        shape = computation[name].shape if name in computation else ""
        whole = array_bytes(shape, in_memory=True)
        parameter = _parameter(body, number)
        if whole and parameter:
            read, updated = _read(parameter, whole, body, all_)
            total += read
            in_place += whole if updated else 0
    root = list(body.values())[-1]
    results = [body[name] for name in root.operands] if root.kind == "tuple" else [root]
    written = sum(
        array_bytes(shape[0], in_memory=True)
        for result, shape in zip(results, _ARRAY.finditer(one.shape), strict=False)
        if result.kind != "parameter" and not _hands_on(result)
    )
    return total + max(0.0, written - in_place)


def _read(
    name: str, whole: float, body: Computation, all_: dict[str, Computation]
) -> tuple[float, bool]:
    """Bytes that a fusion touches of a value inside it, and whether it changes a part in place."""
    total, updated = 0.0, False
    for user in body.values():
        places = [] if _hands_on(user) else user.operands
        for place, operand in enumerate(places):
            if operand != name:
                continue
            part, changed = whole, False
            if user.kind == "bitcast":
                part, changed = _read(user.name, whole, body, all_)
            elif user.kind == "fusion" and _called(user) in all_:
                inside = all_[_called(user)]
                part, changed = _read(_parameter(inside, place), whole, inside, all_)
            elif user.kind == "dynamic-update-slice" and place == 0:
                part, changed = array_bytes(body[user.operands[1]].shape), True
            elif user.kind in ("dynamic-slice", "slice", "gather") and place == 0:
                part = array_bytes(user.shape)
            total, updated = total + part, updated or changed
    return min(total, whole), updated


def _called(one: Instruction) -> str:
    found = _CALLED.search(one.rest)
    return found[1].removeprefix("%") if found else ""


def _parameter(body: Computation, number: int) -> str:
    """The name of a computation's parameter."""
    found = (one for one in body.values() if one.kind == "parameter")
    return next((one.name for one in found if int(one.arguments) == number), "")


def _hands_on(one: Instruction) -> bool:
    """Whether an instruction inside a fusion only carries buffers."""
    return one.kind in ("tuple", "custom-call", "get-tuple-element", *COLLECTIVES)
