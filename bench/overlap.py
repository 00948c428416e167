"""How much of the softmax of an attention kernel runs while the tensor cores of sm_90 work.

The tensor cores of sm_90 work asynchronously (HGMMA) until a warp group waits for them
(WARPGROUP.DEPBAR), so the order of the instructions alone says whether they idle: what stands where
no product is in flight is exposed. Read from SASS, as the disassembler of the Triton wheel prints
it; the schedule depends on the version of ptxas, so hold thresholds against it, not equalities.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MUFU_CYCLES = 8  # of one warp: 4 results a cycle
FLOPS_PER_CYCLE = 4096  # of the tensor cores of one multiprocessor, 16-bit operands

_LABEL = re.compile(r"^\s*(\.L\w+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S[^;]*?)\s*;")
_BRANCH = re.compile(r"^BRA\b.*`\((\.L\w+)\)")
_PRODUCT = re.compile(r"^HGMMA\.(\d+)x(\d+)x(\d+)")
_WAIT = re.compile(r"^WARPGROUP\.DEPBAR\S*\s+gsb0,\s*(0x[0-9a-f]+)")


@dataclass(frozen=True)
class Overlap:
    """One iteration of an innermost loop with products, once the pipeline is full.

    Attributes:
        products: HGMMA instructions.
        product_cycles: cycles that they keep the tensor core of one warp group's quarter busy.
        waits: places where the warp group waits for products; as many as there are products means
            that ptxas has serialised them.
        copies: tiles that are copied from global memory through tensor descriptors.
        mufu: instructions of the special function unit: exponentials.
        instructions: all of them.
        exposed_mufu: those of `mufu` with no product in flight.
        exposed_instructions: those of `instructions` with no product in flight.
    """

    products: int
    product_cycles: int
    waits: int
    copies: int
    mufu: int
    instructions: int
    exposed_mufu: int
    exposed_instructions: int

    @property
    def tensor_bound(self) -> float:
        """Share of the time that tensor cores could work, if all warp groups waited together."""
        exposed = max(self.exposed_instructions, MUFU_CYCLES * self.exposed_mufu)
        return self.product_cycles / (self.product_cycles + exposed)


def overlaps(sass: str) -> list[Overlap]:
    """The innermost loops of a kernel that contain HGMMA, in the order of the code."""
    return [_measure(body) for body in _innermost_loops(sass) if _count(body, "HGMMA")]


def exposed_mufu(sass: str) -> int:
    """Exponentials per iteration that run while the tensor cores idle, in the worst loop.

    Raises:
        ValueError: no loop contains HGMMA.
    """
    found = overlaps(sass)
    if not found:
        raise ValueError("no loop with HGMMA in this code; is it compiled for sm_90?")
    return max(overlap.exposed_mufu for overlap in found)


def _innermost_loops(sass: str) -> Iterator[Sequence[str]]:
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif instruction := _INSTRUCTION.search(line):
            instructions.append(instruction[1])
    loops = set()
    for position, text in enumerate(instructions):
        branch = _BRANCH.match(text)
        if branch and labels.get(branch[1], position + 1) <= position:
            loops.add((labels[branch[1]], position + 1))
    for start, end in sorted(loops):
        inside = (s >= start and e <= end for s, e in loops - {(start, end)})
        if not any(inside):
            yield instructions[start:end]


def _measure(body: Sequence[str]) -> Overlap:
    """Walk the body twice: the first time fills the pipeline, the second one counts."""
    groups, is_open = 0, False
    for _ in range(2):
        exposed = []
        for instruction in body:
            if instruction.startswith("HGMMA"):
                # The product that names its barrier ends a group; a wait counts whole groups.
                is_open = "gsb0" not in instruction
                groups += not is_open
            elif wait := _WAIT.match(instruction):
                groups = min(groups, int(wait[1], 16))
            if not groups and not is_open:
                exposed.append(instruction)
    shapes = (_PRODUCT.match(instruction) for instruction in body)
    flops = sum(2 * int(m[1]) * int(m[2]) * int(m[3]) for m in shapes if m)
    return Overlap(
        products=_count(body, "HGMMA"),
        product_cycles=flops // FLOPS_PER_CYCLE,
        waits=_count(body, "WARPGROUP.DEPBAR"),
        copies=_count(body, "UTMALDG"),
        mufu=_count(body, "MUFU"),
        instructions=len(body),
        exposed_mufu=_count(exposed, "MUFU"),
        exposed_instructions=len(exposed),
    )


def _count(instructions: Sequence[str], name: str) -> int:
    return sum(1 for instruction in instructions if instruction.startswith(name))
