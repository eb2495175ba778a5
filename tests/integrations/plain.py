"""A catalogue, prompts, and what a Hugging Face model says of them without this library."""

from __future__ import annotations

from collections import defaultdict

import torch
from needs import needs

needs("transformers")

from tiny import VOCAB

from vstar_ops import Trie
from vstar_ops.integrations.transformers import TrieLogitsProcessor

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
    """Logits ``[N, L, V]`` that predict items ``[N, L]`` behind one prompt, each in a row of its own."""
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
