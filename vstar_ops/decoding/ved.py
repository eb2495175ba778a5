"""Value-guided efficient decoding: a tree search per request within a budget, all requests side by side."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._deprecated import renamed_arguments, renamed_field
from ..ops import (
    ExpandTopK,
    LeafCandidates,
    ModelInputs,
    SearchTrees,
    SelectedRows,
    expand_topk,
    ved_beams,
    ved_candidates,
    ved_evaluate,
    ved_inputs,
    ved_insert,
    ved_select,
)
from ..ops._checks import check_int, check_seeds, validating
from ..trie import Trie
from .protocol import (
    PrefixModel,
    can_skip_forced,
    check_finite_logits,
    check_model,
    extend_by_request,
)
from .ved_config import VEDConfig


class VEDResult(NamedTuple):
    """Candidates of :func:`ved`, best first; ``L`` tokens each."""

    sequence: Tensor
    node: Tensor
    logp: Tensor
    score: Tensor
    num_valid: Tensor
    forward_tokens: Tensor
    trees: SearchTrees


VEDResult.count = renamed_field("num_valid")  # type: ignore[method-assign]


@renamed_arguments(candidates="num_candidates", rounds="num_rounds")
@torch.no_grad()
def ved(
    model: PrefixModel,
    context: Any,
    trie: Trie,
    num_candidates: int = 16,
    config: VEDConfig = VEDConfig(),  # noqa: B008 (it is immutable)
    *,
    seed: Tensor | int = 0,
    num_rounds: int | None = None,
    constant_shapes: bool = False,
) -> VEDResult:
    r"""Value-guided efficient decoding (V-STAR, arXiv 2602.10699, Eqs. 10-14), within a hard token budget.

    A beam search makes the first tree of each request, and every node of it is evaluated once. Then, round
    after round, a traversal follows the largest
    :math:`U(s) = G(s) + \beta \sqrt{\ln(N_{root} + 1) / (N(s) + 1)}` with
    :math:`G(s) = w_v V(s) + \lambda H(s) + w_p \log\pi(y_{\le\ell}|x)`. Every node on its path whose G is at
    least the mean of its depth gets one new child, drawn from its unexpanded legal children in proportion to
    :math:`\pi`. The new children of all requests are evaluated in one forward. The search ends when the
    budget is spent or nothing can be expanded. With ``config.skip_forced`` prefixes that lead to one leaf
    only are candidates without being evaluated. Its steps are the ops of :mod:`vstar_ops.ops.ved`.

    Args:
        model: a :class:`PrefixModel` that also has ``value``, unless ``config.value_weight`` is 0, and
            ``child_value``, unless ``config.child_values`` is False; see :class:`ValueModel`.
        context: a batch of ``B`` prompts, as the model takes them.
        trie: the catalogue, on the model's device; a restricted one, for all requests or for each of the
            ``B``, gives allowed items only. What leads to one leaf of the whole catalogue is known as such.
        num_candidates: ``K``, the most leaves that are returned per request.
        config: see :class:`VEDConfig`; ``VEDConfig.paper()`` is the paper's search.
        seed: int64 seeds ``[B]``, one per request, or one int for seeds derived from it and ``b``. The
            drawn children are a pure function of (seed, prefix), whatever the batch, device and threads.
        num_rounds: run exactly this number of rounds and never look at the host in between, as a CUDA graph
            needs it. None stops when all requests are done, which the host looks up once per round.
        constant_shapes: run unused rows too, so that the host has nothing else to wait for. Implied by
            ``num_rounds``.

    Returns:
        A named tuple:

        - ``sequence`` int32 ``[B, K, L]``, ``node`` int32 ``[B, K]``, ``logp`` float32 ``[B, K]``: distinct
          legal leaves: those that were evaluated, by value descending, then by lower tokens; then those that
          the evaluated prefixes list, by score descending, then by shorter prefixes and lower tokens
        - ``score`` float32 ``[B, K]``: :math:`w_v V + w_p \log\pi`, by which they are ranked; for the
          policy's own candidates log pi
        - ``num_valid`` int32 ``[B]``: candidates that exist; slots past it hold -1 and -inf
        - ``forward_tokens`` int32 ``[B]``: never above the budget
        - ``trees``: the whole search, see :class:`vstar_ops.SearchTrees`

    Raises:
        TypeError, ValueError: an argument's type, shape, device or value, by name. Where forced tokens are
            skipped, under :func:`vstar_ops.validation`, a model that breaks its promise of finite logits.
    """
    check_int("num_candidates", num_candidates, 1)
    if num_rounds is not None:
        check_int("num_rounds", num_rounds, 0)
    if not isinstance(config, VEDConfig):
        raise TypeError(f"config must be a VEDConfig, got {type(config).__name__}")
    budget = config.forward_budget(trie.length, num_candidates)
    _check_methods(model, trie, config)
    logits, state = model.prefill(context)
    seeds = check_seeds("seed", seed, logits.shape[0], logits.device)
    levels = trie.length if config.evaluate_leaves else trie.length - 1
    # A list of leaves is cut where nothing behind the cut can become a candidate.
    leaves = trie.max_children
    if not (config.num_policy_candidates and config.child_values):  # these rank one list in two ways
        leaves = min(leaves, num_candidates + (budget if config.evaluate_leaves else 0))
    trees = SearchTrees.empty(
        logits.shape[0],
        budget,
        levels,
        children=max(1, min(trie.max_children, budget)),
        leaves=max(1, leaves),
        device=logits.device,
    )
    skip_forced = config.skip_forced and not config.evaluate_leaves
    skip_forced = skip_forced and can_skip_forced(model, config.normalize)
    constant_shapes = constant_shapes or num_rounds is not None
    search = _Search(model, state, trie, trees, seeds, config, levels, skip_forced, constant_shapes)
    search.plant(logits, budget)
    search.grow(num_rounds)
    best = search.candidates(num_candidates)
    return VEDResult(trie.sequences(best.node), *best, trees.size, trees)


def _check_methods(model: PrefixModel, trie: Trie, config: VEDConfig) -> None:
    """The methods and the logits that the config needs."""
    check_model(model, trie, config.normalize)
    unasked = "child_values=False and num_value_beams=0"
    value = "value", config.value_weight != 0, f"one with value_weight=0, {unasked}"
    child_value = "child_value", config.child_values, f"VEDConfig.paper(), or one with {unasked}"
    for method, needed, otherwise in (value, child_value):
        if needed and not hasattr(model, method):
            given = type(model).__name__
            raise TypeError(
                f"model must have {method}(state, slot), got {given}; else config must be {otherwise}"
            )


@dataclass
class _Search:
    """The trees of a batch, the model that is asked, and how."""

    model: Any
    state: Any
    trie: Trie
    trees: SearchTrees
    seeds: Tensor
    config: VEDConfig
    levels: int  # the depth of the deepest node that is evaluated
    skip_forced: bool
    constant_shapes: bool

    @property
    def policy(self) -> dict[str, Any]:
        """How log-probabilities are computed."""
        return {"normalize": self.config.normalize, "temperature": self.config.temperature}

    def plant(self, logits: Tensor, budget: int) -> None:
        """The initial beam search, all nodes of which are evaluated."""
        batch, device = len(logits), logits.device
        root = torch.zeros(batch, 1, dtype=torch.int32, device=device)
        rows = SelectedRows(root - 1, root, torch.zeros(batch, 1, device=device))
        logits = logits[:, None]
        values = self.evaluate(rows, logits, torch.arange(batch, device=device)[:, None])
        width, spent = min(self.config.beam_width, max(1, (budget - 1) // max(self.levels, 1))), 1
        for _ in range(self.levels):
            width = min(width, budget - spent)
            if width < 1:
                break
            rows = self.next_beams(rows, logits, width, *values)
            logits, slot = self.forward(ved_inputs(self.trees, self.trie, rows))
            values = self.evaluate(rows, logits, slot)
            spent += width

    def next_beams(
        self, rows: SelectedRows, logits: Tensor, width: int, value: Tensor, child_value: Tensor | None
    ) -> SelectedRows:
        """The best extensions of the beams ``rows``: by probability, then by value."""
        config, of_value = self.config, min(self.config.num_value_beams, width)

        def best(count: int, **ranking: Any) -> ExpandTopK:
            # What stands for a leaf is a candidate already, and takes no place.
            count *= config.LISTED_PER_BEAM if self.skip_forced else 1
            return expand_topk(
                logits, self.trie, rows.node, count, cum_logp=rows.logp, **self.policy, **ranking
            )

        lists = [best(width - of_value)] if of_value < width else []
        if of_value:
            weight = config.value_weight or 1.0  # where V has no weight, child values have weight 1
            ranking = {"value_weight": weight, "logp_weight": config.logp_weight}
            lists.append(best(width, value=value / weight, child_value=child_value, **ranking))
        options: dict[str, Any] = {"num_first": width - of_value or width, "skip_forced": self.skip_forced}
        return ved_beams(self.trees, self.trie, rows, lists[0], width, others=lists[-1], **options)

    def grow(self, num_rounds: int | None) -> None:
        """Rounds of traversals, each with one forward of the nodes that they add."""
        config = self.config
        while self.levels > 0 and num_rounds != 0:
            rows = ved_select(
                self.trees,
                exploration=config.exploration,
                traversals=config.traversals_per_round,
                max_idle=config.max_idle,
            )
            inputs = ved_inputs(self.trees, self.trie, rows)
            if num_rounds is not None:
                num_rounds -= 1
            elif bool(inputs.unused.all()):
                break
            self.evaluate(rows, *self.forward(inputs))

    def forward(self, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
        """Logits ``[B, P, V]`` and slots ``[B, P]`` of new rows."""
        shape = inputs.slot.shape
        if self.constant_shapes:
            logits, slot = extend_by_request(self.model, self.state, inputs.slot, inputs.token)
        else:  # models leave unused rows out
            logits, slot = self.model.extend(self.state, inputs.slot.flatten(), inputs.token.flatten())
            logits = logits.unflatten(0, shape)
        return logits, slot.long().view(shape).masked_fill(inputs.unused, -1)

    def evaluate(self, rows: SelectedRows, logits: Tensor, slot: Tensor) -> tuple[Tensor, Tensor | None]:
        """Insert the rows with all that the model says about them; returns values and child values."""
        config, shape, asked = self.config, slot.shape, slot.flatten()
        value = child_value = None
        if config.value_weight != 0:
            value = self.model.value(self.state, asked).float().unflatten(0, shape)
        if config.child_values:
            child_value = self.model.child_value(self.state, asked).unflatten(0, shape)
        if self.skip_forced and validating():
            token = self.trie.children(rows.node).token.long()
            finite = logits.gather(2, token.clamp(min=0)) > -torch.inf  # NaN compares false
            check_finite_logits((finite & (token >= 0)).sum(2), (token >= 0).sum(2))
        evaluation = ved_evaluate(
            self.trees, self.trie, rows, logits, slot, self.seeds, value=value, child_value=child_value,
            value_weight=config.value_weight, logp_weight=config.logp_weight, skip_forced=self.skip_forced,
            expand_root=config.expand_root, **self.policy,
        )  # fmt: skip
        priority = {"entropy_weight": config.entropy_weight, "logp_weight": config.logp_weight}
        ved_insert(self.trees, rows, evaluation, **priority)
        return evaluation.value, child_value

    def candidates(self, k: int) -> LeafCandidates:
        """The ``k`` best leaves: the policy's own, those of distinct prefixes, the others."""
        trees, config, length = self.trees, self.config, self.trie.length
        best = ved_candidates(trees, length, k, logp_weight=config.logp_weight)
        if config.max_leaves_per_prefix is not None:
            few = replace(trees, num_leaves=trees.num_leaves.clamp(max=config.max_leaves_per_prefix))
            best = _first_then(ved_candidates(few, length, k, logp_weight=config.logp_weight), best)
        if config.num_policy_candidates:
            probable = replace(trees, value=torch.zeros_like(trees.value), leaf_score=trees.leaf_logp)
            first = ved_candidates(probable, length, min(config.num_policy_candidates, k), logp_weight=1.0)
            best = _first_then(first, best)
        return best


def _first_then(first: LeafCandidates, others: LeafCandidates) -> LeafCandidates:
    """The nodes of ``first``, then those of ``others`` that are not among them; as many as ``others`` has."""
    again = (others.node[:, :, None] == first.node[:, None]).any(2)
    others = others._replace(node=others.node.masked_fill(again, -1))
    node, logp, score = (torch.cat(pair, 1) for pair in zip(first[:3], others[:3]))
    order = torch.sort((node < 0).byte(), dim=1, stable=True).indices[:, : others.node.shape[1]]
    node = node.gather(1, order)
    unused = node < 0
    logp, score = (x.gather(1, order).masked_fill(unused, -torch.inf) for x in (logp, score))
    return LeafCandidates(node, logp, score, (~unused).sum(1).int())
