"""The smallest failing call that can be found: :func:`smallest`."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

import vstar_ops

from ..trie import Trie
from . import checks
from .calls import Call, map_alive, map_tensors, tensors
from .checks import Finding, problem
from .generators import restricted
from .judge import Problem

# The axes of each argument; of what holds several tensors, the first ones of all of them.
_CANDIDATES = dict.fromkeys(("tokens", "mask", "logp", "old_logp", "ref_logp"), "BGL")
_CANDIDATES |= {"rewards": "BG", "embedding": "BGE", "target": "BL", "target_embedding": "BE"}
_CANDIDATES |= {"weights": "L", "depth_weights": "L"}
_SEARCH = {"trees": "B", "rows": "BP", "evaluation": "BP", "logits": "BPV", "child_value": "BPV"}
_SEARCH |= {"slot": "BP", "value": "BP", "seeds": "B", "first": "BK", "others": "BJ"}
_BEAMS = {"node": "BW", "row": "BW", "cum_logp": "BW", "value": "BW", "bonus": "BW", "gumbel_seed": "B"}
_STEP = {"parent": "BK", "token": "BK", "node": "BK", "sequence": "BWT", "slot": "BW", "evaluated": "BW"}
_STEP |= {"row": "BW", "row_slot": "R"}


def axes(op: str, arguments: dict[str, Any]) -> dict[str, str]:
    """The axes of each argument."""
    if op == "expand_topk":
        rows = "RV" if arguments.get("row") is not None else "BWV"
        return _BEAMS | {"logits": rows, "child_value": rows}
    if op.startswith("token_logp"):
        rows = "BW"[: arguments["logits"].dim() - 1]
        targets = rows + "T" * (arguments["targets"].dim() - len(rows))
        of_rows = {"logits": rows + "V", "node": rows, "grad_entropy": rows}
        return of_rows | {"targets": targets, "grad_logp": targets}
    if op == "draw_children":
        lists = "RC" if arguments.get("row") is not None else "BC"
        of_lists = {"logp": lists, "token": lists, "node": lists, "sequence": "BKT", "seed": "B"}
        return of_lists | dict.fromkeys(("row", "prefix", "cum_logp"), "BK")
    if op == "distinct_rows":
        return {"node": "BK", "token": "BK", "row": "BK", "slot": "R"}
    if op == "filter_items":
        return {"bits": "B", "row": "BM", "within": "B"}
    if op in ("advance_beams", "rows_to_run"):
        return _STEP if op == "advance_beams" else _STEP | {"node": "BW"}
    return _SEARCH if op.startswith("ved") else _CANDIDATES


def size(call: Call) -> int:
    """Numbers in the arguments, those in between included where the tensors are strided."""
    found = tensors(tuple(call.arguments.values()))
    return sum(x.numel() if _plain(x) else len(x.untyped_storage()) // x.itemsize for x in found)


def smallest(found: Finding, others: Iterable[Call], seconds: float) -> Finding:
    """Begin with the smallest of other calls that fails as well, then take away what does not matter."""
    end = checks.clock() + seconds
    for call in sorted(others, key=size) if seconds > 0 else ():
        if size(call) >= size(found.call) or checks.clock() > end - seconds / 2:
            break
        if (wrong := _fails(found, call)) is not None:
            found = found._replace(call=call, problem=wrong)
            break
    progress = True
    while progress:
        progress = False
        for call in smaller(found.op, found.call):
            if checks.clock() > end:
                return found
            wrong = _fails(found, call)
            if wrong is not None:
                found, progress = found._replace(call=call, problem=wrong), True
                break
    return found


def _fails(found: Finding, call: Call) -> Problem | None:
    """What is wrong with another call, if it is the same kind of failure."""
    try:
        wrong = problem(found.op, found.backend, "values" if found.kind == "error" else found.kind, call)
        same = wrong and found.kind != "error" and _is_nan(wrong.want) == _is_nan(found.problem.want)
        return wrong if same else None
    except Exception as error:
        # What is not a call at all is refused by the checks of the arguments, in other words.
        same = found.kind == "error" and message(error)[:40] == found.problem.got[:40]
        return found.problem._replace(got=message(error)) if same else None


def _is_nan(x: Any) -> bool:
    return bool(x != x)


def message(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def smaller(op: str, call: Call) -> Iterator[Call]:
    """Calls with less in them, those that save most first."""
    a = call.arguments
    letters = axes(op, a)
    for axis in dict.fromkeys("".join(letters.values())):
        for keep in _parts(_length(a, letters, axis)):
            if axis == "V" and keep.start:
                continue
            yield call._replace(arguments=_cut(a, letters, axis, keep))
    public = inspect.signature(getattr(vstar_ops, op.removesuffix("_backward"))).parameters
    for name, x in a.items():
        default = public[name].default if name in public else inspect.Parameter.empty
        if default is not inspect.Parameter.empty and x is not default:
            yield call._replace(arguments={k: v for k, v in a.items() if k != name})
    if isinstance(a.get("trie"), Trie):
        if a["trie"].alive is not None:
            yield call._replace(arguments={**a, "trie": Trie.from_sequences(sequences(a["trie"]))})
        for keep in _parts(a["trie"].num_sequences):
            yield call._replace(arguments={**a, "trie": _of_sequences(a["trie"], keep)})
    for k in dict.fromkeys((1, a.get("k", 1) // 2, a.get("k", 1) - 1)):
        if 1 <= k < a.get("k", 1):
            yield call._replace(arguments={**a, "k": k})
    yield from _simpler(call)


def _parts(n: int) -> Iterator[slice]:
    """One half, the other half, and all but the first or the last."""
    if n > 3:
        yield from (slice(0, n // 2), slice(n // 2, n))
    if n > 0:
        yield from (slice(0, n - 1), slice(1, n))


def _length(a: dict[str, Any], letters: dict[str, str], axis: str) -> int:
    """How long an axis is; 0 if no argument has it."""
    for name, x in a.items():
        if axis in letters.get(name, ""):
            d = letters[name].index(axis)
            if isinstance(x, tuple) and not tensors(x):
                return len(x)
            for tensor in tensors(x)[:1]:
                if tensor.dim() > d:
                    return tensor.shape[d]
    return 0


def _cut(a: dict[str, Any], letters: dict[str, str], axis: str, keep: slice) -> dict[str, Any]:
    """The arguments with a part of an axis."""

    def part(name: str, x: Any) -> Any:
        if axis not in letters.get(name, ""):
            return x
        d = letters[name].index(axis)
        if isinstance(x, tuple) and not tensors(x):
            return x[keep]
        return map_tensors(lambda t: t[(slice(None),) * d + (keep,)] if t.dim() > d else t, x)

    out = {name: part(name, x) for name, x in a.items()}
    if isinstance(a.get("trie"), Trie):
        if axis == "V":
            out["trie"] = _of_sequences(a["trie"], (sequences(a["trie"]) < keep.stop).all(1))
        elif axis == "B":
            out["trie"] = map_alive(lambda x: x[keep] if len(x) > 1 else x, a["trie"])
    return out


def _of_sequences(trie: Trie, keep: Any) -> Trie:
    """The trie of some of a trie's sequences, which are allowed where they were."""
    part = Trie.from_sequences(sequences(trie)[keep])
    return part if trie.alive is None else restricted(part, allowed(trie)[:, keep])


