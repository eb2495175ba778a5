"""The value model: causality, one walk for all scores, targets, embeddings, and the samplers that use it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from vstar_ops import Trie
from vstar_ops.decoding import VEDConfig, beam_search, topk_sampling, ved
from vstar_ops.reference.ved_search import ved_search
from vstar_ops.train import reinforce, scoring
from vstar_ops.train.config import Config, Variant
from vstar_ops.train.data import Split
from vstar_ops.train.decode import Decoder
from vstar_ops.train.model import SIDTransformer
from vstar_ops.train.supervised import fit_prior
from vstar_ops.train.synthetic import synthetic
from vstar_ops.train.trainer import Run, optimizer_of
from vstar_ops.train.value import (
    DenseReturn,
    ItemEmbeddings,
    ItemNearness,
    RewardReturn,
    cooccurrence_embeddings,
    load_embeddings,
    squared_error,
    td_target,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CATALOGUE = torch.tensor([[0, 4, 8], [0, 4, 9], [0, 5, 8], [1, 6, 10], [1, 7, 10], [2, 6, 11], [3, 7, 11]])


@pytest.fixture
def trie() -> Trie:
    return Trie.from_sequences(CATALOGUE)


@pytest.fixture
def model() -> SIDTransformer:
    torch.manual_seed(0)
    model = SIDTransformer(12, 12, dim=32, layers=2, heads=2, dropout=0.0)
    items = ItemEmbeddings(Trie.from_sequences(CATALOGUE), CATALOGUE, torch.randn(len(CATALOGUE), 5))
    model.add_item_prior(items)
    model.add_value_head(child_values=True)
    for parameter in model.parameters():  # far from the initial, almost constant outputs
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def values_of(model: SIDTransformer, context: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """V of the prefixes of one candidate, by extending one after the other."""
    _, state = model.prefill(context)
    slot, values = torch.zeros(1, dtype=torch.int64), []
    for token in tokens:
        _, slot = model.extend(state, slot, torch.tensor([token]))
        values.append(model.value(state, slot))
    return torch.cat(values)


@pytest.mark.parametrize("pack", [True, False])
def test_values_are_those_of_prefixes_alone(model: SIDTransformer, trie: Trie, pack: bool) -> None:
    """In one walk over all candidates and step by step: the same V, blind to what follows."""
    context = torch.tensor([[0, 4, 8], [-1, -1, -1]])
    candidates = torch.stack([CATALOGUE[:5], CATALOGUE[[6, 6, 0, 2, 3]]])
    candidates[1, 4] = -1
    options = {"values": True, "child_values": True, "pack": pack}
    scores = scoring.candidate_scores(model, context, trie, candidates, **options)
    logp = scoring.candidate_scores(model, context, trie, candidates).logp
    torch.testing.assert_close(scores.logp, logp)
    for b in range(2):
        for g in range(5):
            if candidates[b, g, 0] < 0:
                assert not scores.value[b, g].any()
                continue
            alone = values_of(model, context[b : b + 1], candidates[b, g].tolist())
            torch.testing.assert_close(scores.value[b, g], alone, rtol=1e-4, atol=1e-5)
    _, state = model.prefill(context)
    zero = torch.tensor([0])
    q = model.value(state, zero) + model.child_value(state, zero)[:, 1]
    torch.testing.assert_close(scores.value_from_parent[0, 3, 0], q[0], rtol=1e-4, atol=1e-5)


def test_leaves_need_not_be_run(model: SIDTransformer, trie: Trie) -> None:
    context, candidates = torch.tensor([[0, 4, 8], [2, 6, 11]]), CATALOGUE[:5].expand(2, -1, -1)
    run = {}
    for leaves in (True, False):
        rows = scoring.candidate_rows(model, context, trie, candidates, values=True, leaves=leaves).rows
        run[leaves] = rows.input_ids.shape[1] - rows.prompt_columns
    assert run == {True: 2 + 4 + 5, False: 2 + 4}  # distinct prefixes
    asked = {"values": True, "child_values": True}
    every = scoring.candidate_scores(model, context, trie, candidates, **asked)
    inner = scoring.candidate_scores(model, context, trie, candidates, **asked, leaves=False)
    torch.testing.assert_close(inner.logp, every.logp)
    torch.testing.assert_close(inner.value_from_parent, every.value_from_parent)
    torch.testing.assert_close(inner.value[..., :2], every.value[..., :2])
    assert not inner.value[..., 2].any()


def test_the_value_loss_moves_the_head_alone(model: SIDTransformer, trie: Trie) -> None:
    policy, head = model.parts()
    assert len(policy) + len(head) == len(list(model.parameters()))
    context, candidates = torch.tensor([[0, 4, 8]]), CATALOGUE[None, :5]
    scores = scoring.candidate_scores(model, context, trie, candidates, values=True)
    squared_error(scores.value, torch.ones_like(scores.value), torch.ones(1, 5, dtype=torch.bool)).backward()
    assert all(p.grad is None or not p.grad.any() for p in policy)
    assert any(p.grad is not None and p.grad.any() for p in head)


@pytest.mark.slow
def test_the_value_head_learns(model: SIDTransformer, trie: Trie) -> None:
    """V of every prefix becomes the discounted mean reward below it."""
    optimizer = optimizer_of(model, 0.0, 0.0, 3e-3)
    context, candidates = torch.tensor([[0, 4, 8]]), CATALOGUE[None]
    reward = torch.tensor([[1.0, 0.0, 0.5, 0.2, 0.4, 0.0, 0.9]])
    mask = torch.ones(1, 7, dtype=torch.bool)
    returns = RewardReturn(lambda *_: reward)(None, candidates, mask)
    for _ in range(900):
        optimizer.zero_grad()
        value = scoring.candidate_scores(model, context, trie, candidates, values=True).value
        squared_error(value, td_target(value, returns, 0.9), mask).backward()
        optimizer.step()
    torch.testing.assert_close(value[..., 2], reward, rtol=0, atol=0.1)
    assert value[0, 0, 1].item() == pytest.approx(0.9 * 0.5, abs=0.1)  # (0, 4) leads to 1 and 0
    assert value[0, 0, 0].item() == pytest.approx(0.81 * 0.5, abs=0.1)  # (0) to 1, 0 and 0.5


def test_td_target() -> None:
    value, returns = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[[0.1, 0.2, 0.3]]])
    torch.testing.assert_close(td_target(value, returns, 0.5), torch.tensor([[[1.1, 1.7, 0.3]]]))
    padded = squared_error(
        torch.tensor([[[1.0], [float("nan")]]]), torch.zeros(1, 2, 1), torch.tensor([[True, False]])
    )
    assert padded == 1


@pytest.mark.parametrize("skip_forced", [True, False])
def test_a_prefix_that_stands_for_its_leaf_is_worth_what_it_is(tmp_path, monkeypatch, skip_forced) -> None:
    """Its target is the leaf's return, on every level; of other prefixes it is that of Eq. 9."""
    data = synthetic(items=60, users=40, requests=10, codes=(8, 4))
    trie, seen = Trie.from_sequences(data.sequences), []
    ved = VEDConfig.training(skip_forced=skip_forced)
    run = Run(Config.synthetic().replace(ved=ved), data, trie, tmp_path, 0)
    sft = SIDTransformer(data.vocab, data.max_tokens, dim=16, layers=1, heads=2)
    variant = Variant("ved", "joint")
    gradient = reinforce.PolicyGradient(run, variant, reinforce.new_policy(run, variant, sft), sft)
    monkeypatch.setattr(
        reinforce, "squared_error", lambda _, target, mask: seen.append(target) or target.sum()
    )
    requests, tokens = data.train[:4], trie.sequences(torch.arange(trie.level_offset[-2], trie.num_nodes))
    tokens, mask = tokens.long().expand(4, -1, -1), torch.ones(4, len(tokens), dtype=torch.bool)
    scores = scoring.candidate_scores(
        gradient.model, requests.context, trie, tokens, values=True, child_values=True, leaves=False
    )
    node = torch.stack([trie.lookup(tokens[..., :depth]) for depth in (1, 2, 3)], 2).long()
    gradient.value_loss(scores, requests, tokens, mask, node)
    returns = gradient.returns_of(requests, tokens, mask)
    value = torch.cat([scores.value[..., :-1], returns[..., -1:]], 2).detach()
    complete = trie.only_leaf[node] >= 0
    assert complete[..., 1].any() and not complete[..., :2].all()
    want = td_target(value, returns, run.config.gamma)
    if skip_forced:
        want = torch.where(complete, returns[..., -1:], want)
    assert len(seen) == 2 and all(torch.equal(target, want) for target in seen)


