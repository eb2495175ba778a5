r"""The steps of value-guided decoding (V-STAR, Eqs. 10-14) on ``B`` prefix trees side by side.

:func:`vstar_ops.decoding.ved` puts them together; they are public so that other searches can be built of
them. The trees are a structure of arrays of fixed capacity, :class:`SearchTrees`, on the model's device. A
round is :func:`ved_select` (traverse, gate, take the next child of the gated nodes), the model's forward of
the rows that it returns, and :func:`ved_insert` (store the evaluated nodes, update the depth sums);
:func:`ved_candidates` ranks the leaves at the end. All shapes are fixed, trees do not see each other, and
every choice is a total order, so a request gives the same result alone, in any batch and on any number of
threads. Statistics are float64 over float32 data.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, get_type_hints

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .. import reference
from .._deprecated import renamed_field
from ._checks import check, check_finite, check_int, check_type
from ._registry import REFUSED, define

_NODE, _CHILD, _LEAF, _TREE, _DEPTH = (
    ("B", "T"),
    ("B", "T", "C"),
    ("B", "T", "D"),
    ("B",),
    ("B", "levels + 1"),
)


class _Remembered:
    """Room for what was found right, which ``vars`` does not list."""

    __slots__ = ("_right",)


@dataclass
class SearchTrees(_Remembered):
    r"""``B`` trees of at most ``T`` evaluated nodes; node 0 is the root, a node stands behind its parent.

    Attributes:
        node: int32 ``[B, T]``, the trie node.
        parent: int32 ``[B, T]``, the position of the parent, -1 for the root.
        depth: int32 ``[B, T]``.
        logp: float32 ``[B, T]``, log pi of the whole prefix.
        value, entropy: float32 ``[B, T]``, V and H of the node's own forward.
        priority: float32 ``[B, T]``, :math:`G = V + \lambda H + w_p \log\pi` (Eq. 10).
        visits: int32 ``[B, T]``, traversals through the node; the root's is :math:`N_{root}`.
        child_node, child_logp: int32 and float32 ``[B, T, C]``, the children in the order in which they
            will be expanded, a sample without replacement in proportion to pi.
        num_children, next_child: int32 ``[B, T]``, entries of that list, and those that are used up.
        leaf_node, leaf_logp, leaf_score: ``[B, T, D]``, leaves below the node that need not be evaluated to
            be candidates, best first, and what they are ranked by: the children of prefixes of depth
            ``L - 1``, or whatever else a search lists.
        num_leaves: int32 ``[B, T]``.
        slot: int64 ``[B, T]``, the model's.
        size: int32 ``[B]``, evaluated nodes, which is the number of forward tokens.
        budget: int32 ``[B]``, the most that ``size`` may become; :func:`ved_select` lowers it to end one.
        depth_sum, depth_count: float64 and int32 ``[B, L + 1]``, sum of G and number of nodes per depth.
    """

    node: Annotated[Tensor, torch.int32, _NODE, -1]
    parent: Annotated[Tensor, torch.int32, _NODE, -1]
    depth: Annotated[Tensor, torch.int32, _NODE, 0]
    logp: Annotated[Tensor, torch.float32, _NODE, 0]
    value: Annotated[Tensor, torch.float32, _NODE, 0]
    entropy: Annotated[Tensor, torch.float32, _NODE, 0]
    priority: Annotated[Tensor, torch.float32, _NODE, 0]
    visits: Annotated[Tensor, torch.int32, _NODE, 0]
    child_node: Annotated[Tensor, torch.int32, _CHILD, -1]
    child_logp: Annotated[Tensor, torch.float32, _CHILD, 0]
    num_children: Annotated[Tensor, torch.int32, _NODE, 0]
    next_child: Annotated[Tensor, torch.int32, _NODE, 0]
    leaf_node: Annotated[Tensor, torch.int32, _LEAF, -1]
    leaf_logp: Annotated[Tensor, torch.float32, _LEAF, 0]
    leaf_score: Annotated[Tensor, torch.float32, _LEAF, 0]
    num_leaves: Annotated[Tensor, torch.int32, _NODE, 0]
    slot: Annotated[Tensor, torch.int64, _NODE, -1]
    size: Annotated[Tensor, torch.int32, _TREE, 0]
    budget: Annotated[Tensor, torch.int32, _TREE, 0]
    depth_sum: Annotated[Tensor, torch.float64, _DEPTH, 0]
    depth_count: Annotated[Tensor, torch.int32, _DEPTH, 0]

    @classmethod
    def empty(
        cls,
        batch: int,
        capacity: int,
        levels: int,
        *,
        children: int,
        leaves: int,
        budget: Tensor | int | None = None,
        device: torch.device | str = "cpu",
    ) -> SearchTrees:
        """Trees without nodes.

        Args:
            batch, capacity: ``B`` and ``T``.
            levels: the depth of the deepest node that is ever evaluated.
            children, leaves: ``C`` and ``D``, at least 1.
            budget: forward tokens per request, ``T`` if None; ints ``[B]`` for one each.
        """
        for name, size in (("capacity", capacity), ("children", children), ("leaves", leaves)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        sizes = {"B": batch, "T": capacity, "C": children, "D": leaves, "levels + 1": levels + 1}
        arrays = {
            name: torch.full([sizes[axis] for axis in axes], fill, dtype=dtype, device=device)
            for name, (dtype, axes, fill) in _LAYOUT.items()
        }
        if isinstance(budget, Tensor):
            check("budget", budget, (batch,), "[B]", (torch.int32, torch.int64))
            arrays["budget"].copy_(budget)
        else:
            arrays["budget"].fill_(capacity if budget is None else budget)
        return cls(**arrays)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        object.__setattr__(self, "_right", None)  # another array is checked

    def _checked(self) -> Right:
        """The arrays as the ops take them, looked at once: sizes that change later are left to C++."""
        right = getattr(self, "_right", None)
        if right is None or is_dynamo_compiling():
            self.check()
            lists = [x.shape[-1] for x in (self.child_node, self.leaf_node, self.depth_sum)]
            arrays = self._arrays(_SELECT), self._arrays(_INSERT), self._arrays(_CANDIDATES)
            right = Right(self._sizes(), *arrays, self.size.shape[0], self.size.device, *lists)
            if not is_dynamo_compiling():
                object.__setattr__(self, "_right", right)
        return right

    def _check_sizes(self, right: Right) -> None:
        """Check the arrays again if the sizes of one have changed in place."""
        if self._sizes() != right.sizes:
            self.check()

    def _arrays(self, names: Iterable[str]) -> tuple[Tensor, ...]:
        return tuple([getattr(self, name) for name in names])

    def _sizes(self) -> list[torch.Size]:
        return [x.shape for x in self._arrays(_LAYOUT)]

    def check(self) -> None:
        """Raise where an array's shape, dtype, device or layout is not what the class says."""
        sizes: dict[str, int] = {}
        device = None
        for name, (dtype, axes, _fill) in _LAYOUT.items():
            array, shape = getattr(self, name), tuple([sizes.get(axis) for axis in axes])
            check(f"trees.{name}", array, shape, _AXES[axes], (dtype,), device)
            if not array.is_contiguous():
                raise ValueError(f"trees.{name} must be contiguous, got strides {array.stride()}")
            if axes in (_CHILD, _LEAF, _DEPTH) and array.shape[-1] == 0:
                given = tuple(array.shape)
                raise ValueError(f"trees.{name} must have at least one place in its last axis, got {given}")
            if None in shape:
                sizes.update(zip(axes, array.shape))
                device = array.device