def allowed(trie: Trie) -> Tensor:
    """Which sequences a restricted trie allows, bool ``[R, num_sequences]``."""
    assert trie.alive is not None
    bits = trie.alive.cpu()[:, :, None] >> torch.arange(32) & 1
    return bits.flatten(1)[:, trie.level_offset[-2] : trie.num_nodes].bool()


def sequences(trie: Trie) -> Tensor:
    """The sequences of a trie, int64 ``[N, L]``."""
    offset, rows = trie.offset.long().cpu(), torch.zeros(1, 0, dtype=torch.int64)
    token, node = trie.token.long().cpu(), torch.zeros(1, dtype=torch.int64)
    for _ in range(trie.length):
        number = offset[node + 1] - offset[node]
        first = torch.repeat_interleave(offset[node], number)
        within = torch.arange(len(first)) - torch.repeat_interleave(number.cumsum(0) - number, number)
        edge = first + within
        rows = torch.cat([rows.repeat_interleave(number, 0), token[edge][:, None]], 1)
        node = edge + 1
    return rows


def _simpler(call: Call) -> Iterator[Call]:
    """The same with tensors that lie one number after the other, and with rounder numbers."""
    for name, x in call.arguments.items():
        if isinstance(x, Tensor):
            for y in _rounder(x):
                if _cost(y) < _cost(x):
                    yield call._replace(arguments={**call.arguments, name: y})
        elif any(y.storage_offset() for y in tensors(x)):
            yield call._replace(arguments={**call.arguments, name: map_tensors(torch.Tensor.clone, x)})


def _rounder(x: Tensor) -> Iterator[Tensor]:
    own = x.clone(memory_format=torch.contiguous_format)
    yield own
    yield torch.zeros_like(own)
    yield torch.ones_like(own)
    if x.is_floating_point():
        yield own.round()
    for i in range(x.numel() if x.numel() <= 24 else 0):
        y = own.clone()
        y.view(-1)[i] = 0
        yield y


def _plain(x: Tensor) -> bool:
    return x.is_contiguous() and x.storage_offset() == 0


def _cost(x: Tensor) -> int:
    """How much there is to read in a tensor."""
    laid = 0 if _plain(x) else 10
    wrong = (x != 0, (x != 0) & (x != 1), x != x.round() if x.is_floating_point() else x != x)
    return laid + sum(int(w.sum()) for w in wrong)
