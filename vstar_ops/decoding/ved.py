"""Value-guided efficient decoding: a budgeted tree search a request, all requests side by side."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import expand_topk
from ..ops._checks import check_finite, check_int, check_seeds
from ..ops.ved import Candidates, Evaluation, Rows, SearchTrees, ved_candidates, ved_insert, ved_select
from ..trie import Trie
from .protocol import PrefixModel


class VEDResult(NamedTuple):
    """Candidates of :func:`ved`, best first; ``L`` tokens each."""

    sequence: Tensor
    node: Tensor
    logp: Tensor
    score: Tensor
    num_valid: Tensor
    forward_tokens: Tensor
    trees: SearchTrees


@torch.no_grad()
def ved(
    model: PrefixModel,
    context: Any,
    trie: Trie,
    candidates: int = 16,
    *,
    budget: int = 33,
    width: int = 8,
    entropy_weight: float = 0.1,
    exploration: float = 1.0,
    value_weight: float = 1.0,
    logp_weight: float = 0.0,
    evaluate_leaves: bool = True,
    action_values: bool = False,
    guided: int = 0,
    expand_root: bool = True,
    skip_forced: bool = False,
    completions: int = 0,
    own: int = 0,
    paths: int = 1,
    max_idle: int = 1000,
    rounds: int | None = None,
    seed: Tensor | int = 0,
    normalize: str = "legal",
    temperature: float = 1.0,
) -> VEDResult:
    r"""Value-guided efficient decoding (V-STAR, arXiv 2602.10699, Eqs. 10-14), within a hard token budget.

    A beam search of ``width`` makes a request's first tree and every node of it is evaluated once. Then,
    round after round, a traversal follows the largest
    :math:`U(s) = G(s) + \beta \sqrt{\ln(N_{root} + 1) / (N(s) + 1)}` with
    :math:`G(s) = w_v V(s) + \lambda H(s) + w_p \log\pi(y_{\le\ell}|x)`, and every node on its path whose G
    is at least the mean of its depth gets one new child, drawn from its unexpanded legal children in
    proportion to :math:`\pi`; the new children of all requests are evaluated in one forward. It ends when
    the budget is spent or nothing can be expanded. The steps are the ops of :mod:`vstar_ops.ops.ved`.

    Args:
        model: a :class:`PrefixModel` that also has ``value`` (unless ``value_weight`` is 0) and
            ``child_value`` (with ``action_values``); see :class:`ValueModel`.
        context: a batch of ``B`` prompts, as the model takes them.
        trie: the catalogue, on the model's device.
        candidates: ``K``, at most so many leaves a request are returned.
        budget: forward tokens a request, never exceeded: 1 for the root and 1 for each other evaluated
            node. At least ``L``, what one prefix of depth ``L - 1`` costs.
        width: of the initial beam search; narrowed to ``(budget - 1) // levels`` where the budget is smaller.
        entropy_weight, exploration: :math:`\lambda` and :math:`\beta`.
        value_weight: :math:`w_v`; 0 is a best-first search that never asks for a value.
        logp_weight: :math:`w_p`, a log-probability prior in G, and in the ranking of leaves,
            :math:`w_v V + w_p \log\pi`. 0 is the paper.
        evaluate_leaves: True: leaves are nodes, cost a token and are ranked by their own value. False: the
            whole budget goes to inner prefixes, and a leaf is ranked by its parent's value.
        action_values: leaves without a value of their own are ranked by ``V + Q``, Q the model's
            ``child_value``, a correction to V for each child; with ``evaluate_leaves=False`` these are all.
        guided: of the initial beams so many are the best of the others by :math:`w_p \log\pi + w_v (V + Q)`,
            what a prefix is thought to be worth before it is evaluated; needs ``action_values``. 0 is the
            paper, all by log pi. With ``guided`` and ``width`` at ``candidates`` the whole budget is a beam
            search by value.
        expand_root: False leaves the root out of the expansion: no first tokens beyond the initial ones.
        skip_forced: a leaf that is an only child is not evaluated; it is ranked among the evaluated leaves by
            its parent's value, and its token is saved. Only with ``evaluate_leaves`` and ``"legal"``, and
            without ``completions``.
        completions: leaves below one prefix that may be candidates before those of other prefixes are used
            up; 0 is the paper, any number. A parent's value says the same of all its leaves: without a limit
            the candidates crowd below few prefixes.
        own: so many candidates are the policy's, the most probable leaves of the tree (evaluated ones first),
            whatever V says of them, in front of the others. So training sees the mistakes that V avoids.
        paths: traversals a round; more than 1 trades exactness for larger forwards.
        max_idle: so many traversals in a row may expand nothing before a request's search ends.
        rounds: run exactly so many rounds and never look at the host in between; None stops when all
            requests are done, which the host looks up once a round.
        seed: int64 seeds ``[B]``, one a request, or one int for seeds derived from it and ``b``. The
            drawn children are a pure function of (seed, prefix), whatever the batch, device and threads.
        normalize, temperature: of :math:`\pi`, as in :func:`vstar_ops.expand_topk`.

    Returns:
        A named tuple:

        - ``sequence`` int32 ``[B, K, L]``, ``node`` int32 ``[B, K]``, ``logp`` float32 ``[B, K]``: distinct
          legal leaves, by value descending, then by lower tokens; if there are too few evaluated leaves,
          then the most probable unexpanded children of the evaluated prefixes of depth ``L - 1``, best
          prefix first
        - ``score`` float32 ``[B, K]``, what they are ranked by; log pi of the policy's ``own``
        - ``num_valid`` int32 ``[B]``; slots past it hold -1 and -inf
        - ``forward_tokens`` int32 ``[B]``, at most ``budget``
        - ``trees``: the whole search, see :class:`vstar_ops.ops.ved.SearchTrees`

    Raises:
        TypeError, ValueError: an argument's type, shape, device or value, by name.
    """
    length = trie.length
    for name, number, low in (
        ("candidates", candidates, 1), ("budget", budget, length), ("width", width, 1),
        ("completions", completions, 0), ("own", own, 0), ("guided", guided, 0),
    ):  # fmt: skip
        check_int(name, number, low)
    if rounds is not None and (isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 0):
        raise ValueError(f"rounds must be None or a whole number >= 0, got {rounds!r}")
    if skip_forced and normalize != "legal":
        raise ValueError(f"skip_forced needs normalize='legal', got {normalize!r}")
    if skip_forced and completions:
        raise ValueError(f"skip_forced needs completions=0, got {completions}")
    if guided and not action_values:
        raise ValueError(f"guided needs action_values=True, got guided={guided} without")
    value_weight, logp_weight = (
        check_finite("value_weight", value_weight),
        check_finite("logp_weight", logp_weight),
    )
    entropy_weight = check_finite("entropy_weight", entropy_weight)
    for name, needed in (("value", value_weight != 0), ("child_value", action_values)):
        if needed and not hasattr(model, name):
            raise TypeError(f"model must have {name}(state, slot), got {type(model).__name__}")

    logits, state = model.prefill(context)
    batch, device = logits.shape[0], logits.device
    seeds = check_seeds("seed", seed, batch, device)
    levels = length if evaluate_leaves else length - 1
    # A list of leaves is cut where nothing behind the cut can become a candidate.
    leaves = trie.max_children
    if not (own and action_values):  # two rankings of one list
        leaves = min(leaves, candidates + (budget if evaluate_leaves else 0))
    trees = SearchTrees.empty(
        batch,
        budget,
        levels,
        children=max(1, min(trie.max_children, budget)),
        leaves=max(1, leaves),
        device=device,
    )
    search = _Search(
        model, state, trie, trees, seeds, levels, value_weight, entropy_weight, logp_weight, action_values,
        guided, expand_root, skip_forced and evaluate_leaves, normalize, temperature,
    )  # fmt: skip

    search.plant(logits, min(width, max(1, (budget - 1) // max(levels, 1))), budget)
    while levels > 0 and (rounds is None or rounds > 0):
        rows = ved_select(trees, exploration=exploration, paths=paths, max_idle=max_idle)
        if rounds is not None:
            rounds -= 1
        elif not bool((rows.node >= 0).any()):
            break
        search.evaluate(rows, *search.forward(rows))
    ranking: dict[str, Any] = {"logp_weight": logp_weight, "forced_first": search.skip_forced}
    best = ved_candidates(trees, length, candidates, **ranking)
    if completions > 0:
        few = replace(trees, num_leaves=trees.num_leaves.clamp(max=completions))
        best = _ranked_before(ved_candidates(few, length, candidates, **ranking), best)
    if own > 0:
        ranking["logp_weight"] = 1.0
        probable = replace(trees, value=torch.zeros_like(trees.value), leaf_score=trees.leaf_logp)
        best = _ranked_before(ved_candidates(probable, length, min(own, candidates), **ranking), best)
    return VEDResult(trie.sequences(best.node), *best, trees.size, trees)


def _before(first: Any, others: Any, names: tuple[str, ...]) -> list[Tensor]:
    """``node`` and the named fields of ``first``, then of those of the others that are not among them.

    As many as the others are; dead ones come last.
    """
    again = (others.node[:, :, None] == first.node[:, None]).any(2)
    node = torch.cat([first.node, others.node.masked_fill(again, -1)], 1)
    order = (node < 0).int().argsort(dim=1, stable=True)[:, : others.node.shape[1]]
    fields = (torch.cat([getattr(part, name) for part in (first, others)], 1) for name in names)
    return [node.gather(1, order), *(field.gather(1, order) for field in fields)]


def _ranked_before(first: Candidates, others: Candidates) -> Candidates:
    node, logp, score = _before(first, others, ("logp", "score"))
    logp, score = (x.masked_fill(node < 0, -torch.inf) for x in (logp, score))
    return Candidates(node, logp, score, (node >= 0).sum(1).int())


@dataclass
class _Search:
    model: Any
    state: Any
    trie: Trie
    trees: SearchTrees
    seeds: Tensor
    levels: int
    value_weight: float
    entropy_weight: float
    logp_weight: float
    action_values: bool
    guided: int
    expand_root: bool
    skip_forced: bool
    normalize: str
    temperature: float

    def plant(self, logits: Tensor, width: int, budget: int) -> None:
        """The initial beam search; each of its nodes is evaluated."""
        trie, trees = self.trie, self.trees
        batch, device = len(logits), logits.device
        root = torch.zeros(batch, 1, dtype=torch.int32, device=device)
        rows = Rows(root - 1, root, torch.zeros(batch, 1, device=device))
        scores = self.evaluate(rows, logits, torch.arange(batch, device=device))
        frontier, at, spent = logits[:, None], root, 1
        for _ in range(self.levels):
            width = min(width, budget - spent)
            if width < 1:
                break
            beams = self.extensions(frontier, rows, width, scores)
            above = at.gather(1, beams.parent.clamp(min=0).long())
            single = trie.num_children(rows.node.gather(1, beams.parent.clamp(min=0).long())) == 1
            drop = (beams.node < 0) | (single & (beams.node >= self._first(trie.length)) & self.skip_forced)
            node = beams.node.masked_fill(drop, -1)
            rows = Rows(above.masked_fill(drop, -1), node, beams.logp)
            at = trees.size[:, None] + (node >= 0).cumsum(1).int() - 1
            new, slot = self.forward(rows)
            scores = self.evaluate(rows, new, slot)
            frontier = new.view(batch, width, -1)
            spent += width

    def extensions(self, logits: Tensor, rows: Rows, width: int, scores: dict[str, Any]) -> Rows:
        """The next beams; their parents are places among ``rows``."""
        given: dict[str, Any] = {"cum_logp": rows.logp, "normalize": self.normalize}
        given["temperature"] = self.temperature
        probable = width - min(self.guided, width)
        best = expand_topk(logits, self.trie, rows.node, width, **given, **scores)
        if not self.guided or not probable:
            return Rows(best.parent, best.node, best.logp)
        first = expand_topk(logits, self.trie, rows.node, probable, **given)
        node, parent, logp = _before(first, best, ("parent", "logp"))
        return Rows(parent.masked_fill(node < 0, -1), node, logp)

    def forward(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Logits ``[B * P, V]`` and slots ``[B * P]`` of the rows."""
        live = rows.node >= 0
        parent = self.trees.slot.gather(1, rows.parent.clamp(min=0).long()).masked_fill(~live, -1)
        token = self.trie.token[(rows.node.long() - 1).clamp(min=0)].long()
        logits, slot = self.model.extend(self.state, parent.flatten(), token.flatten())
        return logits, slot.masked_fill(~live.flatten(), -1)

    def evaluate(self, rows: Rows, logits: Tensor, slot: Tensor) -> dict[str, Any]:
        """Value, entropy and the lists of children of the rows; insert them into the trees.

        Returns what :func:`expand_topk` needs to rank their children by value, if beams are guided.
        """
        trie, trees, length = self.trie, self.trees, self.trie.length
        shape = rows.node.shape
        node, logp = rows.node.reshape(-1, 1), rows.logp.reshape(-1, 1)
        logits = logits.unsqueeze(1)
        policy: dict[str, Any] = {"normalize": self.normalize, "temperature": self.temperature}
        value = logp.new_zeros(len(node))
        if self.value_weight != 0:
            value = self.value_weight * self.model.value(self.state, slot).float()

        # The Gumbel order is a sample without replacement, so "draw an unexpanded child" is "take the next".
        inner = node.masked_fill(node >= self._first(self.levels), -1)
        seeds = self.seeds.repeat_interleave(shape[1])
        drawn = expand_topk(
            logits, trie, node, trees.child_node.shape[2], cum_logp=logp, gumbel_seed=seeds, **policy
        )
        num_children = drawn.num_valid.masked_fill(inner[:, 0] < 0, 0)
        if not self.expand_root:
            num_children = num_children.masked_fill(node[:, 0] == 0, 0)

        before_leaf = node.masked_fill((node < self._first(length - 1)) | (node >= self._first(length)), -1)
        if self.skip_forced:
            num_children = num_children.masked_fill((before_leaf[:, 0] >= 0) & (drawn.num_valid == 1), 0)
        ranking: dict[str, Any] = {}
        scale = self.value_weight if self.value_weight != 0 else 1.0
        if self.action_values:
            ranking = {"child_value": self.model.child_value(self.state, slot).unsqueeze(1)}
            ranking |= {"value_weight": scale, "logp_weight": self.logp_weight}
        listed = expand_topk(
            logits, trie, before_leaf, trees.leaf_node.shape[2], cum_logp=logp, **ranking, **policy
        )
        if self.action_values:
            leaf_score = value[:, None] + listed.score
        else:
            leaf_score = value[:, None] + (self.logp_weight * listed.logp if self.logp_weight != 0 else 0)
            leaf_score = leaf_score.expand_as(listed.logp)

        def rowwise(x: Tensor) -> Tensor:
            return x.reshape(*shape, *x.shape[1:])

        evaluation = Evaluation(
            slot=rowwise(slot.long()),
            value=rowwise(value),
            entropy=drawn.entropy.view(shape),
            num_children=rowwise(num_children),
            child_node=rowwise(drawn.node),
            child_logp=rowwise(drawn.logp),
            leaf_node=rowwise(listed.node),
            leaf_logp=rowwise(listed.logp),
            leaf_score=rowwise(leaf_score),
            num_leaves=rowwise(listed.num_valid),
        )
        ved_insert(trees, rows, evaluation, entropy_weight=self.entropy_weight, logp_weight=self.logp_weight)
        if not self.guided:
            return {}
        child_value = rowwise(ranking["child_value"][:, 0])
        return {**ranking, "value": rowwise(value) / scale, "child_value": child_value}

    def _first(self, depth: int) -> int:
        """The first trie node of a depth."""
        return self.trie.level_offset[depth]
