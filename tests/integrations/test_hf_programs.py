"""The examples of the docstrings, those of ``examples/``, and the benchmark."""

from __future__ import annotations

import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from needs import needs

needs("transformers")

from plain import TRIE
from tiny import CAUSAL, VOCAB

import vstar_ops
from vstar_ops.decoding import beam_search
from vstar_ops.integrations import transformers as package

ROOT = Path(__file__).resolve().parents[2]
MODULES = ("", ".eos", ".head", ".logits", ".value")


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name, tmp_path):
    torch.manual_seed(0)
    names = {
        "torch": torch,
        "vstar_ops": vstar_ops,
        "beam_search": beam_search,
        **{name: getattr(package, name) for name in package.__all__},
        "model": CAUSAL["qwen2"](),
        "trie": TRIE,
        "input_ids": torch.randint(70, VOCAB, (2, 6)),
        "path": tmp_path / "head.safetensors",
    }
    if name == ".head":  # its token ids are of a larger vocabulary
        names["model"].resize_token_embeddings(1000)
    module = importlib.import_module(package.__name__ + name)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in doctest.DocTestFinder().find(module, globs=names):
        runner.run(test)
    assert runner.summarize().failed == 0
    assert runner.tries > 0


def run(*command):
    done = subprocess.run([sys.executable, *command], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_hf_beam_search():
    assert "same sequences: 100 %" in run("examples/hf_beam_search.py")


def test_hf_packed_grpo():
    printed = run("examples/hf_packed_grpo.py")
    rewards = [float(line.split("mean reward")[1].split()[0]) for line in printed.splitlines()]
    assert rewards[0] < 0.7
    assert min(rewards[-2:]) > 0.8  # of the last step, and of the tree search


def test_benchmark():
    """With few items: the checks before the timing are what matters."""
    printed = run("-m", "benchmarks.integrations", "--rounds", "1", "--items", "500", "--vocab", "3000")
    assert printed.count("head on legal columns") == 5
    for against in ("LogitsProcessor", "prefix_allowed_tokens_fn"):
        assert printed.count(f"  generate(), {against} ") == 10
    assert printed.count("forward, backward, 8 x 16") == 4
