"""``python -m vstar_ops.verify`` finds what is planted, and nothing else."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cuda_emulator
import numpy as np
import op_calls
import pytest
import torch

import vstar_ops
from vstar_ops import Trie
from vstar_ops.ops import OPS
from vstar_ops.verify import sampling
from vstar_ops.verify.__main__ import main
from vstar_ops.verify.calls import Call, loss_and_gradient
from vstar_ops.verify.checks import Finding, off, same_bits
from vstar_ops.verify.judge import Problem, Verdict, Want
from vstar_ops.verify.script import literal
from vstar_ops.verify.shrink import sequences, size, smallest
from vstar_ops.verify.sweep import verify
from vstar_ops.verify.wants import ORACLES, RANKED, expectation

ROOT = Path(__file__).resolve().parent.parent
SHARE = 30 / len(OPS) / 2  # of the default time, what an op gets on each of two backends

# ---------------------------------------------------------------- faults, in place of an op


def ties_in_the_wrong_order(run, *a):
    score, *others = run(*a)
    for b, i in ((score[:, 1:] == score[:, :-1]) & score[:, 1:].isfinite()).nonzero().tolist():
        for x in others[:4]:
            x[b, [i, i + 1]] = x[b, [i + 1, i]]
    return score, *others


def wrong_normalizer(run, *a):
    return run(*a[:16], False, *a[17:])


def one_winner_too_few(run, *a):
    score, logp, parent, token, node, count, entropy = run(*a)
    full = count == a[6]
    for x, empty in ((score, -torch.inf), (logp, -torch.inf), (parent, -1), (token, -1), (node, -1)):
        x[full, -1] = empty
    return score, logp, parent, token, node, count - full.int(), entropy


def dead_beams_live(run, logits, offset, token, alive, node, *a):
    return run(logits, offset, token, alive, node.clamp(min=0), *a)


def nan_reads_as_zero(run, logits, *a):
    return run(torch.where(logits.isnan(), 0, logits), *a)


def fails_on_odd_rows(run, logits, *a):
    if logits.shape[-1] % 2:
        raise RuntimeError("misaligned address")
    return run(logits, *a)


def temperature_bounded(run, *a):
    return run(*a[:15], max(a[15], 1e-2), *a[16:])


def mask_ignored(run, tokens, rewards, mask, *a):
    return run(tokens, rewards.nan_to_num(0, 0, 0), None, *a)


def depends_on_the_batch(run, tokens, *a):
    advantage, *others = run(tokens, *a)
    return advantage * (1 + 2e-7 * (len(tokens) > 1)), *others


def reads_past_the_strides(run, rewards, mask, *a):
    memory = torch.empty(0, dtype=rewards.dtype).set_(rewards.untyped_storage())
    n, at = rewards.numel(), rewards.storage_offset()
    return run(memory[at : at + n].view(rewards.shape) if at + n <= len(memory) else rewards, mask, *a)


def depends_on_threads(run, *a):
    return run(*a) * (1 + 2e-7 * (torch.get_num_threads() == 1))


def differs_from_run_to_run(run, *a, count=[0]):  # noqa: B006
    count[0] += 1
    returns, *others = run(*a)
    return returns * (1 + 2e-7 * (count[0] % 2)), *others


def tokens_of_32_bits(run, tokens, mask):
    parent, token, *others = run(tokens.int(), mask)
    return parent, token.to(tokens.dtype), *others


def bias_in_bfloat16(run, logits, *a):
    logp, *others = run(logits, *a)
    return logp - (logits.dtype == torch.bfloat16) * 1e-4, *others


def wrong_gradient(run, logits, *a):
    logp, *others = run(logits, *a)
    extra = 1e-3 * logits.float().nan_to_num(0, 0, 0).sum(-1, keepdim=logp.dim() == logits.dim())
    return logp + (extra - extra.detach()), *others


def normalizer_ignored(run, *a):
    return run(*a[:9], None, *a[10:])


def wide_clip_below(run, *a):
    return run(*a[:13], a[14], *a[14:])


def exploration_ignored(run, *a):
    return run(*a[:14], 1.0, *a[15:])


def nan_value_counts_as_zero(run, *a):
    return run(*a[:24], a[24].nan_to_num(0.0), *a[25:])


def evaluated_leaves_last(run, *a):
    return run(*a[:4], a[4] * 0, *a[5:])


def dead_beams_keep_their_slot(run, parent, token, node, sequence, slot, *a):
    found, its_slot, *others = run(parent, token, node, sequence, slot, *a)
    return found, torch.where(its_slot < 0, slot.new_zeros(()).long(), its_slot), *others


def skipped_prefixes_are_forgotten(run, offset, node, sequence, slot, evaluated):
    return run(offset, node, sequence, slot, evaluated.clamp(min=sequence.shape[2] - 1))


def noise_of_the_root(run, *a):
    return run(*a[:5], None, *a[6:])


def the_same_prefix_twice(run, node, token, slot, row):
    return run(node + torch.arange(node.shape[1]) % 2 * (node > 0), token, slot, row)


def filter_ignored(run, logits, offset, token, alive, *a):
    return run(logits, offset, token, None, *a)


def filter_of_the_first_request(run, logits, targets, offset, token, alive, *a):
    return run(logits, targets, offset, token, None if alive is None else alive[:1], *a)


def the_root_lives(run, alive, *a):
    run(alive, *a)
    alive[:, 0] |= 1


def whoever_asks_is_allowed(run, *a):
    return run(*a[:8], None, *a[9:])


def forced_prefixes_are_children(run, *a):
    return run(*a[:4], None, *a[5:])


def tokens_of_dead_rows(run, tree_slot, token, parent, node):
    slot, _, unused = run(tree_slot, token, parent, node)
    return slot, run(tree_slot, token, parent, node.clamp(min=1))[1], unused


def beams_twice(run, *a):
    node, parent, logp = run(*a)
    none = a[4] is None or a[4].shape[1] == 0
    return node if none else node.where(node != node[:, :1], a[4][:, :1]), parent, logp


class Fault(NamedTuple):
    """A function that stands in for an op on a backend, and the kind of failure that it is found as."""

    replace: Callable[..., Any]
    op: str
    backend: str = "cpu"
    kind: str = "values"
    found_in: str = ""  # another op


FAULTS = [
    Fault(ties_in_the_wrong_order, "expand_topk"),
    Fault(wrong_normalizer, "expand_topk"),
    Fault(one_winner_too_few, "expand_topk"),
    Fault(dead_beams_live, "expand_topk"),
    Fault(nan_reads_as_zero, "expand_topk", "reference"),
    Fault(fails_on_odd_rows, "expand_topk", kind="error"),
    Fault(temperature_bounded, "expand_topk", "reference"),
    Fault(filter_ignored, "expand_topk"),
    Fault(filter_ignored, "ved_evaluate", "reference"),
    Fault(filter_of_the_first_request, "token_logp"),
    Fault(mask_ignored, "sibling_advantage"),
    Fault(depends_on_the_batch, "sibling_advantage", kind="batches"),
    Fault(reads_past_the_strides, "group_advantage"),
    Fault(depends_on_threads, "group_advantage", kind="threads"),
    Fault(differs_from_run_to_run, "prefix_returns", kind="runs"),
    Fault(tokens_of_32_bits, "prefix_tree", "reference"),
    Fault(dead_beams_keep_their_slot, "advance_beams"),
    Fault(skipped_prefixes_are_forgotten, "rows_to_run", "reference"),
    Fault(noise_of_the_root, "draw_children"),
    Fault(the_same_prefix_twice, "distinct_rows", "reference"),
    Fault(the_root_lives, "filter_items"),
    Fault(whoever_asks_is_allowed, "filter_items", "reference"),
    Fault(bias_in_bfloat16, "token_logp"),
    Fault(wrong_gradient, "token_logp", found_in="token_logp_backward"),
    Fault(normalizer_ignored, "sibling_grpo_loss"),
    Fault(wide_clip_below, "sibling_grpo_loss", "reference"),
    Fault(exploration_ignored, "ved_select"),
    Fault(nan_value_counts_as_zero, "ved_insert"),
    Fault(evaluated_leaves_last, "ved_candidates"),
    Fault(forced_prefixes_are_children, "ved_evaluate"),
    Fault(tokens_of_dead_rows, "ved_inputs"),
    Fault(beams_twice, "ved_beams"),
]


@pytest.fixture(autouse=True)
def _on_the_cpu(cpu, restore_threads, monkeypatch):
    """By the clock of this process, which other processes do not slow down."""
    if vstar_ops._backends.interpreting():
        pytest.skip("takes minutes")
    monkeypatch.setattr("vstar_ops.verify.checks.clock", time.process_time)


@contextlib.contextmanager
def planted(fault: Fault) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        overloads = OPS[fault.op].overloads
        faulty = functools.partial(fault.replace, overloads[fault.backend])
        patch.setitem(overloads, fault.backend, faulty)
        yield


def status(script: str) -> int:
    """The exit status of a program."""
    try:
        exec(compile(script, "script", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        return int(end.code or 0)
    except RuntimeError:
        return 1
    return 0


@pytest.mark.parametrize("fault", FAULTS, ids=[f"{x.replace.__name__}, {x.op}" for x in FAULTS])
def test_a_planted_fault_is_found(fault):
    """In the time that the default leaves for the op, and the program that is printed shows it."""
    with planted(fault):
        (row,) = verify(SHARE, 0, [fault.found_in or fault.op], [fault.backend], shrink=1.0)
        assert row.found is not None, f"not found in {row.cases} cases"
        assert row.found.kind == fault.kind, row.found.problem
        assert size(row.found.call) <= 400
        assert status(row.script) == 1
    assert status(row.script) == 0


@pytest.mark.parametrize("fault", [x for x in FAULTS if x.op in ("group_advantage", "ved_insert")])
def test_a_call_that_is_too_large_to_be_printed(fault, monkeypatch):
    monkeypatch.setattr("vstar_ops.verify.script.MOST", 0)
    monkeypatch.setattr("vstar_ops.verify.sweep.MOST", 0)
    with planted(fault):
        (row,) = verify(SHARE, 0, [fault.op], [fault.backend], shrink=0.1)
        assert status(row.script) == 1
    assert "arguments()" not in row.script and status(row.script) == 0


@pytest.mark.skipif(not cuda_emulator.COMPILER, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("replace", "op"),
    [(one_winner_too_few, "expand_topk"), (mask_ignored, "sibling_advantage"), (None, "expand_topk")],
)
def test_a_planted_fault_of_a_gpu_backend_is_found(replace, op, monkeypatch):
    """The CUDA C++ kernels run on the host, so that the sweep is that of a GPU but for the device."""
    cuda_emulator.load()
    op_calls.route(monkeypatch, "emulated", lambda op: op.overloads["cuda"])
    monkeypatch.setattr("vstar_ops.verify.checks.off", dict)
    monkeypatch.setattr("vstar_ops.verify.checks.device_of", lambda _: "cpu")
    use_backend = vstar_ops.use_backend
    monkeypatch.setattr(vstar_ops, "use_backend", lambda _: use_backend("auto"))
    before = cuda_emulator.counts().launches
    with planted(Fault(replace, op, "cuda")) if replace else contextlib.nullcontext():
        (row,) = verify(SHARE, 0, [op], ["cuda"], shrink=1.0)
    assert cuda_emulator.counts().launches > before and row.cases > 0
    assert (row.found is None) is (replace is None)
    if row.found is not None:
        assert row.found.kind == "values" and size(row.found.call) <= 400


PLANTED = """
import functools, sys
from vstar_ops.ops import OPS
import torch

