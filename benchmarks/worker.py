"""A process that runs the cases for another one, where ``vstar_ops`` of another commit is.

``python -m benchmarks.worker`` reads a request per line and answers with a line, both JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

import vstar_ops

from . import catalogue, harness
from .cases import Case, cases

ROOT = Path(__file__).resolve().parent.parent


class WorkerDied(Exception):
    """Its error is on stderr."""


class Worker:
    """A process of the cases that ``args`` asks for, on one thread, in a folder."""

    def __init__(self, args: argparse.Namespace, root: Path = ROOT) -> None:
        self.root = root
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"], cwd=root,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.ask(data=args.data, category=args.category, small=args.small)

    def ask(self, **request: Any) -> Any:
        """The answer to a request."""
        assert self.process.stdin and self.process.stdout
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self.process.wait()
            self.process.communicate()
            raise WorkerDied(f"the process that runs the cases in {self.root} ended with {code}; see above")
        return json.loads(line)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def digest(case: Case) -> str:
    """Of the bits of the results."""
    found = hashlib.sha256()
    for x in case.results("ours"):
        if x is not None:
            found.update(f"{x.dtype} {tuple(x.shape)}".encode())
            found.update(x.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def main() -> None:
    """Serve until the input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr
    at = Path(vstar_ops.__file__).parent.parent
    assert at == Path.cwd(), f"vstar_ops is imported from {at}, not from {Path.cwd()}"
    torch.set_num_threads(1)
    asked = json.loads(sys.stdin.readline())
    _, items, _ = catalogue.load(asked["data"], asked["category"])
    makers, clock = cases("small" if asked["small"] else "cpu", items), harness.Clock()
    case = sample = None
    print("null", file=answers, flush=True)
    for line in sys.stdin:
        asked, answer = json.loads(line), None
        if "case" in asked:
            case = sample = None  # the memory of the last one
            torch.manual_seed(0)
            try:
                case = makers[asked["case"]]()
                answer = {"name": case.name, "digest": digest(case)}
                call = partial(case.run, case.variants["ours"])
                sample = clock.sample(call, calls=case.calls)
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
        else:
            assert case and sample
            case.reset()
            answer = clock.once(sample.run) / sample.calls
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
