"""Items of different lengths, and the catalogue in ``generate()``."""

from __future__ import annotations

import pytest
import torch
from needs import needs

needs("transformers")

from plain import TRIE, assert_ranked, generated, lists, plain_logp, prompts
from tiny import CAUSAL, MODELS, SIZE, VOCAB

from vstar_ops import Trie
from vstar_ops.decoding import beam_search, topk_sampling, ved
from vstar_ops.integrations.transformers import TrieLogitsProcessor, append_eos, prefix_model

END = SIZE["eos_token_id"]
ITEMS = [[20], [20, 30], [20, 30, 40], [20, 31], [21, 30, 40], [21, 30, 41], [22], [23, 30, 40], [23, 32]]
UNEVEN = append_eos(ITEMS, END)


def test_append_eos():
    assert UNEVEN.dtype == torch.int64
    assert UNEVEN[:3].tolist() == [[20, 2, 2, 2], [20, 30, 2, 2], [20, 30, 40, 2]]
    assert append_eos([torch.tensor([5])], 0).tolist() == [[5, 0]]
    for items in ([[3], []], [[3, END, 4]]):
        with pytest.raises(ValueError, match="sequences must be items of one token or more, without 2"):
            append_eos(items, END)


@pytest.mark.parametrize("normalize", ["legal", "vocab"])
@pytest.mark.parametrize("name", ["qwen2", "gpt2", "mistral, window", "t5"])
def test_items_of_different_lengths(name, normalize):
    """Items that end early, and items that are prefixes of others; EOS counts once."""
    model, inputs, trie = MODELS[name](), prompts(), Trie.from_sequences(UNEVEN)
    lm = prefix_model(model, trie, full_head=normalize == "vocab", eos_token_id=END)
    found = beam_search(lm, inputs, lm.trie, len(UNEVEN), normalize=normalize)
    options = {"rows": UNEVEN, "normalize": normalize, "end": END}
    assert_ranked(found, lm, model, inputs, **options)
    tokens = lm.token_ids(found.node)
    assert sorted(tokens[0].tolist()) == sorted([*item, END, 0, 0][:4] for item in ITEMS)
    scores = lm.score(inputs, tokens, normalize=normalize)
    torch.testing.assert_close(scores.logp.sum(2), found.logp, rtol=1e-5, atol=1e-5)
    assert (scores.logp[tokens == 0] == 0).all()
    short = append_eos([[20], [20, 30]], END)
    scores = lm.score(inputs, short.expand(3, -1, -1), normalize=normalize)
    with torch.no_grad():
        rows = [plain_logp(model, p, short, **options) for p in lists(inputs)]
    torch.testing.assert_close(scores.logp, torch.stack(rows), rtol=1e-5, atol=1e-5)
    if normalize == "legal":
        sampled = topk_sampling(lm, inputs, lm.trie, 50)
        assert (sampled.num_valid == 50).all()
        lm.add_value_head()
        assert set(map(tuple, lm.token_ids(ved(lm, inputs, lm.trie, 9).node)[0].tolist())) <= set(
            map(tuple, tokens[0].tolist())
        )


@pytest.mark.parametrize("normalize", ["legal", "vocab"])
def test_items_of_different_lengths_in_generate(normalize):
    """``generate()`` takes items out of its beams when they end; with enough beams it finds the same."""
    model, inputs, trie = CAUSAL["qwen2"](), prompts(), Trie.from_sequences(UNEVEN)
    lm = prefix_model(model, trie, full_head=True)
    sequence, score = generated(model, inputs, trie, len(UNEVEN), normalize, early_stopping=False)
    found = beam_search(lm, inputs, lm.trie, len(UNEVEN), normalize=normalize)
    assert torch.equal(lm.token_ids(found.node, pad_token_id=END), sequence)  # which reads a pad of 0 as none
    torch.testing.assert_close(found.logp, score, rtol=1e-5, atol=1e-5)


def test_what_may_follow_an_end():
    model = CAUSAL["qwen2"]()
    for rows, child in (([[20, END, 0], [21, 30, END]], 0), ([[20, END, END], [20, END, 30]], 30)):
        with pytest.raises(ValueError, match=f"nothing but EOS tokens after the EOS token 2, got {child}"):
            prefix_model(model, Trie.from_sequences(rows))
        prefix_model(model, Trie.from_sequences(rows), eos_token_id=[90, 91])
    with pytest.raises(TypeError, match="eos_token_id must be an int"):
        prefix_model(model, TRIE, eos_token_id="2")


@pytest.mark.parametrize("normalize", ["legal", "vocab"])
def test_the_logits_processor(normalize):
    """Against the same, written out."""
    trie = Trie.from_sequences(UNEVEN)
    process = TrieLogitsProcessor(trie, 2, normalize=normalize, eos_token_id=END)
    prefixes = [
        [[]],
        [[20], [21], [99]],
        [[20, 30], [20, 2], [21, 30]],
        [[20, 30, 40], [22, 2, 2], [9, 9, 9]],
    ]
    prefixes += [[[20, 2, 2, 2], [20, 30, 40, 2]], [[20, 2, 2, 2, 0], [9, 9, 9, 9, 9]]]
    for level in prefixes:
        scores = torch.randn(len(level), VOCAB)
        before = scores.clone()
        got = process(torch.tensor([[7, 8, *prefix] for prefix in level]), scores)
        assert torch.equal(scores, before)
        for row, prefix, source in zip(got, level, scores):
            legal = {
                r[len(prefix)] for r in UNEVEN.tolist() if len(prefix) < 4 and r[: len(prefix)] == prefix
            }
            legal = sorted(legal or {END})
            want = torch.full((VOCAB,), -torch.inf)
            want[legal] = source[legal] - (source[legal].logsumexp(0) if normalize == "legal" else 0)
            torch.testing.assert_close(row, want)


def test_sampling_by_generate_with_items_that_end_early():
    model, inputs, trie = CAUSAL["qwen2"](), prompts(), Trie.from_sequences(UNEVEN)
    process = TrieLogitsProcessor(trie, inputs["input_ids"].shape[1], eos_token_id=END)
    out = model.generate(
        **inputs, logits_processor=[process], max_new_tokens=6, do_sample=True, num_return_sequences=9
    )
    for row in out[:, inputs["input_ids"].shape[1] :].tolist():
        assert row[: row.index(END)] in ITEMS
        assert set(row[row.index(END) + 1 :]) <= {0}


def test_errors_of_the_logits_processor():
    for arguments, message in (
        ({"prompt_length": -1}, "prompt_length must be at least 0"),
        ({"prompt_length": 1, "normalize": "all"}, "normalize must be 'legal' or 'vocab', got 'all'"),
        ({"prompt_length": 1, "eos_token_id": -1}, "eos_token_id must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            TrieLogitsProcessor(TRIE, **arguments)
    process = TrieLogitsProcessor(TRIE, 3)
    with pytest.raises(ValueError, match="prompt_length must be at most the 2 columns of input_ids, got 3"):
        process(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, VOCAB))
    with pytest.raises(ValueError, match="more columns than the trie's largest token 69, got 50"):
        process(torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 50))
