"""``python -m benchmarks.filters``: what it takes to change a filter, and to search under one.

CPU time of one thread. A step and a whole beam search under a filter are compared with the same without one.
Prompts differ, as users' do: requests with one prompt have the same beams until their filters differ, so that
the cache holds all of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from vstar_ops import Trie, expand_topk
from vstar_ops.collect_env import cpu_model
from vstar_ops.decoding import beam_search

from . import harness
from .catalogue import frontiers, made
from .competitors import Bigrams

GOAL = 1.3  # times as long as without a filter
UPDATE_GOAL = 5  # ms, 1 % of a million items
WHOLE, SEARCH = "no filter", "whole search"
SHAPES = ((10**5, 256, 3), (10**6, 256, 3), (10**6, 256, 4), (10**6, 8192, 4))  # items, codes, levels
SIZES = ((1, 16), (1, 128), (64, 16), (64, 128))  # requests, beams

T = TypeVar("T")


class CpuClock(harness.Clock):
    """Counts the time of this thread only: other programs matter less."""

    def once(self, run: Callable[[], Any]) -> float:
        """CPU seconds of a run."""
        start = time.thread_time()
        run()
        return time.thread_time() - start


def ids(trie: Trie, *shape: int) -> Tensor:
    """Random ones."""
    return trie.item_ids[torch.randint(trie.num_items, shape)]


def changes(trie: Trie, users: tuple[int, int], crowd: tuple[int, int], rounds: int) -> harness.Timing:
    """Changes in place, by other items each time. Two sets of requests, and items of each of them."""

    def each_time(change: Callable[[T], None], given: list[T]) -> Callable[[], None]:
        inputs = iter(given)
        change(next(inputs))  # the first call of all finds out where ids are
        return lambda: change(next(inputs))

    one, masked, own, many = (trie.restrict(ban=[[]] * n) for n in (1, 1, users[0], crowd[0]))
    times = range(rounds + 1)
    percent = [trie.item_ids[torch.randperm(trie.num_items)[: trie.num_items // 100]] for _ in times]
    history = [ids(trie, *users) for _ in range(rounds + 2)]
    swaps = list(zip(history, history[1:]))
    few, theirs, others = (
        f"{len(percent[0]):,} items",
        *("{:,} requests, {} items each".format(*x) for x in (users, crowd)),
    )
    calls = {
        f"update(ban=...), {few}": each_time(lambda x: one.update(ban=x), percent),
        f"update(allow=...), {few}": each_time(lambda x: one.update(allow=x), percent),
        f"reset(ban=...), {theirs}": each_time(lambda x: own.reset(ban=x), history),
        f"update(allow=last, ban=next), {theirs}": each_time(
            lambda x: own.update(allow=x[0], ban=x[1]), swaps
        ),
        f"reset(ban=...), {others}": each_time(
            lambda x: many.reset(ban=x), [ids(trie, *crowd) for _ in times]
        ),
        "reset(allow=mask), one mask of all items": each_time(
            lambda x: masked.reset(allow=x), [torch.rand(trie.num_items) < 0.5 for _ in times]
        ),
    }
    return CpuClock().interleave({x: harness.Sample(call, 1) for x, call in calls.items()}, rounds)


def filters(trie: Trie, batch: int) -> dict[str, Trie]:
    """None, small ones and large ones, of all requests and of each."""
    found = {
        WHOLE: trie,
        "200 items banned": trie.restrict(ban=ids(trie, 200)),
        "half of all allowed": trie.restrict(allow=torch.rand(trie.num_items) < 0.5),
    }
    if batch > 1:
        found["200 banned of each request"] = trie.restrict(ban=ids(trie, batch, 200))
        found["half allowed of each request"] = trie.restrict(allow=torch.rand(batch, trie.num_items) < 0.5)
    return found


def searches(
    report: harness.Report, name: str, trie: Trie, columns: int, sizes: tuple[int, int], rounds: int
) -> None:
    """Steps from the beams that random logits leave, and a whole search with a model that costs little."""
    batch, width = sizes
    views, seed = filters(trie, batch), torch.seed()
    beams = {}
    for x, view in views.items():
        torch.manual_seed(seed)  # the same logits
        beams[x] = frontiers(view, batch, width, columns)

    def step(view: Trie, depth_beams: tuple[Tensor, Tensor], logits: Tensor, _: int) -> Any:
        return expand_topk(logits, view, depth_beams[0], width, cum_logp=depth_beams[1])

    def compare(case: str, calls: dict[str, Callable[[int], Any]]) -> None:
        clock = CpuClock()
        timing = clock.interleave({x: clock.sample(call) for x, call in calls.items()}, rounds)
        report.add(f"{name}, {case}", timing, dict.fromkeys(calls, GOAL))

    for depth in range(trie.length):
        logits = torch.randn(batch, beams[WHOLE][depth][0].shape[1], columns)
        compare(
            f"depth {depth}, B={batch} W={width}",
            {x: partial(step, view, beams[x][depth], logits) for x, view in views.items()},
        )
    model, context = Bigrams(columns), torch.randint(columns, (batch,))
    calls = {x: lambda _, view=view: beam_search(model, context, view, width) for x, view in views.items()}
    for x, view in views.items():
        found = calls[x](0)
        there = found.node >= 0
        reached = view.lookup(found.sequence.clamp(min=0))
        assert torch.equal(reached[there], found.node[there]), f"{x}: beam_search finds what is not allowed"
    compare(f"{SEARCH}, B={batch} W={width}", calls)


def main() -> None:
    """Parse the options, measure, print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.filters", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="small shapes, to check this program")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    simd = torch.ops.vstar_ops.simd_level()
    print(f"{cpu_model()}, {simd}, 1 thread, torch {torch.__version__}")
    shapes, sizes = (((1000, 16, 3),), ((1, 4), (3, 4))) if args.small else (SHAPES, SIZES)
    users, crowd = ((3, 5), (7, 2)) if args.small else ((64, 200), (1024, 50))
    tries = {shape: Trie.from_sequences(made(*shape)) for shape in shapes}
    names = {shape: "{:,} items of {}^{}".format(*shape) for shape in shapes}
    for shape in shapes if args.small else ((10**6, 256, 3), (10**6, 8192, 4)):
        print(f"\n{names[shape]}")
        timing = changes(tries[shape], users, crowd, args.rounds)
        for what in timing.rounds:
            goal = f"  goal {UPDATE_GOAL} ms" if what.startswith("update") and "requests" not in what else ""
            print(f"  {what:<64} {1e3 * timing.seconds(what):>8.2f} ms{goal}", flush=True)
    report = harness.Report()
    for shape in shapes:
        for size in sizes:
            searches(report, names[shape], tries[shape], shape[1], size, args.rounds)
    print(f"\nthe largest ratios; the goal is {GOAL}x")
    for whole in (False, True):
        rows: list[dict[str, Any]] = [x for x in report.rows if (SEARCH in str(x["case"])) == whole]
        most = max(rows, key=lambda row: row["ratio"])
        what = SEARCH if whole else "one step"
        print(f"  {what}: {harness.times(most['ratio'])} ({most['case']}, {most['against']})")


if __name__ == "__main__":
    main()
