"""``token_logp``: log-probabilities of given tokens and the entropy, from logits, with gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .. import reference
from ..trie import Trie
from ._checks import (
    FLOATS_OR_DOUBLE,
    INTS,
    check,
    check_alive,
    check_nodes,
    check_positive,
    check_tokens,
    check_trie,
    result_dtype,
    validating,
)
from ._registry import REFUSED, Gradient, define


class TokenLogp(NamedTuple):
    """The result of :func:`token_logp`."""

    logp: Tensor
    entropy: Tensor


def _fake(logits: Tensor, targets: Tensor, *_: object) -> tuple[Tensor, ...]:
    rows, dtype = logits.shape[:-1], result_dtype(logits)
    logp = logits.new_empty(targets.shape, dtype=dtype)
    return logp, *(logits.new_empty(rows, dtype=dtype) for _ in range(3))


_backward = define(
    reference.token_logp_backward,
    lambda grad_logp, grad_entropy, logits, *_: logits.new_empty(logits.shape),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, temperature, max_children = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.scalars = temperature, max_children
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)  # a loss without entropy pays nothing for it


def _differentiate(ctx: Any, backward: Any, grad_logp: Any, grad_entropy: Any, *_: None) -> tuple[Any, ...]:
    gradient = None
    if ctx.needs_input_grad[0] and (grad_logp is not None or grad_entropy is not None):
        gradient = backward(grad_logp, grad_entropy, *ctx.saved_tensors, *ctx.scalars)
    return gradient, None, None, None, None, None, None, None


_op = define(
    reference.token_logp,
    _fake,
    Gradient(_backward, _save, _differentiate),
    double=("logits",),
)


def token_logp(
    logits: Tensor,
    targets: Tensor,
    trie: Trie | None = None,
    node: Tensor | None = None,
    *,
    temperature: float = 1.0,
) -> TokenLogp:
    r"""Log-probabilities of tokens and the entropy of their distribution, without a table of log-softmax.

    For a row of logits :math:`z`, with :math:`D` all ``V`` columns, or the legal children of the row's node
    where a trie is given:

    .. math::
        \log\pi(v) &= z_v/\tau - \log\textstyle\sum_{u \in D} \exp(z_u/\tau) \\
        H &= -\textstyle\sum_{u \in D} \pi(u) \log\pi(u)

    The forward pass keeps two numbers per row, and the backward pass writes the gradient of the logits once:
    nothing else of the size of the logits is made. Arithmetic is float32 for all dtypes of the logits but
    float64: those are taken by the reference implementation, which computes in float64. With a trie only
    legal columns are read, and the dense gradient is zero outside of them (on the CPU its pages come zeroed
    from the system, so what is not legal is not written either).

    Args:
        logits: float32, bfloat16, float16 or float64 ``[..., V]``, any strides. Up to three dimensions, such
            as ``logits[:, :-1]``, they are read in place; leading dimensions beyond that are flattened, which
            copies where their strides do not allow it. NaN reads as -inf, +inf as the largest finite float32.
        targets: integers ``[...]``, a token for each row, or ``[..., T]``, ``T`` of them, which may repeat.
            Negative ones (-1, -100) are padding: log-probability 0, no gradient.
        trie: the catalogue; its tokens are columns of ``logits``. Together with ``node`` or not at all. Of
            a restricted trie only children with an allowed item below them are legal; where it has a filter
            per request, the first dimension of ``logits`` is the request.
        node: int32 or int64 ``[...]``, the trie node of each row. Whatever is not a node has no children.
        temperature: any finite :math:`\tau > 0`. A log-probability beyond float32 is -inf. So is that of a
            logit more than 3.4e38 below the largest one, a difference that is float32 too; only the
            reference implementation computes it.

    Returns:
        A named tuple:

        - ``logp`` float32 (float64 for float64 logits), of the shape of ``targets``. -inf for a target that
          is not in :math:`D`, or whose logit reads -inf. Exactly 0 for a single legal child.
        - ``entropy`` of the same dtype ``[...]``, 0 where nothing is legal.

    Both are differentiable with respect to the logits, once:

    .. math:: \frac{\partial}{\partial z_v} = \frac1\tau \Big[\sum_{t: y_t = v} g_t - \pi(v) \sum_t g_t
        - g_H \, \pi(v) (\log\pi(v) + H)\Big]

    Targets at -inf have no gradient, logits that read -inf get exactly 0, and so does a single legal child.
    The gradient has the dtype of the logits. Both passes give the same bits for any number of threads
    and in any batch.

    Raises:
        TypeError, ValueError: an argument's type, shape, device or value, by name. Values of ``targets`` and
            ``node`` are checked only under :func:`vstar_ops.validation`.

    Example:
        >>> logits = torch.zeros(2, 4, requires_grad=True)
        >>> out = vstar_ops.token_logp(logits, torch.tensor([1, -1]))
        >>> out.logp, out.entropy
        (tensor([-1.3863,  0.0000], grad_fn=...), tensor([1.3863, 1.3863], grad_fn=...))
        >>> out.logp.sum().backward(); logits.grad
        tensor([[-0.2500,  0.7500, -0.2500, -0.2500],
                [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    found = REFUSED
    if trie is None and node is None:
        scale = check_positive("temperature", temperature)
        found = _op.attempt(logits, targets, None, None, None, None, scale, 0)
    if found is REFUSED:
        found = _checked(logits, targets, trie, node, temperature)
    return TokenLogp(found[0], found[1])


def _checked(
    logits: Tensor, targets: Tensor, trie: Trie | None, node: Tensor | None, temperature: float
) -> Sequence[Tensor]:
    if not isinstance(logits, Tensor) or logits.dim() == 0:
        given = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        error = ValueError if isinstance(logits, Tensor) else TypeError
        raise error(f"logits must be a tensor [..., V], got {given}")
    *rows, columns = logits.shape
    check("logits", logits, (*rows, columns), "[..., V]", FLOATS_OR_DOUBLE)
    device = logits.device
    many = isinstance(targets, Tensor) and targets.dim() == logits.dim()
    shape: tuple[int | None, ...] = (*rows, None) if many else tuple(rows)
    targets = check_tokens("targets", targets, shape, "[...] or [..., T]", device)
    if (trie is None) != (node is None):
        names = ("trie", "node") if trie is None else ("node", "trie")
        raise ValueError("{} must be given where {} is, got None".format(*names))
    offset = token = alive = None
    max_children = 0
    if trie is not None:
        check_trie(trie, columns, device)
        check_alive(trie, rows[0] if rows else 1)
        node = check("node", node, tuple(rows), "[...]", INTS, device)
        offset, token, alive, max_children = trie.offset, trie.token, trie.alive, trie.max_children
    temperature = check_positive("temperature", temperature)
    if validating():
        if targets.numel() and int(targets.max()) >= columns:
            raise ValueError(f"targets must be below V = {columns}, got {int(targets.max())}")
        if trie is not None and node is not None:
            check_nodes(node, trie)

    if len(rows) <= 2:
        return _op(device, logits, targets, offset, token, alive, node, temperature, max_children)
    if alive is not None and alive.shape[0] > 1:  # a filter per request, which is the first dimension
        batched = logits.flatten(1, -2)
    else:
        batched = logits.flatten(0, -3)
    flat = batched.shape[:2]
    each = targets.reshape(*flat, targets.shape[-1]) if many else targets.reshape(flat)
    where = None if node is None else node.reshape(flat)
    logp, entropy, *_ = _op(device, batched, each, offset, token, alive, where, temperature, max_children)
    return logp.reshape(targets.shape), entropy.reshape(rows)
