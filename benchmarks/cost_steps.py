"""The cost model's cases of what stands between two forwards of a decoder; see cost_cases.py.

The shapes are those of ``cases`` on a GPU, the names as well. Nothing is aimed at: a forward takes longer.
"""

from __future__ import annotations

from .cost_cases import CostCase
from .cost_model import L1, L2, MEMORY, Launch, Loop

WORD = r"LDG\.E (?!.*CONSTANT)"  # tells loops over what the kernel has written apart


def _beams() -> list[CostCase]:
    """64 requests of 128 beams: after the second level, and with a level that has run."""
    batch, width = 64, 128
    beams = batch * width
    advanced = beams * (4.0 + 4 + 4 + 8 + 4 + 8 + 8 + 8 + 4)
    listed = beams * (4.0 + 8 + 4 + 16 + 8 + 4 + 8 + 2 * 16)
    # Eight neighboring beams per thread. Assumed: all have a row and lack both lengths.
    rows = [
        Loop("LDG", beams / 1024, {"STG": 1, "LDG": 4}, latency=MEMORY),
        Loop(WORD, width / 16, latency=L2),
        Loop(WORD, 1, up=1, latency=L2),
        Loop(WORD, 2, which=3, latency=L1),
        Loop(WORD, 2 * 2, which=6, latency=L1),
        Loop(WORD, 2 * 2, {r"STG\.E\.64": 8}, which=7, latency=L2),
        Loop(WORD, 2, which=7, up=1),
        Loop(WORD, 2, {"STG": 8}, which=9, latency=L2),
    ]
    stage = [
        Loop("LDG", beams / 512, {r"STG\.E\.64": 8, "LDG": 20}, which=1, latency=L2),
        Loop(r"STG\.E\.64", beams / 512, which=1),
    ]
    one = {"STG": 4, "LDG": 5}
    four = {"STG": 16, r"LDG\.E ": 16, r"LDG\.E\.64": 4}
    return [
        CostCase(
            f"advance_beams B={batch} W={width}",
            None,
            [Launch("advance_beams_kernel", 2 * beams // 256, 8, advanced, one, [], 2 * beams)],
            [Launch("advance_beams", 2 * beams // 256, 2, advanced, four, [], 2 * beams)],
        ),
        CostCase(
            f"rows_to_run B={batch} W={width}",
            None,
            [Launch("rows_to_run_kernel", 1, 32, listed, {}, rows, beams, 132)],
            [Launch("rows_to_run", 1 + 2 + batch, 4, listed, {"STG": 1}, stage, beams)],
        ),
    ]


def _draws() -> list[CostCase]:
    """64 requests of 128 candidates with lists of 50 children, whose prefixes have one token."""
    batch, candidates, children = 64, 128, 50
    all_ = batch * candidates
    drawn, placed = all_ * (12.0 * children + 16), all_ * (4.0 + 4 + 16 + 12)
    draw = [Loop("DSETP", 2, {"DSETP": 1}, latency=MEMORY)]
    place = [
        Loop("LDG", 1),
        Loop("BAR", 1, {"BAR": 3, "STG": 4, "LDG": 9}, latency=L2),
    ]
    triton_draw = [Loop("DSETP", 1, {"DSETP": 2}, latency=MEMORY)]
    triton_place = [
        Loop("LDG", 1),
        Loop("LDG", 2, {"STG": 2}, which=1, latency=L2),
        Loop("LDG", 2, {"STG": 6}, which=1, up=1, latency=L2),
    ]
    # Each candidate is compared with all; none is equal to an earlier one.
    first = [Loop("LDG", candidates, latency=L1), Loop("LDG", 1, up=1)]
    number = [
        Loop("LDG", 1),
        Loop("LDG", candidates / 4, {"LDG": 8}, which=1, latency=L1),
        Loop("LDG", 1, {"STG": 4}, which=1, up=1),
    ]
    turns = candidates // 32
    triton_first = [Loop("BAR", turns * (turns + 1) / 2, latency=L1), Loop("BAR", turns, up=1)]
    triton_number = [
        Loop("LDG", 1),
        Loop("LDG", turns * turns, which=1, latency=L1),
        Loop("LDG", turns, {"STG": 7}, which=1, up=1),
    ]
    moved = all_ * (8.0 + 4 + 4 + 4 + 20)
    return [
        CostCase(
            f"draw_children B={batch} K={candidates} C={children}",
            None,
            [
                Launch("draw_children_kernel", all_ // 8, 8, drawn, {"STG": 1}, draw, all_ * children),
                Launch("place_draws_kernel", batch, 4, placed, {}, place, all_, 132),
            ],
            [
                Launch("draw_children", all_, 1, drawn, {"STG": 1}, triton_draw, all_ * children),
                Launch("draw_children, placing", batch, 1, placed, {}, triton_place, all_),
            ],
        ),
        CostCase(
            f"distinct_rows B={batch} K={candidates}",
            None,
            [
                Launch("first_candidates_kernel", batch, 4, 8.0 * all_, {}, first, all_, 132),
                Launch("distinct_rows_kernel", batch, 4, moved, {}, number, all_, 132),
            ],
            [
                Launch("distinct_rows, first candidates", batch, 1, 8.0 * all_, {}, triton_first, all_),
                Launch("distinct_rows", batch, 1, moved, {}, triton_number, all_),
            ],
        ),
    ]


def _ved() -> list[CostCase]:
    """12 rows per tree, of 48 children in the mean and 94 at most: with noise, then with child values."""
    trees, rows, most = 256, 256 * 12, 94
    moved, kept = rows * 48 * 14.0, rows * most * 20.0
    evaluate = [
        Loop("U16", 1, {"U16": 8, r"LDG\.E ": 8}, latency=MEMORY),
        Loop("U16", 1, {"U16": 1, "LDG": 4, "MUFU": 1}, which=2, latency=L2),  # noise
        Loop("U16", 1, {"U16": 1, "LDG": 4, "MUFU": 0}, which=2, latency=L2),  # child values
        Loop(r"LD\.E\.64", 42),
        Loop(r"LD\.E\.64", 42, up=1),
        Loop(r"LD\.E\.64", 12, up=2),
        Loop("U16", 4, {"STG": 2}, which=3, latency=L2),
        Loop("U16", 2, which=3, up=1),
    ]
    first_pass = Loop("U16", 1, {"U16": 8, r"LDG\.E\.128": 2}, latency=L2)
    noisy, valued = (
        [first_pass, Loop("U16", 1, {"U16": 8, "STG": 1, "LDG": loads}, which=-1, latency=L2)]
        for loads in (17, 24)
    )
    selected = [Loop("LDG", 1, {"STG": 8, "U16": units}, which=1, up=1, latency=L2) for units in (0, 8)]
    lists = [
        Loop("SHFL", 1, {"STG": 8}, latency=L2),
        Loop("SHFL", 1, {"STG": 12}, which=1, latency=L2),
        *(Loop("STG", 1, which=i) for i in (1, 3, 4)),
    ]
    rows_kernel = "expand_topk rows 256, extra score, bfloat16"
    select = Launch(
        "expand_topk select 256 of 512, segments of 16", rows, 2, kept, {}, selected, rows * 48, latency=L2
    )
    expand = [
        launch
        for loops in (noisy, valued)
        for launch in (Launch(rows_kernel, rows, 1, moved, {"STG": 9}, loops, rows * 48), select)
    ]
    many, beams = 1024, 1024 * 12
    take = [
        Loop("LDG", 1, which=1, latency=MEMORY),
        Loop("VOTE", 1, {"STG": 3, "VOTE": 1}, latency=MEMORY),
        Loop(WORD, 6, which=-1, latency=L2),
        Loop(WORD, 1, {"STG": 3, "VOTE": 1}, which=-1, up=1, latency=MEMORY),
    ]
    triton_take = [
        Loop("LDG", 1, latency=MEMORY),
        Loop("LDG", 1, {"STG": 3}, which=1, latency=MEMORY),
        Loop("LDG", 6, which=3, latency=L2),
        Loop("LDG", 1, {"STG": 3}, which=3, up=1, latency=MEMORY),
    ]
    read, filled = many * (48 * 12 + 12 * 16.0), beams * (16 + 17.0)
    return [
        CostCase(
            f"ved_evaluate bf16 B={trees} P=12 V=768",
            None,
            [Launch("ved_evaluate_kernelINS_8BFloat16ELi1", rows, 2, moved, {}, evaluate, rows * 48, 18_000)],
            [*expand, Launch("ved_lists", rows, 1, 2 * kept, {}, lists, rows * most)],
        ),
        CostCase(
            f"ved_beams, ved_inputs B={many} P=12",
            None,
            [
                Launch("ved_beams_kernel", many // 4, 4, read, {}, take, beams),
                Launch("ved_inputs_kernel", beams // 128, 4, filled, {"STG": 3}, [], beams),
            ],
            [
                Launch("ved_beams", many, 1, read, {}, triton_take, beams),
                Launch("ved_inputs", beams // 128, 1, filled, {"STG": 12}, [], beams),
            ],
        ),
    ]


CASES = [*_beams(), *_draws(), *_ved()]
