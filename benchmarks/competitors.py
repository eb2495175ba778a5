"""``python -m benchmarks.competitors``: steps and whole searches, beside what people decode with today.

A competitor is a way of expanding beams under a catalogue, written here as its sources describe it:

- a Python trie behind a function of the prefix, as ``generate()`` with ``prefix_allowed_tokens_fn`` and
  MiniOneRec's logits processor have it
- a dense mask of all columns
- STATIC (arXiv 2602.22647): dense tables of the first two levels, a gather of CSR rows below
- the top ``2 W`` of each beam before the mask, as in wide-beam engines, whose wrong winners are counted

All of them normalize over all columns, as ``normalize="vocab"`` does, and those that claim to be exact must
find the same winners. Ours is timed with ``"legal"`` too, which needs no illegal column; its scores differ.
Beside it stands the best composition of torch operations for that, a gather of the legal logits before the
softmax. Last come verl's and TRL's functions, where they are installed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding

from vstar_ops import Trie, expand_topk
from vstar_ops._files import replacing
from vstar_ops.decoding import beam_search

from . import harness, trainers
from .catalogue import frontiers, made

OURS, LEGAL, GATHER = "ours", "ours, legal", "gather, log_softmax, top-k"
STATIC, DENSE, PYTHON, CUT = "STATIC", "dense mask", "Python trie", "top 2W before the mask"


class Winners(NamedTuple):
    """``[B, k]``, best first; node -1 where there are no more."""

    logp: Tensor
    parent: Tensor
    token: Tensor
    node: Tensor


Step = Callable[[Tensor, Tensor, Tensor, int], Winners]  # logits[B, W, V], node[B, W], cum_logp[B, W], k


def _winners(score: Tensor, token: Tensor | None, node: Tensor, k: int) -> Winners:
    """The best of ``score[B, W, C]``, where ``node`` has the children, and ``token`` their tokens or None."""
    width, per_beam = score.shape[1:]
    top, index = score.flatten(1).topk(min(k, width * per_beam))
    tokens = index % per_beam if token is None else token.flatten(1).gather(1, index)
    return Winners(top, index // per_beam, tokens, node.flatten(1).gather(1, index))


class DenseMask:
    """A mask of all columns for each beam, from a table of the depth's nodes where that is small."""

    def __init__(self, trie: Trie, depth: int, columns: int) -> None:
        self.trie, self.columns, self.table = trie, columns, None
        self.first, end = trie.level_offset[depth], trie.level_offset[depth + 1]
        if (end - self.first) * columns <= 2**25:
            self.table = self.mask(torch.arange(self.first, end))

    def mask(self, node: Tensor) -> Tensor:
        """int64 ``[..., V]``, the child by each column, -1 where there is none."""
        token, child = (x.long() for x in self.trie.children(node))
        mask = torch.full((*node.shape, self.columns + 1), -1)
        return mask.scatter_(-1, token.masked_fill(token < 0, self.columns), child)[..., :-1]

    def __call__(self, logits: Tensor, node: Tensor, cum_logp: Tensor, k: int) -> Winners:
        """Log-softmax, mask, top-k over all columns of all beams."""
        child = self.mask(node) if self.table is None else self.table[node - self.first]
        logp = torch.log_softmax(logits, -1).masked_fill_(child < 0, -torch.inf)
        return _winners(logp.add_(cum_logp[:, :, None]), None, child, k)


