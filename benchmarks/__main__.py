"""``python -m benchmarks``: time every op against torch, after checking that both agree.

Beside a time stands the pace at which it moves what any implementation must read and write, its share of a
copy's bandwidth (above 100 % where the caches hold a case), and the memory that a call takes at its peak.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._inductor.exc import InductorError

from vstar_ops import Trie
from vstar_ops._files import replacing

from . import base, harness
from .cases import Case, cases

# How many times as fast as another variant ours should be; the names of cases begin like this.
TARGETS = (
    ("expand_topk legal depth 1 fp32 B=64 W=16 V=768", "gather, log_softmax, top-k", 8.0),
    ("expand_topk legal depth 2", "gather, log_softmax, top-k", 14.0),
    ("expand_topk vocab", "log_softmax, top-k", 6.0),
    ("sibling_advantage", "unique, index_add", 40.0),
    ("token_logp fp32", "reading twice, writing once", 0.5),
    ("token_logp legal", "ours, all columns", 50.0),
    ("expand_topk legal depth 1, two threads", "one thread", 1.6),
)
COMPILED = "torch.compile of the last"


def two_threads(case: Case) -> Case:
    """A case on two threads and on one."""

    def on(threads: int) -> Callable[..., Any]:
        def call(*inputs: Any) -> Any:
            torch.set_num_threads(threads)
            return case.variants["ours"](*inputs)

        return call

    name = "expand_topk legal depth 1, two threads"
    return replace(case, name=name, variants={"ours": on(2), "one thread": on(1)})


def compiled(case: Case) -> Case:
    """With ``torch.compile`` of the last variant, where a compiler is at hand."""
    torch._dynamo.reset()
    variant = torch.compile(list(case.variants.values())[-1], dynamic=False)
    try:
        case.run(variant)
    except InductorError as error:
        print(f"{case.name}: no torch.compile: {str(error).strip().splitlines()[0]}")
        return case
    return replace(case, variants={**case.variants, COMPILED: variant})


def measure(case: Case, clock: harness.Clock, rounds: int) -> harness.Timing:
    """Check a case and time it."""
    case.check()
    variants = {**case.variants, **case.others}
    samples = {name: clock.sample(partial(case.run, f), calls=case.calls) for name, f in variants.items()}
    several = min(rounds, 7) if case.name.startswith("token_logp") else rounds  # a call takes a second
    return clock.interleave(samples, several, case.reset)


def against_torch(
    makers: Iterable[Callable[[], Case]], args: Any, clock: harness.Clock, report: harness.Report
) -> float:
    """A block for each case. Returns the bandwidth of a copy."""
    bandwidth = harness.copy_bandwidth(clock, "cpu", 2**24 if args.small else 2**28)
    print(f"a copy moves {bandwidth / 1e9:.3g} GB/s, read and written")
    for make in makers:
        case = make()
        case = compiled(case) if case.compiled and not args.no_compile else case
        timing, moved = measure(case, clock, args.rounds), case.bytes()
        costs = {}
        for name in timing.rounds:
            peak = harness.peak_memory(partial(case.run, {**case.variants, **case.others}[name]))
            pace = moved / timing.seconds(name) if name in case.variants else None
            costs[name] = harness.Cost(pace, pace and pace / bandwidth, peak)
        targets = {name: target for start, name, target in TARGETS if case.name.startswith(start)}
        report.add(case.name, timing, targets, costs)
    return bandwidth


def main() -> None:
    """Parse the options, run all cases, print the table, write it where asked."""
    parser = harness.parser("benchmarks", __doc__, rounds=25)
    parser.add_argument("--alternate", action="store_true", help="one call a turn: others empty the caches")
    parser.add_argument("--base", metavar="REV", help="compare with this commit instead, and not with torch")
    parser.add_argument("--only", default="", help="what begins so among the makers of cases: expand_legal")
    parser.add_argument("--small", action="store_true", help="small shapes, to check this program")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes long")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()

    header, _, sequences, _ = harness.start(args)
    report, clock = harness.Report(), harness.Clock(slice_s=0.0 if args.alternate else 0.01)
    all_cases = list(enumerate(cases("small" if args.small else "cpu", sequences)))
    names = dict.fromkeys(make.__name__.partition(" ")[0] for _, make in all_cases)
    makers = {i: make for i, make in all_cases if make.__name__.startswith(args.only)}
    if not makers:
        parser.error(f"--only: expected the beginning of one of {', '.join(names)}, got {args.only!r}")
    found: dict[str, Any] = {"machine": header, "rows": report.rows}
    if args.base:
        try:
            with base.built(args.base) as (commit, root):
                base.compare(args, list(makers), commit[:12], root, report)
        except base.CannotCompare as error:
            parser.error(str(error))
        found["base"] = commit
    else:
        found["bandwidth"] = against_torch(makers.values(), args, clock, report)
        if not (args.only or args.small):
            case = two_threads(cases("cpu", sequences)[0]())
            report.add(case.name, measure(case, clock, args.rounds), {TARGETS[-1][1]: TARGETS[-1][2]})
            torch.set_num_threads(1)
            rows = torch.randint(0, 2048, (1_000_000, 4))
            seconds = clock.once(lambda: Trie.from_sequences(rows))
            print(f"Trie.from_sequences, 1,000,000 x 4 over 2,048 codes: {seconds:.2f} s (target 3 s)")
    if args.json:
        with replacing(args.json) as path:
            path.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
