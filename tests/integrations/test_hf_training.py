"""Packed training of Hugging Face models, and value heads on them."""

from __future__ import annotations

import gc

import pytest
import torch
from needs import needs
from torch import nn

needs("transformers")

from plain import ROWS, TRIE, lists, plain_logp, prompts
from tiny import ALL, CAUSAL, MODELS

from vstar_ops.decoding import VEDConfig, beam_search, ved
from vstar_ops.integrations.transformers import ValueHead, prefix_model


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(("name", "attention"), ALL)
def test_packed_training_has_the_gradients_of_rows(name, attention, padding):
    """One row per prompt against one per candidate, in which nothing is packed or masked."""
    model, inputs = MODELS[name](attention), prompts(padding)
    for parameter in model.parameters():
        parameter.requires_grad_()
    picked = torch.randint(len(ROWS), (3, 6), generator=torch.Generator().manual_seed(3))
    candidates, weight = ROWS[picked], torch.randn(3, 6, 3, generator=torch.Generator().manual_seed(4))
    for normalize in ("legal", "vocab"):
        lm = prefix_model(model, TRIE, full_head=normalize == "vocab")
        model.zero_grad()
        scores = lm.score(inputs, candidates, normalize=normalize)
        (scores.logp * weight).sum().backward()
        got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        rows = [plain_logp(model, p, c, normalize=normalize) for p, c in zip(lists(inputs), candidates)]
        torch.testing.assert_close(scores.logp, torch.stack(rows), rtol=1e-5, atol=2e-5)
        (torch.stack(rows) * weight).sum().backward()
        want = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert got.keys() == want.keys()
        for key in want:
            scale = want[key].abs().max().item()
            torch.testing.assert_close(got[key], want[key], rtol=0, atol=max(1e-5 * scale, 1e-6))


def test_rows_that_are_no_candidates_and_illegal_ones():
    lm = prefix_model(CAUSAL["qwen2"](), TRIE)
    candidates = ROWS[:4].repeat(3, 1, 1)
    want = lm.score(prompts(), candidates).logp
    candidates[0, 1] = -1
    candidates[1, 2, 1:] = torch.tensor([3, 5])
    got = lm.score(prompts(), candidates).logp
    assert (got[0, 1] == 0).all()
    assert got[1, 2, 1:].tolist() == [-torch.inf, -torch.inf]
    same = torch.ones(3, 4, dtype=torch.bool)
    same[0, 1] = same[1, 2] = False
    torch.testing.assert_close(got[same], want[same])
    torch.testing.assert_close(got[1, 2, 0], want[1, 2, 0])


def test_gradient_checkpointing():
    model, inputs = CAUSAL["qwen2"]().train(), prompts()
    lm = prefix_model(model, TRIE)
    candidates = ROWS[:6].expand(3, -1, -1)

    def gradients():
        model.zero_grad()
        lm.score(inputs, candidates).logp.sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    want = gradients()
    model.gradient_checkpointing_enable()
    for got, expected in zip(gradients(), want):
        torch.testing.assert_close(got, expected)
    assert torch.equal(beam_search(lm, inputs, lm.trie, 4).logp, beam_search(lm, inputs, lm.trie, 4).logp)


def test_distributed_data_parallel(tmp_path):
    """Training goes through the wrapper, which averages gradients; decoding leaves it out."""
    model, inputs = CAUSAL["qwen2"](), prompts()
    lm = prefix_model(model, TRIE)
    found = beam_search(lm, inputs, lm.trie, 4)

    def train():
        wrapped = nn.parallel.DistributedDataParallel(model)
        calls = []
        wrapped.register_forward_hook(lambda *_: calls.append(1))
        both = prefix_model(wrapped, TRIE)
        assert torch.equal(beam_search(both, inputs, lm.trie, 4).node, found.node)
        assert not calls
        both.score(inputs, both.token_ids(found.node)).logp.sum().backward()
        assert len(calls) == 1

    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        train()
    finally:
        gc.collect()  # a wrapper that goes after the group joins the group's threads under Python's lock
        torch.distributed.destroy_process_group()
    assert model.lm_head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["qwen2", "mistral, window", "t5"])
