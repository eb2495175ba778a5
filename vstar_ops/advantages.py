"""Advantages per token for trainers whose batch is flat: rows of completions, groups by id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .ops._checks import FLOATS, INTS, check, check_choice, check_finite, check_int, check_tokens
from .ops._forms import sibling_form
from .ops.group_advantage import group_advantage as _group_advantage
from .ops.sibling_advantage import sibling_advantage as _sibling_advantage

_NORMALIZERS = ("sequence", "token", "constant", "sum")


@torch.no_grad()
def token_advantages(
    tokens: Tensor,
    rewards: Tensor,
    groups: Sequence[Any] | Tensor | int,
    mask: Tensor | None = None,
    *,
    normalizer: str,
    horizon: int | None = None,
    global_weight: float = 1.0,
    sibling_weight: float = 1.0,
    form: str = "centered",
    weighting: str | None = None,
    singleton: str = "zero",
    group_advantage: Tensor | None = None,
    group_options: Mapping[str, Any] | None = None,
    sibling_options: Mapping[str, Any] | None = None,
) -> Tensor:
    r"""The advantages that make a trainer's own policy loss that of :func:`sibling_grpo_loss`.

    A GRPO trainer minimizes :math:`-\sum_{it} q_{it} \, \rho_{it} \, A_{it}` over rows :math:`i` and their
    tokens :math:`t`, with weights :math:`q` of its own and, as a rule, one advantage per row. It gets here

    .. math::
        A_{it} = w_{global} \, A_i + w_{sib} \, f_i \, A^{sib}_{it} / n_{it}

    of :func:`group_advantage` and, in the ``form`` of :func:`sibling_grpo_loss`, :func:`sibling_advantage`
    and :math:`n`. The factor :math:`f` turns the trainer's weight of a token into the objective's weight of
    a node. For ``N`` rows in ``B`` groups, :math:`T_i` tokens in a row and :math:`G_b` rows in its group:

    ============== ========================== ========================= ==================================
    ``normalizer`` the trainer's :math:`q`    factor :math:`f`          equal to ``loss_type``
    ============== ========================== ========================= ==================================
    ``"sequence"`` :math:`1 / (N T_i)`        :math:`T_i N / (B G_b)`   ``"grpo"``
    ``"token"``    :math:`1 / \sum_i T_i`     :math:`\sum_i T_i / N`    ``"bnpo"``
    ``"constant"`` :math:`1 / (N H)`          :math:`H`                 ``"dr_grpo"``, ``horizon`` ``H``
    ``"sum"``      :math:`1 / N`              1                         ``"dr_grpo"``, ``horizon`` 1
    ============== ========================== ========================= ==================================

    Losses and gradients are equal with ``clip_terms="joint"``, as the trainer clips the sum of both
    advantages, and wherever no ratio is clipped. (``"dr_grpo"`` divides by the ``B G`` places of its grid,
    the trainer by its rows: another constant where groups are unequal.)

    Args:
        tokens: integers ``[N, T]``, the completions, padded on the right.
        rewards: float32, bfloat16 or float16 ``[N]``.
        groups: which rows answer the same prompt: ``N`` hashable ids (a list, an array, a tensor) in any
            order, groups of any sizes; or an int, the size of whole groups that lie one behind the other,
            for which nothing is read on the host.
        mask: bool or integers ``[N, T]``, False or 0 in padding and in tokens that are not the policy's.
            Such a token takes no part, whatever it is; between others, it still tells the prefixes behind it
            apart. A row without any token takes no part: mask a row that was not scored. A NaN or infinite
            reward of a row that does take part makes the advantages that are compared with it NaN.
        normalizer: how the trainer weighs a token, see above.
        horizon: :math:`H` of ``"constant"``; None: ``T``.
        global_weight, sibling_weight: :math:`w_{global}`, :math:`w_{sib}`.
        form: of the sibling term, ``"centered"`` or ``"paper"``, see :func:`sibling_grpo_loss`.
        weighting: ``"node"``: :math:`n` is the number of candidates through a node, which counts once;
            ``"candidate"``: :math:`n = 1`; None: as ``form`` has it.
        singleton: :math:`A_i` of a row that is alone in its group: ``"zero"``, or ``"reward"``, its reward as
            it is, as in verl. It has no siblings in either case.
        group_advantage: float32 ``[N]``, :math:`A_i` as the trainer computed it.
        group_options, sibling_options: keywords of :func:`group_advantage` and :func:`sibling_advantage`,
            the latter in place of those of ``form``.

    Returns:
        float32 ``[N, T]``, 0 where masked. ``N``, ``B``, :math:`T_i` and :math:`G_b` count what takes part.
        (A trainer that counts other rows too makes both terms smaller by the same share.) No gradient flows;
        the same bits for any number of threads and any order of rows.

    Raises:
        TypeError, ValueError: an argument's type, shape, device or value, by name. Rewards that are not
            finite are told only under :func:`vstar_ops.validation`.

    Example:
        >>> tokens = torch.tensor([[1, 5], [1, 6], [2, 5], [7, 0]])
        >>> rewards, prompts = torch.tensor([1.0, 0.0, 0.0, 1.0]), ["a", "a", "a", "b"]
        >>> vstar_ops.token_advantages(tokens, rewards, prompts, global_weight=0, normalizer="sum")
        tensor([[ 0.2886,  0.8659],
                [ 0.2886, -0.8659],
                [-0.5773,  0.0000],
                [ 0.0000,  0.0000]])
    """
    tokens = check_tokens("tokens", tokens, (None, None), "[N, T]")
    shape, device = tuple(tokens.shape), tokens.device
    check("rewards", rewards, shape[:1], "[N]", FLOATS, device)
    if mask is None:
        mask = torch.ones_like(tokens, dtype=torch.bool)
    mask = check("mask", mask, shape, "[N, T]", (torch.bool, *INTS), device).bool()
    if group_advantage is not None:
        check("group_advantage", group_advantage, shape[:1], "[N]", (torch.float32,), device)
    check_choice("normalizer", normalizer, _NORMALIZERS)
    of_form, weighting = sibling_form(form, weighting)
    sibling_options = {**of_form, **(sibling_options or {})}
    check_choice("singleton", singleton, ("zero", "reward"))
    if horizon is None:
        horizon = shape[1]
    elif normalizer != "constant":
        raise ValueError(f'horizon must be None unless normalizer is "constant", got {horizon!r}')
    check_int("horizon", horizon, 0)
    global_weight = check_finite("global_weight", global_weight)
    sibling_weight = check_finite("sibling_weight", sibling_weight)

    if device.type == "cpu":  # elsewhere this would wait for the device
        columns = mask.sum(0).nonzero()
        used = int(columns[-1]) + 1 if len(columns) else 0
        if used < shape[1]:
            tokens, mask = tokens[:, :used], mask[:, :used]
    length = mask.sum(1)
    there = length > 0
    over_groups: Any = None
    per_node: Any = None
    group_size: Any = None
    num_groups: Any = 0
    for layout in GroupLayout.split(groups, shape[0], device):
        grid_rewards, candidates = layout.grid(rewards), layout.grid(there)
        if normalizer == "sequence" or singleton == "reward":
            size = candidates.sum(1, keepdim=True)
        if normalizer == "sequence":
            group_size = layout.put(group_size, size.expand_as(candidates), shape[0])
            num_groups = num_groups + (size > 0).sum()
        if group_advantage is None:
            among = _group_advantage(grid_rewards, candidates, **group_options or {})
            if singleton == "reward":
                among = torch.where(size == 1, grid_rewards.float(), among)
            over_groups = layout.put(over_groups, among, shape[0])
        siblings = _sibling_advantage(layout.grid(tokens), grid_rewards, layout.grid(mask), **sibling_options)
        each = siblings.advantage
        if weighting == "node":
            each = each / siblings.num_candidates.clamp(min=1)
        per_node = layout.put(per_node, each, shape[0])
    if group_advantage is None:
        group_advantage = over_groups

    factor: Any = 1
    if normalizer == "sequence":
        rows = there.sum().double()
        factor = (length * rows / (num_groups * group_size.clamp(min=1)))[:, None]
    elif normalizer == "token":
        factor = length.sum() / there.sum().double().clamp(min=1)
    elif normalizer == "constant":
        factor = horizon
    advantage = global_weight * group_advantage[:, None] + sibling_weight * factor * per_node
    advantage = torch.where(mask, advantage, 0).float()
    return advantage if mask.shape == shape else F.pad(advantage, (0, shape[1] - mask.shape[1]))


class GroupLayout:
    """Where rows of a flat batch lie in a grid ``[B, G]`` of groups.

    Attributes:
        shape: ``(B, G)``.
        row: int64 ``[n]``, which rows; None for all.
        slot: int64 ``[n]``, their places in the flattened grid; None if they lie in it as they are.
        order: int64 ``[B * G]``, the row in each place, if all rows lie in the grid and fill it.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        row: Tensor | None = None,
        slot: Tensor | None = None,
        order: Tensor | None = None,
    ) -> None:
        self.shape, self.row, self.slot, self.order = shape, row, slot, order

    @classmethod
    def of(cls, groups: Any, rows: int, device: torch.device) -> GroupLayout:
        """The one as wide as the largest group, of ``groups`` as in :func:`token_advantages`."""
        return cls.split(groups, rows, device, full=0.0)[0]

    @classmethod
    def split(cls, groups: Any, rows: int, device: torch.device, full: float = 0.5) -> list[GroupLayout]:
        """Layouts that together hold every row: one, if that is ``full``; else one for every power of 2."""
        if isinstance(groups, int) and not isinstance(groups, bool):
            check_int("groups", groups, 1)
            if rows % groups:
                raise ValueError(f"groups must divide the number of rows, N = {rows}, got {groups}")
            return [cls((rows // groups, groups))]
        group = number_ids(groups, rows)
        size = np.bincount(group)
        short = group.astype(np.uint16) if len(size) <= 1 << 16 else group  # sorted by radix, 5 times as fast
        order = np.argsort(short, kind="stable")
        width, place = int(size.max(initial=0)), np.empty_like(group)
        if len(size) * width == rows:
            place[order] = np.arange(rows)
            indices = (torch.from_numpy(x).to(device) for x in (place, order))
            return [cls((len(size), width), None, *indices)]
        place[order] = np.arange(rows) - (np.cumsum(size) - size)[group[order]]
        if full * len(size) * width <= rows:
            return [cls((len(size), width), None, torch.from_numpy(group * width + place).to(device))]
        layouts = []
        level = np.ceil(np.log2(size)).astype(np.int64)
        for at in np.unique(level):
            width, which = 1 << int(at), level == at
            row = np.flatnonzero(which[group])
            at_slot = (np.cumsum(which) - 1)[group[row]] * width + place[row]
            indices = (torch.from_numpy(x).to(device) for x in (row, at_slot))
            layouts.append(cls((int(which.sum()), width), *indices))
        return layouts

    def grid(self, x: Tensor) -> Tensor:
        """``[B, G, ...]`` of ``x[N, ...]``; 0 where there is no row."""
        if self.slot is None:
            return x.unflatten(0, self.shape)
        if self.order is not None:
            return x.index_select(0, self.order).unflatten(0, self.shape)
        laid = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[1:])
        return laid.index_copy_(0, self.slot, x if self.row is None else x[self.row]).unflatten(0, self.shape)

    def put(self, rows: Tensor | None, x: Tensor, number: int) -> Tensor:
        """``rows[N, ...]`` with ``x[B, G, ...]`` in its places; where None, others are still to come."""
        flat = x.flatten(0, 1)
        if self.slot is not None:
            flat = flat.index_select(0, self.slot)
        if self.row is None:
            return flat
        if rows is None:
            rows = flat.new_empty(number, *flat.shape[1:])
        return rows.index_copy_(0, self.row, flat)


def number_ids(ids: Any, rows: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The group of each row, numbered in the order of appearance."""
    try:
        listed = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        numbers = {x: number for number, x in enumerate(dict.fromkeys(listed))}
        group = np.fromiter(map(numbers.__getitem__, listed), np.int64, len(listed))
    except TypeError as problem:
        raise TypeError(
            f"groups must be an int or N hashable ids, got {type(ids).__name__}: {problem}"
        ) from None
    if len(group) != rows:
        raise ValueError(f"groups must hold an id for every row, N = {rows}, got {len(group)}")
    return group
