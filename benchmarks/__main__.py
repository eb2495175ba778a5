"""``python -m benchmarks``: time every op against torch, after checking that both agree."""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import vstar_ops
from vstar_ops import Trie, expand_topk

from . import baselines, catalogue, harness
from .harness import Report, machine


def legal_case(trie: Trie, depth: int, columns: int) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """``expand_topk`` at B=64, W=16, K=16 with value and entropy, on beams that random logits leave."""
    node, cum_logp = catalogue.frontiers(trie, 64, 16, max(trie.max_token + 1, 768))[depth]
    logits, value = torch.randn(64, node.shape[1], columns), torch.randn(node.shape)
    tables, index = baselines.child_tables(trie, depth), node.long()
    scoring = {"cum_logp": cum_logp, "value": value, "value_weight": 1.0, "entropy_weight": 0.1}
    variants: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        "ours": lambda: expand_topk(logits, trie, node, 16, **scoring),
        "gather, log_softmax, top-k": lambda: baselines.expand_legal(
            logits, tables, index, cum_logp, value, 16
        ),
    }
    ours, other = variants["ours"](), variants["gather, log_softmax, top-k"]()
    torch.testing.assert_close(ours[0], other[0], rtol=1e-4, atol=1e-4)
    return variants


def vocab_case() -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """``normalize="vocab"`` at B=16, W=128, V=8192, K=128, every token legal."""
    trie = Trie.from_sequences(torch.arange(8192).unsqueeze(1))
    logits, cum_logp = torch.randn(16, 128, 8192), torch.randn(16, 128)
    node = torch.zeros(16, 128, dtype=torch.int32)
    variants: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        "ours": lambda: expand_topk(logits, trie, node, 128, cum_logp=cum_logp, normalize="vocab"),
        "log_softmax, top-k": lambda: baselines.expand_dense(logits, cum_logp, 128),
    }
    torch.testing.assert_close(
        variants["ours"]()[0], variants["log_softmax, top-k"]()[0], rtol=1e-4, atol=1e-4
    )
    return variants


def sibling_case(sequences: Tensor, batch: int, group: int) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """``sibling_advantage`` on random items of the catalogue."""
    tokens, rewards = sequences[torch.randint(0, len(sequences), (batch, group))], torch.rand(batch, group)
    variants: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        "ours": lambda: vstar_ops.sibling_advantage(tokens, rewards),
        "unique, index_add": lambda: baselines.sibling_advantage(tokens, rewards),
        "unique of packed keys, index_add": lambda: baselines.sibling_advantage(tokens, rewards, packed=True),
    }
    ours = variants["ours"]()
    for name in list(variants)[1:]:
        advantage, valid = variants[name]()
        torch.testing.assert_close(ours[0], torch.where(valid, advantage, 0), rtol=1e-4, atol=1e-4)
    return variants


def returns_case(sequences: Tensor, batch: int, group: int) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """``prefix_returns`` on random items of the catalogue, embeddings of 64 numbers."""
    tokens = sequences[torch.randint(0, len(sequences), (batch, group))]
    inputs = (tokens, torch.randn(batch, group, 64), tokens[:, 0], torch.randn(batch, 64))
    variants: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        "ours": lambda: vstar_ops.prefix_returns(*inputs),
        "unique of packed keys, index_add": lambda: baselines.prefix_returns(*inputs, (0.3, 0.5, 1.0)),
    }
    for got, want in zip(*(variant() for variant in variants.values())):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    return variants


def tree_case(sequences: Tensor, batch: int, group: int) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """``prefix_tree`` on random items of the catalogue."""
    tokens = sequences[torch.randint(0, len(sequences), (batch, group))]
    variants: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        "ours": lambda: vstar_ops.prefix_tree(tokens),
        "unique of packed keys, scatter": lambda: baselines.prefix_tree(tokens),
    }
    for got, want in zip(*(variant() for variant in variants.values())):
        assert torch.equal(got.long(), want)
    return variants


def logp_case(rows: int, columns: int) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """``token_logp`` over the whole vocabulary, forward and backward, beside the memory's own pace."""
    logits = torch.randn(rows, columns, requires_grad=True)
    target = torch.randint(0, columns, (rows,))
    plain = logits.detach()

    def ours() -> tuple[Tensor, ...]:
        logp = vstar_ops.token_logp(logits, target).logp
        return logp.detach(), torch.autograd.grad(logp.sum(), logits)[0]

    variants: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        "ours": ours,
        "reading twice, writing once": lambda: (
            plain.sum(),
            plain.sum(),
            torch.empty_like(plain).fill_(1.0),
        ),
        "cross_entropy": lambda: baselines.cross_entropy(logits, target),
        "log_softmax, gather": lambda: baselines.token_logp(logits, target),
    }
    for got, want in zip(ours(), variants["cross_entropy"]()):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    return variants