# Array of SearchTrees -> dtype, axes, and what it holds in a tree without nodes.
_LAYOUT = {name: hint.__metadata__ for name, hint in get_type_hints(SearchTrees, include_extras=True).items()}
_AXES = {axes: f"[{', '.join(axes)}]" for _, axes, _ in _LAYOUT.values()}


class Right(NamedTuple):
    """What the ops take of trees whose arrays were found right."""

    sizes: list[torch.Size]
    to_select: tuple[Tensor, ...]
    to_insert: tuple[Tensor, ...]
    to_rank: tuple[Tensor, ...]
    batch: int
    device: torch.device
    children: int
    leaves: int
    depths: int


class SelectedRows(NamedTuple):
    """The nodes that a round evaluates, ``[B, P]``, one per row; unused rows hold -1 and -inf."""

    parent: Tensor
    node: Tensor
    logp: Tensor


class NodeEvaluation(NamedTuple):
    """What the model says about the rows of a round, ``[B, P]`` or ``[B, P, C or D]``; see SearchTrees."""

    slot: Tensor
    value: Tensor
    entropy: Tensor
    num_children: Tensor
    child_node: Tensor
    child_logp: Tensor
    leaf_node: Tensor
    leaf_logp: Tensor
    leaf_score: Tensor
    num_leaves: Tensor


