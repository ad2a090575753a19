"""The cost of a program: the products in its trace, and the traffic once it is compiled.

XLA's own cost analysis counts the body of a loop once. This module counts it once per iteration.
"""

import collections
import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from jax.extend import core

__all__ = ["Traffic", "matrix_flops", "traffic"]

_BYTES = {"pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1}
_BYTES |= {"s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_BYTES |= {"s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16, "token": 0, "opaque": 0}

_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "after-all"),
    *("while", "conditional", "call", "partition-id", "replica-id", "opt-barrier"),
)
"""Instructions that move no bytes themselves."""

_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast")
"""Calls to a TPU's compiler that move no bytes."""

_SLICING = frozenset(("dynamic-slice", "slice", "gather"))


class Traffic(NamedTuple):
    """The bytes that one device moves in one run of a program.

    Attributes:
      memory: bytes read from and written to main memory. Arrays that stay on the chip do not count.
      interconnect: bytes received from other devices, assuming ring collectives.
    """

    memory: float
    interconnect: float


def matrix_flops(jaxpr: Any) -> float:
    """Count the floating-point operations of matrix products and convolutions in a traced program.

    The count is over all devices: the body of a `shard_map` counts once per device. The body of a
    loop counts once per iteration if the trace knows the number of iterations, and only the most
    expensive of several branches counts.

    Args:
      jaxpr: a program, as returned by `jax.make_jaxpr` or `.trace(…).jaxpr`.

    Returns:
      The number of multiplications and additions.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> loop = lambda x: jax.lax.fori_loop(0, 5, lambda _, x: x @ x, x)
      >>> matrix_flops(jax.make_jaxpr(loop)(jnp.ones((4, 4))))
      640.0
    """
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, inside = equation.primitive.name, [*_programs_of(equation)]
        if name == "conv_general_dilated":
            total += _convolution_flops(equation)
        elif name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            lengths = [equation.invars[0].aval.shape[axis] for axis in contracted]
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(lengths)
        elif name == "cond":
            total += max(map(matrix_flops, inside))
        else:
            total += _times(equation) * sum(map(matrix_flops, inside))
    return total


def traffic(program: str) -> Traffic:
    """Estimate the traffic of a compiled program from its text, `compiled.as_text()`.

    Only the branch of a conditional that moves the most bytes counts.
    """
    computations, entry = _parsed(program)
    return _traffic_of(entry, computations, chains=None)


def _traffic_of(
    name: str, computations: Mapping[str, Mapping[str, "_Instruction"]], chains: set[str] | None
) -> Traffic:
    """The traffic of one call of a computation.

    Nothing inside a fusion goes through main memory, but a fusion may contain collectives. While a
    TPU runs an asynchronous collective in the background, every fusion that runs meanwhile repeats
    the instruction. All repetitions have the same chain id, and count once.

    Args:
      name: the computation.
      computations: all computations of the program.
      chains: inside a fusion, the chains that were counted in earlier fusions of the computation
        that calls it; `None` outside of fusions.
    """
    memory = interconnect = 0.0
    own = set() if chains is None else chains
    named = computations[name]
    for instruction in named.values():
        if instruction.opcode in ("async-update", "async-done"):
            continue  # counted at their async-start
        interconnect += _received(instruction, own)
        if chains is None:
            memory += _moved(instruction, named, computations)
        outside = instruction.opcode in ("while", "conditional", "call")
        called = [
            _traffic_of(callee, computations, None if outside and chains is None else own)
            for callee in _callees(instruction)
        ]
        if not called:
            continue
        count = _trips(instruction, computations) if instruction.opcode == "while" else 1.0
        join = max if instruction.opcode == "conditional" else sum
        memory += count * join(one.memory for one in called)
        interconnect += count * join(one.interconnect for one in called)
    # A TPU writes a reduce-scatter as a fusion of an all-reduce, which receives twice as much.
    return Traffic(
        memory, interconnect / 2 if name.startswith("all-reduce-scatter") else interconnect
    )


def _callees(instruction: "_Instruction") -> list[str]:
    """The computations that an instruction calls, except the condition of a loop."""
    called = re.findall(
        r"(?:body|calls|to_apply|branch_computations|(?:true|false)_computation)="
        r"\{?((?:%[\w.\-]+(?:, )?)+)",
        instruction.attributes,
    )
    return re.findall(r"%([\w.\-]+)", " ".join(called))


class _Instruction(NamedTuple):
    name: str
    result: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool
    text: str  # inside its parentheses


