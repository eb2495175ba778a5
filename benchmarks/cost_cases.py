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
    """Assumed: one sort; at most 4 candidates per node and, below the root, 8 per parent."""
    batch, group, depth = 1024, 64, 3
    moved = batch * group * (8.0 * depth + 4 + 13 * depth)
    keys = {
        "REDUX": 4,
        r"LDG\.E\.64": 1,
        "SHFL": 0,
    }  # a candidate's tokens are neighbors: the first brings the others
    level = {"STG": 4, r"LDG\.E\.64": 1, "RSQ64H": 1, "RCP64H": 2}
    parents = 5 + 3 * (depth - 1)  # steps of a sum over runs
    loops = [
        Loop("REDUX", 1, keys, latency=MEMORY),
        Loop("REDUX", depth - 1, keys),
        Loop("DADD", 2 * depth),
        Loop("DADD", parents, which=1),
        Loop("DADD", parents, which=3),
        Loop("STG", depth, level),
    ]
    # Tokens fit into keys, so they are sorted once per level.
    triton = [Loop("SHFL", depth, which=0), Loop("STG", depth, {"STG": 8, r"LDG\.E\.64": 2}, latency=L2)]
    return CostCase(
        "sibling_advantage B=1024 G=64 L=3",
        (8e-6, 20e-6),
        [Launch("sibling_small_kernelILi2", batch, 2, moved, {}, loops, batch * group, 5_000)],
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
    # Fewer than K leaves were evaluated. A third of the nodes list leaves, of equal score in each list. One
    # warp of four opens two lists, in which some leaf takes two looks into the table, and takes K leaves from
    # these.
    lists, one = nodes / 3, 1 / 4
    candidates = [
        Loop(r"ST\.E ", 4),
        Loop(r"ATOM\.E\.ADD", 1, {"CAS": 1}, latency=MEMORY),
        Loop(r"LD\.E\.64", nodes, per=r"LD\.E\.64"),
        Loop(r"LD\.E\.64", 1, {r"ST\.E ": 2}, up=1),
        Loop(r"ST\.E\.128", 1, which=1),
        Loop("LDG", lists * 3 / 4, which=1, up=1),  # those of other warps
        Loop("LDG", lists / 4, {"REDUX": 1}, which=1, up=1, latency=MEMORY),
        Loop("LDG", nodes / 32, which=1, up=2, latency=MEMORY),
        Loop(r"LD\.E\.128", nodes / 32, which=2, share=one),
        Loop("LDG", 4, which=3, share=one),
        Loop("LDG", 2, {"LDG": 5}, which=3, up=1, latency=L2, share=one),
        Loop("SHFL", 2 * 32 * 5, per="SHFL", share=one),
        Loop("LDG", 2, {r"ST\.E": 3, "REDUX": 0}, which=4, up=1, share=one),
        Loop("LDG", 2, {"REDUX": 5, r"LD\.E\.128": 2}, which=4, up=2, latency=L2, share=one),
        Loop("STG", 1, {"LDG": 3}, latency=L2),
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
            [Launch("ved_candidates_kernel", batch, 4, seen, {}, candidates, batch * entries, 6_000)],
            [Launch("ved_candidates", batch, 2, stored, {}, triton_candidates, batch * entries)],
        ),
    ]  # fmt: skip


def _token_logp(columns: int, odd: bool) -> CostCase:
    rows, moved = 4096, 2.0 * 4096 * columns
    tile, items = columns / (8 * 256), rows * columns
    forward = [Loop(WIDE, tile / 4, {WIDE: 8 if odd else 4}, latency=MEMORY)]
    backward = [Loop(WIDE, tile / 2, {WIDE: 2, r"STG\.E\.128": 2}, which=1, latency=MEMORY)]
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
            Launch(other, rows, 8, both, {"BAR": 3}, backward, items),
        ],
        [
            Launch(f"token_logp bfloat16{names[0]}", rows, 8, moved, {"STG": 3}, statistics, items),
            Launch(f"token_logp gradient bfloat16{names[1]}", 2 * rows, 4, both, {}, coefficients, items),
            Launch("token_logp gradient of targets", rows, 1, 64.0 * rows, {}, targets, rows, latency=L2),
        ],
    )


CASES = [_dense(), _legal(), _sibling(), *_ved(), _token_logp(151_936, False), _token_logp(152_437, True)]