@pytest.mark.parametrize("evaluate_leaves", [True, False])
@pytest.mark.parametrize("child_values", [True, False])
def test_ved_of_the_model_is_the_sequential_search(model, trie, evaluate_leaves, child_values) -> None:
    context = torch.tensor([[0, 4, 8], [2, 6, 11], [-1, -1, -1]])
    config = VEDConfig.paper(
        budget=9,
        beam_width=2,
        evaluate_leaves=evaluate_leaves,
        child_values=child_values,
        num_value_beams=int(child_values),
        skip_forced=True,
    )
    out = ved(model, context, trie, 5, config, seed=torch.tensor([5, 6, 7]))
    for b in range(3):
        leaves, tree = ved_search(model, context[b : b + 1], trie, 5, config, seed=5 + b)
        assert out.node[b, : len(leaves)].tolist() == [leaf.node for leaf in leaves]
        assert out.trees.node[b, : len(tree)].tolist() == [s.node for s in tree]


@pytest.mark.parametrize(("own", "most"), [(2, None), (0, 1), (2, 1)])
def test_whose_candidates(model, trie, own, most) -> None:
    """The policy's own come first, then at most so many of each prefix while there are other prefixes."""
    context = torch.tensor([[0, 4, 8], [2, 6, 11]])
    search = VEDConfig.paper(budget=11, evaluate_leaves=False, child_values=True)
    plain = ved(model, context, trie, 5, search, seed=3)
    config = search.replace(num_policy_candidates=own, max_leaves_per_prefix=most)
    out = ved(model, context, trie, 5, config, seed=3)
    assert torch.equal(out.trees.node, plain.trees.node) and out.num_valid.tolist() == [5, 5]
    probable = beam_search(model, context, trie, 7)  # the tree holds every prefix of this catalogue
    assert torch.equal(out.node[:, :own], probable.node[:, :own])
    torch.testing.assert_close(out.score[:, :own], probable.logp[:, :own])
    for b in range(2):
        rest = [n for n in plain.node[b].tolist() if n not in out.node[b, :own].tolist()]
        if most is None:
            assert out.node[b, own:].tolist() == rest[: 5 - own]
            continue
        best_below: dict[tuple[int, ...], int] = {}
        everything = ved(model, context, trie, 7, search, seed=3)
        for node, sequence in zip(everything.node[b].tolist(), everything.sequence[b, :, :2].tolist()):
            best_below.setdefault(tuple(sequence), node)
        want = [n for n in best_below.values() if n not in out.node[b, :own].tolist()]
        want += [n for n in everything.node[b].tolist() if n not in want + out.node[b, :own].tolist()]
        assert out.node[b, own:].tolist() == want[: 5 - own]


