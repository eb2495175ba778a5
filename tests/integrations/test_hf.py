"""Hugging Face models as prefix models, against the models themselves: run plainly, and by ``generate()``."""

from __future__ import annotations

import copy
from collections import defaultdict

import pytest
import torch
from needs import needs
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

needs("transformers")

import transformers
from tiny import ALL, CAUSAL, MODELS, SEQ2SEQ, SIZE, VOCAB, causal
from torch.utils._python_dispatch import TorchDispatchMode

from vstar_ops import Trie
from vstar_ops.decoding import VEDConfig, beam_search, topk_sampling, ved
from vstar_ops.integrations.transformers import (
    TrieLogitsProcessor,
    ValueHead,
    append_eos,
    legal_head,
    prefix_model,
)

ROWS = torch.unique(
    torch.stack(
        [
            torch.tensor([20, 24, 29]).repeat(20),
            *torch.randint(30, 70, (2, 60), generator=torch.Generator().manual_seed(1)),
        ],
        1,
    ),
    dim=0,
)
ROWS = torch.cat([ROWS, torch.tensor([[25, 40, 41], [26, 44, 45], [26, 44, 46]])])  # forced tokens, too
TRIE = Trie.from_sequences(ROWS)


def prompts(padding="left", batch=3, columns=9, seed=2):
    """Prompts of 9, 6, 5, ... tokens, which reach past the sliding windows."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(70, VOCAB, (batch, columns), generator=generator)
    length = torch.tensor([columns, columns - 3, *range(columns - 4, 0, -1)])[:batch, None]
    column = torch.arange(columns)
    mask = column >= columns - length if padding == "left" else column < length
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}


def lists(inputs):
    """The prompts without padding."""
    return [ids[mask > 0] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"])]


def plain_logits(model, prompt, items):
    """Logits ``[N, L, V]`` that predict the tokens of items ``[N, L]`` behind one prompt, each in its own row."""
    prompt, (number, length) = prompt.expand(len(items), -1), items.shape
    if model.config.is_encoder_decoder:
        start = torch.full((number, 1), model.config.decoder_start_token_id)
        return model(input_ids=prompt, decoder_input_ids=torch.cat([start, items[:, :-1]], 1)).logits
    return model(input_ids=torch.cat([prompt, items], 1)).logits[:, -length - 1 : -1]


def plain_logp(model, prompt, items, rows=ROWS, normalize="legal", end=None):
    """Log-probabilities ``[N, L]`` of items behind one prompt, with a dictionary for the catalogue."""
    children = defaultdict(set)
    for row in rows.tolist():
        for depth in range(len(row)):
            children[tuple(row[:depth])].add(row[depth])
    logits, found = plain_logits(model, prompt, items).float(), []
    for row, item in zip(logits, items.tolist()):
        logp = []
        for depth, token in enumerate(item):
            legal = sorted(children[tuple(item[:depth])]) if normalize == "legal" else slice(None)
            if end is not None and end in item[:depth]:
                logp.append(row.new_zeros(()))
            else:
                logp.append(row[depth, token] - row[depth, legal].logsumexp(0))
        found.append(torch.stack(logp))
    return torch.stack(found)


def assert_ranked(found, lm, model, inputs, rows=ROWS, tolerance=1e-5, **options):
    """A beam as wide as the catalogue holds every item once, the best first, with the model's own numbers."""
    with torch.no_grad():
        want = torch.stack([plain_logp(model, p, rows, rows, **options).sum(1) for p in lists(inputs)])
    leaf = lm.catalogue.lookup(rows)
    assert torch.equal(found.node.sort(1).values, leaf.sort().values.expand(len(want), -1))
    order = (found.node[:, :, None] == leaf).long().argmax(2)
    torch.testing.assert_close(found.logp, want.gather(1, order).float(), rtol=tolerance, atol=tolerance)
    assert (found.logp.diff(dim=1) <= 0).all()


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


def generated(model, inputs, trie, beams, normalize="legal", **options):
    """Tokens ``[B, K, L]`` and scores ``[B, K]`` of ``generate()``."""
    start = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    out = model.generate(
        **inputs,
        logits_processor=[TrieLogitsProcessor(trie, start, normalize=normalize)],
        max_new_tokens=trie.length,
        **{
            "num_beams": beams,
            "num_return_sequences": beams,
            "do_sample": False,
            "length_penalty": 0.0,
            **options,
        },
        return_dict_in_generate=True,
        output_scores=True,
    )
    batch = len(inputs["input_ids"])
    tokens = out.sequences[:, start:].view(batch, beams, -1)
    return tokens, out.get("sequences_scores", torch.zeros(batch * beams)).view(batch, beams)


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
    model.zero_grad()
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
        if config == searches["default"]:  # leaves by w_p log pi + w_v (V of the parent + child value)
            want = found.logp + config.value_weight * scores.value_from_parent[..., -1]
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
    candidates = ROWS.expand(3, -1, -1)
    for step in range(60):
        scores = lm.score(inputs, candidates, values=True)
        loss = (scores.value[..., 1:] - reward[..., None]).square().mean()
        loss = loss + (scores.value_from_parent[..., 1] - reward).square().mean()
        first = loss.item() if step == 0 else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5 * first
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


