"""``python -m benchmarks.scale``: a catalogue of ten million items, from its sequences to its steps.

Time and memory to build it, to write it, to map it; the time of a step at every depth, in all and per legal
child, beside a step whose columns are all legal. ``--items 30_000_000`` needs about 4 GB.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vstar_ops import Trie, expand_topk
from vstar_ops._files import replacing
from vstar_ops.collect_env import cpu_model

from . import harness
from .catalogue import frontiers, made

BATCH, WIDTH = 16, 128


def timed(what: str, call: Callable[[], Any], found: dict[str, Any]) -> Any:
    """The result; prints and notes the time, and how much the process grew at most."""
    result = []
    clock, seconds = harness.Clock(), []
    peak = harness.peak_memory(lambda: seconds.append(clock.once(lambda: result.append(call()))))
    found[what] = {"seconds": seconds[0], "peak": peak}
    grew = "" if peak is None else f", {peak / 1e6:,.0f} MB more at the peak"
    print(f"{what}: {seconds[0]:.3g} s{grew}", flush=True)
    return result[0]


def steps(trie: Trie, codes: int, rounds: int) -> list[dict[str, Any]]:
    """A step at every depth but the root's, beside one of a single node with as many children as columns."""
    logits = torch.randn(BATCH, WIDTH, codes)
    dense = Trie.from_sequences(torch.arange(codes)[:, None])
    root, zero = torch.zeros(BATCH, WIDTH, dtype=torch.int32), torch.zeros(BATCH, WIDTH)
    places = {"all columns legal": (dense, root, zero)}
    for depth, (node, cum_logp) in list(enumerate(frontiers(trie, BATCH, WIDTH, codes)))[1:]:
        places[f"depth {depth}"] = (trie, node, cum_logp)

    def step(place: tuple[Trie, Tensor, Tensor], _: int = 0) -> Any:
        tree, node, cum_logp = place
        return expand_topk(logits, tree, node, WIDTH, cum_logp=cum_logp)

    clock = harness.Clock()
    samples = {name: clock.sample(partial(step, place)) for name, place in places.items()}
    samples["reading the logits"] = clock.sample(lambda _: logits.sum())
    timing = clock.interleave(samples, rounds)
    children = {name: int(tree.num_children(node).sum()) for name, (tree, node, _) in places.items()}
    children["reading the logits"] = logits.numel()
    return [{"step": x, "seconds": timing.seconds(x), "children": children[x]} for x in samples]


def main() -> None:
    """Build, write, map, expand; print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--items", type=int, default=10**7, help="default: %(default)s")
    parser.add_argument("--codes", type=int, default=8192, help="per level (default: %(default)s)")
    parser.add_argument("--length", type=int, default=4, help="levels (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    machine = f"{cpu_model()}, 1 thread, torch {torch.__version__}"
    print(machine)
    found: dict[str, Any] = {"machine": machine, "items": args.items}
    items = made(args.items, args.codes, args.length)
    print(f"sequences: {items.nbytes / 1e6:,.0f} MB")
    trie = timed("build", partial(Trie.from_sequences, items), found)
    del items
    size = sum(x.nbytes for x in (trie.offset, trie.token, trie.item_offset, trie.item_ids))
    print(f"{trie}\n{size / 1e6:,.0f} MB, {size / args.items:.1f} bytes per item")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "catalogue")
        timed("write", lambda: trie.save(path), found)
        found["bytes"] = size
        del trie
        trie = timed("map", lambda: Trie.load(path, verify=False), found)
        timed("map, and check the sum", lambda: Trie.load(path), found)
        found["steps"] = steps(trie, args.codes, args.rounds)
    print(f"a step of B={BATCH} W={WIDTH} V={args.codes:,} K={WIDTH}")
    for row in found["steps"]:
        each = f"{1e9 * row['seconds'] / row['children']:>8.2f} ns each"
        print(f"  {row['step']:<20} {1e3 * row['seconds']:>8.3f} ms {row['children']:>12,} children {each}")
    if args.json:
        with replacing(args.json) as path:
            path.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
