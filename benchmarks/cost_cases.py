"""The cases of the cost model: how each is launched, what its hot paths are, and what is aimed at.

Trips follow from the shapes. Where they depend on the data too, a comment says what was assumed.
"""

from __future__ import annotations

from typing import NamedTuple

from .cost_model import COPY, L1, L2, MEMORY, Launch, Loop, Marks

WIDE, SHARED_64 = r"LDG\.E\.128", r"LD\.E\.64"  # what tells loops apart


class CostCase(NamedTuple):
    """One shape, by its name in ``cases``. ``goals``, if any, are in seconds: CUDA C++, Triton."""

    name: str
    goals: tuple[float, float] | None
    cuda: list[Launch]
    triton: list[Launch]


def _selection(segments: float, children: float, loads: Marks, latency: int) -> list[Loop]:
    """CUDA C++, K=128; segments per thread; children that a thread scores, and the loads of a step.

    Assumed: one round of counting, and 160 candidates, which a warp compares with its own four at a time.
    """
    return [
        Loop(r"LDG|LDS\.128", segments / 4, {"STS": 4}, which=-6, latency=latency),
        Loop(r"ATOMS\.POPC", segments, {"ATOMS": 1}),
        Loop(r"ATOMS\.POPC", 1, up=1),
        Loop(r"ATOMS\.ADD", segments),
        Loop(r"LDG.*U16", children, {**loads, "ATOMS": 0}, which=-3, per="U16", latency=latency),
        Loop(r"LDG.*U16", 1, which=-3, up=1),
        Loop(r"LDS\.64", 3 * 160 / 32, which=-1, per=r"LDS\.64"),
        Loop("REDUX", 3, which=-1),
        Loop("U16", 1, {"STG": 5, "U16": 1}, which=-1, latency=latency),
    ]


