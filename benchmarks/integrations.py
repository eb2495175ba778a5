"""``python -m benchmarks.integrations``: Hugging Face models decoded and trained, by this library or not.

Tiny random models, so that what is compared is everything around them; one thread. Both sides are checked to
give the same sequences, or gradients, before they are timed.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from vstar_ops import Trie
from vstar_ops.collect_env import cpu_model
from vstar_ops.decoding import beam_search
from vstar_ops.integrations.transformers import TrieLogitsProcessor, prefix_model

from . import harness, trainers
from .tiny import qwen2, t5

SMALL_VOCAB, BATCH, CANDIDATES = 20_000, 8, 16  # the vocabulary of T5 and of training
PROCESSOR, PREFIX_FN = "generate(), LogitsProcessor", "generate(), prefix_allowed_tokens_fn"
ROWS = "one row per candidate"
SID_TOKENS = 256  # per level


def items(vocab: int, number: int) -> Tensor:
    """A catalogue whose tokens are the last columns of the vocabulary, three levels."""
    return torch.randint(SID_TOKENS, (number, 3)) + torch.arange(3) * SID_TOKENS + vocab - 3 * SID_TOKENS


def dictionary(rows: Tensor) -> dict[tuple[int, ...], list[int]]:
    """The tokens that may follow each prefix, for ``prefix_allowed_tokens_fn``."""
    children: dict[tuple[int, ...], set[int]] = {}
    for row in rows.tolist():
        for depth in range(len(row)):
            children.setdefault(tuple(row[:depth]), set()).add(row[depth])
    return {prefix: sorted(tokens) for prefix, tokens in children.items()}


def decode(
    report: harness.Report, name: str, model: Any, rows: Tensor, prompt: int, beams: int, rounds: int
) -> None:
    """A line for each way to use ``generate()``, with the full head and with that on legal columns."""
    trie, legal = Trie.from_sequences(rows), dictionary(rows)
    ids = torch.randint(5, 1000, (BATCH, prompt))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    start = 1 if model.config.is_encoder_decoder else prompt
    options = {"num_beams": beams, "num_return_sequences": beams, "max_new_tokens": 3, "do_sample": False}

    def generated(**constraint: Any) -> Tensor:
        out = model.generate(**inputs, **options, renormalize_logits=True, length_penalty=0.0, **constraint)
        return out[:, start:].view(BATCH, beams, 3)

    def searched(full_head: bool) -> Tensor:
        lm = prefix_model(model, trie, full_head=full_head, eos_token_id=[])
        return lm.token_ids(beam_search(lm, inputs, lm.trie, beams).node)

    variants: dict[str, Callable[[], Tensor]] = {
        PROCESSOR: lambda: generated(logits_processor=[TrieLogitsProcessor(trie, start)]),
        PREFIX_FN: lambda: generated(prefix_allowed_tokens_fn=lambda _, x: legal[tuple(x[start:].tolist())]),
        "full": lambda: searched(True),
        "legal": lambda: searched(False),
    }
    want, *others = (call() for call in variants.values())
    for found in others:
        turned = (found != want).any(2).float().mean().item()  # the order of what is equal up to rounding
        assert turned <= 0.01, f"{100 * turned:.1f} % of the sequences differ"
    timing = harness.compare(variants, rounds)
    targets = {"t5": {PROCESSOR: 2.5}}.get(name, {PROCESSOR: 3.0, PREFIX_FN: 4.0})
    for ours, text in (("full", "full head"), ("legal", "head on legal columns")):
        kept = {key: timing.rounds[key] for key in (ours, PROCESSOR, PREFIX_FN)}
        if ours == "legal" and name != "t5":
            targets = {PROCESSOR: 15.0, PREFIX_FN: 15.0}
        report.add(f"{name}, {prompt} prompt tokens, {beams} beams, {text}", harness.Timing(kept), targets)


def training(report: harness.Report, vocab: int, prompt: int, rounds: int) -> None:
    """Forward and backward of 8 prompts with 16 candidates, whole vocabulary; ours also on legal columns."""
    rows = items(vocab, 10_000)
    model, trie = qwen2(vocab, 128, 2), Trie.from_sequences(rows)
    ids = torch.randint(5, 1000, (BATCH, prompt))
    inputs = {"input_ids": ids}
    candidates = rows[torch.randint(len(rows), (BATCH, CANDIDATES))]
    weight = torch.randn(candidates.shape)
    full, few = (prefix_model(model, trie, full_head=x) for x in (True, False))

    def packed() -> Tensor:
        return full.score(inputs, candidates, normalize="vocab").logp

    def legal() -> Tensor:
        return few.score(inputs, candidates).logp

    def unpacked() -> Tensor:
        row = torch.cat([ids.repeat_interleave(CANDIDATES, 0), candidates.flatten(0, 1)], 1)
        logits = model(input_ids=row, logits_to_keep=4).logits[:, :-1]
        logp = logits.log_softmax(2).gather(2, candidates.flatten(0, 1)[..., None])
        return logp.view(candidates.shape)

    def gradients(logp: Callable[[], Tensor]) -> list[Tensor]:
        model.zero_grad()
        (logp() * weight).sum().backward()
        return [p.grad for p in model.parameters()]

    got, want = copy.deepcopy(gradients(packed)), gradients(unpacked)
    worst = max(((x - y).norm() / y.norm()).item() for x, y in zip(got, want))
    assert worst < 1e-5, f"gradients differ by {worst:.1e}"
    calls = {"packed": packed, ROWS: unpacked, "legal": legal}
    timing = harness.compare({name: (lambda f=f: gradients(f)) for name, f in calls.items()}, rounds).rounds
    targets = {ROWS: 5.0 if prompt < 300 else 10.0}
    name = f"forward, backward, {BATCH} x {CANDIDATES}, {prompt} prompt tokens"
    report.add(name, harness.Timing({key: timing[key] for key in ("packed", ROWS)}), targets)
    both = harness.Timing({key: timing[key] for key in ("legal", ROWS)})
    report.add(f"{name}, legal columns", both)
    print(f"greatest relative difference of a gradient: {worst:.1e}")


def main() -> None:
    """Parse the options, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.integrations", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--items", type=int, default=100_000, help="in the catalogue (default: %(default)s)")
    parser.add_argument("--vocab", type=int, default=151_936, help="of the decoder (default: %(default)s)")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{cpu_model()}, 1 thread, {versions}")
    report = harness.Report()
    model, rows = qwen2(args.vocab, 128, 2), items(args.vocab, args.items)
    for prompt, beams in ((64, 16), (64, 50), (300, 16)):
        decode(report, "qwen2", model, rows, prompt, beams, args.rounds)
    vocab = min(args.vocab, SMALL_VOCAB)
    model, rows = t5(vocab), items(vocab, args.items)
    for beams in (16, 50):
        decode(report, "t5", model, rows, 64, beams, args.rounds)
    for prompt in (64, 300):
        training(report, vocab, prompt, args.rounds)
    trainers.measure(report, args.rounds)


if __name__ == "__main__":
    main()
