"""``python -m benchmarks.decoding``: what a tree search costs beside the model that it asks.

With the reference model, 64 requests, budget 33, one thread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vstar_ops import Trie, expand_topk
from vstar_ops.decoding import VEDConfig, beam_search, ved
from vstar_ops.reference.ved_search import ved_search
from vstar_ops.train.model import SIDTransformer
from vstar_ops.train.value import ItemEmbeddings

from . import harness


class Stopwatch:
    """A model that adds up the time spent in it."""

    def __init__(self, model: SIDTransformer) -> None:
        self.model, self.seconds = model, 0.0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self.model, name)

        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = method(*arguments)
            self.seconds += time.perf_counter() - start
            return result

        return timed


def share_of_search(run: Callable[[Any], Any], model: SIDTransformer, rounds: int) -> float:
    """Median over rounds of the part of ``run(model)`` that is not the model's."""
    shares = []
    for _ in range(rounds):
        watch = Stopwatch(model)
        total = harness.Clock().once(partial(run, watch))
        shares.append(1 - watch.seconds / total)
    return statistics.median(shares)


@torch.no_grad()
def least_tokens(model: SIDTransformer, context: Tensor, trie: Trie, width: int) -> Tensor:
    """The tokens ``[B]`` that no exact beam search can do without, however clever.

    A prefix that branches, and is itself above the last winner, may hold a winner until it has been run.
    """
    logits, state = model.prefill(context)
    node = torch.zeros(len(context), 1, dtype=torch.int64)
    slot, logp = torch.arange(len(context))[:, None], torch.zeros(len(context), 1)
    frontier, least = logits[:, None], torch.ones(len(context))
    for depth in range(trie.length):
        out = expand_topk(frontier, trie, node, width, cum_logp=logp)
        if depth > 0:
            least += ((trie.num_children(node) > 1) & (logp > out.logp[:, -1:])).sum(1)
        if depth < trie.length - 1:
            node, logp = out.node.long(), out.logp
            parent = slot.gather(1, out.parent.clamp(min=0).long()).masked_fill(node < 0, -1)
            frontier, slot = model.extend(state, parent.flatten(), out.token.flatten())
            frontier, slot = frontier.unflatten(0, node.shape), slot.view_as(node)
    return least


def against_beam_search(model: SIDTransformer, context: Tensor, trie: Trie, rounds: int) -> None:
    """The search's part of the decode, and the wall time beside a beam search of the same tokens."""
    report = harness.Report()
    beams = "beam search of 33 tokens"
    print()
    for name, config in (("the paper's", VEDConfig.paper()), ("the defaults", VEDConfig())):
        decode = partial(ved, context=context, trie=trie, config=config)
        share = share_of_search(decode, model, rounds)
        print(f"search, {name}, as a share of the VED decode: {100 * share:.1f} % (target at most 15 %)")
        variants: dict[str, Callable[[], Any]] = {
            "ved": partial(decode, model),
            beams: lambda: beam_search(model, context, trie, 16, skip_forced=False),
        }
        spent = [int(call().forward_tokens.sum()) / len(context) for call in variants.values()]
        timing = harness.compare(variants, rounds)
        report.add(f"VED, {name}, {spent[0]:.1f} tokens per request, against {spent[1]:.1f}", timing)
        times = timing.ratio("ved", beams)
        print(f"VED takes {times:.2f} times the wall time of that beam search (target at most 1.5)")


def against_the_sequential_search(model: SIDTransformer, context: Tensor, trie: Trie, rounds: int) -> None:
    """All requests side by side, and one after the other."""
    config, same = VEDConfig.paper(), 0
    few = ved(model, context[:8], trie, config=config, seed=torch.arange(8))
    for b in range(8):
        leaves, _ = ved_search(model, context[b : b + 1], trie, 16, config, seed=b)
        same += len({leaf.node for leaf in leaves} & set(few.node[b].tolist()))
    # Random weights make near ties; rounding in the model's own matrix products turns some of them, and with
    # them the rest of a search. (The tests compare decisions one by one, on models that do not round.)
    assert same >= 0.75 * 8 * 16, f"the sequential search found {8 * 16 - same} of {8 * 16} other candidates"
    variants = {
        "ved": lambda: ved(model, context, trie, config=config),
        "sequential, one request": lambda: ved_search(model, context[:1], trie, 16, config),
    }
    ratio = len(context) * harness.compare(variants, rounds).ratio("sequential, one request", "ved")
    print(f"VED of {len(context)} requests, the sequential search of as many: {ratio:.1f}x (target 10x)")


def forced_tokens(model: SIDTransformer, requests: Tensor, trie: Trie) -> None:
    """What skipping forced tokens saves a beam search."""
    for width in (16, 50, 64, 128):
        spent, least = {True: 0, False: 0}, 0.0
        for prompts in requests.split(64):
            found = {skip: beam_search(model, prompts, trie, width, skip_forced=skip) for skip in spent}
            # Matrix products of other sizes round otherwise, which may turn a near tie.
            torch.testing.assert_close(found[True].logp, found[False].logp, rtol=1e-4, atol=1e-4)
            turned = float((found[True].node != found[False].node).float().mean())
            assert turned < 1e-3, f"skipping forced tokens changed {100 * turned:.2f} % of the results"
            least += least_tokens(model, prompts, trie, width).sum().item()
            spent = {skip: tokens + int(found[skip].forward_tokens.sum()) for skip, tokens in spent.items()}
        each = [spent[skip] / len(requests) for skip in (False, True)]
        print(
            f"forced tokens skipped, {len(requests)} requests, beam search of width {width}: "
            f"{each[0]:.1f} -> {each[1]:.1f} tokens, {100 - 100 * each[1] / each[0]:.0f} % saved; "
            f"no exact search can save more than {100 - 100 * least / len(requests) / each[0]:.0f} %"
        )


def main() -> None:
    """Parse the options, measure, print."""
    parser = harness.parser("benchmarks.decoding", __doc__, rounds=15)
    parser.add_argument("--weights", help="state dict of a trained policy (default: random weights)")
    args = parser.parse_args()

    _, trie, sequences, prompts = harness.start(args)
    model = SIDTransformer(trie.max_token + 1, 33)
    if args.weights:
        state = torch.load(args.weights, map_location="cpu", weights_only=True)
        own = {k: v for k, v in state.items() if k != "prior" and not k.startswith("value_head")}
        model.load_state_dict(own)
    model.add_item_prior(ItemEmbeddings(trie, sequences, torch.randn(len(sequences), 64)))
    model.add_value_head(child_values=True)
    for parameter in model.value_head.parameters():  # type: ignore[union-attr]
        parameter.data += 0.1 * torch.randn_like(parameter)  # values that differ, as trained ones do
    model.eval()
    context = sequences[torch.randint(0, len(sequences), (64, 10))].flatten(1)  # ten items each

    against_beam_search(model, context, trie, args.rounds)
    against_the_sequential_search(model, context, trie, args.rounds)
    forced_tokens(model, context if prompts is None else prompts, trie)


if __name__ == "__main__":
    main()
