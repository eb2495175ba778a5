"""The gradient study: exact gradients against autograd and enumeration, estimators against theory."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import gradients
from benchmarks.gradients_report import CANDIDATES
from benchmarks.policy_tree import (
    FORMS,
    PARENT,
    SIBLING,
    Draws,
    Tree,
    best_of,
    cosine,
    estimates,
    gumbel_top,
    sample,
    weighted_estimates,
)
from vstar_ops import Trie
from vstar_ops.train.checkpoint import Mismatch
from vstar_ops.train.config import Config
from vstar_ops.train.model import SIDTransformer
from vstar_ops.train.scoring import candidate_scores
from vstar_ops.train.synthetic import synthetic

pytestmark = pytest.mark.usefixtures("one_thread")

# Three levels; below (0, 4) and (1,) nothing branches.
ITEMS = [[0, 3, 6], [0, 3, 7], [0, 4, 6], [1, 3, 8], [2, 4, 6], [2, 4, 7], [2, 4, 8], [2, 5, 6], [2, 5, 8]]


@pytest.fixture
def tree() -> Tree:
    return Tree(Trie.from_sequences(ITEMS))


@pytest.fixture
def logits(tree: Tree) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, len(tree.parent), dtype=torch.float64, requires_grad=True)


@pytest.fixture
def reward(tree: Tree) -> Tensor:
    return torch.rand(2, len(ITEMS), dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_hand(logits: Tensor) -> Tensor:
    """Log-probabilities of the items, ``[B, leaves]``."""
    prefixes = sorted({tuple(item[:n]) for item in ITEMS for n in (1, 2, 3)}, key=lambda p: (len(p), p))
    edge = {prefix: i for i, prefix in enumerate(prefixes)}
    columns = []
    for item in ITEMS:
        terms = []
        for n in (1, 2, 3):
            siblings = [
                i for prefix, i in edge.items() if len(prefix) == n and prefix[:-1] == tuple(item[: n - 1])
            ]
            terms.append(logits[:, edge[tuple(item[:n])]] - logits[:, siblings].logsumexp(1))
        columns.append(sum(terms))
    return torch.stack(columns, 1)


def test_exact_gradients_are_those_of_autograd(tree: Tree, logits: Tensor, reward: Tensor) -> None:
    logp, p = tree.logp(tree.by_child(logits)), by_hand(logits).exp()
    torch.testing.assert_close(tree.leaf_logp(logp), by_hand(logits))
    (expected,) = torch.autograd.grad((p * reward).sum(), logits, retain_graph=True)
    torch.testing.assert_close(tree.exact(logp, reward), expected)

    best = 0.0  # over all groups of three draws
    for group in itertools.product(range(len(ITEMS)), repeat=3):
        best = best + p[:, group].prod(1) * reward[:, group].max(1).values
    (expected,) = torch.autograd.grad(best.sum(), logits)
    torch.testing.assert_close(tree.exact(logp, best_of(p, reward, 3)), expected)


def test_what_a_level_decides(tree: Tree, logits: Tensor) -> None:
    logp = tree.logp(tree.by_child(logits)).detach()
    for level in range(3):
        reward = torch.tensor([item[: level + 1] for item in ITEMS]).double().square().sum(1).expand(2, -1)
        share = tree.decided(logp, reward)
        torch.testing.assert_close(share.sum(1), torch.ones(2, dtype=torch.float64))
        assert (share[:, level + 1 :] < 1e-12).all() and (share[:, 0] > 0).all()


def test_tree_of_a_model() -> None:
    data = synthetic(items=120, users=30, requests=4, codes=(5, 4))
    tree = Tree(Trie.from_sequences(data.sequences))
    torch.manual_seed(0)
    model = SIDTransformer(data.vocab, data.max_tokens, dim=16, layers=2, heads=2).eval()
    assert (tree.trie.num_children(torch.arange(tree.trie.level_offset[-2])) == 1).any()
    every = tree.sequences(torch.arange(len(tree.path)))
    context = data.valid.context
    expected = candidate_scores(model, context, tree.trie, every.expand(len(context), *every.shape)).logp
    got = tree.logp(tree.logits(model, context))
    torch.testing.assert_close(got[:, tree.path].float(), expected, rtol=1e-4, atol=1e-5)
    assert (tree.leaf_logp(got).exp().sum(1) - 1).abs().max() < 1e-5


def test_exact_gradient_by_weights() -> None:
    data = synthetic(items=120, users=30, requests=4, codes=(5, 4))
    tree = Tree(Trie.from_sequences(data.sequences))
    torch.manual_seed(0)
    model = SIDTransformer(data.vocab, data.max_tokens, dim=16, layers=2, heads=2).eval()
    case, weights = gradients.Case.of(tree, model, data, data.train.part(20)), list(model.parameters())

    def run(rows: slice) -> Tensor:
        return tree.logits(model, case.requests.context[rows])

    (got,) = gradients._gradients(weights, 20, run, [tree.by_child(case.exact)])
    p = tree.leaf_logp(tree.logp(run(slice(20)))).exp()
    found = torch.autograd.grad((p * case.reward).sum(), weights, materialize_grads=True)
    expected = torch.cat([x.flatten() for x in found]).double()
    assert expected.norm() > 0.01
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5 * expected.norm().item())


def mean_estimates(tree: Tree, logp: Tensor, reward: Tensor, draws: Draws) -> dict[str, Tensor]:
    """By the logits ``[B, E]``, the mean over the draws."""
    shape = draws.leaf.shape
    nodes = tree.path[draws.leaf].flatten(0, 1)
    rewards = reward.gather(1, draws.leaf.flatten(1)).view(shape).flatten(0, 1).float()
    if draws.share is None:
        found = estimates(nodes, rewards, torch.ones(rewards.shape, dtype=torch.bool))
    else:
        found = weighted_estimates(nodes, rewards, draws.p.flatten(0, 1), draws.share.flatten(0, 1))
    result = {}
    for name, x in found.items():
        total = torch.zeros_like(logp).scatter_add_(
            1, tree.path[draws.leaf].flatten(1), x.reshape(len(logp), -1)
        )
        result[name] = tree.gradient(logp, total / shape[1])
    return result


@pytest.mark.parametrize("draw", [sample, gumbel_top])
def test_leave_one_out_is_unbiased(tree: Tree, logits: Tensor, reward: Tensor, draw: object) -> None:
    logp = tree.logp(tree.by_child(logits)).detach()
    exact = tree.exact(logp, reward)
    draws = draw(tree.leaf_logp(logp), 20_000, 4)  # type: ignore[operator]
    found = mean_estimates(tree, logp, reward, draws)
    assert cosine(found["leave-one-out"], exact).min() > 0.998
    torch.testing.assert_close(3 * found["leave-one-out"], exact, atol=0.006, rtol=0)  # 3 levels share it
    # The same draws, not weighted, are not; nor is what the paper writes.
    if draw is gumbel_top:
        plain = mean_estimates(tree, logp, reward, Draws(draws.leaf, draws.p))
        assert cosine(plain["leave-one-out"], exact).max() < 0.99
        assert draws.leaf.sort(2).values.diff(dim=2).min() > 0
    else:
        assert cosine(found["paper"], exact).max() < 0.995


def test_equal_shares_are_no_weights(tree: Tree, reward: Tensor) -> None:
    """Half of the shares, which scale every estimate, and candidates that repeat."""
    torch.manual_seed(0)
    leaf = torch.randint(len(ITEMS), (2, 50, 6))
    nodes, rewards = tree.path[leaf].flatten(0, 1), reward.gather(1, leaf.flatten(1)).view(100, 6).float()
    half = torch.full((100, 6), 1 / 12, dtype=torch.float64)
    got = weighted_estimates(nodes, rewards, 0 * half, half)
    expected = estimates(nodes, rewards, torch.ones(100, 6, dtype=torch.bool))
    for form in (PARENT, SIBLING):
        torch.testing.assert_close(2 * got[str(form)], expected[str(form)], atol=1e-7, rtol=1e-6)
    scaled = (6 / 5) ** 0.5 * expected["GRPO"]  # by the sample's standard deviation
    torch.testing.assert_close(2 * got["GRPO"], scaled, atol=1e-4, rtol=1e-3)


def test_padded_candidates_take_no_part(tree: Tree, reward: Tensor) -> None:
    nodes, rewards = tree.path[None, :6], reward[:1, :6].float()
    alone = estimates(nodes[:, :4], rewards[:, :4], torch.ones(1, 4, dtype=torch.bool))
    padded = estimates(nodes, rewards, torch.arange(6)[None] < 4)
    assert set(map(str, FORMS)) < set(alone)
    for name, x in alone.items():
        torch.testing.assert_close(padded[name][:, :4], x)
        assert not padded[name][:, 4:].any()


def test_part_tables_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policies = {name: (variant, min(steps, 1)) for name, (variant, steps) in gradients.POLICIES.items()}
    del policies["GRPO, 150 steps"]
    monkeypatch.setattr(gradients, "POLICIES", policies)
    data = synthetic(items=200, users=60, requests=10, codes=(6, 4))
    options = {"dataset": data, "config": Config.synthetic().replace(sft_epochs=1, candidates=8)}
    result = gradients.part(tmp_path / "out", **options, groups=(4, 8), requests=3)
    assert list(result) == list(policies)
    for name, found in result.items():
        kinds = [k for k in CANDIDATES if "GRPO" not in name or "VED" not in k]
        assert list(found["logits"]["8"]) == kinds and list(found["weights"]) == ["exact", *kinds]
        for kind in kinds:
            for cells in (found["logits"]["8"][kind], found["weights"][kind]):
                assert len(cells) >= 6 and all(0 < abs(x["one"]) <= 1 for x in cells.values())
        assert found["logits"]["8"]["independent samples"]["leave-one-out"]["mean"] > 0.9
        assert found["weights"]["independent samples"]["leave-one-out"]["one"] > 0.1
        assert sum(found["exact"]["decided"]) == pytest.approx(1)
    text = gradients.tables(result)
    assert all(name in text for name in (*policies, *CANDIDATES, "paper", "centered"))
    gradients.figure(tmp_path / "figure.png", result)
    assert (tmp_path / "figure.png").stat().st_size > 10_000

    cells = sorted((tmp_path / "out" / "cells").glob("*.json"))
    assert len(cells) == 4 * len(policies)
    times = [cell.stat().st_mtime_ns for cell in cells[1:]]
    first = json.loads(cells[0].read_text())
    cells[0].unlink()
    again = gradients.part(tmp_path / "out", **options, groups=(4, 8), requests=3)
    assert again == result and json.loads(cells[0].read_text()) == first
    assert [cell.stat().st_mtime_ns for cell in cells[1:]] == times
    with pytest.raises(Mismatch, match="other settings"):
        gradients.part(tmp_path / "out", **options, groups=(4, 8), requests=4)