@pytest.mark.parametrize("full_head", [False, True])
def test_tree_search_with_a_value_head(name, full_head, tmp_path):
    """The values and child values that the search sees are those of the packed pass, also after a reload."""
    model, inputs = MODELS[name](), prompts()
    lm = prefix_model(model, TRIE, full_head=full_head)
    with pytest.raises(ValueError, match="no value head"):
        ved(lm, inputs, lm.trie, 8)
    head = lm.add_value_head()
    torch.manual_seed(5)
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    searches = {
        "default": VEDConfig(),
        "forced": VEDConfig(skip_forced=False),
        "paper": VEDConfig.paper(),
        "no head": VEDConfig(value_weight=0, child_values=False, num_value_beams=0),
    }
    for config in searches.values():
        found = ved(lm, inputs, lm.trie, 8, config, seed=1)
        assert (found.num_valid >= 5).all()
        assert (found.forward_tokens <= config.forward_budget(3, 8)).all()
        tokens = lm.token_ids(found.node)
        scores, valid = lm.score(inputs, tokens, values=True), found.node >= 0
        torch.testing.assert_close(scores.logp.sum(2), found.logp, rtol=1e-4, atol=1e-5)
        if config.child_values:  # leaves by w_p log pi + w_v (V + child value of the parent that lists them)
            listed = torch.full_like(found.node[..., None], 2, dtype=torch.int64)
            if config.skip_forced:
                prefixes = [lm.trie.lookup(found.sequence[..., :depth]) for depth in (1, 2, 3)]
                leaf = lm.trie.only_leaf[torch.stack(prefixes, 2).clamp(min=0).long()] >= 0
                listed = leaf.int().argmax(2, keepdim=True)
            value = scores.value_from_parent.gather(2, listed)[..., 0]
            want = found.logp + config.value_weight * value
            torch.testing.assert_close(found.score[valid], want[valid], rtol=1e-4, atol=1e-4)
        elif config == searches["paper"]:
            evaluated = found.score[:, 0]
            torch.testing.assert_close(evaluated, scores.value[:, 0, -1], rtol=1e-4, atol=1e-4)
    path = tmp_path / "head.safetensors"
    head.save(path)
    again = prefix_model(model, TRIE, full_head=full_head, value_head=ValueHead.load(path))
    assert torch.equal(
        ved(again, inputs, lm.trie, 8, seed=1).score, ved(lm, inputs, lm.trie, 8, seed=1).score
    )


def test_a_value_head_learns_and_leaves_the_model_alone(one_thread):
    model, inputs = CAUSAL["qwen2"](), prompts()
    lm = prefix_model(model, TRIE)
    head, reward = lm.add_value_head(), (ROWS[:, 1] > 50).float().expand(3, -1)
    optimizer = torch.optim.Adam(head.parameters(), 0.03)
    candidates, losses = ROWS.expand(3, -1, -1), []
    for _ in range(60):
        scores = lm.score(inputs, candidates, values=True)
        loss = (scores.value[..., 1:] - reward[..., None]).square().mean()
        loss = loss + (scores.value_from_parent[..., 1] - reward).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    assert all(parameter.grad is None for parameter in model.parameters())
    by_value = ved(lm, inputs, lm.trie, 8, VEDConfig(value_weight=30.0, beam_width=12, num_value_beams=12))
    gained = [
        (lm.token_ids(x.node)[..., 1] > 50).float().mean()
        for x in (beam_search(lm, inputs, lm.trie, 8), by_value)
    ]
    assert gained[1] > gained[0] + 0.15


def test_files_of_value_heads(tmp_path):
    path = tmp_path / "head.safetensors"
    head = ValueHead(8, TRIE.compact().columns, width=3).to(torch.bfloat16)
    head.save(path)
    before = path.read_bytes()
    loaded = ValueHead.load(path)
    assert loaded.state_dict().keys() == head.state_dict().keys()
    assert all(
        torch.equal(x, y) and x.dtype == y.dtype
        for x, y in zip(loaded.state_dict().values(), head.state_dict().values())
    )
    ValueHead(8).save(path)
    assert ValueHead.load(path).child is None
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "nothing is left of writing"
    path.write_bytes(before[:-5])
    with pytest.raises(ValueError, match="not a value head, or damaged"):
        ValueHead.load(path)
    TRIE.save(path)
    with pytest.raises(
        ValueError, match=r"expected the format 'vstar_ops.value_head.v1', got 'vstar_ops.trie"
    ):
        ValueHead.load(path)
    other = ValueHead(32, torch.arange(5))
    with pytest.raises(ValueError, match="value_head must have child values of the"):
        prefix_model(CAUSAL["qwen2"](), TRIE, value_head=other)
    with pytest.raises(ValueError, match="made without child values"):
        ValueHead(8).child_values(torch.zeros(1, 8))