# ------------------------------------------------------------------ items of different lengths

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


# ------------------------------------------------------------------ generate()


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


def test_fewer_items_than_beams():
    trie = Trie.from_sequences(ROWS[:2])
    lm = prefix_model(CAUSAL["qwen2"](), trie)
    found = beam_search(lm, prompts(), lm.trie, 4)
    assert found.num_valid.tolist() == [2, 2, 2]
    assert (lm.token_ids(found.node)[:, 2:] == SIZE["pad_token_id"]).all()
    assert (lm.token_ids(found.node, pad_token_id=-5)[:, 2:] == -5).all()


# ------------------------------------------------------------------ what is refused


def config(kind, **changes):
    settings = {**SIZE, **changes}
    return getattr(transformers, f"{kind}Config")(**settings)


def refused():
    """Models that cannot be run exactly, and a part of the reason that is given."""
    small = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": VOCAB}
    make = transformers
    yield (
        "no position ids",
        lambda: make.BloomForCausalLM(make.BloomConfig(n_layer=1, n_head=2, **small)),
        "it takes no position_ids",
    )
    yield (
        "recurrent",
        lambda: make.MambaForCausalLM(make.MambaConfig(state_size=4, **small)),
        "it takes no position_ids",
    )
    yield (
        "alibi",
        lambda: make.FalconForCausalLM(make.FalconConfig(alibi=True, num_attention_heads=2, **small)),
        "ALiBi goes by the column",
    )
    yield (
        "local",
        lambda: make.GPTNeoForCausalLM(
            make.GPTNeoConfig(
                hidden_size=16,
                num_layers=2,
                num_heads=2,
                vocab_size=VOCAB,
                attention_types=[[["global", "local"], 1]],
            )
        ),
        "its local attention goes by the column",
    )
    yield (
        "linear",
        lambda: make.Qwen3NextForCausalLM(
            config(
                "Qwen3Next",
                num_experts=2,
                num_experts_per_tok=1,
                head_dim=8,
                linear_num_value_heads=2,
                linear_num_key_heads=2,
                linear_key_head_dim=8,
                linear_value_head_dim=8,
                layer_types=["linear_attention", "full_attention"],
            )
        ),
        "linear_attention",
    )
    yield (
        "absolute positions",
        lambda: make.BartForConditionalGeneration(
            make.BartConfig(
                d_model=16,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                vocab_size=VOCAB,
            )
        ),
        "of encoder-decoders only t5 and mt5 can, got 'bart'",
    )
    yield "no head", lambda: make.Qwen2Model(config("Qwen2")), "model must have a language model head"
    yield "no model", lambda: nn.Linear(2, 2), "model must be a Hugging Face model, got Linear"


@pytest.mark.parametrize(("make", "reason"), [pytest.param(*x[1:], id=x[0]) for x in refused()])
def test_models_that_would_not_be_exact(make, reason):
    with pytest.raises(TypeError, match=reason):
        prefix_model(make(), TRIE)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_attention_that_takes_no_such_mask(attention):
    model = CAUSAL["qwen2"]()
    lm = prefix_model(model, TRIE)
    model.config._attn_implementation = attention
    for call in (lambda: prefix_model(model, TRIE), lambda: lm.prefill(prompts())):
        with pytest.raises(ValueError, match=f"'sdpa' or 'eager', got '{attention}': model.set_attn_impl"):
            call()


