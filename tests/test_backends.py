"""Choosing a backend."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vstar_ops
from vstar_ops import Trie, decoding

ROOT = Path(__file__).resolve().parent.parent


def active() -> str | None:
    return vstar_ops._backends.active_backend(torch.device("cpu"))


def run(value: str | None, code: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "VSTAR_OPS_BACKEND"}
    if value is not None:
        env["VSTAR_OPS_BACKEND"] = value
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_backends_lists_all_with_a_reason():
    found = vstar_ops.backends()
    assert list(found) == ["reference", "cpu", "triton", "cuda"]
    assert found["reference"].available
    for status in found.values():
        assert isinstance(status.available, bool)
        assert status.detail
    found.clear()
    assert vstar_ops.backends(), "a caller can change the registry"


def test_cuda_says_why_it_is_off(monkeypatch):
    load = vstar_ops._backends._load_cuda
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(vstar_ops._backends, "library_path", lambda name: None)
    assert load() == (False, f"torch {torch.__version__} is built without CUDA")
    monkeypatch.setattr(vstar_ops._backends, "library_path", lambda name: Path("/nonexistent/_CUDA.abi3.so"))
    assert load() == (False, f"built, but torch {torch.__version__} is built without CUDA")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    available, detail = load()
    assert not available and detail.startswith("_CUDA.abi3.so does not load beside torch")
    monkeypatch.setattr(vstar_ops._backends, "library_path", lambda name: None)
    available, detail = load()
    assert not available and detail.startswith("not built: ")


def test_cuda_refuses_other_devices(monkeypatch):
    monkeypatch.setitem(vstar_ops._backends._backends, "cuda", vstar_ops._backends.BackendStatus(True, ""))
    with vstar_ops.use_backend("cuda"), pytest.raises(RuntimeError, match="the backend 'cuda' runs on CUDA"):
        vstar_ops.group_advantage(torch.zeros(1, 1))


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"^name must be one of .*'reference'.*got 'fortran'"):
        vstar_ops.use_backend("fortran").__enter__()


def test_unavailable_backend_says_why():
    off = [name for name, status in vstar_ops.backends().items() if not status.available]
    for name in off:
        with pytest.raises(RuntimeError, match=name) as error:
            vstar_ops.use_backend(name).__enter__()
        assert vstar_ops.backends()[name].detail in str(error.value)


def test_a_refused_backend_changes_nothing():
    before = active()
    with pytest.raises(ValueError, match="name"), vstar_ops.use_backend("nope"):
        pass
    assert active() == before


def test_nesting_restores():
    before = active()
    with vstar_ops.use_backend("reference"):
        with vstar_ops.use_backend("auto"):
            assert active() is None
        assert active() == "reference"
        with pytest.raises(KeyError), vstar_ops.use_backend("auto"):
            raise KeyError("an exception restores too")
        assert active() == "reference"
    assert active() == before


def test_cpu_refuses_other_devices(cpu):
    trie = Trie.from_sequences([[0]]).to("meta")
    with pytest.raises(RuntimeError, match="cpu"):
        vstar_ops.expand_topk(
            torch.zeros(1, 1, 1, device="meta"), trie, torch.zeros(1, 1, dtype=torch.int32, device="meta"), 1
        )


@pytest.mark.slow
@pytest.mark.parametrize("value", [None, "auto", "reference"])
def test_environment(value):
    done = run(
        value,
        'import vstar_ops; import torch; print(vstar_ops._backends.active_backend(torch.device("cpu")))',
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ("reference" if value == "reference" else "None")


def test_environment_with_a_bad_value():
    done = run("fortran", "import vstar_ops")
    assert done.returncode != 0
    assert "ValueError: VSTAR_OPS_BACKEND must be one of" in done.stderr
    assert "'fortran'" in done.stderr


def test_environment_with_a_backend_that_is_off():
    off = [name for name, status in vstar_ops.backends().items() if not status.available]
    if not off:
        pytest.skip("every backend is available")
    done = run(off[0], "import vstar_ops")
    assert done.returncode != 0
    assert f"RuntimeError: the backend '{off[0]}' is off" in done.stderr


def test_the_reference_for_lack_of_anything_better_is_said_once():
    """The first op says why, and what mends it; ``use_backend("reference")`` is a choice and warns nobody."""
    code = """