class Gather:
    """Rows of a CSR matrix of (token, child), each as long as the one of the depth's widest node."""

    def __init__(self, trie: Trie, depth: int, columns: int) -> None:
        self.offset = trie.offset.long()
        edges = torch.arange(len(trie.token))
        self.packed = torch.stack([trie.token.long(), edges + 1], 1)
        level = self.offset[trie.level_offset[depth] : trie.level_offset[depth + 1] + 1]
        self.limit = torch.arange(int(level.diff().max()))  # the most children on this depth

    def rows(self, values: Tensor, node: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``values[B, W, V]`` of the children, -inf behind the last, their tokens and nodes ``[B, W, C]``."""
        start = self.offset[node]
        there = self.limit < (self.offset[node + 1] - start)[..., None]
        token, child = self.packed[(start[..., None] + self.limit).clamp(max=len(self.packed) - 1)].unbind(-1)
        found = values.gather(2, token).masked_fill_(~there, -torch.inf)
        return found, token, child.masked_fill(~there, -1)

    def __call__(self, logits: Tensor, node: Tensor, cum_logp: Tensor, k: int) -> Winners:
        """Log-softmax over the legal children, top-k."""
        found, token, child = self.rows(logits, node)
        return _winners(torch.log_softmax(found, -1).add_(cum_logp[:, :, None]), token, child, k)


class Static(Gather):
    """The first two depths by :class:`DenseMask`, others by rows of a CSR matrix."""

    def __init__(self, trie: Trie, depth: int, columns: int) -> None:
        self.dense = DenseMask(trie, depth, columns) if depth < 2 else None
        if not self.dense:
            super().__init__(trie, depth, columns)

    def __call__(self, logits: Tensor, node: Tensor, cum_logp: Tensor, k: int) -> Winners:
        """Log-softmax over all columns, mask, top-k."""
        if self.dense:
            return self.dense(logits, node, cum_logp, k)
        found, token, child = self.rows(torch.log_softmax(logits, -1), node)
        return _winners(found.add_(cum_logp[:, :, None]), token, child, k)


class PythonTrie:
    """Dicts, and a Python function that says what is allowed behind a prefix, beam by beam."""

    def __init__(self, trie: Trie, depth: int, columns: int) -> None:
        first, end = trie.level_offset[depth], trie.level_offset[depth + 1]
        children = trie.children(torch.arange(first, end))
        self.allowed = {
            first + i: {t: n for t, n in zip(*row) if t >= 0}
            for i, row in enumerate(zip(children.token.tolist(), children.node.tolist()))
        }

    def __call__(self, logits: Tensor, node: Tensor, cum_logp: Tensor, k: int) -> Winners:
        """Log-softmax, a mask filled from lists, top-k over all columns."""
        logp = torch.log_softmax(logits, -1)
        mask = torch.full_like(logp, -torch.inf)
        for b, beams in enumerate(node.tolist()):
            for w, prefix in enumerate(beams):
                mask[b, w, list(self.allowed[prefix])] = 0
        columns = logits.shape[2]
        top, index = (logp + mask + cum_logp[:, :, None]).flatten(1).topk(k)
        parent, token = index // columns, index % columns
        above = node.gather(1, parent).tolist()
        child = [[self.allowed[p].get(t, -1) for p, t in zip(*row)] for row in zip(above, token.tolist())]
        return Winners(top, parent, token, torch.tensor(child))


class CutBeforeTheMask:
    """The ``2 W`` best tokens of each beam, then the mask: inexact where too few of them are legal."""

    def __init__(self, trie: Trie, depth: int, columns: int) -> None:
        parent = torch.repeat_interleave(trie.offset.diff().long())
        self.columns, self.key = columns, parent * columns + trie.token  # sorted, as the trie is

    def __call__(self, logits: Tensor, node: Tensor, cum_logp: Tensor, k: int) -> Winners:
        """Log-softmax, top ``2 k`` of each beam, mask, top-k."""
        logp, token = torch.log_softmax(logits, -1).topk(min(2 * k, logits.shape[2]), dim=-1)
        wanted = node[..., None] * self.columns + token
        edge = torch.searchsorted(self.key, wanted).clamp(max=len(self.key) - 1)
        legal = self.key[edge] == wanted
        score = logp.masked_fill(~legal, -torch.inf).add_(cum_logp[:, :, None])
        return _winners(score, token, (edge + 1).masked_fill(~legal, -1), k)


COMPETITORS: Mapping[str, Callable[[Trie, int, int], Step]] = {
    STATIC: Static, DENSE: DenseMask, PYTHON: PythonTrie, CUT: CutBeforeTheMask,
}  # fmt: skip


def ours(trie: Trie, normalize: str) -> Step:
    """One call of the op."""

    def step(logits: Tensor, node: Tensor, cum_logp: Tensor, k: int) -> Winners:
        out = expand_topk(logits, trie, node, k, cum_logp=cum_logp, normalize=normalize)
        return Winners(out.logp, out.parent, out.token, out.node)

    return step


def wrong(found: Winners, right: Winners) -> float:
    """The share of the right winners that were not found; those that nearly tie with the last may differ."""
    exist = right.node >= 0
    hit = (
        right.node[:, :, None] == found.node[:, None].masked_fill(found.logp[:, None] == -torch.inf, -2)
    ).any(2)
    last = right.logp.masked_fill(~exist, torch.inf).min(1, keepdim=True).values
    near = (right.logp - last).abs() <= 1e-4
    return float((exist & ~hit & ~near).sum() / exist.sum())


def one_step(
    report: harness.Report, name: str, trie: Trie, columns: int, sizes: tuple[int, int], rounds: int
) -> None:
    """Every depth but the root's, from the beams that random logits leave."""
    batch, width = sizes
    for depth, (node, cum_logp) in list(enumerate(frontiers(trie, batch, width, columns)))[1:]:
        logits = torch.randn(batch, node.shape[1], columns)
        inputs = logits, node.long(), cum_logp, width
        steps: dict[str, Step] = {OURS: ours(trie, "vocab"), LEGAL: ours(trie, "legal")}
        steps |= {other: make(trie, depth, columns) for other, make in COMPETITORS.items()}
        steps[GATHER] = Gather(trie, depth, columns)
        assert wrong(steps[GATHER](*inputs), steps[LEGAL](*inputs)) == 0, f"{GATHER} has wrong winners"
        right, shares = steps[OURS](*inputs), {}
        for other in COMPETITORS:
            shares[other] = wrong(steps[other](*inputs), right)
            assert other == CUT or shares[other] == 0, f"{other} has {shares[other]:.1%} wrong winners"
        clock = harness.Clock()
        samples = {x: clock.sample(lambda _, f=f, inputs=inputs: f(*inputs)) for x, f in steps.items()}
        timing = clock.interleave(samples, rounds)
        case = f"{name}, depth {depth}, B={batch} W={width} V={columns}"
        for own, kind, others in ((OURS, "", COMPETITORS), (LEGAL, ", legal", (GATHER, *COMPETITORS))):
            kept = {x: timing.rounds[x] for x in (own, *others)}
            report.add(case + kind, harness.Timing(kept))
        if shares[CUT]:
            print(f"  {CUT}: of the winners {shares[CUT]:.1%} are wrong, for random logits")


class Bigrams:
    """A model that costs little: logits of a row of a table, by the last token."""

    finite_logits = rows_by_request = True

    def __init__(self, columns: int) -> None:
        self.table = torch.randn(columns + 1, columns)

    def prefill(self, context: Tensor) -> tuple[Tensor, list[Tensor]]:
        return embedding(context, self.table), [context]

    def extend(self, state: list[Tensor], parent: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        first = sum(x.numel() for x in state)
        state.append(token)
        return embedding(token, self.table), torch.arange(first, first + token.numel()).view_as(token)


def search_by(
    steps: list[Step], model: Bigrams, context: Tensor, trie: Trie, width: int
) -> tuple[Tensor, Tensor]:
    """A beam search around steps, one per depth: sequences ``[B, W, L]`` and their log-probabilities."""
    logits, _ = model.prefill(context)
    batch = len(context)
    node, logp = torch.zeros(batch, 1, dtype=torch.int64), torch.zeros(batch, 1)
    sequence = torch.zeros(batch, 1, 0, dtype=torch.int64)
    logits = logits[:, None]
    for depth, step in enumerate(steps):
        found = step(logits, node, logp, width)
        node, logp = found.node.long(), found.logp
        above = sequence.gather(1, found.parent[:, :, None].long().expand(-1, -1, depth))
        sequence = torch.cat([above, found.token[:, :, None].long()], 2)
        if depth + 1 < len(steps):
            logits, _ = model.extend([], found.parent, found.token.long())
    return sequence, logp


def whole_search(
    report: harness.Report, name: str, trie: Trie, columns: int, sizes: tuple[int, int], rounds: int
) -> None:
    """``beam_search`` against the same loop around STATIC's steps, with a model that costs little."""
    batch, width = sizes
    model, context = Bigrams(columns), torch.full((batch,), columns)
    steps = [Static(trie, depth, columns) for depth in range(trie.length)]
    options: dict[str, Any] = {"skip_forced": False}
    calls: dict[str, Callable[[], Any]] = {
        OURS: partial(beam_search, model, context, trie, width, normalize="vocab", **options),
        LEGAL: partial(beam_search, model, context, trie, width, **options),
        STATIC: partial(search_by, steps, model, context, trie, width),
    }
    found, (sequence, logp) = calls[OURS](), calls[STATIC]()
    torch.testing.assert_close(found.logp, logp, rtol=1e-4, atol=1e-4)
    turned = float((found.sequence != sequence).any(2).float().mean())
    assert turned < 0.01, f"{turned:.1%} of the sequences differ"
    clock = harness.Clock()
    timing = clock.interleave({x: clock.sample(lambda _, f=f: f()) for x, f in calls.items()}, rounds)
    case = f"{name}, whole search, B={batch} W={width} V={columns}"
    report.add(case, harness.Timing({x: timing.rounds[x] for x in (OURS, STATIC)}))
    report.add(f"{case}, legal", harness.Timing({x: timing.rounds[x] for x in (LEGAL, STATIC)}))


def main() -> None:
    """Parse the options, measure, print."""
    parser = harness.parser("benchmarks.competitors", (__doc__ or "").split("\n")[0], rounds=9)
    parser.add_argument("--small", action="store_true", help="small shapes, to check this program")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    header, trie, _, _ = harness.start(args)
    report = harness.Report()
    columns = trie.max_token + 1
    one_step(report, "Industrial", trie, columns, (2, 4) if args.small else (64, 16), args.rounds)
    for items, codes, sizes in ((10**3, 64, (2, 4)),) if args.small else (
        (10**5, 1024, (2, 70)), (10**6, 1024, (2, 70)), (10**6, 8192, (4, 128)),
    ):  # fmt: skip
        name, trie = f"{items:,} items", Trie.from_sequences(made(items, codes, 3))
        one_step(report, name, trie, codes, sizes, args.rounds)
        whole_search(report, name, trie, codes, sizes, args.rounds)
    trainers.functions(report, args.rounds, args.small)
    if args.json:
        with replacing(args.json) as path:
            path.write_text(json.dumps({"machine": header, "rows": report.rows}, indent=1))


if __name__ == "__main__":
    main()
