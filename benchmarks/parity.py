"""``python -m benchmarks.parity``: which number of this library equals whose, and how closely.

A table for the paper's formulas and one for each package that is installed; the bounds are checked, and the
exit status says whether all of them hold. Tiny random models, CPU, float32, fixed seeds. A row without a
bound shows how much something differs on purpose; docs/parity.md says why.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

import vstar_ops
from vstar_ops import Trie, group_advantage, sibling_advantage, sibling_grpo_loss
from vstar_ops.decoding import beam_search

from . import parity_trainers
from .parity_table import Table, siblings_by_hand


def formulas(table: Table) -> None:
    """The paper's equations, and what the authors' released code makes of them."""
    table.section("Formulas of the paper (arXiv 2602.10699)")
    shape = (6, 16, 3)
    tokens, rewards = torch.randint(4, shape), torch.rand(shape[:2]).round(decimals=1)
    old = -torch.rand(shape)
    logp = (old + 0.1 * torch.randn(shape)).requires_grad_()
    every, group = torch.ones(96, 3, dtype=torch.bool), torch.arange(6).repeat_interleave(16)
    want, number = (
        x.view(shape) for x in siblings_by_hand(tokens.flatten(0, 1), rewards.flatten(), every, group)
    )
    found = sibling_advantage(tokens, rewards)
    table.add("`sibling_advantage`", "Eqs. 17, 18", "advantage", found.advantage, want, 1e-6, relative=True)
    table.add(
        "`num_candidates`", "counted", "candidates per node", found.num_candidates, number.long(), bound=0
    )

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, logp, retain_graph=True)[0]

    options = {"old_logp": old, "global_weight": 0.0, "form": "paper"}
    ours = sibling_grpo_loss(logp, tokens, rewards, **options).loss
    theirs = -((logp.double() - old).exp() * want / number).sum((1, 2)).mean() / shape[1]
    table.add('`form="paper"`', "Eq. 19, each node once", "loss", ours, theirs, 1e-6, relative=True)
    table.add(
        '`form="paper"`',
        "Eq. 19, autograd",
        "gradient",
        gradient(ours),
        gradient(theirs),
        1e-6,
        relative=True,
    )
    x = rewards.double()
    grpo = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-4)
    table.add("`group_advantage`", "GRPO", "advantage", group_advantage(rewards), grpo, 1e-6)

    pooled = sibling_advantage(tokens.view(1, -1, 3), rewards.view(1, -1)).advantage.view(shape)
    turned = ((pooled * found.advantage) < 0).float().mean().item()
    table.add_value("groups per prompt", "prompts pooled (released code)", "share of signs that turn", turned)
    each = sibling_grpo_loss(logp, tokens, rewards, weighting="candidate", **options).loss
    table.add(
        '`weighting="node"`',
        '`"candidate"` (released code)',
        "gradient",
        gradient(ours),
        gradient(each),
        relative=True,
    )
    parts = {"old_logp": old, "clip": (0.1, 0.1), "form": "paper"}
    apart, joint = (
        gradient(sibling_grpo_loss(logp, tokens, rewards, clip_terms=x, **parts).loss)
        for x in ("separate", "joint")
    )
    table.add(
        '`clip_terms="separate"`',
        '`"joint"` (trainers)',
        "gradient under clipping",
        apart,
        joint,
        relative=True,
    )


# ---------------------------------------------------------------- transformers


def decoded(table: Table) -> None:
    """Beam search against ``generate()``, and packed rows against one row per candidate."""
    from . import integrations, tiny

    for name, model in (
        ("Qwen2", tiny.qwen2(2000, 64, 2)),
        ("T5", tiny.t5(2000, spread=1.0)),
    ):
        rows = integrations.items(2000, 5000)
        ids, mask = torch.randint(5, 1000, (4, 20)), torch.ones(4, 20, dtype=torch.int64)
        mask[1, :7] = mask[2, :12] = 0
        if name == "T5":
            mask = mask.flip(1)
        inputs = {"input_ids": ids * mask, "attention_mask": mask}
        beams = []
        for normalize in ("legal", "vocab"):
            beams.append(search(table, f"{name}, {normalize}", model, rows, inputs, normalize))
            packed(table, f"{name}, {normalize}", model, rows, inputs, normalize)
        first, second = (x[:, :10] for x in beams)
        others = (first[:, :, None] != second[:, None]).all(2).float().mean().item()
        table.add_value(
            f"`beam_search`, {name}, legal", "the same, vocab", "share of the top 10 that differ", others
        )


def search(
    table: Table, name: str, model: Any, rows: Tensor, inputs: dict[str, Tensor], normalize: str
) -> Tensor:
    """16 beams of each prompt; returns their leaves, numbered as in the catalogue."""
    from vstar_ops.integrations.transformers import TrieLogitsProcessor, prefix_model

    trie = Trie.from_sequences(rows)
    lm = prefix_model(model, trie, full_head=normalize == "vocab", eos_token_id=[])
    found = beam_search(lm, inputs, lm.trie, 16, normalize=normalize)
    start = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    out = model.generate(
        **inputs,
        logits_processor=[TrieLogitsProcessor(trie, start, normalize=normalize)],
        num_beams=16,
        num_return_sequences=16,
        max_new_tokens=3,
        do_sample=False,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    want = out.sequences[:, start:].view(4, 16, 3)
    differ = (lm.token_ids(found.node) != want).any(2).float().mean().item()
    theirs = "`generate()`, `TrieLogitsProcessor`"
    table.add_value(f"`beam_search`, {name}", theirs, "share of sequences that differ", differ, 0)
    scores = out.sequences_scores.view(4, 16)
    table.add(f"`beam_search`, {name}", theirs, "scores", found.logp, scores, 2e-5)
    return found.node


def packed(
    table: Table, name: str, model: Any, rows: Tensor, inputs: dict[str, Tensor], normalize: str
) -> None:
    """8 candidates of each prompt; theirs without packing, padding, cache or mask."""
    from vstar_ops.integrations.transformers import prefix_model

    from . import integrations

    lm = prefix_model(model, Trie.from_sequences(rows), full_head=normalize == "vocab", eos_token_id=[])
    candidates, legal = rows[torch.randint(len(rows), (4, 8))], integrations.dictionary(rows)
    weight = torch.randn(candidates.shape)

    def gradient(logp: Tensor) -> list[Tensor]:
        model.zero_grad()
        (logp * weight).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    def alone(prompt: Tensor, item: Tensor) -> Tensor:
        if model.config.is_encoder_decoder:
            start = torch.tensor([model.config.decoder_start_token_id])
            fed = {"input_ids": prompt[None], "decoder_input_ids": torch.cat([start, item[:-1]])[None]}
        else:
            fed = {"input_ids": torch.cat([prompt, item[:-1]])[None]}
        logits = model(**fed).logits[0, -3:]
        if normalize == "legal":
            keep = torch.zeros_like(logits, dtype=torch.bool)
            for depth in range(3):
                keep[depth, legal[tuple(item[:depth].tolist())]] = True
            logits = logits.masked_fill(~keep, float("-inf"))
        return logits.log_softmax(1).gather(1, item[:, None])[:, 0]

    prompts = [ids[mask > 0] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"])]
    ours = lm.score(inputs, candidates, normalize=normalize).logp
    theirs = torch.stack(
        [torch.stack([alone(p, item) for item in group]) for p, group in zip(prompts, candidates)]
    )
    table.add(f"`score`, {name}", "one row per candidate", "log-probabilities", ours, theirs, 2e-5)
    table.add(
        f"`score`, {name}",
        "one row per candidate",
        "gradient",
        gradient(ours),
        gradient(theirs),
        1e-5,
        relative=True,
    )


def main() -> int:
    """Print the tables; 1 if a bound does not hold."""
    argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__).parse_args()
    torch.set_num_threads(1)
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # rollout_func
    print(f"vstar_ops {vstar_ops.__version__}, torch {torch.__version__}")
    table = Table()
    torch.manual_seed(0)
    formulas(table)
    for package, part in (
        ("transformers", decoded),
        ("trl", parity_trainers.trl),
        ("verl", parity_trainers.verl),
    ):
        if find_spec(package) is None:
            print(f"\n{package} is not installed")
            continue
        torch.manual_seed(0)
        table.section(f"{package} {importlib.metadata.version(package)}")
        part(table)
    print(f"\nbounds exceeded: {table.exceeded}")
    return int(table.exceeded > 0)


if __name__ == "__main__":
    sys.exit(main())