def test_heads_that_are_not_linear_layers():
    class Head(nn.Linear):
        pass

    model = CAUSAL["qwen2"]()
    want = beam_search(prefix_model(model, TRIE), prompts(), TRIE.compact().trie, 4)
    head = Head(32, VOCAB, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    with pytest.raises(TypeError, match="must be a torch.nn.Linear .* got Head: use full_head=True"):
        prefix_model(model, TRIE)
    got = beam_search(prefix_model(model, TRIE, full_head=True), prompts(), TRIE, 4)
    assert torch.equal(got.node, want.node)


def test_normalizing_over_the_vocabulary_needs_the_full_head():
    lm = prefix_model(CAUSAL["qwen2"](), TRIE)
    paper = VEDConfig.paper(normalize="vocab", value_weight=0)
    for call in (
        lambda: beam_search(lm, prompts(), lm.trie, 4, normalize="vocab"),
        lambda: ved(lm, prompts(), lm.trie, 4, paper),
        lambda: lm.score(prompts(), ROWS[None].expand(3, -1, -1), normalize="vocab"),
    ):
        with pytest.raises(ValueError, match="normalize='vocab' needs the logits of all columns"):
            call()
    with pytest.raises(ValueError, match="trie"):  # in token ids, with the compact logits
        beam_search(lm, prompts(), TRIE, 4)


def test_errors_name_the_argument():
    lm = prefix_model(CAUSAL["qwen2"](), TRIE)
    ids, mask = prompts().values()
    for context, error, message in (
        ("a prompt", TypeError, "context must hold input_ids and attention_mask, got str"),
        ({"input_ids": ids, "token_type_ids": ids}, ValueError, "got also token_type_ids"),
        ({"input_ids": ids.float()}, TypeError, "input_ids must be .* got float32"),
        ({"input_ids": ids, "attention_mask": mask[:, 1:]}, ValueError, "attention_mask must have the shape"),
        (
            {"input_ids": ids, "attention_mask": 0 * mask},
            ValueError,
            "attention_mask must leave every prompt",
        ),
    ):
        with pytest.raises(error, match=message):
            lm.prefill(context)
    for candidates, message in (
        (ROWS[:4], r"candidates must have the shape \[B, G, T\]"),
        (ROWS[None, :4].expand(2, -1, -1), r"candidates must have the shape \[B, G, T\]"),
        (torch.zeros(3, 2, 5, dtype=torch.int64), "candidates must have at most L = 3 tokens, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            lm.score(prompts(), candidates)
    with pytest.raises(ValueError, match="normalize must be 'legal' or 'vocab', got 'all'"):
        lm.score(prompts(), ROWS.expand(3, -1, -1), normalize="all")
    with pytest.raises(ValueError, match="values needs a value head"):
        lm.score(prompts(), ROWS.expand(3, -1, -1), values=True)


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


# ------------------------------------------------------------------ wrappers


def test_a_compiled_model():
    """The same items, and a second decode compiles nothing, also of longer prompts."""
    counter = CompileCounterWithBackend("eager")
    model, inputs = causal("Qwen2", num_hidden_layers=1)(), prompts()
    lm = prefix_model(model, TRIE)
    compiled = prefix_model(torch.compile(model, backend=counter, dynamic=True), TRIE)
    graphs = []
    for columns in (9, 9, 11):
        inputs = prompts(columns=columns)
        got, want = (beam_search(x, inputs, lm.trie, 6) for x in (compiled, lm))
        assert torch.equal(got.node, want.node)
        torch.testing.assert_close(got.logp, want.logp)
        graphs.append(counter.frame_count)
    assert 0 < graphs[0] == graphs[1] == graphs[2]


def test_distributed_data_parallel(tmp_path):
    """Training goes through the wrapper, which averages gradients; decoding leaves it out."""
    model, inputs = CAUSAL["qwen2"](), prompts()
    lm = prefix_model(model, TRIE)
    found = beam_search(lm, inputs, lm.trie, 4)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        calls = []
        wrapped.register_forward_hook(lambda *_: calls.append(1))
        both = prefix_model(wrapped, TRIE)
        assert torch.equal(beam_search(both, inputs, lm.trie, 4).node, found.node)
        assert not calls
        both.score(inputs, both.token_ids(found.node)).logp.sum().backward()
        assert len(calls) == 1
        assert model.lm_head.weight.grad.abs().sum() > 0
    finally:
        torch.distributed.destroy_process_group()


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


def test_weights_may_change_between_decodes():
    model, inputs = CAUSAL["qwen2"](), prompts()
    lm = prefix_model(model, TRIE)
    before = beam_search(lm, inputs, lm.trie, 4).logp
    model.lm_head.weight.data.mul_(2)
    after = beam_search(lm, inputs, lm.trie, 4).logp
    assert not torch.equal(before, after)
    assert torch.equal(after, beam_search(prefix_model(model, TRIE), inputs, lm.trie, 4).logp)


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
        for depth, token in enumerate(row[:2]):
            logits, first = lm.extend(state, first, torch.full((3,), lm.columns.tolist().index(token)))
        with torch.no_grad():
            want = [plain_logits(model, p, torch.tensor([row]))[0, 2, lm.columns] for p in lists(inputs)]
        torch.testing.assert_close(logits, torch.stack(want), rtol=1e-5, atol=2e-5)
    assert state.position.shape[1] == 9 + 2 * 2 * len(ROWS) > 64 + 9
    unused, nowhere = lm.extend(state, torch.tensor([-1, -1]), torch.tensor([0, 0]))
    assert unused.shape == (2, len(lm.columns))
    assert nowhere.tolist() == [-1, -1]
