"""Decoders over Hugging Face models, against the models themselves: run plainly, and by ``generate()``."""

from __future__ import annotations

import copy

import pytest
import torch
from needs import needs
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

needs("transformers")

from plain import ROWS, TRIE, assert_ranked, generated, lists, plain_logits, plain_logp, prompts
from tiny import ALL, CAUSAL, MODELS, SEQ2SEQ, SIZE, VOCAB

from vstar_ops import Trie
from vstar_ops.decoding import beam_search, topk_sampling
from vstar_ops.integrations.transformers import legal_head, prefix_model


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(("name", "attention"), ALL)
def test_a_wide_beam_ranks_the_catalogue_as_the_model_does(name, attention, padding):
    """The oracle runs every item behind its unpadded prompt in a row of its own, without mask and cache."""
    model, inputs = MODELS[name](attention), prompts(padding)
    lm = prefix_model(model, TRIE)
    found = beam_search(lm, inputs, lm.trie, len(ROWS))
    assert_ranked(found, lm, model, inputs)
    assert torch.equal(TRIE.sequences(found.node).long(), lm.token_ids(found.node))


@pytest.mark.parametrize("normalize", ["legal", "vocab"])
@pytest.mark.parametrize(("name", "attention"), ALL)
def test_the_same_items_as_generate(name, attention, normalize):
    model, inputs = MODELS[name](attention), prompts("right" if name in SEQ2SEQ else "left")
    lm = prefix_model(model, TRIE, full_head=True)
    for beams in (2, 7):
        sequence, score = generated(model, inputs, TRIE, beams, normalize)
        found = beam_search(lm, inputs, lm.trie, beams, normalize=normalize)
        assert torch.equal(lm.token_ids(found.node), sequence)
        torch.testing.assert_close(found.logp, score, rtol=2e-5, atol=2e-5)


class Widest(TorchDispatchMode):
    """The largest result whose last axis has the size of the vocabulary."""

    def __init__(self):
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.ndim > 1 and x.shape[-1] == VOCAB:
                self.entries = max(self.entries, x.numel())
        return out


