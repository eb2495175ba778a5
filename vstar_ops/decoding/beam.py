"""Exact trie-constrained beam search on top of ``expand_topk``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._deprecated import renamed_arguments, renamed_field
from ..ops import RowsToRun, advance_beams, expand_topk, rows_to_run
from ..ops._checks import check_int, validating
from ..trie import Trie
from .protocol import (
    PrefixModel,
    can_skip_forced,
    check_finite_logits,
    check_model,
    extend_by_request,
)


class BeamResult(NamedTuple):
    """Candidates of :func:`beam_search`, best first; ``L`` tokens each."""

    sequence: Tensor
    node: Tensor
    logp: Tensor
    num_valid: Tensor
    forward_tokens: Tensor


BeamResult.count = renamed_field("num_valid")  # type: ignore[method-assign]


@renamed_arguments(width="beam_width")
@torch.no_grad()
def beam_search(
    model: PrefixModel,
    context: Any,
    trie: Trie,
    beam_width: int,
    *,
    normalize: str = "legal",
    temperature: float = 1.0,
    skip_forced: bool = True,
) -> BeamResult:
    """The ``beam_width`` most probable legal sequences that a beam of that width finds.

    ``L`` rounds of :func:`vstar_ops.expand_topk`; the last level is scored but never evaluated.

    Args:
        model: see :class:`PrefixModel`.
        context: a batch of ``B`` prompts, as the model takes them.
        trie: the catalogue, on the model's device; a restricted one, for all requests or for each of the
            ``B``, gives allowed items only.
        beam_width: ``K``, beams per request, and candidates returned.
        normalize: ``"legal"`` (the policy restricted to legal tokens) or ``"vocab"``, which needs the logits
            of all columns.
        temperature: divides the logits.
        skip_forced: do not run a prefix with a single legal child, whose log-probability under ``"legal"``
            is 0 by any finite logit. Only for models that promise such logits (``finite_logits``, see
            :class:`PrefixModel`), so that the result is the same. A skipped prefix is run later if a
            longer one needs it. Reads the number of rows on the host; turn it off for constant shapes.
            Without effect under ``"vocab"``.

    Returns:
        A named tuple:

        - ``sequence`` int32 ``[B, K, L]``, ``node`` int32 ``[B, K]`` (leaves), ``logp`` float32 ``[B, K]``,
          ordered by log-probability, ties as in ``expand_topk``; slots past ``num_valid`` hold -1 and -inf
        - ``num_valid`` int32 ``[B]``: candidates that exist, fewer than ``K`` if fewer sequences are allowed
        - ``forward_tokens`` int32 ``[B]``: tokens the model evaluated after the prompt, the prompt's last
          position (the root) included: ``1 + 2 K`` at most for ``L = 3``

    Raises:
        TypeError, ValueError: as :func:`vstar_ops.expand_topk`. Under :func:`vstar_ops.validation` also a
            model that has broken its promise of finite logits where it was run.
    """
    check_int("beam_width", beam_width, 1)
    check_model(model, trie, normalize)
    skip_forced = skip_forced and can_skip_forced(model, normalize)
    logits, state = model.prefill(context)
    batch, device = len(logits), logits.device
    # The empty prefix of request b is in slot b.
    node = token = torch.zeros(batch, 1, dtype=torch.int32, device=device)
    sequence, slot = node.new_empty(batch, 1, 0), torch.arange(batch, device=device).unsqueeze(1)
    frontier = logits.unsqueeze(1)
    evaluated = row = row_slot = logp = None
    forward_tokens = torch.ones(batch, dtype=torch.int32, device=device)
    for depth in range(trie.length):
        if depth > 0 and evaluated is not None:
            rows = rows_to_run(trie, node, sequence, slot, evaluated)
            frontier, row_slot = _run(model, state, rows, logits)
            row = rows.row
            forward_tokens += rows.num_tokens
        elif depth > 0:
            frontier, slot = extend_by_request(model, state, slot, token)
        out = expand_topk(
            frontier,
            trie,
            node,
            beam_width,
            row=row,
            cum_logp=logp,
            normalize=normalize,
            temperature=temperature,
        )
        if skip_forced and validating():
            legal = trie.num_children(node).sum(1).clamp(max=beam_width)
            check_finite_logits(out.num_valid, legal)
        winners = out.parent, out.token, out.node
        sequence, slot, token, evaluated = advance_beams(
            *winners, sequence, slot, evaluated=evaluated, row=row, row_slot=row_slot
        )
        if not skip_forced:
            evaluated = None  # all of every beam will be
            if depth + 1 < trie.length:
                forward_tokens += out.num_valid
        node, logp = out.node, out.logp
    return BeamResult(sequence, out.node, out.logp, out.num_valid, forward_tokens)


def _run(model: PrefixModel, state: Any, rows: RowsToRun, like: Tensor) -> tuple[Tensor, Tensor]:
    """Logits ``[R, V]`` and slots ``[R]`` of the rows. Skipped prefixes are caught up, length by length."""
    numbers = rows.num_rows.cpu().tolist()  # the host waits for them, once per level
    logits, slot = like[:0], rows.parent[: numbers[-1]]
    for stage, number in enumerate(numbers):
        if number == 0:
            continue
        token = rows.token[stage, :number]
        if number == len(slot):
            logits, slot = model.extend(state, slot, token)
        else:
            place = rows.place[stage, :number]
            slot[place] = model.extend(state, slot[place], token)[1]
    return logits, slot
