"""``python -m benchmarks``: time every op against torch, after checking that both agree."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vstar_ops import Trie
from vstar_ops._files import replacing

from . import harness
from .cases import Case, cases

# How many times as fast as another variant ours should be; the names of cases begin like this.
TARGETS = (
    ("expand_topk legal depth 1 fp32 B=64 W=16 V=768", "gather, log_softmax, top-k", 8.0),
    ("expand_topk legal depth 2", "gather, log_softmax, top-k", 15.0),
    ("expand_topk vocab", "log_softmax, top-k", 6.0),
    ("sibling_advantage", "unique, index_add", 40.0),
    ("token_logp fp32", "reading twice, writing once", 0.5),
    ("token_logp legal", "ours, all columns", 50.0),
    ("expand_topk legal depth 1, two threads", "one thread", 1.6),
)


def two_threads(case: Case) -> Case:
    """A case on two threads and on one."""

    def on(threads: int) -> Callable[..., Any]:
        def call(*inputs: Any) -> Any:
            torch.set_num_threads(threads)
            return case.variants["ours"](*inputs)

        return call

    name = "expand_topk legal depth 1, two threads"
    return replace(case, name=name, variants={"ours": on(2), "one thread": on(1)})


def measure(case: Case, clock: harness.Clock, rounds: int, report: harness.Report) -> None:
    """Check a case, time it, print its rows."""
    case.check()
    variants = {**case.variants, **case.others}
    samples = {name: clock.sample(partial(case.run, f), calls=case.calls) for name, f in variants.items()}
    several = min(rounds, 7) if case.name.startswith("token_logp") else rounds  # a call takes a second
    targets = {name: target for start, name, target in TARGETS if case.name.startswith(start)}
    report.add(case.name, clock.interleave(samples, several, case.reset), targets)
    if case.name.startswith("token_logp fp32"):
        peak, size = harness.peak_memory(lambda: case.run(case.variants["ours"])), case.inputs[0][0].nbytes
        if peak is not None:
            extra = 100 * (peak - size) / size
            print(f"its memory beyond logits and gradient: {extra:.1f} % of the logits (target at most 5 %)")


def main() -> None:
    """Parse the options, run all cases, print the table, write it where asked."""
    parser = harness.parser("benchmarks", __doc__, rounds=25)
    parser.add_argument("--alternate", action="store_true", help="one call a turn: others empty the caches")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()

    header, _, sequences, _ = harness.start(args)
    report, clock = harness.Report(), harness.Clock(slice_s=0.0 if args.alternate else 0.01)
    for make in cases("cpu", sequences):
        measure(make(), clock, args.rounds, report)
    measure(two_threads(cases("cpu", sequences)[0]()), clock, args.rounds, report)
    torch.set_num_threads(1)
    rows = torch.randint(0, 2048, (1_000_000, 4))
    seconds = clock.once(lambda: Trie.from_sequences(rows))
    print(f"Trie.from_sequences, 1,000,000 x 4 over 2,048 codes: {seconds:.2f} s (target 3 s)")
    if args.json:
        with replacing(args.json) as path:
            path.write_text(json.dumps({"machine": header, "rows": report.rows}, indent=1))


if __name__ == "__main__":
    main()
