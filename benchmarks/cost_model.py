"""What the kernels should take on an H100, worked out from their machine code.

``python -m benchmarks.resources --model`` prints it; ``results/model.md`` says how to read it. The hot path
of a kernel is a route through its control-flow graph: the cheapest one that executes given numbers of certain
instructions (four 16-byte loads, say) and enters the loops that count. Loops are found by their back edges;
each has a route of its own, and a number of trips that follows from the shapes.
"""

from __future__ import annotations

import heapq
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

# An H100 SXM: cycles and bytes per second. A copy reaches 90 % of the data sheet's bandwidth.
CLOCK, SMS, SCHEDULERS, COPY = 1.755e9, 132, 4, 3.0e12
# Cycles until the result is there, rounded from published microbenchmarks of Hopper.
MEMORY, L2, L1, SHARED, OTHER, BARRIER = 480, 263, 41, 30, 20, 30
LAUNCH, MARGIN = 2e-6, 1.15  # seconds to start and drain a kernel; for what the model leaves out
# Cycles for which an instruction of a warp keeps a pipe busy; a scheduler has one of each kind. From the
# table of arithmetic throughput in the CUDA programming guide.
PIPES = {
    "integer": (r"(IADD|ISETP|FSETP|FMNMX|I?MNMX|VIMNMX|LOP3|SHF|LEA|SEL|FSEL|PRMT|PLOP3|FLO|POPC)", 2),
    "multiply": (r"IMAD(?!\.MOV)", 2),
    "double": (r"D(ADD|MUL|FMA|SETP)", 2),
    "special": (r"(MUFU|F2I|I2F|F2F)", 8),
    "shared memory": (r"(SHFL|LDS|STS|LDG|STG|LD|ST|ATOM)", 4),
}
Marks = Mapping[str, int]  # regular expression of an instruction -> how many of them a route executes


class Instruction(NamedTuple):
    """A line of SASS and what its encoding says about waiting."""

    address: int
    predicate: str
    text: str  # without the predicate
    stall: int  # cycles until the next
    sets: int  # the scoreboard that its result releases, 7: none
    waits: int  # mask of scoreboards


class Loop(NamedTuple):
    """A loop of a kernel's hot path.

    Attributes:
        holds: the innermost loops with such an instruction are meant; ``which`` of them in order of address,
            or the loop that stands ``up`` levels around it.
        trips: of a warp, in all. With ``per`` elements instead: a trip takes as many as it has such
            instructions.
        marks: what the route through the body executes.
        latency: of its global loads.
        share: of a block's warps that go there, while the others wait.
    """

    holds: str
    trips: float
    marks: Mapping[str, int] = {}
    which: int = 0
    up: int = 0
    per: str = ""
    latency: int = L1
    share: float = 1


class Launch(NamedTuple):
    """A launch of a kernel and its hot path.

    Attributes:
        kernel: a part of the mangled name of CUDA C++, or the name of a Triton specialization.
        blocks: of the grid.
        warps: per block.
        bytes: moved, from the shapes.
        marks: what the route through everything but the loops executes.
        loops: inner ones before those around them.
        items: elements or rows that "instructions per item" refers to.
        shared: dynamic shared memory per block.
        latency: of the global loads outside of the loops.
    """

    kernel: str
    blocks: int
    warps: int
    bytes: float
    marks: Marks
    loops: Sequence[Loop]
    items: float
    shared: int = 0
    latency: int = MEMORY


