"""Restricted catalogues: searches and scores of Hugging Face models, and ``generate()``."""

from __future__ import annotations

import pytest
import torch
from needs import needs

needs("transformers")

from plain import ROWS, TRIE, generated, lists, plain_logp, prompts
from tiny import MODELS

from vstar_ops import Trie
from vstar_ops.decoding import VEDConfig, beam_search, topk_sampling, ved
from vstar_ops.integrations.transformers import TrieLogitsProcessor, append_eos, prefix_model

BANNED = [list(range(0, 40)), [], list(range(3, len(ROWS)))]  # of the last request three items are left
EVERY = torch.arange(len(ROWS))


def allowed(b: int) -> torch.Tensor:
    return ROWS[~torch.isin(EVERY, torch.tensor(BANNED[b], dtype=torch.int64))]


@pytest.mark.parametrize("full_head", [False, True])
@pytest.mark.parametrize("name", ["qwen2", "t5"])
def test_every_search_finds_what_is_allowed(name, full_head):
    """Beam search finds all of it, ranked as the model itself ranks it among these items."""
    model, inputs = MODELS[name](), prompts("right" if name == "t5" else "left")
    lm = prefix_model(model, TRIE.restrict(ban=BANNED), full_head=full_head)
    found = beam_search(lm, inputs, lm.trie, len(ROWS))
    for b, prompt in enumerate(lists(inputs)):
        rows = allowed(b)
        with torch.no_grad():
            want = plain_logp(model, prompt, rows, rows).sum(1)
        assert int(found.num_valid[b]) == len(rows)
        leaf = TRIE.lookup(rows)
        order = (found.node[b, : len(rows), None] == leaf).long().argmax(1)
        assert torch.equal(leaf[order], found.node[b, : len(rows)])
        torch.testing.assert_close(found.logp[b, : len(rows)], want[order], rtol=1e-5, atol=1e-5)
    config = VEDConfig(value_weight=0.0, child_values=False, num_value_beams=0)
    for out in (topk_sampling(lm, inputs, lm.trie, 20), ved(lm, inputs, lm.trie, 8, config)):
        for b in range(3):
            assert out.num_valid[b] > 0
            assert set(out.node[b].tolist()) - {-1} <= set(TRIE.lookup(allowed(b)).tolist())
    scores = lm.score(inputs, lm.token_ids(found.node[:, :3]))
    torch.testing.assert_close(scores.logp.sum(2), found.logp[:, :3], rtol=1e-5, atol=1e-5)


def test_a_model_sees_changes():
    """The compact trie of a model shares the filter of the view that it was made of."""
    view, inputs = TRIE.restrict(ban=[]), prompts()
    lm = prefix_model(MODELS["qwen2"](), view)
    first = beam_search(lm, inputs, lm.trie, 1).node[0]
    view.update(ban=TRIE.items(first)[0])
    assert not (beam_search(lm, inputs, lm.trie, 5).node == first).any()


@pytest.mark.parametrize("normalize", ["legal", "vocab"])
@pytest.mark.parametrize("shared", [True, False])
def test_generate(normalize, shared):
    """As beam search, whose oracle is above."""
    model, inputs = MODELS["qwen2"](), prompts()
    view = TRIE.restrict(ban=BANNED[0] if shared else [BANNED[0], [], BANNED[0][:20]])
    lm = prefix_model(model, view, full_head=True)
    sequence, score = generated(model, inputs, view, 5, normalize)
    found = beam_search(lm, inputs, lm.trie, 5, normalize=normalize)
    assert torch.equal(lm.token_ids(found.node), sequence)
    torch.testing.assert_close(found.logp, score, rtol=2e-5, atol=2e-5)


def test_the_processor_takes_rows_of_each_request():
    view = TRIE.restrict(ban=[[], []])
    with pytest.raises(ValueError, match="^trie is restricted for 2 requests, got 3 rows of input_ids"):
        TrieLogitsProcessor(view, 9)(prompts()["input_ids"], torch.zeros(3, 100))
    nothing = TrieLogitsProcessor(TRIE.restrict(allow=[]), 9, eos_token_id=2)
    assert nothing(prompts()["input_ids"], torch.zeros(3, 100)).argmax(1).tolist() == [2, 2, 2]


def test_ends_are_checked_in_the_whole_catalogue():
    trie = Trie.from_sequences(append_eos([[20, 30], [20, 30, 40], [21]], 2))
    view = trie.restrict(ban=[[0], [1, 2]])
    lm = prefix_model(MODELS["qwen2"](), view)
    found = beam_search(lm, prompts(batch=2), lm.trie, 3)
    assert found.num_valid.tolist() == [2, 1]
