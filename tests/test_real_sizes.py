"""The C++ backend against the reference at the sizes and ties of a real catalogue."""

from __future__ import annotations

import pytest
import torch

import vstar_ops
from benchmarks.catalogue import frontiers, industrial_like
from vstar_ops import Trie, expand_topk

needs_cpu = pytest.mark.skipif(not vstar_ops.backends()["cpu"].available, reason="C++ backend not built")


@pytest.mark.slow
@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalize", ["legal", "vocab"])
@pytest.mark.parametrize("gumbel_seed", [None, 7])
def test_industrial_sizes(dtype: torch.dtype, normalize: str, gumbel_seed: int | None) -> None:
    """Every winner is the same, at every depth and for winners that overflow the selection's buffers."""
    torch.manual_seed(1)
    trie = Trie.from_sequences(industrial_like())
    for k, width in ((1, 3), (5, 16), (16, 16), (33, 40), (64, 16), (128, 40), (300, 16)):
        for node, cum_logp in frontiers(trie, 6, width, 768):
            logits = torch.randn(*node.shape, 768).to(dtype)
            options = {
                "cum_logp": cum_logp,
                "entropy_weight": 0.1,
                "normalize": normalize,
                "gumbel_seed": gumbel_seed,
            }
            ours = expand_topk(logits, trie, node, k, **options)
            with vstar_ops.use_backend("reference"):
                expected = expand_topk(logits, trie, node, k, **options)
            torch.testing.assert_close(ours.score, expected.score, rtol=1e-5, atol=1e-5)
            assert torch.equal(ours.num_valid, expected.num_valid)
            # Backends may order scores that differ by rounding alone in either way.
            gap = (expected.score[:, 1:] - expected.score[:, :-1]).abs() / expected.score[:, 1:].abs()
            close = (gap > 0) & (gap < 1e-5)
            unsure = torch.nn.functional.pad(close, (1, 0)) | torch.nn.functional.pad(close, (0, 1))
            for field in ("parent", "token", "node"):
                assert torch.equal(getattr(ours, field)[~unsure], getattr(expected, field)[~unsure])
            torch.testing.assert_close(ours.logp[~unsure], expected.logp[~unsure], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(ours.entropy, expected.entropy, rtol=1e-5, atol=1e-6)


@needs_cpu
def test_ascending_scores_fill_the_selection() -> None:
    """The worst order for a running threshold: every candidate beats all before it."""
    trie = Trie.from_sequences(torch.arange(5000).unsqueeze(1))
    logits = torch.linspace(-3, 3, 5000).view(1, 1, -1)
    for k in (1, 16, 40, 500, 5000, 6000):
        out = expand_topk(logits, trie, torch.zeros(1, 1, dtype=torch.int32), k)
        wins = min(k, 5000)
        assert out.token[0, :wins].tolist() == list(range(4999, 4999 - wins, -1))
        assert out.num_valid.item() == wins
        torch.testing.assert_close(out.logp[0, :wins], logits.log_softmax(-1)[0, 0].flip(0)[:wins])


def test_equal_scores_come_in_order() -> None:
    """All equal: the first prefixes and the smallest tokens win, however the buffers overflow."""
    trie = Trie.from_sequences(torch.arange(300).unsqueeze(1))
    out = expand_topk(torch.zeros(2, 5, 300), trie, torch.zeros(2, 5, dtype=torch.int32), 700)
    expected = torch.arange(700)
    assert torch.equal(out.parent.long(), (expected // 300).expand(2, -1))
    assert torch.equal(out.token.long(), (expected % 300).expand(2, -1))