import warnings, torch, vstar_ops
warnings.simplefilter("error")
with vstar_ops.use_backend("reference"):
    vstar_ops.group_advantage(torch.rand(2, 4))
warnings.simplefilter("always")
for _ in range(3):
    vstar_ops.group_advantage(torch.rand(2, 4))
    vstar_ops.prefix_tree(torch.ones(1, 1, 1, dtype=torch.int32))
"""
    done = run(None, HIDE_C + code)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("vstar_ops runs on the pure-torch reference on cpu") == 1, done.stderr
    assert "--no-build-isolation" in done.stderr


# A package without its C++ module: the library is looked for in an empty folder.
HIDE_C = """
import pathlib
glob = pathlib.Path.glob
pathlib.Path.glob = lambda self, pattern: iter(()) if pattern.startswith("_C") else glob(self, pattern)
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (lambda: vstar_ops.use_backend("cpp"), "the backend 'cpp' is now called 'cpu'"),
        (
            lambda: (
                vstar_ops.expand_topk(
                    torch.zeros(1, 1, 1),
                    Trie.from_sequences([[0]]),
                    torch.zeros(1, 1, dtype=torch.int32),
                    1,
                    gumbel=3,
                ).count
            ),
            "gumbel is now called gumbel_seed",
        ),
        (
            lambda: (
                vstar_ops.sibling_advantage(torch.ones(1, 2, 1, dtype=torch.int32), torch.rand(1, 2)).count
            ),
            "count is now called num_candidates",
        ),
        (
            lambda: vstar_ops.sibling_grpo_loss(
                torch.zeros(1, 2, 1), torch.ones(1, 2, 1, dtype=torch.int32), torch.rand(1, 2), w_sib=0.5
            ),
            "w_sib is now called sibling_weight",
        ),
    ],
    ids=["cpp", "gumbel", "count", "w_sib"],
)
def test_old_names_work_and_warn(old, new):
    with pytest.warns(FutureWarning, match=new):
        assert old() is not None


def test_an_old_and_a_new_name_are_one_too_many():
    tokens, rewards = torch.ones(1, 2, 1, dtype=torch.int32), torch.rand(1, 2)
    with pytest.raises(TypeError, match="kl_weight must not be given together with its old name beta"):
        vstar_ops.sibling_grpo_loss(torch.zeros(1, 2, 1), tokens, rewards, beta=1.0, kl_weight=1.0)


def test_old_names_of_decoders():
    """They reach the checks of the new ones."""
    trie = Trie.from_sequences([[0]])
    calls = [
        (lambda: decoding.beam_search(None, None, None, width=0), "width", "beam_width"),
        (lambda: decoding.topk_sampling(None, None, None, candidates=0), "candidates", "num_candidates"),
        (lambda: decoding.topk_sampling(None, None, None, top=0), "top", "top_k"),
        (
            lambda: decoding.ved(None, None, trie, candidates=0),
            "candidates",
            "num_candidates",
        ),
    ]
    for call, old, new in calls:
        wrong = pytest.raises(ValueError, match=f"^{new} must be at least 1, got 0")
        with pytest.warns(FutureWarning, match=f"^{old} is now called {new}"), wrong:
            call()
    for result in (decoding.BeamResult, decoding.SampleResult, decoding.VEDResult, vstar_ops.LeafCandidates):
        numbers = result(*range(len(result._fields)))
        with pytest.warns(FutureWarning, match="count is now called num_valid"):
            assert numbers.count == numbers.num_valid