def test_the_item_prior_is_what_it_says(trie: Trie) -> None:
    """Weights a level times the user's mean direction times that of a prefix, from the definition."""
    torch.manual_seed(0)
    vectors = torch.randn(8, 5)
    sequences = torch.cat([CATALOGUE, CATALOGUE[:1]])  # a collision
    prior, weight = ItemNearness(ItemEmbeddings(trie, sequences, vectors)), torch.tensor([0.1, 0.2, 0.3])
    leaf = vectors[:7].clone()
    leaf[0] = (vectors[0] + vectors[7]) / 2

    def direction(prefix: list[int]) -> torch.Tensor:
        parts = []
        for depth in range(1, len(prefix) + 1):
            below = [v for v, s in zip(leaf, CATALOGUE.tolist()) if s[:depth] == prefix[:depth]]
            parts.append(functional.normalize(sum(below), dim=0))
        return functional.normalize(sum(parts), dim=0)

    mean = sum(direction(s) for s in CATALOGUE.tolist()) / 7
    prompt = torch.tensor(
        [[99, 0, 4, 9, 3, 7, 11], [99, 2, 6, 11, -1, -1, -1], [99, -1, -1, -1, 1, 6, 10], [99] + [-1] * 6]
    )
    near = prior(prompt, prompt >= 0)
    request = torch.arange(4)[:, None].expand(-1, trie.num_nodes)
    found = prior.weighted(weight, near, request, torch.arange(trie.num_nodes).expand(4, -1))
    histories = [[[0, 4, 9], [3, 7, 11]], [[2, 6, 11]], [[1, 6, 10]], []]
    for b, history in enumerate(histories):
        user = functional.normalize(sum((direction(s) - mean for s in history), torch.zeros(5)), dim=0)
        for prefix in ([0], [3], [0, 4], [2, 6], [0, 4, 8], [1, 7, 10]):
            want = [1.0, 2.0, 3.0][len(prefix) - 1] * (user @ (direction(prefix) - mean))
            got = found[b, trie.lookup(torch.tensor(prefix)).item()]
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert not found[:, 0].any() and not near[:, -1].any() and not found[3].any()
    node = torch.tensor([trie.lookup(torch.tensor([0])).item(), -1, 0, trie.num_nodes - 1])
    child, token = prior.below(node)
    assert [[t for t in row if t >= 0] for row in token.tolist()] == [[4, 5], [], [0, 1, 2, 3], []]
    for row, prefix in ((0, [0]), (2, [])):
        for at, one in enumerate(token[row].tolist()):
            assert child[row, at] == (trie.lookup(torch.tensor([*prefix, one])) if one >= 0 else -1)
    prefixes = torch.tensor([[0, 4, 9], [0, 6, 9], [-1, -1, -1], [3, 7, 12]])  # some leave the catalogue
    want = [trie.lookup(prefixes[:, :depth]).long() for depth in (1, 2, 3)]
    assert torch.equal(prior.nodes(prefixes), torch.stack(want, 1))
    dead = prior.weighted(weight, near, torch.arange(4), node)
    assert dead.tolist() == [found[0, node[0]].item(), 0.0, 0.0, found[3, node[3]].item()]


