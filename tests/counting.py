"""What a compiled program does: flops of its matrix products and its all-reduces, with loop bodies multiplied by their trip count.

XLA's own cost analysis counts the body of a loop once. Here the optimised HLO text is walked from its entry computation: every computation
is visited once for each call of it, and as many times as the loop runs where it is a loop's body.
"""

import re
from math import prod
from typing import NamedTuple

COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")
TRIPS = re.compile(r'"known_trip_count":\s*\{"n":\s*"(\d+)"')
ALL_REDUCE = ("all-reduce", "all-reduce-start", "reduce-scatter")
OPAQUE = ("convolution", "custom-call")


class Instruction(NamedTuple):
    """One line of HLO: `name = shape opcode(rest`."""

    name: str
    shape: str
    opcode: str
    rest: str


def computations(text):
    """(name of the entry, {computation: its instructions})."""
    entry, current, found = None, None, {}
    for line in text.splitlines():
        if head := COMPUTATION.match(line):
            current = head[2]
            found[current] = []
            entry = current if head[1] else entry
        elif (body := INSTRUCTION.match(line)) and current:
            found[current].append(Instruction(*body.groups()))
    if entry is None:
        raise ValueError("This text holds no entry computation: give compiled.as_text().")
    return entry, found


def visits(text, unknown=False):
    """Yields (instruction, computation, how often it runs, whether inside a loop). Loops of `unknown` length count once, or raise."""
    entry, found = computations(text)
    stack = [(entry, 1, False)]
    while stack:
        name, times, looped = stack.pop()
        for instruction in found[name]:
            yield instruction, found[name], times, looped
            is_loop = instruction.opcode == "while"
            trips = TRIPS.search(instruction.rest)
            if is_loop and not trips and not unknown:
                raise ValueError(f"The loop {instruction.name} has no known trip count.")
            for single, several in CALLED.findall(instruction.rest):
                for callee in [single] if single else re.findall(r"[\w.\-]+", several):
                    stack.append((callee, times * int(trips[1]) if trips and is_loop else times, looped or is_loop))


def dimensions(shape):
    """The dimensions of an array's shape as HLO prints it."""
    return [int(n) for n in re.search(r"\[([\d,]*)\]", shape)[1].split(",") if n]


def dot_flops(instruction, computation):
    """2 x elements of the result x length of the contraction."""
    lhs = re.search(r"%([\w.\-]+)", instruction.rest)[1]
    shape = dimensions(next(other.shape for other in computation if other.name == lhs))
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)[1].split(",")
    return 2 * prod(dimensions(instruction.shape)) * prod(shape[int(axis)] for axis in contracted if axis)


def matmul_flops(compiled):
    """Flops of the matrix products that `compiled` runs. Raises ValueError at an operation that may hide one."""
    total = 0
    for instruction, computation, times, _ in visits(compiled.as_text()):
        if instruction.opcode in OPAQUE:
            raise ValueError(f"{instruction.opcode} {instruction.name} is not counted.")
        if instruction.opcode == "dot":
            total += times * dot_flops(instruction, computation)
    return total


def all_reduces(compiled):
    """How many all-reduces stand inside loop bodies, and how many outside; a loop's trips are not multiplied."""
    found = [looped for instruction, _, _, looped in visits(compiled.as_text(), unknown=True) if instruction.opcode in ALL_REDUCE]
    return found.count(True), found.count(False)