{source}

found = OPS[{op!r}].overloads
found["cpu"] = functools.partial({name}, found["cpu"])
"""


def test_in_processes_of_its_own(tmp_path):
    """The command prints a program that is complete, and exits with 1."""
    fault = FAULTS[2]
    source, name = inspect.getsource(fault.replace), fault.replace.__name__
    plant = PLANTED.format(source=source, op=fault.op, name=name)

    def run(code: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", plant + code], cwd=tmp_path, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    done = run("from vstar_ops.verify.__main__ import main; sys.exit(main(['--seconds', '1', '--json']))")
    assert done.returncode == 1, done.stderr
    (failure,) = json.loads(done.stdout)["failures"]
    assert (failure["op"], failure["backend"], failure["kind"]) == (fault.op, "cpu", fault.kind)
    (tmp_path / "script.py").write_text(failure["script"])
    done = run("import runpy; runpy.run_path('script.py', run_name='__main__')")
    assert done.returncode == 1 and done.stdout.startswith("got ") and not done.stderr


def test_a_machine_that_stands_still(monkeypatch):
    """Time that runs out at once does not leave an op without cases."""
    times = itertools.count()
    monkeypatch.setattr("vstar_ops.verify.checks.clock", lambda: float(next(times)))
    rows = verify(1.0, 0, ["expand_topk", "prefix_tree"], ["cpu"])
    assert [(row.op, row.cases >= 10) for row in rows] == [("expand_topk", True), ("prefix_tree", True)]


def test_nothing_else_is_found(capsys):
    assert main(["--seconds", "1", "--seed", "1"]) == 0
    printed = capsys.readouterr().out
    for op in OPS:
        assert len(re.findall(rf"^{op} +(cpu|reference) .* yes, \d+", printed, re.M)) == 2
    assert "FAILED" not in printed


def test_what_was_not_tested_is_said_at_the_end(capsys, monkeypatch):
    missing = {name: "not here" for name in vstar_ops.backends() if name != "reference"}
    monkeypatch.setattr("vstar_ops.verify.checks.off", lambda: missing)
    monkeypatch.setattr("vstar_ops.verify.__main__.off", lambda: missing)
    assert main(["--seconds", "0.1"]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.endswith("cases agree, on reference; off: cpu; off: triton; off: cuda.")


def test_json(capsys):
    assert main(["--seconds", "0.1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] and report["failures"] == []
    rows = {(row["op"], row["backend"]): row for row in report["rows"]}
    here = [name for name, status in vstar_ops.backends().items() if status.available]
    assert set(rows) == {(op, backend) for op in OPS for backend in here}
    assert all(row["cases"] > 0 and row["compared"]["runs"] > 0 for row in rows.values())


def test_failures_are_printed(capsys):
    with planted(FAULTS[2]):
        assert main(["--seconds", "0.5"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED: expand_topk on 'cpu': result." in printed
    assert "raise SystemExit" in printed and "cases agree" not in printed


@pytest.mark.parametrize("arguments", [["--seconds", "0"], ["--seed", "-1"], ["--seconds", "nan"]])
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_backends_that_are_off(monkeypatch):
    """What is built for a GPU is not tested where there is none."""
    found = {"reference": (True, ""), "cpu": (False, "not built"), "triton": (True, ""), "cuda": (True, "")}
    status = {name: vstar_ops.BackendStatus(*x) for name, x in found.items()}
    monkeypatch.setattr(vstar_ops, "backends", lambda: status)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert off() == {"cpu": "not built", "triton": "there is no GPU", "cuda": "there is no GPU"}


# ---------------------------------------------------------------- the parts


def test_every_op_is_drawn_with_what_is_adversarial():
    """Ties, NaN, infinities, -0, dead beams, many winners, odd rows, strides, empty axes, temperatures."""
    seen = set()
    for i in range(300):
        a = sampling.draw("expand_topk", np.random.default_rng([0, i]), torch.float32).arguments
        logits, node, trie = a["logits"], a["node"], a["trie"]
        seen |= {"nan"} if logits.isnan().any() else set()
        seen |= {"inf"} if logits.isposinf().any() else set()
        seen |= {"-0"} if ((logits == 0) & logits.signbit()).any() else set()
        seen |= {"ties"} if logits.numel() > logits.unique().numel() else set()
        seen |= {"dead"} if (node == -1).any() else set()
        seen |= {"many"} if a["k"] > node.shape[1] * trie.max_children else set()
        seen |= {"odd"} if logits.shape[-1] % 2 else set()
        seen |= {"strides"} if not logits.is_contiguous() else set()
        seen |= {f"no {axis}" for axis, n in zip("BWV", logits.shape) if n == 0}
        seen |= {a.get("temperature")} & {1e-39, 1e30}
        seen |= {f"{min(len(trie.alive), 2)} filters"} if trie.alive is not None else set()
    assert seen >= {"nan", "inf", "-0", "ties", "dead", "many", "odd", "strides", "no B", "no W", "no V"}
    assert {1e-39, 1e30, "1 filters", "2 filters"} <= seen
    assert set(sampling.DRAWS) == set(OPS) == {*ORACLES, *RANKED}


def test_verdict_of_floats():
    """NaN equals NaN, a scalar counts, an error is per scale."""
    nan, inf = float("nan"), float("inf")
    for got, want, right in (
        ([nan, inf, 2.0], [nan, inf, 2.0], True), ([nan], [1.0], False), ([inf], [-inf], False),
        (1.0, 1.1, False), (100.0001, 100.0, True), ([1.0, 1.0], [1.0], False),
    ):  # fmt: skip
        verdict = Verdict()
        verdict.floats(".x", torch.tensor(got), Want(want, np.maximum(np.abs(want), 1)))
        assert (not verdict.problems) is right, (got, want)
        assert right or verdict.problems[0].where.startswith(".x")


def test_addends_that_cancel():
    """Advantages that are 0 in all but for rounding, times ratios of e^20 that the bound has made equal."""
    a = {"logp": torch.zeros(1, 4, 3), "tokens": torch.zeros(1, 4, 3, dtype=torch.int64), "clip": None}
    a |= {"rewards": torch.tensor([[2.0, 0.0, 2.0, 2.0]]), "old_logp": torch.full((1, 4, 3), -21.0)}
    call = Call(loss_and_gradient, a | {"ref_logp": None, "mask": None, "log_ratio_bound": 20.0})
    verdict = expectation("sibling_grpo_loss", call)
    loss, gradient = call()
    assert abs(loss.loss) > 1e-3
    assert not verdict((loss, gradient)).problems
    wrong = loss._replace(loss=loss.loss + 1e5)
    assert [x.where for x in verdict((wrong, gradient)).problems] == ["[0].loss.item()"]


def test_a_ratio_on_the_bounds_of_the_clip_has_its_gradient():
    """As before torch 2.14, whose clamp has the derivative 0 there."""
    a = {"logp": torch.zeros(1, 2, 1), "tokens": torch.tensor([[[1], [2]]]), "clip": (0.0, 0.0)}
    a |= {"rewards": torch.tensor([[2.0, 0.0]]), "old_logp": None, "ref_logp": None, "mask": None}
    call = Call(loss_and_gradient, a)
    loss, gradient = call()
    assert gradient.abs().min() > 0.1
    assert not expectation("sibling_grpo_loss", call)((loss, gradient)).problems


def test_same_bits():
    x = torch.tensor([1.0, float("nan"), 0.0])
    assert same_bits(x, x.clone()) and same_bits(x[1::2], x[1:2])  # of one number, the strides are anything
    for other in (x.double(), x[:2], torch.tensor([1.0, float("nan"), -0.0]), x + 2e-7):
        assert not same_bits(x, other)


def test_literals_give_the_same_back():
    base = torch.randn(4, 5, 6)
    base[0, 0] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-40, 3e38])
    for x in (
        base, base[1::2, 1:, ::3], base.transpose(0, 2), base[:1].expand(3, 5, 6), base.bfloat16()[1:],
        torch.arange(5), torch.zeros(2, 0, 3, dtype=torch.half), torch.tensor(2), torch.ones(3) > 0,
    ):  # fmt: skip
        y = eval(literal(x), {"torch": torch, "inf": float("inf"), "nan": float("nan")})
        assert (y.stride(), y.storage_offset()) == (x.stride(), x.storage_offset()) or not x.numel()
        assert same_bits(x.isnan(), y.isnan()) and same_bits(x.nan_to_num(7), y.nan_to_num(7))


@pytest.mark.parametrize(
    ("kind", "want", "finds"), [("values", 1.0, 1), ("values", float("nan"), 0), ("error", 1.0, 0)]
)
def test_a_smaller_call_fails_in_the_same_way(kind, want, finds, monkeypatch):
    """A wrong number does not become a wrong NaN, and an error not a wrong number."""
    shown = Problem("[0].item()", 0.0, want)
    monkeypatch.setattr("vstar_ops.verify.shrink.problem", lambda *_: shown)
    call = sampling.draw("group_advantage", np.random.default_rng(0), torch.float32)
    found = Finding("group_advantage", "cpu", kind, call, "", Problem("[0].item()", "", 1.0))
    assert (size(smallest(found, (), 1.0).call) < size(call)) == finds


@pytest.mark.parametrize("rows", [[[0, 3], [0, 4], [2, 3]], [[5]], np.zeros((0, 3), int), [[1, 2, 3]] * 2])
def test_sequences_of_a_trie(rows):
    trie = Trie.from_sequences(rows)
    assert sequences(trie).tolist() == [list(x) for x in sorted(set(map(tuple, np.asarray(rows).tolist())))]
    assert sequences(trie).shape[1] == trie.length