def test_the_weights_of_the_prior_are_the_most_likely_ones(model: SIDTransformer, trie: Trie) -> None:
    """By the log-probabilities of the packed pass, whereas the fit asks prefixes one after the other."""
    torch.manual_seed(1)
    history = CATALOGUE[torch.randint(7, (40, 2))]
    history[::3, 1] = -1
    split = Split(history, CATALOGUE[torch.randint(7, (40,))], torch.arange(40))
    fitted = fit_prior(model, trie, split)

    def likelihood(weight: torch.Tensor) -> float:
        model.prior = torch.nn.Parameter(weight.clone())
        with torch.no_grad():
            logp = scoring.candidate_scores(model, split.context, trie, split.target[:, None]).logp
        return (logp.sum() - weight.square().sum() / 2).item()

    best = likelihood(fitted)
    assert fitted.abs().min() > 1e-3
    for level in range(3):
        for change in (-0.05, 0.05):
            assert likelihood(fitted + change * torch.eye(3)[level]) < best


def test_value_beams_are_the_best_by_value(model, trie) -> None:
    """The first beams are ranked by log pi + w (V + child value)."""
    context = torch.tensor([[0, 4, 8], [2, 6, 11]])
    options = {"logp_weight": 0.5, "value_weight": 3.0, "skip_forced": False}
    config = VEDConfig(budget=5, beam_width=2, num_value_beams=2, **options)
    out = ved(model, context, trie, 2, config)
    logits, state = model.prefill(context)
    root = torch.arange(2)
    q = 3 * (model.value(state, root)[:, None] + model.child_value(state, root))[:, :4]
    rank = 0.5 * logits[:, :4].log_softmax(1) + q  # the first tokens of the catalogue are 0 to 3
    assert torch.equal(out.trees.node[:, 1:3].long() - 1, rank.topk(2, 1).indices)


