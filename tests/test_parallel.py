"""Training on two processes is training on one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import distributed

from vstar_ops.train import checkpoint

ROOT = Path(__file__).resolve().parent.parent
ALONE = [sys.executable, "-m", "vstar_ops.train"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
TOGETHER = [*TORCHRUN, "-m", "vstar_ops.train"]
# Batches of 13 are shares of 7 and 6, and of 40 requests one is left over: nothing for the second process.
# Dropout is each process' own.
OPTIONS = "--category Toy --threads 1 --dropout 0 --sft-epochs 3 --rl-steps 8 --sft-batch-size 13"
OPTIONS += " --rl-batch-size 13 --candidates 6 --checkpoint-every 1 --sft-evals 2 --rl-evals 2 --patience 9"
OPTIONS += " --ved child_values=true evaluate_leaves=true logp_weight=1.0 --decoder ved --objective joint"
STAGES = ("sft", "ved+joint")

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="this torch is without gloo")


def start(command: list[str], data: Path, *options: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([*command, *options], cwd=data, env=environment, **pipes)


def finish(process: subprocess.Popen[bytes]) -> str:
    output = process.communicate(timeout=240)[0].decode()
    assert process.returncode == 0, output
    return output


def test_two_processes_give_the_result_of_one(toy: Path, tmp_path: Path) -> None:
    alone, together, resumed = (tmp_path / name for name in ("alone", "together", "resumed"))
    options = ["--data", str(toy), *OPTIONS.split()]
    finish(start(ALONE, toy, *options, "--out", str(alone)))
    output = finish(start(TOGETHER, toy, *options, "--out", str(together)))
    assert output.count("results.md") == 1  # one process writes
    assert sorted(p.name for p in together.rglob("*")) == sorted(p.name for p in alone.rglob("*"))

    # Begun by one process and killed, ended by two.
    process = start(ALONE, toy, *options, "--out", str(resumed))
    path, deadline = resumed / "seed-0" / "ved+joint.pt", time.monotonic() + 240
    while not path.exists() or checkpoint.load(path)["now"]["step"] < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert checkpoint.load(path)["now"]["step"] < 8
    finish(start(TOGETHER, toy, "--resume", str(resumed)))

    for run in (together, resumed):
        for stage in STAGES:
            want, got = (checkpoint.read_metrics(r / "seed-0" / f"{stage}.jsonl") for r in (alone, run))
            assert len(want) == len(got)
            for a, b in zip(want, got):
                for record in (a, b):
                    record.pop("seconds", None)
                assert b.pop("valid", {}) == pytest.approx(a.pop("valid", {}), rel=1e-4, abs=1e-5)
                assert b == pytest.approx(a, rel=1e-4, abs=1e-5)
            want, got = (
                torch.load(r / "seed-0" / f"{stage}.weights.pt", weights_only=True) for r in (alone, run)
            )
            for name, weight in want.items():
                torch.testing.assert_close(got[name], weight, rtol=1e-3, atol=1e-4, msg=name)
