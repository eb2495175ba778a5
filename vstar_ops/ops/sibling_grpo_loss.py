"""``sibling_grpo_loss``: GRPO with a sibling term and KL (V-STAR, Eq. 19), and its gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from .._deprecated import renamed_arguments
from ..trie import Trie
from ._checks import (
    FLOATS,
    FLOATS_OR_DOUBLE,
    INTEGERS,
    INTS,
    check,
    check_choice,
    check_finite,
    check_int,
    check_mask,
    check_tokens,
    check_type,
    floats_beside,
    level_weights,
    result_dtype,
    validating,
)
from ._forms import sibling_form
from ._registry import Gradient, define
from .group_advantage import group_advantage as _group_advantage
from .sibling_advantage import SiblingAdvantage
from .sibling_advantage import sibling_advantage as _sibling_advantage
from .token_logp import token_logp

_AXES = "[B, G, L]"
_ADVANTAGES = (torch.float32, torch.float64)
_CHOICES = (
    ("scale", ("std", "none")),
    ("clip_terms", ("separate", "joint")),
    ("importance_sampling_level", ("token", "sequence")),
    ("kl", ("k1", "k2", "k3")),
    ("loss_type", ("grpo", "bnpo", "dr_grpo")),
)


class SiblingGRPOLoss(NamedTuple):
    """The result of :func:`sibling_grpo_loss`; all scalars."""

    loss: Tensor
    global_term: Tensor
    sibling_term: Tensor
    kl: Tensor
    ratio: Tensor
    global_clip_fraction: Tensor
    sibling_clip_fraction: Tensor
    valid_fraction: Tensor


def _fake(logp: Tensor, *_: object) -> tuple[Tensor, ...]:
    sizes: tuple[Any, ...] = ((), (7,), logp.shape)
    return tuple(logp.new_empty(size, dtype=result_dtype(logp)) for size in sizes)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], output[2])
    ctx.dtype, ctx.others = inputs[0].dtype, len(inputs) - 1
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, _: None, grad_loss: Tensor, *__: Tensor) -> tuple[Any, ...]:
    gradient = grad_loss * ctx.saved_tensors[1]
    return gradient if gradient.dtype is ctx.dtype else gradient.to(ctx.dtype), *[None] * ctx.others


_op = define(
    reference.sibling_grpo_loss,
    _fake,
    Gradient(None, _save, _differentiate),
    double=("logp",),
)


@renamed_arguments(
    sibling="sibling_advantage",
    group="group_advantage",
    w_global="global_weight",
    w_sib="sibling_weight",
    beta="kl_weight",
)
def sibling_grpo_loss(
    logp: Tensor,
    tokens: Tensor | None = None,
    rewards: Tensor | None = None,
    *,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    mask: Tensor | None = None,
    sibling_advantage: SiblingAdvantage | None = None,
    group_advantage: Tensor | None = None,
    scale: str = "std",
    global_weight: float = 1.0,
    sibling_weight: float = 1.0,
    kl_weight: float = 1e-3,
    clip: tuple[float, float] | None = None,
    dual_clip: float | None = None,
    clip_terms: str = "separate",
    importance_sampling_level: str = "token",
    log_ratio_bound: float | None = None,
    kl: str = "k3",
    form: str = "centered",
    weighting: str | None = None,
    depth_weights: Tensor | Sequence[float] | None = None,
    loss_type: str = "grpo",
    horizon: int | None = None,
    normalizer: Tensor | None = None,
) -> SiblingGRPOLoss:
    r"""The loss of a policy on ``G`` candidates per request: GRPO, Sibling-GRPO and a KL term.

    .. math::
        \text{loss} &= -(w_{global} \, J_{global} + w_{sib} \, J_{sib} - \beta \, KL) \\
        J_{global} &= \textstyle\sum_{b,g,\ell} c_{bg} \, s(\rho_{bg\ell}, A_{bg}) \\
        J_{sib} &= \textstyle\sum_{b,g,\ell} \frac{u_b w_\ell}{n_{bg\ell}} \, s(\rho_{bg\ell}, A_{bg\ell}) \\
        KL &= \textstyle\sum_{b,g,\ell} c_{bg} \, k(d_{bg\ell}), \qquad d = \log\pi_{ref} - \log\pi

    where :math:`\rho = \exp(\log\pi - \log\pi_{old})`, :math:`A_{bg}` is :func:`group_advantage`,
    :math:`A_{bg\ell}` is :func:`sibling_advantage` (only where it is valid), :math:`s(\rho, A) = \rho A`
    or with ``clip`` PPO's bound :math:`\min(\rho A, \text{clip}(\rho, 1 - low, 1 + high) A)`, and the
    estimate :math:`k` of the divergence is ``k1``: :math:`-d`, ``k2``: :math:`d^2 / 2`, ``k3``:
    :math:`e^d - d - 1`.

    The sibling term has two forms. For a token :math:`v` behind a prefix :math:`h`, the mean reward
    :math:`\bar R` of the candidates through a prefix, and the candidates' rewards :math:`R` of a request:

    - ``"centered"``: each level has the change of the mean reward when the prefix grew by its token, over
      GRPO's standard deviation, and every candidate counts once (:math:`n = 1`):

      .. math:: A(h, v) = \frac{\bar R(h, v) - \bar R(h)}{\text{std}(R) + 10^{-4}}

      A token that all candidates behind :math:`h` share has exactly 0. The sum over the levels of a candidate
      is its :func:`group_advantage` (the mean of those of its duplicates, if their rewards differ). With a
      mask of tokens this holds where candidates with a common prefix all end there, or all go on.
    - ``"paper"``: Eqs. 17-19 of arXiv 2602.10699. Each level compares :math:`\bar R` of the children of
      :math:`h` with each other, as :func:`sibling_advantage` does by default, and every node counts once:
      :math:`n` is the number of candidates through it.

    Weights by ``loss_type``, for :math:`T_{bg}` tokens that are there in a sequence and :math:`G_b` sequences
    with any in a request:

    ============= ============================================= =========================== =================
    ``loss_type`` a sequence's tokens, :math:`c_{bg}`           a request's nodes, `u_b`    meaning
    ============= ============================================= =========================== =================
    ``"grpo"``    :math:`1 / (T_{bg} \sum_b G_b)`               :math:`1 / (B \, G_b)`      sequence means
    ``"bnpo"``    :math:`1 / \sum_{bg} T_{bg}`                  :math:`1 / \sum_b G_b`      token mean
    ``"dr_grpo"`` :math:`1 / (B \, G \, L)`                     :math:`1 / (B \, G)`        constant
    ============= ============================================= =========================== =================

    One pass computes loss, gradient and all terms.

    Args:
        logp: float32, bfloat16 or float16 ``[B, G, L]``: log-probabilities of the candidates' tokens. Or
            float64, which the reference implementation takes.
        tokens: integers ``[B, G, L]``; rewards: floats ``[B, G]``. Advantages are computed of them; not
            needed where ``sibling_advantage`` and ``group_advantage`` are given.
        old_logp: of the policy that drew the candidates, as ``logp``. None: this policy, now
            (:math:`\rho = 1`, its gradient that of ``logp``).
        ref_logp: of the reference policy; None: no KL term.
        mask: bool ``[B, G]``, candidates that are there, or ``[B, G, L]``, tokens that are. Others take no
            part whatever they hold. A candidate without any token is not there.
        sibling_advantage: the result of :func:`sibling_advantage`, with options of its own. ``form``
            then decides the weighting alone.
        group_advantage: float32 or float64 ``[B, G]``, advantages of whole candidates.
        scale: of the advantages that are computed here: ``"std"``, divided by a standard deviation, or
            ``"none"``, not divided.
        global_weight, sibling_weight, kl_weight: weights of the terms. 0 turns a term off, even one that is
            infinite.
        clip: None, or ``(low, high)``, both >= 0; ``math.inf`` leaves a side open.
        dual_clip: None, or :math:`c > 1`: where :math:`A < 0`, :math:`s` is at least :math:`c A`, and has no
            gradient there (arXiv 1912.09729). With or without ``clip``.
        clip_terms: ``"separate"``, or ``"joint"``: a token has one :math:`s`, of the weighted sum of its
            advantages :math:`w_{global} c_{bg} A_{bg} + w_{sib} \frac{u_b w_\ell}{n_{bg\ell}} A_{bg\ell}`,
            as in trainers that add up the advantages. :math:`J_{global}` and :math:`J_{sib}` are its parts.
        importance_sampling_level: ``"token"``, or ``"sequence"``: all tokens of a sequence have the ratio
            :math:`r = \exp(\text{mean of } \log\pi - \log\pi_{old} \text{ over its tokens})`, with the
            derivative :math:`r` by each token's :math:`\log\pi` (GSPO-token, arXiv 2507.18071). Where a
            sequence has one advantage, as in the global term, the gradient is that of GSPO.
        log_ratio_bound: None, the exact formulas, whose exponentials overflow as float64 does; or a number
            > 0 that bounds the exponent of :math:`\rho`, and :math:`d`, to plus and minus itself, without
            gradient beyond it, as ``torch.clamp``. verl has 20.
        kl: ``"k1"``, ``"k2"`` or ``"k3"``.
        form: of the sibling term, ``"centered"`` or ``"paper"``.
        weighting: ``"node"``, every node counts once, or ``"candidate"``, every candidate does; None: as
            ``form`` has it.
        depth_weights: :math:`w_\ell`, ``L`` numbers (1), or a tensor of them.
        loss_type: ``"grpo"``, ``"bnpo"`` or ``"dr_grpo"``.
        horizon: of ``"dr_grpo"``, in place of :math:`L`.
        normalizer: None, or :func:`loss_counts` of several calls, added up: the :math:`B`, :math:`B \, G`,
            :math:`\sum_b G_b` and :math:`\sum_{bg} T_{bg}` of all of them. Then the losses and gradients of
            the calls add up to those of one call with all requests: for gradient accumulation and data
            parallelism. ``"dr_grpo"`` needs the same ``L`` in all of them, or a ``horizon``.

    Returns:
        A named tuple of scalars on the device, so that nothing waits for them, float32, or float64 if
        ``logp`` is. Only ``loss`` is differentiable, by ``logp``, once:

        - ``loss``, and :math:`J_{global}` as ``global_term``, :math:`J_{sib}` as ``sibling_term``, ``kl``
        - ``ratio``: mean of :math:`\rho` over the tokens that are there
        - ``global_clip_fraction``: share of these tokens at which a clip cuts the global term, or the sum of
          both terms
        - ``sibling_clip_fraction``: the same of the sibling term, among tokens with a valid sibling advantage
        - ``valid_fraction``: share of the tokens with a valid sibling advantage

        The last four are of this call, whatever the ``normalizer``.

    Sums are float64 in a fixed order: the same bits for any number of threads. NaN or infinity among the
    values that take part goes into the loss, but an advantage of 0, as in groups without signal, gives
    exactly 0 even where the ratio is infinite.

    Raises:
        TypeError, ValueError: an argument's type, shape, device or value, by name.

    Example:
        >>> tokens = torch.tensor([[[1, 5], [1, 6], [2, 5]]])
        >>> logp = torch.zeros(1, 3, 2, requires_grad=True)
        >>> out = vstar_ops.sibling_grpo_loss(logp, tokens, torch.tensor([[1.0, 0.0, 0.0]]), global_weight=0)
        >>> out.loss.backward(); logp.grad
        tensor([[[-0.0962, -0.2886],
                 [-0.0962,  0.2886],
                 [ 0.1924,  0.0000]]])

        One step over the micro-batches of a window, on several processes. (Where gradients are averaged over
        processes, as in DistributedDataParallel, multiply the loss by their number.) ::

            counts = sum(vstar_ops.loss_counts(x.tokens, x.mask) for x in window)
            torch.distributed.all_reduce(counts)
            for x in window:
                sibling_grpo_loss(..., mask=x.mask, normalizer=counts).loss.backward()
    """
    check("logp", logp, (None, None, None), _AXES, FLOATS_OR_DOUBLE)
    shape, device = tuple(logp.shape), logp.device
    floats = floats_beside(logp)
    for name, value in (("old_logp", old_logp), ("ref_logp", ref_logp)):
        if value is not None:
            check(name, value, shape, _AXES, floats, device)
    there = _tokens_there(mask, shape, device)
    chosen = (scale, clip_terms, importance_sampling_level, kl, loss_type)
    for choice, (name, choices) in zip(chosen, _CHOICES):
        if choice not in choices:
            check_choice(name, choice, choices)
    options, weighting = sibling_form(form, weighting)
    advantages = _advantages(sibling_advantage, group_advantage, tokens, rewards, mask, options, scale, logp)
    if normalizer is not None:
        check("normalizer", normalizer, (4,), "[4]", (torch.int64,), device)
        if validating() and bool((normalizer < loss_counts(logp, mask)).any()):
            raise ValueError("normalizer must count this call's requests too, got less than their counts")
    loss, terms, _ = _op(
        device,
        logp,
        old_logp,
        ref_logp,
        *advantages,
        there,
        _depth_weights(depth_weights, logp),
        normalizer,
        check_finite("global_weight", global_weight),
        check_finite("sibling_weight", sibling_weight),
        check_finite("kl_weight", kl_weight),
        *_clip(clip),
        _bound("dual_clip", dual_clip, 1),
        _bound("log_ratio_bound", log_ratio_bound, 0),
        _horizon(horizon, loss_type, shape[2]),
        " ".join((loss_type, kl, weighting, importance_sampling_level, clip_terms)),
    )
    return SiblingGRPOLoss(loss, *terms.unbind())


def loss_counts(tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""What the means of :func:`sibling_grpo_loss` divide by, for its ``normalizer``.

    Counts of several calls add up, on one device or by ``torch.distributed.all_reduce``.

    Args:
        tokens: ``[B, G, L]``, the candidates' tokens, or any tensor of their shape, such as ``logp``.
        mask: as in :func:`sibling_grpo_loss`.

    Returns:
        int64 ``[4]`` on the device, for which nothing waits: the requests :math:`B`, their candidates
        :math:`B \, G` with those that are masked, the sequences :math:`\sum_b G_b` with a token that is
        there, and the tokens :math:`\sum_{bg} T_{bg}` that are.

    Raises:
        TypeError, ValueError: an argument's type, shape or device, by name.
    """
    any_dtype = (tokens.dtype,) if isinstance(tokens, Tensor) else ()
    check("tokens", tokens, (None, None, None), _AXES, any_dtype)
    there = _tokens_there(mask, tuple(tokens.shape), tokens.device)
    if there is None:
        there = torch.ones_like(tokens, dtype=torch.bool)
    lengths = there.sum(2)
    batch, group = lengths.shape
    # Filled in on the device: numbers from the host would wait for it.
    sizes = lengths.new_full((), batch), lengths.new_full((), batch * group)
    return torch.stack([*sizes, (lengths > 0).sum(), lengths.sum()])