@pytest.mark.parametrize(("name", "attention"), ALL)
def test_the_head_on_legal_columns(name, attention):
    """Scaled, soft-capped, tied and biased heads: the same numbers, and no logits of the vocabulary."""
    model, inputs = MODELS[name](attention), prompts("left")
    model.get_output_embeddings().weight.requires_grad_()
    few, full = prefix_model(model, TRIE), prefix_model(model, TRIE, full_head=True)
    with Widest() as widest:
        found = beam_search(few, inputs, few.trie, 6)
    assert widest.entries == 0
    with Widest() as widest:
        same = beam_search(full, inputs, full.trie, 6)
    assert widest.entries >= 3 * VOCAB
    assert torch.equal(found.node, same.node)
    torch.testing.assert_close(found.logp, same.logp)
    candidates = few.token_ids(found.node)
    with Widest() as widest:
        few.score(inputs, candidates).logp.sum().backward()
    assert widest.entries == 0
    gradients = []
    for lm in (few, full):
        model.zero_grad()
        lm.score(inputs, candidates).logp.sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, want in gradients[1].items():
        torch.testing.assert_close(gradients[0][key], want, rtol=0, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("name", MODELS)
def test_legal_head_is_a_part_of_the_logits(name):
    model, inputs = MODELS[name]("eager"), prompts("right")
    if name in SEQ2SEQ:
        inputs["decoder_input_ids"] = torch.tensor([[0, 20]] * 3)
    columns = TRIE.compact().columns
    want = model(**inputs).logits
    with legal_head(model, columns):
        got = model(**inputs).logits
    torch.testing.assert_close(got, want[..., columns])
    assert torch.equal(model(**inputs).logits, want), "the head is what it was"
    with pytest.raises(ZeroDivisionError), legal_head(model, columns):
        _ = 1 / 0
    assert "forward" not in vars(model.get_output_embeddings())


def test_the_window_goes_by_position():
    """Without its window the model says something else: the cases above reach past it."""
    for name in ("mistral, window", "phi3, window", "qwen2, layers of two kinds", "gemma3, window"):
        model, inputs = CAUSAL[name](), prompts()
        lm = prefix_model(model, TRIE)
        logp = lm.score(inputs, ROWS.expand(3, -1, -1)).logp
        model.config.sliding_window = 10**6
        assert (lm.score(inputs, ROWS.expand(3, -1, -1)).logp - logp).abs().max() > 0.1


@pytest.mark.parametrize("name", ["qwen2", "gemma3, window", "t5"])
def test_bfloat16(name):
    """As near to float32 as the model itself is in bfloat16, however it is run."""
    model, inputs = MODELS[name](), prompts()
    exact = prefix_model(model, TRIE).score(inputs, ROWS.expand(3, -1, -1)).logp
    half = copy.deepcopy(model).bfloat16()
    lm = prefix_model(half, TRIE)
    found = beam_search(lm, inputs, lm.trie, len(ROWS))
    leaf = TRIE.lookup(ROWS)
    order = (found.node[:, :, None] == leaf).long().argmax(2)
    with torch.no_grad():
        plain = torch.stack([plain_logp(half, p, ROWS) for p in lists(inputs)])
    unavoidable = (plain - exact).abs().max()
    assert 0 < (found.logp - exact.sum(2).gather(1, order)).abs().max() < 4 * unavoidable
    assert (lm.score(inputs, ROWS.expand(3, -1, -1)).logp - exact).abs().max() < 2 * unavoidable


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "t5"])
def test_sampling_draws_from_the_policy(name):
    model, inputs = MODELS[name](), prompts()
    lm = prefix_model(model, TRIE)
    found = topk_sampling(lm, inputs, lm.trie, 500, top_k=100, seed=1)
    scores = lm.score(inputs, lm.token_ids(found.node))
    torch.testing.assert_close(scores.logp.sum(2), found.logp, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        want = torch.stack([plain_logp(model, p, ROWS).sum(1) for p in lists(inputs)]).exp()
    share = (found.node[:, :, None] == TRIE.lookup(ROWS)).float().mean(1)
    assert (share - want).abs().max() < 0.08


def test_fewer_items_than_beams():
    trie = Trie.from_sequences(ROWS[:2])
    lm = prefix_model(CAUSAL["qwen2"](), trie)
    found = beam_search(lm, prompts(), lm.trie, 4)
    assert found.num_valid.tolist() == [2, 2, 2]
    assert (lm.token_ids(found.node)[:, 2:] == SIZE["pad_token_id"]).all()
    assert (lm.token_ids(found.node, pad_token_id=-5)[:, 2:] == -5).all()


def test_a_request_alone_and_in_a_batch():
    """No request sees another's columns, whatever room its own leave."""
    model, inputs = CAUSAL["qwen2"](), prompts(batch=5)
    lm = prefix_model(model, TRIE)
    together = beam_search(lm, inputs, lm.trie, 7)
    for b, prompt in enumerate(lists(inputs)):
        alone = beam_search(lm, prompt[None], lm.trie, 7)
        assert torch.equal(alone.node[0], together.node[b])
        torch.testing.assert_close(alone.logp[0], together.logp[b])


def test_long_searches_outgrow_the_cache():
    """More columns than the cache has room for at first, over several rounds."""
    model, inputs = CAUSAL["gpt2"](), prompts()
    lm = prefix_model(model, TRIE)
    logits, state = lm.prefill(inputs)
    slot = torch.arange(3)
    for row in ROWS.repeat(2, 1).tolist():
        first = slot
        for token in row[:2]:
            logits, first = lm.extend(state, first, torch.full((3,), lm.columns.tolist().index(token)))
        with torch.no_grad():
            want = [plain_logits(model, p, torch.tensor([row]))[0, 2, lm.columns] for p in lists(inputs)]
        torch.testing.assert_close(logits, torch.stack(want), rtol=1e-5, atol=2e-5)
    assert state.position.shape[1] == 9 + 2 * 2 * len(ROWS) > 64 + 9
    unused, nowhere = lm.extend(state, torch.tensor([-1, -1]), torch.tensor([0, 0]))
    assert unused.shape == (2, len(lm.columns))
    assert nowhere.tolist() == [-1, -1]


def test_rows_by_request():
    """Unused rows change nothing: prompts padded, requests with more and with fewer rows."""
    model, inputs = CAUSAL["qwen2"](), prompts()
    lm = prefix_model(model, TRIE)
    (_, flat), (_, state) = lm.prefill(inputs), lm.prefill(inputs)
    parent, token = torch.tensor([[0, 0], [-1, 1], [-1, -1]]), torch.tensor([[1, 0], [0, 2], [0, 0]])
    used = parent >= 0
    expected, _ = lm.extend(flat, parent[used], token[used])
    logits, slot = lm.extend(state, parent, token)
    torch.testing.assert_close(logits[used], expected, rtol=1e-5, atol=2e-5)
    again = slot.masked_fill(~used, -1)[:, :1], torch.tensor([[2], [0], [0]])
    expected, _ = lm.extend(flat, torch.tensor([3]), torch.tensor([2]))
    torch.testing.assert_close(lm.extend(state, *again)[0][0], expected, rtol=1e-5, atol=2e-5)


def test_weights_may_change_between_decodes():
    model, inputs = CAUSAL["qwen2"](), prompts()
    lm = prefix_model(model, TRIE)
    before = beam_search(lm, inputs, lm.trie, 4).logp
    model.lm_head.weight.data.mul_(2)
    after = beam_search(lm, inputs, lm.trie, 4).logp
    assert not torch.equal(before, after)
    assert torch.equal(after, beam_search(prefix_model(model, TRIE), inputs, lm.trie, 4).logp)


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "t5"])
def test_the_mode_of_every_module_is_restored(name):
    """Dropout is off in a search and on in training; a part that was frozen in eval mode stays there."""
    model, inputs = MODELS[name](), prompts()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    if name == "qwen2":
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
    lm = prefix_model(model, TRIE)
    want = beam_search(lm, inputs, lm.trie, 5)
    model.train()
    model.get_input_embeddings().eval()
    modes = [module.training for module in model.modules()]
    got = beam_search(lm, inputs, lm.trie, 5)
    assert torch.equal(got.logp, want.logp)
    assert modes == [module.training for module in model.modules()]
    candidates = lm.token_ids(want.node)
    assert not torch.equal(lm.score(inputs, candidates).logp, lm.score(inputs, candidates).logp)


@pytest.mark.parametrize("full_head", [False, True])
@pytest.mark.parametrize("name", ["qwen2", "t5"])
def test_small_catalogues(name, full_head):
    """None, one item, and items of a single token."""
    model, inputs = MODELS[name](), prompts()
    for rows in ([[20, 30, 40]], [[token] for token in range(20, 29)], []):
        rows = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), -1 if rows else 3)
        trie = Trie.from_sequences(rows)
        lm = prefix_model(model, trie, full_head=full_head)
        found = beam_search(lm, inputs, lm.trie, 9)
        assert found.num_valid.tolist() == [len(rows)] * 3
        if len(rows) == 0:
            continue
        assert (topk_sampling(lm, inputs, lm.trie, 9).num_valid == 9).all()
        assert_ranked(beam_search(lm, inputs, lm.trie, len(rows)), lm, model, inputs, rows)
        scores = lm.score(inputs, rows.expand(3, -1, -1))
        with torch.no_grad():
            want = torch.stack([plain_logp(model, p, rows, rows) for p in lists(inputs)])
        torch.testing.assert_close(scores.logp, want, rtol=1e-5, atol=1e-5)
