"""What the programs share: options, interleaved timing, and the table of ratios.

Every round times each variant once, so drift of the machine hits all alike.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import vstar_ops
from vstar_ops import Trie
from vstar_ops.collect_env import cpu_model

from . import catalogue

GRAPH_BELOW = 1e-3  # seconds, of the host too; shorter calls are timed without the gaps between launches


def parser(module: str, text: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options of all programs that measure on the CPU."""
    options = argparse.ArgumentParser(prog=f"python -m {module}", description=text)
    options.add_argument("--data", help="folder in MiniOneRec's layout (default: a made catalogue)")
    options.add_argument("--category", default="Industrial_and_Scientific", help="default: %(default)s")
    options.add_argument(
        "--rounds", type=int, default=rounds, help="interleaved rounds (default: %(default)s)"
    )
    return options


def start(args: argparse.Namespace) -> tuple[str, Trie, Tensor, Tensor | None]:
    """One thread, seed 0. Returns a line on what is measured, printed, the trie, items and prompts."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    name, sequences, prompts = catalogue.load(args.data, args.category)
    trie = Trie.from_sequences(sequences)
    cpu = f"{cpu_model()}, {torch.get_num_threads()} threads"
    module = vstar_ops.backends()["cpu"].detail
    header = f"{cpu}, torch {torch.__version__}, {module}; catalogue: {name}, {trie}"
    print(header)
    return header, trie, sequences, prompts


class Sample(NamedTuple):
    """What is timed at once: ``run`` makes ``calls`` calls; by ``clock``, ``events`` or ``graph``."""

    run: Callable[[], Any]
    calls: int
    how: str = "clock"


class Timing(NamedTuple):
    """Seconds per call of each variant in each round."""

    rounds: dict[str, list[float]]

    def seconds(self, name: str) -> float:
        """The median over the rounds."""
        return statistics.median(self.rounds[name])

    def ratio(self, name: str, to: str) -> float:
        """The median of the ratios within a round."""
        return statistics.median(x / y for x, y in zip(self.rounds[name], self.rounds[to], strict=True))


class Clock:
    """Times repeated calls on a device.

    On the CPU a sample repeats its call for about ``slice_s`` seconds: short calls find their caches warm,
    as in a decode loop. On a GPU a sample takes some milliseconds by events, or is the replay of a graph.
    """

    def __init__(self, device: str = "cpu", slice_s: float = 0.01) -> None:
        self.gpu, self.slice_s = device == "cuda", slice_s

    def once(self, run: Callable[[], Any]) -> float:
        """Seconds of a run; on the GPU after everything queued before has ended."""
        if not self.gpu:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def sample(
        self, call: Callable[[int], Any], sets: int = 1, calls: int = 0, graph: bool = False
    ) -> Sample:
        """A sample of ``calls`` calls, 0 for as many as are good for the clock, over ``sets`` input sets."""

        def sweep(calls: int) -> None:
            for i in range(calls):
                call(i % sets)

        sweep(max(3, sets) if self.gpu else 1)  # compiles, fills the allocator
        attempts = 3 if self.gpu else 1
        estimate = min(self.once(partial(sweep, sets)) / sets for _ in range(attempts))
        if not self.gpu:
            calls = calls or max(1, round(self.slice_s / max(estimate, 1e-7)))
            return Sample(partial(sweep, calls), calls)
        if not graph or estimate > 2 * GRAPH_BELOW:
            calls = calls or max(sets, min(200, round(2e-3 / max(estimate, 1e-6))))
            return Sample(partial(sweep, calls), calls, "events")
        captured, calls = torch.cuda.CUDAGraph(), calls or max(sets, 20)
        torch.cuda.synchronize()
        with torch.cuda.graph(captured):
            sweep(calls)
        return Sample(captured.replay, calls, "graph")

    def interleave(
        self, samples: dict[str, Sample], rounds: int, reset: Callable[[], None] = lambda: None
    ) -> Timing:
        """Every sample once per round, after a ``reset``."""
        seconds: dict[str, list[float]] = {name: [] for name in samples}
        for _ in range(rounds):
            for name, sample in samples.items():
                reset()
                seconds[name].append(self.once(sample.run) / sample.calls)
        return Timing(seconds)


def compare(variants: Mapping[str, Callable[[], Any]], rounds: int) -> Timing:
    """Time calls on the CPU that have been made before, and are long enough for the clock."""
    return Clock().interleave({name: Sample(call, 1) for name, call in variants.items()}, rounds)


def peak_memory(call: Callable[[], object]) -> int | None:
    """Bytes by which the process grew at most during a call; None where the system does not tell."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the highest mark so far
    except OSError:
        return None

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

    before = status("VmRSS")
    call()
    return status("VmHWM") - before


class Report:
    """Rows of a table, printed as they come."""

    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []
        print(f"\n{'case':<62} {'against':<34} {'ours':>8} {'other':>8} {'ratio':>7} {'target':>7}")

    def add(self, case: str, timing: Timing, targets: dict[str, float] | None = None) -> None:
        """A line for each variant that the first is compared with, or one for the first alone."""
        own, *others = timing.rounds
        ours = timing.seconds(own)
        if not others:
            self.rows.append({"case": case, "ours_s": ours})
            print(f"{case:<62} {'':<34} {_seconds(ours):>8}", flush=True)
        for name in others:
            other, ratio = timing.seconds(name), timing.ratio(name, own)
            self.rows.append(
                {"case": case, "against": name, "ours_s": ours, "other_s": other, "ratio": ratio}
            )
            target = f"{targets[name]:g}x" if targets and name in targets else ""
            figures = f"{_seconds(ours):>8} {_seconds(other):>8} {ratio:>6.1f}x {target:>7}"
            print(f"{case:<62} {name:<34} {figures}", flush=True)


def _seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * scale >= 1:
            return f"{value * scale:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"