class LeafCandidates(NamedTuple):
    """Leaves, best first; slots past ``num_valid`` hold -1 and -inf."""

    node: Tensor
    logp: Tensor
    score: Tensor
    num_valid: Tensor


LeafCandidates.count = renamed_field("num_valid")  # type: ignore[method-assign]


def _arrays(reference_op: Callable[..., Any], prefix: str = "") -> tuple[str, ...]:
    """The arrays of SearchTrees that an op takes, in order; by ``prefix`` those of the rows of a round."""
    names = (
        x.removeprefix(prefix) for x in inspect.signature(reference_op).parameters if x.startswith(prefix)
    )
    return tuple(x for x in ("node" if x == "trie_node" else x for x in names) if x in _LAYOUT)


_SELECT, _INSERT = _arrays(reference.ved_select), _arrays(reference.ved_insert)
_ROWS, _CANDIDATES = _arrays(reference.ved_insert, "row_"), _arrays(reference.ved_candidates)


def _select_fake(trie_node: Tensor, *arguments: object) -> tuple[Tensor, ...]:
    levels, _exploration, paths, _max_idle = arguments[-4:]
    row = trie_node.new_empty((trie_node.shape[0], levels * paths))  # type: ignore[operator]
    return row, torch.empty_like(row), torch.empty_like(row, dtype=torch.float32)


def _candidates_fake(trie_node: Tensor, *arguments: object) -> tuple[Tensor, ...]:
    k = arguments[-2]
    row = trie_node.new_empty((trie_node.shape[0], k))  # type: ignore[arg-type]
    score = torch.empty_like(row, dtype=torch.float32)
    return row, score, torch.empty_like(score), trie_node.new_empty((trie_node.shape[0],))


_select = define(
    reference.ved_select,
    _select_fake,
    mutates=("visits", "next_child", "budget"),
)
_insert = define(
    reference.ved_insert,
    lambda *_: None,
    mutates=["trie_node" if name == "node" else name for name in _INSERT],
)
_candidates = define(
    reference.ved_candidates,
    _candidates_fake,
)


def ved_select(
    trees: SearchTrees, *, exploration: float = 1.0, traversals: int = 1, max_idle: int = 1000
) -> SelectedRows:
    r"""Traverse every tree, and take one new child of each node that passes the gate.

    A traversal goes from the root always to the child of largest
    :math:`U(s) = G(s) + \beta \sqrt{\ln(N_{root} + 1) / (N(s) + 1)}`, ties to the lower token, until a node
    without children in the tree. Every node of the path with an unexpanded child and ``G(s)`` at least the
    mean ``G`` of its depth gives its next child, the root first, as far as the budget reaches. The visits of
    the path rise by one. A traversal that gives nothing is followed by another at once.

    Args:
        trees: ``visits``, ``next_child`` and ``budget`` change.
        exploration: :math:`\beta`.
        traversals: number of traversals that give children, one after the other, before the model is asked.
            Later ones see the visits of earlier ones, not their children: more than 1 trades exactness for
            larger forwards.
        max_idle: traversals in a row that may give nothing; one more ends the search of that tree.

    Returns:
        :class:`SelectedRows` ``[B, P]``, ``P = traversals * levels``. A tree gives no row once its budget is
        spent, or nothing can be expanded: no node with an unexpanded child passes the gate.

    Raises:
        TypeError, ValueError: an argument's type, shape, device or value, by name.
    """
    check_type("trees", trees, SearchTrees)
    right = trees._checked()
    exploration = check_finite("exploration", exploration)
    if exploration < 0:
        raise ValueError(f"exploration must be >= 0, got {exploration}")
    traversals, max_idle = check_int("traversals", traversals, 1), check_int("max_idle", max_idle, 0)
    given = *right.to_select, right.depths - 1, exploration, traversals, max_idle
    found = _select.attempt(*given)
    if found is REFUSED:
        trees._check_sizes(right)
        found = _select(right.device, *given)
    return SelectedRows(*found)