class Kernel:
    """The machine code of a kernel, as ``cuobjdump -sass`` prints it."""

    def __init__(self, sass: str, registers: int, shared: int) -> None:
        self.registers, self.shared = registers, shared
        self.code: list[Instruction] = []
        line = r"/\*([0-9a-f]{4,})\*/\s+(@\S+\s+)?(.*?)\s*;.*\n\s*/\* 0x([0-9a-f]+) \*/"
        for address, predicate, text, encoding in re.findall(line, sass):
            control = int(encoding, 16) >> 41
            waiting = control & 15, control >> 5 & 7, control >> 11 & 63
            self.code.append(Instruction(int(address, 16), predicate, text, *waiting))

    def _at(self, found: re.Match[str] | None) -> list[int]:
        return [(int(found[1], 16) - self.code[0].address) // 16] if found else []

    def _target(self, x: Instruction) -> list[int]:
        """Where it jumps. A warp whose threads have come apart takes another way, which is left out."""
        return self._at(re.match(r"BRA(?!\.DIV).*?0x([0-9a-f]+)", x.text))

    @cached_property
    def _cuts(self) -> list[int]:
        starts = {0}
        for i, x in enumerate(self.code):
            if re.match("BRA|EXIT|RET|BRX", x.text):
                starts |= {i + 1, *self._target(x)}
        return sorted(i for i in starts if i < len(self.code))

    @cached_property
    def blocks(self) -> list[list[Instruction]]:
        """Basic blocks, each with the subroutines it calls."""

        def called(x: Instruction) -> list[Instruction]:
            for start in self._at(re.match(r"CALL\S* 0x([0-9a-f]+)", x.text)):
                rest = self.code[start:]
                end = next(i for i, y in enumerate(rest) if y.text.startswith("RET"))
                return [x, *rest[: end + 1]]
            return [x]

        pieces = zip(self._cuts, [*self._cuts[1:], len(self.code)])
        return [[y for x in self.code[i:j] for y in called(x)] for i, j in pieces]

    @cached_property
    def next(self) -> list[list[int]]:
        """The blocks that may follow each block; after a switch (BRX) its first case."""
        number, result = {start: i for i, start in enumerate(self._cuts)}, []
        for i, end in enumerate([*self._cuts[1:], len(self.code)]):
            last = self.code[end - 1]
            after = [number[t] for t in self._target(last)]
            leaves = re.match(r"BRA(?!\.DIV)\S* (?!!?U?P\d)|EXIT|RET", last.text) and not last.predicate
            result.append(after if leaves or i + 1 == len(self._cuts) else [*after, i + 1])
        return result

    def _reached(self, without: int | None) -> set[int]:
        """The blocks that the entry reaches without passing one."""
        reached, todo = set[int](), [0]
        while todo:
            i = todo.pop()
            if i != without and i not in reached:
                reached.add(i)
                todo += self.next[i]
        return reached

    @cached_property
    def loops(self) -> dict[int, set[int]]:
        """Head -> body. A back edge leads to a block without which its origin cannot be reached."""
        reached, found = self._reached(None), dict[int, set[int]]()
        for head in {j for i in reached for j in self.next[i] if j <= i}:
            todo = [i for i in reached - self._reached(head) if head in self.next[i]]
            body = {head} if todo else set[int]()
            while todo:
                i = todo.pop()
                if i not in body:
                    body.add(i)
                    todo += [j for j in reached if i in self.next[j]]
            if body:
                found[head] = body
        return found

    def find(self, loop: Loop) -> int:
        """The head of a loop."""
        holding = [
            head for head, body in self.loops.items()
            if any(re.search(loop.holds, x.text) for i in body for x in self.blocks[i])
        ]  # fmt: skip
        inner = sorted(h for h in holding if not any(o in self.loops[h] for o in holding if o != h))
        around = sorted((len(body), h) for h, body in self.loops.items() if inner[loop.which] in body)
        return around[loop.up][1]

    def route(self, marks: Marks, known: Iterable[int], start: int | None = None) -> list[Instruction]:
        """The cheapest way through the code, or from a loop's head back to it.

        It executes exactly the marked instructions and enters the loops that are known; what these hold
        themselves is left out.

        Raises:
            LookupError: there is none.
        """
        inside = self._reached(None) if start is None else self.loops[start]
        heads = [h for h in known if h in inside and h != start]
        outer = [h for h in heads if not any(h in self.loops[o] for o in heads if o != h)]
        left_out = set[int]().union(*(self.loops[h] for h in heads))
        want = (*[1] * len(outer), *marks.values())
        own = {i: [] if i in left_out else self.blocks[i] for i in inside}
        counts = {
            i: (*(i == h for h in outer), *(sum(bool(re.search(m, x.text)) for x in own[i]) for m in marks))
            for i in inside
        }
        heap: list[tuple[int, int, tuple[int, ...], tuple[int, ...]]] = [
            (0, start or 0, (0,) * len(want), ())
        ]
        seen = set()
        while heap:
            cost, i, had, way = heapq.heappop(heap)
            have = tuple(map(sum, zip(had, counts[i])))
            if (i, have) in seen or any(x > y for x, y in zip(have, want)):
                continue
            seen.add((i, have))
            cost, way = cost + len(own[i]), (*way, i)
            ends = self.blocks[i][-1].text.startswith("EXIT") if start is None else start in self.next[i]
            if ends and have == want:
                return [x for i in way for x in own[i]]
            for j in self.next[i]:
                if j in inside and not (j in self.loops and i in self.loops[j]):
                    heapq.heappush(heap, (cost, j, have, way))
        raise LookupError(f"no way through the code executes {dict(marks)}")


def serial(route: Iterable[Instruction], latency: int) -> int:
    """Cycles of a warp that has a scheduler to itself."""
    kinds = {"LDG": latency, "LD.": SHARED, "LDS": SHARED, "ATOMS": SHARED, "SHFL": SHARED}
    now, ready = 0, [0] * 8
    for x in route:
        now = max(now, *(t for i, t in enumerate(ready) if x.waits >> i & 1), 0)
        takes = next((t for kind, t in kinds.items() if x.text.startswith(kind)), OTHER)
        ready[x.sets] = max(ready[x.sets], now + takes)
        now += max(x.stall, 1) + (BARRIER if x.text.startswith("BAR") else 0)
    return now


def widths(code: Iterable[Instruction]) -> str:
    """Bits of the global loads and stores of a route, as ``load 4 x 128, store 32``."""
    found: Counter[tuple[str, int]] = Counter()
    for x in code:
        match = re.match(r"(LDG|STG)\.E(?:\.(128|64|[US]16|[US]8))?", x.text)
        if match:
            found["load" if match[1] == "LDG" else "store", int((match[2] or "32").lstrip("US"))] += 1
    return ", ".join(
        f"{what} " + f"{n} x " * (n > 1) + str(bits) for (what, bits), n in sorted(found.items())
    )


class Cost(NamedTuple):
    """What a launch costs by the model: instructions of a warp, and seconds."""

    once: int
    trips: tuple[tuple[int, float], ...]  # instructions, how often
    instructions: float
    per_item: float
    widths: str
    resident: int  # blocks on a multiprocessor
    pipe: str  # what the time at the issue limit is limited by
    issue: float
    memory: float
    latency: float

    @property
    def seconds(self) -> float:
        """The largest of the limits."""
        return max(self.issue, self.memory, self.latency)


def cost(kernel: Kernel, launch: Launch) -> Cost:
    """What a launch of a kernel costs."""
    parts, shares, known = [], list[float](), list[int]()
    for loop in launch.loops:
        head = kernel.find(loop)
        way = kernel.route(loop.marks, known, head)
        known.append(head)
        taken = sum(bool(re.search(loop.per, x.text)) for x in way) if loop.per else 1
        parts.append((way, loop.trips / taken, loop.latency))
        shares.append(loop.share * loop.trips / taken)
    parts.append((kernel.route(launch.marks, known), 1, launch.latency))
    shares.append(1)
    number = sum(len(way) * n for (way, _, _), n in zip(parts, shares))
    busy = {"issue": number}
    for name, (pattern, cycles) in PIPES.items():
        busy[name] = cycles * sum(
            n * sum(bool(re.match(pattern, x.text)) for x in way) for (way, _, _), n in zip(parts, shares)
        )
    pipe = max(busy, key=busy.__getitem__)
    by_registers = 65536 // (-(-kernel.registers // 8) * 8 * 32 * launch.warps)
    by_shared = 233472 // (max(kernel.shared, launch.shared) + 1024)
    resident = max(1, min(by_registers, by_shared, 64 // launch.warps, 32))
    warps = math.ceil(launch.blocks / SMS) * launch.warps  # of the busiest multiprocessor
    waves = math.ceil(launch.blocks / (SMS * resident))
    return Cost(
        once=len(parts[-1][0]), trips=tuple((len(way), n) for way, n, _ in parts[:-1]), instructions=number,
        per_item=number * launch.warps * launch.blocks * 32 / launch.items,
        widths=widths(x for way, _, _ in parts for x in way), resident=resident, pipe=pipe,
        issue=math.ceil(warps / SCHEDULERS) * busy[pipe] / CLOCK,
        memory=launch.bytes / COPY,
        latency=waves * sum(serial(way, late) * n for way, n, late in parts) / CLOCK,
    )  # fmt: skip
