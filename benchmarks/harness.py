"""Interleaved timing: every round times each variant once, so drift of the machine hits all alike."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

import vstar_ops


class Timing(NamedTuple):
    """Seconds a call of each variant (median over rounds) and the ratios of the others to the first."""

    seconds: dict[str, float]
    ratio: dict[str, float]


def compare(
    variants: dict[str, Callable[[], object]], rounds: int = 15, slice_s: float = 0.01, warm: bool = False
) -> Timing:
    """Time variants in turn, ``rounds`` times; each turn repeats its call for about ``slice_s`` seconds.

    The ratio of a variant to the first is the median of the ratios within a round. Short calls repeat
    within a turn, so all variants find their caches warm, as in a decode loop. ``warm`` says that all have
    been called before, and that one call is a slice or more.
    """
    repeats = {}
    for name, call in variants.items():
        repeats[name] = 1
        if warm:
            continue
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, round(slice_s / max(time.perf_counter() - start, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            samples[name].append((time.perf_counter() - start) / repeats[name])
    first = next(iter(samples))
    return Timing(
        {name: statistics.median(times) for name, times in samples.items()},
        {
            name: statistics.median(t / own for t, own in zip(times, samples[first]))
            for name, times in samples.items()
            if name != first
        },
    )


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


def machine() -> str:
    """One line that says what was measured on."""
    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            cpu = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    cores = torch.get_num_threads()
    return f"{cpu}, {cores} threads, torch {torch.__version__}, {vstar_ops.backends()['cpu'].detail}"


class Report:
    """Rows of a table, printed as they come."""

    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []
        print(f"\n{'case':<44} {'against':<34} {'ours':>8} {'other':>8} {'ratio':>7} {'target':>7}")

    def add(self, case: str, timing: Timing, **targets: float) -> None:
        """A line for each variant that ours, the first, is compared with; targets by name, _ for a space."""
        own, *others = timing.seconds
        for name in others:
            target = targets.get(name.replace(" ", "_"))
            ours, other, ratio = timing.seconds[own], timing.seconds[name], timing.ratio[name]
            self.rows.append(
                {"case": case, "against": name, "ours_s": ours, "other_s": other, "ratio": ratio}
            )
            goal = "" if target is None else f"{target:g}x"
            print(
                f"{case:<44} {name:<34} {_seconds(ours):>8} {_seconds(other):>8} {ratio:>6.1f}x {goal:>7}",
                flush=True,
            )


def _seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * scale >= 1:
            return f"{value * scale:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"