def _advantages(
    siblings: SiblingAdvantage | None,
    group: Tensor | None,
    tokens: Tensor | None,
    rewards: Tensor | None,
    mask: Tensor | None,
    options: dict[str, Any],
    scale: str,
    logp: Tensor,
) -> tuple[Tensor, ...]:
    """Three of siblings, given or computed with the ``options`` of their form, and those of candidates."""
    shape, device = tuple(logp.shape), logp.device
    if siblings is not None and group is not None:
        if scale != "std":
            raise ValueError(
                f"scale must be 'std' where sibling_advantage and group_advantage are given, got {scale!r}"
            )
    elif rewards is None:
        raise ValueError("rewards must be given where sibling_advantage or group_advantage is not, got None")
    if siblings is None:
        if tokens is None:
            raise ValueError("tokens must be given where sibling_advantage is not, got None")
        check("tokens", tokens, shape, _AXES, INTEGERS, device)
        if scale == "none":
            options = {**options, "scale": scale}
        siblings = _sibling_advantage(tokens, rewards, mask, **options)  # type: ignore[arg-type]
    else:
        check_type("sibling_advantage", siblings, SiblingAdvantage)
        check("sibling_advantage.advantage", siblings.advantage, shape, _AXES, _ADVANTAGES, device)
        check("sibling_advantage.valid", siblings.valid, shape, _AXES, (torch.bool,), device)
        counts = siblings.num_candidates
        check("sibling_advantage.num_candidates", counts, shape, _AXES, (torch.int32,), device)
    advantage, valid, _, count = siblings
    if group is None:
        check("rewards", rewards, shape[:2], "[B, G]", FLOATS_OR_DOUBLE, device)
        candidates = mask.any(2) if mask is not None and mask.dim() == 3 else mask
        group_scale = "group" if scale == "std" else scale
        group = _group_advantage(rewards, candidates, scale=group_scale)  # type: ignore[arg-type]
    else:
        check("group_advantage", group, shape[:2], "[B, G]", _ADVANTAGES, device)
    dtype = result_dtype(logp)
    if advantage.dtype is not dtype:
        advantage = advantage.to(dtype)
    return advantage, valid, count, group if group.dtype is dtype else group.to(dtype)


