"""``python -m benchmarks.training``: what an RL update costs with packed rows, and the conventional way.

An update is forward, backward and optimizer step of the reference model on 64 requests of 16 candidates, one
thread. Candidates are items drawn at random, which share fewer prefixes than those that a search finds.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from vstar_ops import Trie, sibling_grpo_loss
from vstar_ops.train.model import SIDTransformer
from vstar_ops.train.scoring import candidate_scores
from vstar_ops.train.trainer import optimizer_of

from . import harness

REQUESTS, CANDIDATES = 64, 16


class Updates:
    """The update with or without packing, on its own model; in parts of the requests, to fit in memory."""

    def __init__(
        self, pack: bool, model: SIDTransformer, batch: tuple[Tensor, ...], trie: Trie, part: int
    ) -> None:
        self.pack, self.batch, self.trie, self.part = pack, batch, trie, part
        self.model = copy.deepcopy(model)
        self.optimizer = optimizer_of(self.model, 1e-4, 0.0)

    def gradients(self) -> list[Tensor]:
        """Gradients of the objective, by forward and backward."""
        self.optimizer.zero_grad()
        for context, candidates, reward, reference in zip(*(x.split(self.part) for x in self.batch)):
            scores = candidate_scores(self.model, context, self.trie, candidates, pack=self.pack)
            loss = sibling_grpo_loss(scores.logp, candidates, reward, ref_logp=reference).loss
            (loss * len(context) / REQUESTS).backward()
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def __call__(self) -> None:
        self.gradients()
        self.optimizer.step()


def measure(
    report: harness.Report, trie: Trie, sequences: Tensor, tokens: int, part: int, rounds: int
) -> None:
    """Print a line for prompts of ``tokens`` tokens."""
    items = tokens // sequences.shape[1]
    model = SIDTransformer(trie.max_token + 1, tokens + sequences.shape[1]).eval()
    context = sequences[torch.randint(len(sequences), (REQUESTS, items))].flatten(1)
    candidates = sequences[torch.randint(len(sequences), (REQUESTS, CANDIDATES))]
    reference = torch.zeros(candidates.shape)
    batch = (context, candidates, torch.rand(REQUESTS, CANDIDATES), reference)
    packed, whole = (Updates(pack, model, batch, trie, part) for pack in (True, False))
    for got, want in zip(packed.gradients(), whole.gradients(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * want.abs().max().item())
    variants = {"packed": packed, "one row per candidate": whole}
    timing = harness.compare(variants, rounds)
    targets = {10: {"one row per candidate": 4.0}, 100: {"one row per candidate": 8.0}}
    report.add(f"RL update, prompt of {tokens} tokens", timing, targets.get(items))


def main() -> None:
    """Parse the options, measure, print."""
    parser = harness.parser("benchmarks.training", __doc__, rounds=5)
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[30, 300], help="of a prompt (default: 30 300)"
    )
    parser.add_argument("--part", type=int, default=8, help="requests per forward (default: %(default)s)")
    args = parser.parse_args()

    _, trie, sequences, _ = harness.start(args)
    report = harness.Report()
    for tokens in args.tokens:
        measure(report, trie, sequences, tokens, args.part, args.rounds)


if __name__ == "__main__":
    main()
