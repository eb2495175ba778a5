"""A tiny data set in MiniOneRec's layout, and training runs on it in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from vstar_ops.train import checkpoint

ROOT = Path(__file__).resolve().parent.parent
ALONE = (sys.executable,)
TOGETHER = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")

SIDS = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 2), (1, 2, 0), (1, 2, 0), (2, 1, 1), (2, 0, 0)]


def sid(item: int) -> str:
    return "".join(f"<{letter}_{code}>" for letter, code in zip("abc", SIDS[item]))


def write_folder(folder: Path, rows: int = 40) -> Path:
    """A tiny data set in MiniOneRec's layout, where the next item is the last one plus 1."""
    (folder / "index").mkdir(parents=True)
    index = {str(i): [f"<{letter}_{code}>" for letter, code in zip("abc", SIDS[i])] for i in range(8)}
    (folder / "index" / "Toy.index.json").write_text(json.dumps(index, indent=1))
    for split in ("train", "valid", "test"):
        (folder / split).mkdir()
        lines = ["user_id,history_item_title,history_item_sid,item_sid,item_id"]
        for user in range(rows):
            history = [(user + k) % 8 for k in range(1 + user % 4)]
            target = (history[-1] + 1) % 8
            quoted = str([sid(i) for i in history])
            lines.append(f'U{user},"a ""title""\nof two lines","{quoted}",{sid(target)},{target}')
        (folder / split / "Toy_5_2016.csv").write_text("\n".join(lines) + "\n")
    return folder


TRAIN = ("-m", "vstar_ops.train")


def start(
    data: Path, *options: str, launcher: tuple[str, ...] = ALONE, module: tuple[str, ...] = TRAIN
) -> subprocess.Popen[bytes]:
    """``python -m vstar_ops.train`` with these options, one thread per process."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    command = [*launcher, *module, *options]
    return subprocess.Popen(command, cwd=data, env=environment, **pipes)


def finish(process: subprocess.Popen[bytes]) -> str:
    """What a run prints; it must succeed."""
    output = process.communicate(timeout=240)[0].decode()
    assert process.returncode == 0, output
    return output


def steps_done(run: Path, stage: str) -> int:
    """Steps in the checkpoint of a stage of seed 0, -1 without one."""
    path = run / "seed-0" / f"{stage}.pt"
    return checkpoint.load(path)["progress"]["step"] if path.exists() else -1


def kill_at(process: subprocess.Popen[bytes], run: Path, stage: str, step: int) -> None:
    """Kill a run, without warning, as soon as its checkpoint is at ``step`` or later."""
    deadline = time.monotonic() + 240
    while steps_done(run, stage) < step:
        assert process.poll() is None and time.monotonic() < deadline, f"{stage}, step {step} never came"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def untimed(run: Path, stage: str) -> list[dict]:
    """The metrics of a stage of seed 0 without their seconds."""
    records = checkpoint.read_metrics(run / "seed-0" / f"{stage}.jsonl")
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def weights(run: Path, stage: str) -> dict:
    """The final weights of a stage of seed 0."""
    return checkpoint.load(run / "seed-0" / f"{stage}.weights.pt")