def _tokens_there(mask: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
    """A mask of candidates, or of tokens, as one of tokens."""
    check_mask(mask, shape, device)
    return mask[:, :, None].expand(shape) if mask is not None and mask.dim() == 2 else mask


def _clip(clip: Any) -> tuple[float, float]:
    if clip is None:
        return math.inf, math.inf
    if not isinstance(clip, Sequence) or len(clip) != 2:
        raise TypeError(f"clip must be None or (low, high), got {clip!r}")
    for side in clip:
        if side != math.inf and check_finite("clip", side) < 0:
            raise ValueError(f"clip must be >= 0, got {clip!r}")
    return float(clip[0]), float(clip[1])


def _bound(name: str, value: Any, low: int) -> float:
    """An optional number above ``low``; infinite without one."""
    if value is None:
        return math.inf
    number = check_finite(name, value)
    if number <= low:
        raise ValueError(f"{name} must be None or > {low}, got {value}")
    return number


def _horizon(horizon: Any, loss_type: str, length: int) -> int:
    if horizon is None:
        return length
    if loss_type != "dr_grpo":
        raise ValueError(f"horizon must be None where loss_type is {loss_type!r}, got {horizon!r}")
    return check_int("horizon", horizon, 1)


def _depth_weights(weights: Any, logp: Tensor) -> Tensor | None:
    if weights is None:
        return None
    length = logp.shape[2]
    if isinstance(weights, Tensor):
        return check("depth_weights", weights, (length,), "[L]", FLOATS, logp.device).float()
    return level_weights("depth_weights", weights, length, torch.float32, logp)


def sibling_grpo_loss_from_logits(
    logits: Tensor,
    tokens: Tensor,
    rewards: Tensor | None = None,
    *,
    row: Tensor | None = None,
    trie: Trie | None = None,
    node: Tensor | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    **options: Any,
) -> SiblingGRPOLoss:
    r""":func:`sibling_grpo_loss` of the log-probabilities that :func:`token_logp` finds in logits.

    Nothing of the size of the logits is made but their gradient.

    Args:
        logits: float32, bfloat16, float16 or float64 ``[B, G, L, V]``, a row for each token; or with
            ``row`` ``[R, V]``, a row for each distinct prefix that was run.
        tokens: integers ``[B, G, L]``.
        rewards: float ``[B, G]``.
        row: ints ``[B, G, L]``, the row of logits that predicts each token. Candidates of a request share
            rows; requests do not. -1 for a token that was not run, such as one without alternative: its
            log-probability is 0, without gradient.
        trie, node: normalize over the legal children of each row's node, ``[B, G, L]`` or ``[R]``.
        temperature: of the softmax.
        mask, options: as in :func:`sibling_grpo_loss`.

    Returns:
        As :func:`sibling_grpo_loss`; the loss is differentiable by ``logits``.

    Raises:
        TypeError, ValueError: an argument's type, shape, device or value, by name. Rows out of range, or
            shared by two requests, are told only under :func:`vstar_ops.validation`.
    """
    tokens = check_tokens("tokens", tokens, (None, None, None), _AXES)
    shape, device = tuple(tokens.shape), tokens.device
    there = _tokens_there(mask, shape, device)
    targets = tokens if there is None else torch.where(there, tokens, -1)
    if row is None:
        check("logits", logits, (*shape, None), "[B, G, L, V]", FLOATS_OR_DOUBLE, device)
        logp = token_logp(logits, targets, trie, node, temperature=temperature).logp
        return sibling_grpo_loss(logp, tokens, rewards, mask=mask, **options)
    check("logits", logits, (None, None), "[R, V]", FLOATS_OR_DOUBLE, device)
    check("row", row, shape, _AXES, INTS, device)
    rows, group = logits.shape[0], shape[1]
    place = torch.where((row >= 0) & (row < rows) & (targets >= 0), row, rows).to(torch.int64)
    candidate = torch.arange(group, device=device)[:, None].expand(shape)
    # A candidate passes a row once, so that (row, candidate) is a place of its own; the last row is nobody's.
    table = targets.new_full((rows + 1, group), -1).index_put((place, candidate), targets)
    if validating():
        if bool(((row < -1) | (row >= rows)).any()):
            raise ValueError(
                f"row must lie in [-1, {rows}), got values in [{int(row.min())}, {int(row.max())}]"
            )
        if bool(((table[place, candidate] != targets) & (place < rows)).any()):
            raise ValueError(
                "row must not be shared by requests, or by two tokens of a candidate, got one that is"
            )
    found = token_logp(logits, table[:rows], trie, node, temperature=temperature).logp
    logp = torch.cat([found, found.new_zeros(1, group)])[place, candidate]
    return sibling_grpo_loss(logp, tokens, rewards, mask=mask, **options)