def _parsed(program: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
    """Computation -> name -> instruction, and the name of the entry computation."""
    computations: dict[str, dict[str, _Instruction]] = collections.defaultdict(dict)
    current, entry = "", ""
    for line in program.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            current = header[2]
            entry = current if header[1] else entry
        instruction = _instruction(line)
        if instruction is not None:
            computations[current][instruction.name] = instruction
    return computations, entry


def _instruction(line: str) -> _Instruction | None:
    match = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if match is None:
        return None
    rest = line[match.end() :]
    end = _closing(rest) if rest.startswith("(") else rest.find(" ")
    result, rest = rest[:end], rest[end:].lstrip()
    opcode, bracket, _ = rest.partition("(")
    if not bracket:
        return None
    end = len(opcode) + _closing(rest[len(opcode) :])
    text = rest[len(opcode) + 1 : end - 1]
    operands = tuple(re.findall(r"%([\w.\-]+)", text))
    return _Instruction(match[2], result, opcode, operands, rest[end:], bool(match[1]), text)


def _closing(text: str) -> int:
    """The position after the parenthesis that closes the first one."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return position + 1
    return len(text)


def _shapes(result: str, *, on_chip: bool) -> Iterator[int]:
    """The bytes of each array of a result; `on_chip` includes arrays that stay on the chip."""
    for kind, dimensions, layout in re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", result):
        if not on_chip and "S(" in layout:
            continue
        if kind not in _BYTES:
            raise ValueError(f"the compiled program has an array of the unknown type {kind}")
        yield _BYTES[kind] * math.prod(int(n) for n in dimensions.split(",") if n)


def _moved(
    instruction: _Instruction,
    named: Mapping[str, _Instruction],
    computations: Mapping[str, Mapping[str, _Instruction]],
) -> float:
    """The bytes that an instruction reads and writes."""
    opcode = instruction.opcode
    target = re.search(r'custom_call_target="(\w+)"', instruction.attributes)
    if opcode in _FREE or opcode.endswith("-done") or (target and target[1] in _FREE_CALLS):
        return 0.0
    written = float(sum(_shapes(instruction.result, on_chip=False)))
    if opcode == "slice-start":  # the result is ((source), slice, mark), and only the slice moves
        ends = [*_shapes(instruction.result, on_chip=False)]
        return float([*_shapes(instruction.result, on_chip=True)][1] * len(ends))
    if opcode.endswith("-start"):
        return written  # the result includes source and target
    operands = [named[name].result for name in instruction.operands if name in named]
    if opcode in _SLICING:
        return 2 * written
    if opcode == "dynamic-update-slice":
        return 2.0 * sum(_shapes(operands[1], on_chip=False))
    read = [sum(_shapes(result, on_chip=False)) for result in operands]
    called = re.search(r"calls=%([\w.\-]+)", instruction.attributes)
    if opcode == "fusion" and called:
        inside = computations[called[1]]
        background = _in_background(inside)
        if "AsyncCollectiveStart" in background:
            return written  # the result includes source and target
        if "AsyncCollectiveDone" in background:
            return 0.0
        for number, used in _slices_of_parameters(inside, background).items():
            if number < len(read):
                read[number] = min(read[number], used)
        for name in background:
            if (passed := inside[name]).opcode != "tuple":
                written -= sum(_shapes(passed.result, on_chip=False))
        updates = [one for one in inside.values() if one.opcode == "dynamic-update-slice"]
        for update in updates:
            buffer_bytes = sum(_shapes(update.result, on_chip=True))
            if buffer_bytes <= written:  # updated in place, so that only the slice is written
                part = inside.get(update.operands[1])
                written -= buffer_bytes - (sum(_shapes(part.result, on_chip=True)) if part else 0)
    return written + sum(read)


def _in_background(fused: Mapping[str, _Instruction]) -> frozenset[str]:
    """The instructions of a fusion that only pass on an asynchronous collective of a TPU.

    The first fusion of such a collective starts it, the last waits for its end, and all between
    them do other work, and pass on its arrays. The name of the call that starts or ends it stands
    for the first and the last.
    """
    collectives = [one for one in fused.values() if "chain_id=" in one.attributes]
    root = next((one for one in fused.values() if one.is_root), None)
    if not collectives or root is None:
        return frozenset()
    if root.opcode == "custom-call":
        return frozenset(re.findall(r"AsyncCollective(?:Start|Done)", root.attributes))
    if root.opcode != "tuple":
        return frozenset()
    passed = {name for name in root.operands if fused[name].opcode == "parameter"}
    return frozenset((*passed, *(one.name for one in collectives), root.name))


def _slices_of_parameters(
    fused: Mapping[str, _Instruction], background: Collection[str]
) -> dict[int, int]:
    """Number of a parameter -> bytes read from it, for parameters that are only read in slices.

    Instructions in the `background` read nothing.
    """
    users = collections.defaultdict(list)
    for instruction in fused.values():
        for operand in dict.fromkeys(instruction.operands):
            users[operand].append(instruction)
    slices = {}
    for name, parameter in fused.items():
        if parameter.opcode != "parameter" or not users[name]:
            continue
        sizes = []
        for user in users[name]:
            if user.name in background:
                sizes.append(0)
            elif user.opcode in _SLICING and user.operands[0] == name:
                sizes.append(sum(_shapes(user.result, on_chip=True)))
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                sizes.append(0)
            else:
                break
        else:
            slices[int(parameter.text)] = sum(sizes)
    return slices


def _received(instruction: _Instruction, chains: set[str]) -> float:
    """The bytes that a device receives from a collective, if it is a ring.

    Collectives of one of the `chains` are counted already. The instruction's own chain is added.
    """
    collective = re.fullmatch(
        r"(all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute"
        r"|collective-broadcast)(-start)?",
        instruction.opcode,
    )
    if collective is None:
        return 0.0
    if chain := re.search(r'chain_id="(\d+)"', instruction.attributes):
        if chain[1] in chains:
            return 0.0
        chains.add(chain[1])
    kind, started = collective[1], collective[2] is not None
    sizes = [*_shapes(instruction.result, on_chip=True)]
    if started and kind in ("all-gather", "collective-permute"):
        # Inputs, then outputs; on a TPU, a permutation has two more marks at its end.
        marked = re.search(r"u32\[\]\S*, u32\[\]\S*\)$", instruction.result)
        arrays = sizes[:-2] if marked else sizes
        sizes = arrays[len(arrays) // 2 :]
    size, n = float(sum(sizes)), _group_size(instruction.attributes)
    if kind in ("collective-permute", "collective-broadcast") or n is None:
        return size
    if kind == "all-reduce":
        return 2 * size * (n - 1) / n
    if kind == "reduce-scatter":
        return size * (n - 1)
    return size * (n - 1) / n


def _group_size(attributes: str) -> int | None:
    """The number of devices that take part in a collective; `None` if its text does not say."""
    if group := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(group[1])
    if group := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return group[1].count(",") + 1
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\].*?\{(.*?)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])  # or a part of an axis
        return math.prod(int(part or sizes[name]) for name, part in axes)
    return None


def _trips(loop: _Instruction, computations: Mapping[str, Mapping[str, _Instruction]]) -> float:
    """The number of a loop's iterations, from the compiler or the counter's bound; otherwise 1."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return float(known[1])
    condition = re.search(r"condition=%([\w.\-]+)", loop.attributes)
    bounds = [
        int(one.text)
        for one in (computations[condition[1]].values() if condition else ())
        if one.opcode == "constant" and re.fullmatch(r"\d+", one.text)
    ]
    return float(max(bounds, default=1))


def _programs_of(equation: Any) -> Iterator[Any]:
    for value in equation.params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(one, (core.Jaxpr, core.ClosedJaxpr)):
                yield one


def _convolution_flops(equation: Any) -> float:
    """The operations of a convolution, or of a gradient of one, without those on zeros.

    Every output meets a kernel of one output feature, and every input a kernel of one input
    feature. Padding and dilation add zeros to one of the two counts, so the smaller is right.
    """
    inputs, kernel = (one.aval.shape for one in equation.invars)
    outputs = equation.outvars[0].aval.shape
    num_outputs, num_inputs = (
        kernel[axis] for axis in equation.params["dimension_numbers"].rhs_spec[:2]
    )
    groups = equation.params["feature_group_count"] * equation.params["batch_group_count"]
    per_output, per_input = math.prod(kernel) / num_outputs, math.prod(kernel) / num_inputs / groups
    return 2 * min(math.prod(outputs) * per_output, math.prod(inputs) * per_input)


def _times(equation: Any) -> float:
    """How often the programs inside an equation run."""
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        return float(params["length"])
    if name == "shard_map":
        mesh = params["mesh"]  # the compiler divides the body over the other axes
        return float(math.prod(mesh.shape[axis] for axis in params["newly_manual_axes"]))
    if name == "pallas_call":
        return float(math.prod(params["grid_mapping"].grid))
    if name == "while":
        # The carry of a `fori_loop` begins with its counter and its bound.
        carried = equation.invars[params["cond_nconsts"] + params["body_nconsts"] :]
        bounds = [int(one.val) for one in carried[:2] if isinstance(one, core.Literal)]
        if len(bounds) == 2:
            return float(max(0, bounds[1] - bounds[0]))
    return 1.0