def legal_logp_case(trie: Trie, rows: int, columns: int) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """``token_logp`` over the legal children of depth 1 and over all columns, forward and backward."""
    node, _ = catalogue.frontiers(trie, -(-rows // 16), 16, max(trie.max_token + 1, 768))[1]
    node = node.flatten()[:rows]
    tokens = trie.children(node).token
    target = tokens[:, 0].long()
    logits = torch.randn(rows, columns, requires_grad=True)

    def ours(*where: object) -> tuple[Tensor, ...]:
        logp = vstar_ops.token_logp(logits, target, *where).logp  # type: ignore[arg-type]
        return logp.detach(), torch.autograd.grad(logp.sum(), logits)[0]

    def gathered() -> tuple[Tensor, ...]:
        z = logits.gather(1, tokens.long().clamp(min=0)).masked_fill(tokens < 0, float("-inf"))
        logp = z.log_softmax(1)[:, 0]
        return logp.detach(), torch.autograd.grad(logp.sum(), logits)[0]

    for got, want in zip(ours(trie, node), gathered()):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    return {"ours": lambda: ours(trie, node), "ours, all columns": ours, "gather, log_softmax": gathered}


def loss_case(sequences: Tensor, batch: int, group: int) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """``sibling_grpo_loss`` with clipping and KL, forward and backward; the advantages are given to both."""
    tokens, rewards = sequences[torch.randint(0, len(sequences), (batch, group))], torch.rand(batch, group)
    siblings, over_group = vstar_ops.sibling_advantage(tokens, rewards), vstar_ops.group_advantage(rewards)
    old, ref, logp = (-torch.rand(tokens.shape) for _ in range(3))
    logp.requires_grad_()

    def ours() -> tuple[Tensor, ...]:
        given = {"sibling_advantage": siblings, "group_advantage": over_group}
        out = vstar_ops.sibling_grpo_loss(logp, old_logp=old, ref_logp=ref, clip=(0.2, 0.2), **given)
        return out.loss.detach(), torch.autograd.grad(out.loss, logp)[0]

    variants: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        "ours": ours,
        "torch, autograd": lambda: baselines.sibling_grpo_loss(logp, old, ref, siblings, over_group),
    }
    for got, want in zip(*(variant() for variant in variants.values())):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    return variants


def two_threads(trie: Trie) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """The depth-1 case on two threads and on one."""
    call = legal_case(trie, 1, max(trie.max_token + 1, 768))["ours"]

    def on(threads: int) -> tuple[Tensor, ...]:
        torch.set_num_threads(threads)
        return call()

    return {"ours": lambda: on(2), "one thread": lambda: on(1)}


def main() -> None:
    """Parse the options, run all cases, print the table, write it where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--data", help="folder in MiniOneRec's layout (default: a made catalogue)")
    parser.add_argument("--category", default="Industrial_and_Scientific", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=25, help="interleaved rounds a case (default: 25)")
    parser.add_argument("--alternate", action="store_true", help="one call a turn: others empty the caches")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(1)
    name, sequences = catalogue.load(args.data, args.category)
    trie = Trie.from_sequences(sequences)
    columns = max(trie.max_token + 1, 768)
    compare = functools.partial(harness.compare, slice_s=0.0 if args.alternate else 0.01)
    header = f"{machine()}; catalogue: {name}, {trie}"
    print(header)
    report = Report()
    gather, rounds = "gather,_log_softmax,_top-k", args.rounds
    for depth, target in ((1, 8.0), (2, 15.0)):
        timing = compare(legal_case(trie, depth, columns), rounds)
        report.add(f"expand_topk legal, depth {depth}", timing, **{gather: target})
    report.add("expand_topk legal, V=152064, depth 1", compare(legal_case(trie, 1, 152_064), rounds))
    vocab = compare(vocab_case(), rounds)
    report.add("expand_topk vocab, B=16 W=128 V=8192 K=128", vocab, **{"log_softmax,_top-k": 6.0})
    for batch, group in ((64, 16), (256, 64)):
        timing = compare(sibling_case(sequences, batch, group), rounds)
        report.add(f"sibling_advantage, B={batch} G={group} L=3", timing, **{"unique,_index_add": 40.0})
    for batch, group in ((64, 16), (256, 64)):
        report.add(
            f"prefix_returns, B={batch} G={group} L=3 E=64",
            compare(returns_case(sequences, batch, group), rounds),
        )
    for batch, group in ((64, 16), (256, 64)):
        timing = compare(tree_case(sequences, batch, group), rounds)
        report.add(f"prefix_tree, B={batch} G={group} L=3", timing)
    for batch, group in ((64, 16), (256, 64)):
        timing = compare(loss_case(sequences, batch, group), rounds)
        report.add(f"sibling_grpo_loss, B={batch} G={group} L=3", timing)
    several = min(rounds, 7)
    variants = logp_case(1024, 152_064)
    pace = {"reading_twice,_writing_once": 0.5}
    report.add("token_logp, [1024, 152064], forward, backward", compare(variants, several), **pace)
    peak, size = harness.peak_memory(variants["ours"]), 4 * 1024 * 152_064
    if peak is not None:
        extra = 100 * (peak - size) / size
        print(f"its memory beyond logits and gradient: {extra:.1f} % of the logits (target at most 5 %)")
    variants = legal_logp_case(trie, 1024, 152_064)
    report.add(
        "token_logp legal, depth 1, the same", compare(variants, several), **{"ours,_all_columns": 50.0}
    )
    report.add("expand_topk legal, depth 1, two threads", compare(two_threads(trie), rounds), one_thread=1.6)
    torch.set_num_threads(1)
    rows = torch.randint(0, 2048, (1_000_000, 4))
    start = time.perf_counter()
    Trie.from_sequences(rows)
    seconds = time.perf_counter() - start
    print(f"Trie.from_sequences, 1,000,000 x 4 over 2,048 codes: {seconds:.2f} s (target 3 s)")
    if args.json:
        args.json.write_text(json.dumps({"machine": header, "rows": report.rows}, indent=1))


if __name__ == "__main__":
    main()