def test_topk_sampling_draws_from_the_policy(model: SIDTransformer, trie: Trie) -> None:
    context = torch.tensor([[0, 4, 8], [2, 6, 11]])
    every = beam_search(model, context, trie, 7)
    out = topk_sampling(model, context, trie, 4000, seed=3)
    for b in range(2):
        drawn = (out.node[b][:, None] == every.node[b]).float().mean(0)
        torch.testing.assert_close(drawn, every.logp[b].exp(), rtol=0, atol=0.03)
        match = out.node[b][:, None] == every.node[b]
        torch.testing.assert_close(out.logp[b], every.logp[b][match.int().argmax(1)], rtol=1e-4, atol=1e-5)
    assert out.num_valid.tolist() == [4000, 4000] and torch.equal(trie.lookup(out.sequence), out.node)
    assert (out.forward_tokens <= 1 + 4 + 6).all()  # distinct prefixes, not candidates
    alone = topk_sampling(model, context[1:], trie, 50, seed=torch.tensor([9]))
    both = topk_sampling(model, context, trie, 50, seed=torch.tensor([8, 9]))
    assert torch.equal(alone.node[0], both.node[1]) and not torch.equal(both.node[0], both.node[1])
    greedy = topk_sampling(model, context, trie, 3, top_k=1)
    assert (greedy.node == greedy.node[:, :1]).all()


def test_embeddings(trie: Trie, tmp_path) -> None:
    path = tmp_path / "items.npy"
    vectors = np.arange(14, dtype=np.float16).reshape(7, 2)
    np.save(path, vectors)
    loaded = load_embeddings(path, 7)
    assert loaded.dtype == torch.float32
    items = ItemEmbeddings(trie, torch.cat([CATALOGUE, CATALOGUE[:1]]), torch.cat([loaded, loaded[1:2]]))
    got = items(torch.tensor([[0, 4, 8], [3, 7, 11], [3, 7, 8], [-1, -1, -1]]))
    assert got.tolist() == [[1, 2], [12, 13], [0, 0], [0, 0]]  # a collision has its mean
    with pytest.raises(ValueError, match=r"expected floats \[8, E\], one row per item, got float16 \[7, 2\]"):
        load_embeddings(path, 8)


def test_cooccurrence_embeddings_know_who_clicked_what() -> None:
    dataset = synthetic(items=300, users=400, requests=10)
    trie = Trie.from_sequences(dataset.sequences)
    torch.manual_seed(1)
    vectors = cooccurrence_embeddings(dataset, trie, 16)
    torch.manual_seed(2)
    torch.testing.assert_close(cooccurrence_embeddings(dataset, trie, 16), vectors)
    items = ItemEmbeddings(trie, dataset.sequences, vectors)
    last, target = dataset.train.history[:, 0], dataset.train.target  # items of one user
    together = torch.cosine_similarity(items(last), items(target)).mean()
    apart = torch.cosine_similarity(items(last), items(target.flip(0))).mean()
    assert together > apart + 0.1
    dense = DenseReturn(items)
    mask = torch.tensor([[True, False]])
    returns = dense(dataset.train[:1], torch.stack([target[:1], target[:1]], 1), mask)
    assert returns[0, 0].tolist() == pytest.approx([0.3, 0.5, 1.0]) and not returns[0, 1].any()


def test_decoders(model: SIDTransformer, trie: Trie) -> None:
    context, seed = torch.tensor([[0, 4, 8]]), torch.tensor([1])
    for name in ("beam", "topk", "ved"):
        found = Decoder(name, 3)(model, context, trie, seed)
        assert found.sequence.shape == (1, 3, 3) and int(found.forward_tokens) <= 7
    wide = Decoder("beam", 3, beam_width=7)(model, context, trie, seed)
    assert torch.equal(wide.node, beam_search(model, context, trie, 7).node[:, :3])
    assert wide.num_valid.tolist() == [3]
    with pytest.raises(ValueError, match="decoder must be one of beam, topk, ved, got 'greedy'"):
        Decoder("greedy")
    plain = SIDTransformer(12, 12, dim=32, layers=2, heads=2)
    assert (
        Decoder("ved").for_model(plain) == Decoder("beam") and Decoder("ved").for_model(model).name == "ved"
    )
    with pytest.raises(ValueError, match="the model has no value head"):
        Decoder("ved", 3)(plain, context, trie, seed)
    with pytest.raises(ValueError, match="the model has no value head"):
        scoring.candidate_scores(plain, context, trie, CATALOGUE[None], values=True)
    with pytest.raises(ValueError, match="child_values needs values=True"):
        scoring.candidate_scores(model, context, trie, CATALOGUE[None], child_values=True)