def ved_insert(
    trees: SearchTrees,
    rows: SelectedRows,
    evaluation: NodeEvaluation,
    *,
    entropy_weight: float = 0.1,
    logp_weight: float = 0.0,
) -> None:
    r"""Append the evaluated rows to the trees, and add their G to the sums of their depths.

    :math:`G = V + \lambda H + w_p \log\pi` (Eq. 10 for :math:`w_p = 0`), rounded to float32; a value that is
    NaN counts as the smallest finite float32. Rows with node -1, and what does not fit, are left out.

    Args:
        trees: everything but ``budget`` changes.
        rows: of :func:`ved_select`; a row's parent must be in the tree already.
        evaluation: of the same rows, contiguous, dtypes as in :class:`SearchTrees`.
        entropy_weight, logp_weight: :math:`\lambda` and :math:`w_p`.

    Raises:
        TypeError, ValueError: an argument's type, shape, device or value, by name.
    """
    check_type("trees", trees, SearchTrees)
    right = trees._checked()
    check_type("rows", rows, SelectedRows)
    check_type("evaluation", evaluation, NodeEvaluation)
    weights = check_finite("logp_weight", logp_weight), check_finite("entropy_weight", entropy_weight)
    given: tuple[Any, ...] = (*rows, *evaluation)
    if _insert.attempt(*right.to_insert, *given, *weights) is not REFUSED:
        return
    trees._check_sizes(right)
    device = trees.node.device
    row = check("rows.node", rows.node, (trees.node.shape[0], None), "[B, P]", (torch.int32,), device).shape
    ends = {(): row, ("C",): (*row, trees.child_node.shape[2]), ("D",): (*row, trees.leaf_node.shape[2])}
    given = tuple(
        check(name, x, ends[axes[2:]], _AXES[axes].replace("T", "P"), (dtype,), device).contiguous()
        for name, x, (dtype, axes, _) in zip(_ROWS, given, map(_LAYOUT.__getitem__, _ROWS), strict=True)
    )
    _insert(device, *right.to_insert, *given, *weights)


def ved_candidates(trees: SearchTrees, length: int, k: int, *, logp_weight: float = 0.0) -> LeafCandidates:
    r"""The ``k`` best leaves of every tree: first those that were evaluated, then completions.

    Evaluated leaves (nodes of depth ``length``) are ordered by :math:`V + w_p \log\pi` descending, then by
    lower tokens. Completions are the listed leaves below evaluated prefixes that were not evaluated
    themselves, by ``leaf_score`` descending, then prefixes by lower tokens, the more probable leaf, the lower
    token.

    Returns:
        :class:`LeafCandidates` ``[B, k]``: distinct leaves; ``num_valid`` says how many exist.

    Raises:
        TypeError, ValueError: an argument's type, shape, device or value, by name.
    """
    check_type("trees", trees, SearchTrees)
    right = trees._checked()
    length, k = check_int("length", length, 1), check_int("k", k, 1)
    given = *right.to_rank, length, k, check_finite("logp_weight", logp_weight)
    found = _candidates.attempt(*given)
    if found is REFUSED:
        trees._check_sizes(right)
        found = _candidates(right.device, *given)
    return LeafCandidates(*found)