def _triton_selection(
    batch: int, moved: float, segment: int, segments: int, picks: int, rounds: int
) -> Launch:
    """K=128. ``segments`` are looked at, ``picks`` of them taken; ``rounds``: halvings of a list's range.

    Assumed, as random logits have it: above 4,096 the list of segments is shortened, and little more than K
    of their children are good enough to be listed. Fewer are all taken, and children's list is shortened.
    """
    turns, lists = -(-segments // 4096), -(-picks * segment // 4096)
    of_segments, of_children = {"STG": 8, "U16": 0}, {"STG": 8, "U16": 8}
    many = turns > 1
    loops = [
        Loop("LDG", turns - 1, of_segments, which=1, up=1, latency=L2),
        Loop("LDG", lists - 1, of_children, which=1, up=1, latency=L2),
        Loop("LDG", turns + 1, which=1),
        Loop("LDG", 1, of_children if many else of_segments, which=1, up=1, latency=L2),
        Loop("LDG", turns * rounds, which=2),
        Loop("LDG", rounds, which=2, up=1),
        Loop("LDG", turns, which=3),
        Loop("LDG", 1, of_segments if many else of_children, which=1, up=1, latency=L2),
    ]
    name = f"expand_topk select 256 of 4096, segments of {segment}"
    return Launch(name, batch, 16, moved, {"STG": 6}, loops, batch * (segments + picks * segment), latency=L2)


def _dense() -> CostCase:
    rows, columns = 256 * 128, 8192
    logits, maxima, heads = 2.0 * rows * columns, 4.0 * rows * columns / 128, 36.0 * rows
    moved, again = logits + maxima + heads, maxima + heads + 256 * 128 * 128 * 2
    loops = [Loop(WIDE, 4, {WIDE: 4, "SHFL": 2}, latency=MEMORY)]  # a chunk of 4,096
    chunks = [Loop(r"MUFU\.EX2", 2, which=1, latency=L2), Loop(r"MUFU\.EX2", 1, which=1, up=1, latency=L2)]
    triton = [Loop(WIDE, columns // 1024, {WIDE: 2, "STG": 1}, latency=MEMORY)]
    picks = [*chunks, *_selection(16, 32, {"U16": 4}, L2)]
    items, name = 256 * 512 * (16 + 32), "expand_select_kernelINS_8BFloat16ELb0ELb0"
    select = Launch(name, 256, 16, again, {}, picks, items, 64_000, L2)
    return CostCase(
        "expand_topk dense bf16 B=256 W=128 V=8192 K=128",
        (logits / COPY / 0.7, logits / COPY / 0.6),
        [
            Launch("expand_rows_kernelINS_8BFloat16ELb0", rows // 2, 4, moved, {}, loops, rows * columns),
            select,
        ],
        [
            Launch("expand_topk rows 1024, bfloat16", rows, 2, moved, {"STG": 10}, triton, rows * columns),
            _triton_selection(256, again, 128, 8192, 160, 5),
        ],
    )


def _legal() -> CostCase:
    """Depth 1 of a catalogue of 3,670 items: 2,295 children of 48 beams per request, at most 94 of one."""
    rows, children = 16 * 128, 16 * 2295
    moved = 6.0 * children + 80 * rows
    # Rows of up to 128 children take two turns of eight lanes; those behind the 64th have none. What has been
    # read once is in the first-level cache.
    loops = [
        Loop("LDG", 1, {"LDG": 6}, latency=MEMORY),
        Loop(r"LDG.*U16", 2, {"U16": 8, r"LDG\.E\.CONSTANT": 8}, latency=L2),
        Loop(r"LDG.*U16", 1, up=1),
        Loop(r"LDG.*U16", 1, up=2),
        Loop(r"MUFU\.EX2", 1, which=2),
        Loop(r"MUFU\.EX2", 1, which=2, up=1),
        *_selection(3, 2, {"U16": 1, r"LDG\.E\.CONSTANT": 1}, L1),
    ]
    triton = [Loop("U16", 1, {"U16": 8, WIDE: 2}, latency=L2)]
    return CostCase(
        "expand_topk legal depth 1 bf16 B=16 W=128 V=768 K=128",
        (10e-6, 15e-6),
        [Launch("expand_fused_kernelINS_8BFloat16ELb0ELb0", 16, 16, moved, {}, loops, children, 64_000)],
        [
            Launch("expand_topk rows 256, bfloat16", rows, 1, moved, {"STG": 10}, triton, children),
            _triton_selection(16, moved, 16, 768, 168, 4),
        ],
    )


def _sibling() -> CostCase:
    """Assumed: 50 prefixes of one token per request, few candidates below each; most pairs share no token."""
    batch, group, depth = 1024, 64, 3
    moved = batch * group * (8.0 * depth + 4 + 13 * depth)
    loops = [
        Loop(r"LDG\.E\.64", 3, {r"LDG\.E\.64": 1, "MUFU": 1}, latency=MEMORY),
        Loop(SHARED_64, 2 * group, which=1),
        Loop(SHARED_64, group, which=1, up=1),
        Loop(SHARED_64, 1, which=1, up=2),
        Loop(SHARED_64, 2, which=2),
        Loop("U16", 1, {r"LDG\.E\.C": 1}, latency=MEMORY),
        Loop("SHFL", 1, which=1),
        Loop("SHFL", depth, which=-1),
        Loop("DADD", depth, {SHARED_64: 1}, which=6, up=1),
        Loop(SHARED_64, 50, which=10, per=SHARED_64),  # one thread walks over the children of the root, twice
        Loop(SHARED_64, 50, which=12, per=SHARED_64),
        Loop(SHARED_64, depth, {"RSQ": 1}, which=10, up=1),
        Loop("STG", depth, {"STG": 4, "RCP": 1}, which=-1),
        Loop("STG", depth, which=-1, up=1),
    ]
    # Tokens fit into keys, so they are sorted once per level.
    triton = [Loop("SHFL", depth, which=0), Loop("STG", depth, {"STG": 8, r"LDG\.E\.64": 2}, latency=L2)]
    return CostCase(
        "sibling_advantage B=1024 G=64 L=3",
        (8e-6, 20e-6),
        [Launch("sibling_advantage_kernel", batch, 2, moved, {}, loops, batch * group, 8_000)],
        [Launch("sibling_advantage 64", batch, 1, moved, {}, triton, batch * group)],
    )


def _ved() -> list[CostCase]:
    """Trees of 64 nodes; a list has 32 entries. A round opens three nodes, one per level."""
    batch, nodes, entries = 1024, 64, 64 * 33
    seen, inserted = 28.0 * batch * nodes, batch * 3 * 2 * (5 * 32 * 4 + 60.0)
    gate = {"RCP64H": 1}
    select = [
        Loop("VOTE", 2),
        Loop("VOTE", 1, {**gate, "STG": 1}, up=2),
        Loop("VOTE", 1, gate, up=3, latency=L2),
        Loop("VOTE", 2 * 3, which=1),
        Loop("SHFL", 3, {"SHFL": 25, "RSQ64H": 2, "RCP64H": 3, "STG": 6}),
        Loop("SHFL", 1, up=1),
    ]
    triton_select = [
        Loop("STS", nodes / 4),
        Loop("STS", 1, up=1),
        Loop("DSETP", 4, {"STG": 3, "RCP64H": 4, "RSQ": 4}),
        Loop("DSETP", 1, up=1),
        Loop("DSETP", 1, up=2),
    ]
    # A third of the nodes list leaves; of a warp's 17 turns 8 look them up among the nodes.
    candidates = [
        Loop(r"LDG\.E ", 8 * nodes),
        Loop(r"STG\.E\.64", entries / 128, {"LDG": 6}, latency=L2),
        Loop(r"LDG\.E\.64", 16 * entries / 128, {r"LDG\.E\.64": 8}, per=r"LDG\.E\.64"),
        Loop("SHFL", 16, {"STG": 3}),
    ]
    # In Triton every turn of 256 looks its leaves up among the evaluated third of the nodes.
    turns = nodes * 32 / 256
    triton_candidates = [
        Loop(r"STG\.E\.64", 1, latency=L2),
        Loop("LDG", turns * nodes / 3, which=1, per="LDG"),
        Loop(r"STG\.E\.64", turns, which=1, latency=L2),
        Loop(r"LDG\.E\.64", 2 * 33, per=r"LDG\.E\.64"),
        Loop(r"STG\.E\.64", 1, which=2, latency=L2),
        Loop(r"LDG\.E\.64", 16, which=2),
        Loop(r"LDG\.E\.64", 16, which=3),
        Loop(r"STG\.E\.64", 16, which=3, latency=L2),
    ]
    stored, trees = 20.0 * batch * entries, batch // 4
    insert = [Loop(r"LDG\.E\.64", 3, {"STG": 19}, latency=L2)]
    triton_insert = [Loop("LDG", 3, {"STG": 24}, up=1, latency=L2)]
    return [
        CostCase(
            "ved_select, ved_insert B=1024 budget=129",
            (20e-6, 25e-6),
            [
                Launch("ved_select_kernel", trees, 4, seen, {}, select, batch),
                Launch("ved_insert_kernel", trees, 4, inserted, {}, insert, 3 * batch),
            ],
            [
                Launch("ved_select 256 nodes", batch, 2, seen, {"STG": 9}, triton_select, batch),
                Launch("ved_insert", batch, 1, inserted, {}, triton_insert, 3 * batch),
            ],
        ),
        CostCase(
            "ved_candidates B=1024 budget=129 K=16",
            (20e-6, 40e-6),
            [Launch("ved_candidates_kernel", batch, 4, stored, {}, candidates, batch * entries)],
            [Launch("ved_candidates", batch, 2, stored, {}, triton_candidates, batch * entries)],
        ),
    ]  # fmt: skip


def _token_logp(columns: int, odd: bool) -> CostCase:
    rows, moved = 4096, 2.0 * 4096 * columns
    tile, items = columns / (8 * 256), rows * columns
    forward = [Loop(WIDE, tile / 4, {WIDE: 8 if odd else 4}, latency=MEMORY)]
    stores = {WIDE: 2, r"STG\.E\.U16": 8} if odd else {WIDE: 1, r"STG\.E\.128": 1}
    backward = [Loop(WIDE, tile, {**stores, "MUFU": 8}, latency=MEMORY)]
    # Eight 2-byte stores 16 bytes apart each: every pair takes a sector of 32 bytes.
    sectors = 16.0 * items if odd else 0
    names, loads, all_ = (
        ((", odd rows, odd", ", odd"), {"U16": 16}, {r"LDG\.E\.U16": 16, "STG": 16})
        if odd
        else (("", ""), {WIDE: 2}, {WIDE: 2, "STG": 2})
    )
    statistics = [Loop(*loads, columns / 4096, loads, latency=MEMORY)]
    turns = -(-columns // (2 * 2048))
    coefficients = [Loop("LDG", 1, {"LDG": 3}, latency=L2), Loop("STG", turns, all_, latency=MEMORY)]
    targets = [coefficients[0], Loop("SHFL", 1, {"LDG": 3}), Loop("SHFL", 1, {"STG": 1}, up=1)]
    both = 2 * moved
    name, other = "token_logp_kernelINS_8BFloat16ELi8ELb0", "token_logp_backward_kernelINS_8BFloat16ELb0"
    return CostCase(
        f"token_logp bf16 [{rows}, {columns}] forward, backward",
        (1.2 * 3 * moved / COPY, 1.3 * 3 * moved / COPY),
        [
            Launch(name, rows, 8, moved, {}, forward, items),
            Launch(other, rows, 8, both, {"BAR": 3}, backward, items, sectors=sectors),
        ],
        [
            Launch(f"token_logp bfloat16{names[0]}", rows, 8, moved, {"STG": 3}, statistics, items),
            Launch(f"token_logp gradient bfloat16{names[1]}", 2 * rows, 4, both, {}, coefficients, items),
            Launch("token_logp gradient of targets", rows, 1, 64.0 * rows, {}, targets, rows, latency=L2),
        ],
    )


CASES = [_dense(), _legal(), _sibling(), *_ved(), _token_logp(151_936, False), _token_logp(152_437, True)]
