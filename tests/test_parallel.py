"""Training on two processes is training on one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import distributed
from toy_data import TOGETHER, finish, kill_at, start, steps_done, untimed, weights

# Batches of 13 are shards of 7 and 6, and of 40 requests one is left over: nothing for the second process.
# Dropout is each process' own.
OPTIONS = "--category Toy --threads 1 --dropout 0 --sft-epochs 3 --rl-steps 8 --sft-batch-size 13"
OPTIONS += " --rl-batch-size 13 --candidates 6 --checkpoint-every 1 --sft-evals 2 --rl-evals 2 --patience 9"
OPTIONS += " --ved child_values=true evaluate_leaves=true logp_weight=1.0 --decoder ved --objective joint"
STAGES = ("sft", "ved+joint")

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="this torch is without gloo")


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(toy: Path, tmp_path: Path) -> None:
    alone, together, resumed = (tmp_path / name for name in ("alone", "together", "resumed"))
    options = ["--data", str(toy), *OPTIONS.split()]
    finish(start(toy, *options, "--out", str(alone)))
    output = finish(start(toy, *options, "--out", str(together), launcher=TOGETHER))
    assert output.count("results.md") == 1  # one process writes
    assert sorted(p.name for p in together.rglob("*")) == sorted(p.name for p in alone.rglob("*"))

    # Begun by one process and killed, ended by two.
    kill_at(start(toy, *options, "--out", str(resumed)), resumed, "ved+joint", 2)
    assert steps_done(resumed, "ved+joint") < 8
    finish(start(toy, "--resume", str(resumed), launcher=TOGETHER))

    for run in (together, resumed):
        for stage in STAGES:
            want, got = untimed(alone, stage), untimed(run, stage)
            assert len(want) == len(got)
            for a, b in zip(want, got):
                assert b.pop("valid", {}) == pytest.approx(a.pop("valid", {}), rel=1e-4, abs=1e-5)
                assert b == pytest.approx(a, rel=1e-4, abs=1e-5)
            got = weights(run, stage)
            for name, weight in weights(alone, stage).items():
                torch.testing.assert_close(got[name], weight, rtol=1e-3, atol=1e-4, msg=name)


SPOILED = """
import sys
import torch
from pathlib import Path
from vstar_ops.train import __main__, supervised, trainer

calls, legal_logp, close = 0, supervised.legal_logp, trainer._State.close

def spoiled(*arguments):
    global calls
    calls += 1
    logp, mean = legal_logp(*arguments)
    second = torch.distributed.get_rank() == 1
    return logp * (torch.inf if calls == 3 and second else 1), mean

def closed(self):
    folder, rank = self.path.parent.parent, torch.distributed.get_rank()
    torch.save(self.model.state_dict(), folder / f"{self.path.stem}-{rank}.now")
    close(self)

supervised.legal_logp, trainer._State.close = spoiled, closed
__main__.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_step_that_one_process_spoils_is_skipped_by_both(toy: Path, tmp_path: Path) -> None:
    script, run = tmp_path / "spoiled.py", tmp_path / "run"
    script.write_text(SPOILED)
    options = ["--data", str(toy), *OPTIONS.split(), "--rl-steps", "1", "--out", str(run)]
    finish(start(toy, *options, launcher=TOGETHER, module=(str(script),)))
    skipped = [r["step"] for r in untimed(run, "sft") if "skipped" in r]
    assert skipped == [3]
    first, second = (torch.load(run / f"sft-{rank}.now") for rank in (0, 1))
    for name, weight in first.items():
        assert torch.equal(weight, second[name]) and weight.isfinite().all()
