"""What the programs share: options, interleaved timing, and the table of ratios.

Every round times each variant once, so drift of the machine hits all alike.
"""

from __future__ import annotations

import argparse
import ctypes
import math
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
    module = vstar_ops.backends()["cpu"]
    if not module.available:
        raise SystemExit(f"without the C++ backend there is nothing to measure: {module.detail}")
    name, sequences, prompts = catalogue.load(args.data, args.category)
    trie = Trie.from_sequences(sequences)
    cpu = f"{cpu_model()}, {torch.get_num_threads()} threads"
    header = f"{cpu}, torch {torch.__version__}, {module.detail}; catalogue: {name}, {trie}"
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
        return statistics.median(self._ratios(name, to))

    def interval(self, name: str, to: str) -> tuple[float, float]:
        """A 95 % interval of that median, by ranks (sign test); all ratios where rounds are few."""
        ratios, below, rank = sorted(self._ratios(name, to)), 0, 0
        while below + math.comb(len(ratios), rank) <= 0.025 * 2 ** len(ratios):
            below, rank = below + math.comb(len(ratios), rank), rank + 1
        return ratios[max(rank, 1) - 1], ratios[-max(rank, 1)]

    def _ratios(self, name: str, to: str) -> list[float]:
        return [x / y for x, y in zip(self.rounds[name], self.rounds[to], strict=True)]


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


def copy_bandwidth(clock: Clock, device: str, size: int) -> float:
    """Bytes per second, read and written, of a copy that no cache holds."""
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy = Sample(lambda: target.copy_(source), 1)
    return 2 * size / clock.interleave({"copy": copy}, 20).seconds("copy")


def peak_memory(call: Callable[[], object]) -> int | None:
    """Bytes by which the process grew at most during a call, in whole pages; None where nobody tells.

    The first call of its kind counts the code that it loads.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)  # or a call may use what others have left
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


class Cost(NamedTuple):
    """What a variant did beside taking time; None for what is not known."""

    bytes_per_second: float | None = None
    bandwidth_share: float | None = None
    peak: int | None = None

    def __str__(self) -> str:
        pace = "" if self.bytes_per_second is None else f"{self.bytes_per_second / 1e9:.2f} GB/s"
        share = "" if self.bandwidth_share is None else f"{100 * self.bandwidth_share:.0f} %"
        peak = "" if self.peak is None else f"{self.peak / 1e6:.2f} MB"
        return f"{pace:>10} {share:>6} {peak:>9}"


class Report:
    """Rows of a table, printed as they come: for each case a line per variant."""

    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []
        head = f"{'variant':<36} {'time':>8} {'':>10} {'of copy':>6} {'peak':>9}"
        print(f"\n{head} {'ratio':>7} {'95 % interval':>16} {'target':>7}")

    def add(
        self,
        case: str,
        timing: Timing,
        targets: Mapping[str, float] | None = None,
        costs: Mapping[str, Cost] | None = None,
    ) -> None:
        """The first variant, and each of the others compared with it."""
        targets, costs = targets or {}, costs or {}
        own, *others = timing.rounds
        ours = timing.seconds(own)
        print(case)
        print(f"  {own:<34} {_seconds(ours):>8} {costs.get(own, Cost())}".rstrip(), flush=True)
        first = {"case": case, "ours_s": ours, **_known("ours", costs.get(own))}
        if not others:
            self.rows.append(first)
        for name in others:
            other, ratio, interval = timing.seconds(name), timing.ratio(name, own), timing.interval(name, own)
            row = {**first, "against": name, "other_s": other, "ratio": ratio, "interval": interval}
            self.rows.append({**row, **_known("other", costs.get(name))})
            target = f"{targets[name]:g}x" if name in targets else ""
            figures = f"{times(ratio):>7} {' to '.join(map(times, interval)):>16} {target:>7}"
            line = f"  {name:<34} {_seconds(other):>8} {costs.get(name, Cost())} {figures}"
            print(line.rstrip(), flush=True)


def times(ratio: float) -> str:
    """``12.3x``"""
    return f"{ratio:.0f}x" if ratio >= 99.95 else f"{ratio:.3g}x"


def _known(side: str, cost: Cost | None) -> dict[str, object]:
    """The entries of a row."""
    found = cost._asdict() if cost else {}
    return {f"{side}_{name}": value for name, value in found.items() if value is not None}


def _seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * scale >= 0.9995:  # which three digits round to 1
            return f"{value * scale:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"
