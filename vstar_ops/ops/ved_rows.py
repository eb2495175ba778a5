r"""What surrounds the model's forward of a round of value-guided decoding: one op before it, one behind it.

:func:`ved_inputs` says what the model extends, :func:`ved_evaluate` makes of its logits and values what
:func:`vstar_ops.ved_insert` stores, and :func:`ved_beams` chooses the nodes of the next level where a search
begins with beams. They are public for the same searches as :mod:`vstar_ops.ops.ved`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..trie import Trie
from ._checks import (
    FLOATS,
    check,
    check_alive,
    check_finite,
    check_int,
    check_nodes,
    check_positive,
    check_trie,
    check_type,
    validating,
)
from ._registry import REFUSED, define
from .expand_topk import ExpandTopK
from .ved import NodeEvaluation, Right, SearchTrees, SelectedRows

_ROWS = "[B, P]"


class ModelInputs(NamedTuple):
    """What the model extends, ``[B, P]``, one prefix per row."""

    slot: Tensor
    token: Tensor
    unused: Tensor


def _inputs_fake(tree_slot: Tensor, token: Tensor, parent: Tensor, node: Tensor) -> tuple[Tensor, ...]:
    slot = torch.empty_like(node, dtype=torch.int64, memory_format=torch.contiguous_format)
    return slot, torch.empty_like(slot), torch.empty_like(slot, dtype=torch.bool)


def _evaluate_fake(
    logits: Tensor,
    offset: Tensor,
    token: Tensor,
    alive: Tensor | None,
    only_leaf: Tensor | None,
    node: Tensor,
    logp: Tensor,
    value: Tensor | None,
    child_value: Tensor | None,
    seed: Tensor,
    children: int,
    leaves: int,
    *_: object,
) -> tuple[Tensor, ...]:
    def made(dtype: torch.dtype, *width: int) -> Tensor:
        return logits.new_empty((*node.shape, *width), dtype=dtype)

    floats, ints = torch.float32, torch.int32
    return (
        made(floats), made(floats), made(ints), made(ints, children), made(floats, children),
        made(ints, leaves), made(floats, leaves), made(floats, leaves), made(ints),
    )  # fmt: skip


def _beams_fake(*arguments: object) -> tuple[Tensor, ...]:
    size, width = arguments[-2:]
    node = size.new_empty((size.shape[0], width))  # type: ignore[attr-defined]
    return node, torch.empty_like(node), torch.empty_like(node, dtype=torch.float32)


_inputs = define(reference.ved_inputs, _inputs_fake)
_evaluate = define(reference.ved_evaluate, _evaluate_fake)
_beams = define(reference.ved_beams, _beams_fake)


def ved_inputs(trees: SearchTrees, trie: Trie, rows: SelectedRows) -> ModelInputs:
    """The slots of the rows' parents and the rows' last tokens, as ``PrefixModel.extend`` takes them.

    Args:
        trees: the slots of evaluated nodes.
        trie: the catalogue, whose nodes the trees hold.
        rows: ``[B, P]``, of :func:`vstar_ops.ved_select` or :func:`ved_beams`.

    Returns:
        A named tuple, each ``[B, P]``:

        - ``slot`` int64: the parent's; -1 for unused rows and what is not in the tree
        - ``token`` int64; 0 for unused rows
        - ``unused`` bool: rows with node -1

    Raises:
        TypeError, ValueError: an argument's type, shape or device, by name.
    """
    check_type("trees", trees, SearchTrees)
    check_type("rows", rows, SelectedRows)
    slot = check("trees.slot", trees.slot, (None, None), "[B, T]", (torch.int64,)).contiguous()
    batch, device = slot.shape[0], slot.device
    node = check("rows.node", rows.node, (batch, None), _ROWS, (torch.int32,), device)
    parent = check("rows.parent", rows.parent, node.shape, _ROWS, (torch.int32,), device)
    check_trie(trie, None, device)
    return ModelInputs(*_inputs(device, slot, trie.token, parent, node))


def ved_evaluate(
    trees: SearchTrees,
    trie: Trie,
    rows: SelectedRows,
    logits: Tensor,
    slot: Tensor,
    seeds: Tensor,
    *,
    value: Tensor | None = None,
    child_value: Tensor | None = None,
    value_weight: float = 1.0,
    logp_weight: float = 0.0,
    temperature: float = 1.0,
    normalize: str = "legal",
    skip_forced: bool = False,
    expand_root: bool = True,
) -> NodeEvaluation:
    r"""What a search stores of a round's rows, of the model's answers alone.

    With :math:`\log\pi` and :math:`H` as in :func:`vstar_ops.expand_topk`, a row's value is
    :math:`w_v V`, its entropy is :math:`H`, and it lists twice of its legal children, each list cut where the
    trees have no more room:

    - children that may be expanded, by :math:`\log\pi` plus Gumbel noise of (seed, node, token), descending:
      a sample without replacement in proportion to :math:`\pi`. None below nodes of the trees' last level.
    - leaves: children that are leaves, by :math:`w_p \log\pi + w_v \, \text{child\_value}`, or by
      :math:`\log\pi` without child values, descending. Their ``leaf_score`` is the row's value plus
      :math:`w_p \log\pi + w_v \, \text{child\_value}`. Where :math:`w_v` is 0, child values have weight 1.

    With ``skip_forced`` a child from which only one leaf can be reached stands for that leaf: it is
    listed, as the leaf, among the leaves and not among the children. Ties go to lower tokens. A child whose
    logit is -inf or NaN is in no list.

    Args:
        trees: gives the lengths of the lists, ``C`` and ``D``, and the last level that is evaluated.
        trie: the catalogue; its tokens are columns of ``logits``. Of a restricted trie
            only children with an allowed item below them are legal.
        rows: ``[B, P]``, as the model was asked for them; what is not a node lists nothing.
        logits: float32, bfloat16 or float16 ``[B, P, V]``, any strides.
        slot: int64 ``[B, P]``, the model's.
        seeds: int64 ``[B]``.
        value: float ``[B, P]``, V of the rows (0).
        child_value: float ``[B, P, V]``: what each next token adds to V (0).
        value_weight, logp_weight: :math:`w_v` and :math:`w_p`.
        temperature, normalize: of the policy, as in :func:`vstar_ops.expand_topk`.
        skip_forced: see above.
        expand_root: False: the root lists no children that may be expanded.

    Returns:
        :class:`NodeEvaluation` for :func:`vstar_ops.ved_insert`. Unused places hold -1 and -inf. No gradient
        flows through it.

    Raises:
        TypeError, ValueError: an argument's type, shape, device or value, by name.
    """
    check_type("trees", trees, SearchTrees)
    check_type("rows", rows, SelectedRows)
    check_type("trie", trie, Trie)
    right = trees._checked()
    levels = right.depths - 1
    check_alive(trie, right.batch)
    if normalize not in ("legal", "vocab"):
        raise ValueError(f"normalize must be 'legal' or 'vocab', got {normalize!r}")
    value_weight = check_finite("value_weight", value_weight)
    logp_weight = check_finite("logp_weight", logp_weight)
    temperature = check_positive("temperature", temperature)
    if levels > trie.length:
        raise ValueError(f"trees must have at most the trie's {trie.length} levels, got {levels}")
    first_of_level = trie.level_offset
    given = (
        logits, trie.offset, trie.token, trie.alive, trie._only_leaf if skip_forced else None, rows.node,
        rows.logp, value, child_value, seeds, right.children, right.leaves, value_weight,
        value_weight or 1.0, logp_weight, temperature, normalize == "vocab", trie.max_children,
        first_of_level[levels], first_of_level[-2], expand_root,
    )  # fmt: skip
    lists = _evaluate.attempt(*given)
    if lists is REFUSED or logits.shape[0] != right.batch or logits.shape[2] <= trie.max_token:
        _check_evaluated(right, trie, rows, logits, seeds, value, child_value)
        lists = _evaluate(right.device, *given)
    check("slot", slot, lists[0].shape, _ROWS, (torch.int64,), right.device)
    return NodeEvaluation(slot, *lists)


def _check_evaluated(
    right: Right,
    trie: Trie,
    rows: SelectedRows,
    logits: Tensor,
    seeds: Tensor,
    value: Tensor | None,
    child_value: Tensor | None,
) -> None:
    """The tensors of :func:`ved_evaluate` that C++ looks at by itself."""
    batch, device = right.batch, right.device
    _, number, columns = check("logits", logits, (batch, None, None), "[B, P, V]", FLOATS, device).shape
    shape = batch, number
    check_trie(trie, columns, device)
    node = check("rows.node", rows.node, shape, _ROWS, (torch.int32,), device)
    check("rows.logp", rows.logp, shape, _ROWS, (torch.float32,), device)
    check("seeds", seeds, (batch,), "[B]", (torch.int64,), device)
    if value is not None:
        check("value", value, shape, _ROWS, FLOATS, device)
    if child_value is not None:
        check("child_value", child_value, logits.shape, "[B, P, V]", FLOATS, device)
    if validating():
        check_nodes(node, trie)


def _check_list(name: str, found: ExpandTopK, batch: int, device: torch.device) -> None:
    """What :func:`ved_beams` reads of a list, all of one shape."""
    node = check(f"{name}.node", found.node, (batch, None), "[B, K]", (torch.int32,), device)
    check(f"{name}.parent", found.parent, node.shape, "[B, K]", (torch.int32,), device)
    check(f"{name}.logp", found.logp, node.shape, "[B, K]", (torch.float32,), device)


def ved_beams(
    trees: SearchTrees,
    trie: Trie,
    rows: SelectedRows,
    first: ExpandTopK,
    width: int,
    *,
    num_first: int | None = None,
    others: ExpandTopK | None = None,
    skip_forced: bool = False,
) -> SelectedRows:
    """The next ``width`` beams: some of one list, then those of another that are not among them.

    Args:
        trees: which the rows were inserted into last.
        trie: the catalogue.
        rows: ``[B, P]``, the beams whose extensions the lists are; those that are used come first.
        first: extensions of the rows, best first.
        width: the number of beams.
        num_first: how many of ``first`` are taken at most; ``width`` if None.
        others: further extensions, in another order.
        skip_forced: leave out prefixes from which only one leaf can be reached.

    Returns:
        :class:`SelectedRows` ``[B, width]``, whose parents are positions in the trees; unused rows come last.

    Raises:
        TypeError, ValueError: an argument's type, shape, device or value, by name.
    """
    check_type("trees", trees, SearchTrees)
    check_type("rows", rows, SelectedRows)
    check_type("first", first, ExpandTopK)
    if others is not None:
        check_type("others", others, ExpandTopK)
    check_int("width", width, 1)
    num_first = width if num_first is None else check_int("num_first", num_first, 0)
    size = check("trees.size", trees.size, (None,), "[B]", (torch.int32,)).contiguous()
    check_trie(trie, None, size.device)
    further = (None, None, None) if others is None else (others.node, others.parent, others.logp)
    only_leaf = trie._only_leaf if skip_forced else None
    given = first.node, first.parent, first.logp, num_first, *further, only_leaf, rows.node, size, width
    found = _beams.attempt(*given)
    if found is REFUSED:
        batch, device = size.shape[0], size.device
        check("rows.node", rows.node, (batch, None), _ROWS, (torch.int32,), device)
        _check_list("first", first, batch, device)
        if others is not None:
            _check_list("others", others, batch, device)
        found = _beams(device, *given)
    node, parent, logp = found
    return SelectedRows(parent, node, logp)
