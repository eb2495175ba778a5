"""Brute-force oracles in plain Python, written from the specification and not from the library."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

NEG_INF = float("-inf")
FLOAT32_MAX = float(np.finfo(np.float32).max)
_WORD = 0xFFFFFFFF


def float32(x: float) -> float:
    """Round to float32."""
    with np.errstate(over="ignore"):
        return float(np.float32(x))


# ---------------------------------------------------------------- random numbers


def philox4x32(counter: Sequence[int], key: Sequence[int]) -> tuple[int, int, int, int]:
    """Philox4x32-10."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 1 << 32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def gumbel(seed: int, node: int, token: int) -> float:
    """Gumbel(0, 1) noise of a child."""
    word = philox4x32((node & _WORD, token & _WORD, 0, 0), (seed & _WORD, (seed >> 32) & _WORD))[0]
    return -math.log(-math.log1p(-(word + 0.5) / 2**32))


def splitmix64(seed: int, count: int) -> list[int]:
    """The first outputs of SplitMix64, as signed 64-bit integers."""
    mask = (1 << 64) - 1
    out = []
    for i in range(1, count + 1):
        z = (seed + i * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        z ^= z >> 31
        out.append(z - (1 << 64) if z >> 63 else z)
    return out


# ---------------------------------------------------------------- trie


class DictTrie:
    """Prefixes in dictionaries; nodes numbered level by level, lexicographically within a level."""

    def __init__(self, sequences: Sequence[Sequence[int]], length: int) -> None:
        rows = [tuple(int(t) for t in row) for row in sequences]
        self.length = length
        self.prefixes: list[tuple[int, ...]] = [()]
        self.level_offset = [0, 1]
        for depth in range(1, length + 1):
            self.prefixes += sorted({row[:depth] for row in rows})
            self.level_offset.append(len(self.prefixes))
        self.node = {prefix: n for n, prefix in enumerate(self.prefixes)}
        self.children: list[list[tuple[int, int]]] = [[] for _ in self.prefixes]
        for prefix, n in self.node.items():
            if prefix:
                self.children[self.node[prefix[:-1]]].append((prefix[-1], n))
        for row in self.children:
            row.sort()
        order = sorted(range(len(rows)), key=lambda i: rows[i])  # stable
        self.items = [[i for i in order if rows[i][: len(p)] == p] for p in self.prefixes]


# ---------------------------------------------------------------- expand_topk


class Candidate(NamedTuple):
    """One legal child that may win; ``scale`` bounds what its score was summed from."""

    score: float
    logp: float
    parent: int
    token: int
    node: int
    scale: float
    twin: tuple[float, float]


def clean(z: float) -> float:
    """NaN reads as -inf, +inf as the largest finite float32."""
    return NEG_INF if math.isnan(z) else min(z, FLOAT32_MAX)


def log_softmax(z: Sequence[float], domain: Sequence[float], tau: float) -> list[float]:
    """``z / tau`` minus the log-sum-exp over the domain."""
    top = max(domain, default=NEG_INF)
    if top == NEG_INF:
        return [NEG_INF] * len(z)
    total = math.log(math.fsum(math.exp((u - top) / tau) for u in domain))
    return [(u - top) / tau - total for u in z]


def expand_topk(
    logits: np.ndarray,
    trie: Any,
    node: np.ndarray,
    *,
    cum_logp: np.ndarray | None = None,
    value: np.ndarray | None = None,
    bonus: np.ndarray | None = None,
    child_value: np.ndarray | None = None,
    logp_weight: float = 1.0,
    value_weight: float = 0.0,
    entropy_weight: float = 0.0,
    temperature: float = 1.0,
    normalize: str = "legal",
    gumbel_seeds: Sequence[int] | None = None,
    rounded: Callable[[float], float] = float32,
) -> tuple[list[list[Candidate]], np.ndarray]:
    """All winners of each request in order, without a limit, and the entropies.

    ``trie.children[n]`` lists the children of a node, ``(token, node)``; a list of tries has one per request.
    Scores are compared ``rounded``.
    """
    batch, width, _columns = logits.shape
    entropy = np.zeros((batch, width))
    winners: list[list[Candidate]] = []
    for b in range(batch):
        found: list[Candidate] = []
        for w in range(width):
            n, of = int(node[b, w]), trie[b] if isinstance(trie, list) else trie
            children = of.children[n] if 0 <= n < len(of.children) else []
            z = [clean(float(logits[b, w, v])) for v, _ in children]
            own = log_softmax(z, z, temperature)
            entropy[b, w] = -math.fsum(math.exp(p) * p for p in own if p > NEG_INF) if len(z) > 1 else 0.0
            if normalize == "vocab":
                own = log_softmax(z, [clean(float(u)) for u in logits[b, w]], temperature)
            prior = 0.0 if cum_logp is None else float(cum_logp[b, w])
            for (v, child), logit, p in zip(children, z, own):
                logp = prior + p
                terms = [logp_weight * logp] if logp_weight != 0 else []
                if value_weight != 0 and value is not None:
                    terms.append(value_weight * float(value[b, w]))
                if value_weight != 0 and child_value is not None:
                    terms.append(value_weight * float(child_value[b, w, v]))
                if entropy_weight != 0:
                    terms.append(entropy_weight * float(entropy[b, w]))
                if bonus is not None:
                    terms.append(float(bonus[b, w]))
                if gumbel_seeds is not None:
                    terms.append(gumbel(int(gumbel_seeds[b]), n, v))
                score = sum(terms)
                if logit == NEG_INF or not rounded(logp) > NEG_INF or not rounded(score) > NEG_INF:
                    continue
                scale = sum((abs(t) for t in terms if math.isfinite(t)), 1.0)
                scale += abs(logp_weight) * (abs(prior) + abs(p)) if math.isfinite(prior) else 0.0
                twin = (logit, 0.0 if child_value is None else float(child_value[b, w, v]))
                found.append(Candidate(score, logp, w, v, child, scale, twin))
        found.sort(key=lambda c: (-rounded(c.score), c.parent, c.token))
        winners.append(found)
    return winners, entropy


# ---------------------------------------------------------------- advantages


def _mean(values: Sequence[float | Fraction]) -> Fraction | float:
    """Exact; NaN if one of the values is NaN or infinite."""
    if not all(map(math.isfinite, values)):
        return math.nan
    return sum((Fraction(x) for x in values), Fraction(0)) / len(values)


def _std(values: Sequence[float | Fraction], ddof: int) -> float:
    mean = _mean(values)
    if not isinstance(mean, Fraction):
        return math.nan
    squares = [(Fraction(v) - mean) ** 2 for v in values]
    return math.sqrt(sum(squares, Fraction(0)) / max(len(values) - ddof, 1))


def tokens_there(shape: tuple[int, ...], mask: np.ndarray | None, *, ended: bool = False) -> np.ndarray:
    """A mask ``[B, G]`` or ``[B, G, L]`` as one of tokens; ``ended``, with nothing behind a masked one."""
    there = (
        np.ones(shape, bool)
        if mask is None
        else mask
        if mask.ndim == 3
        else mask[:, :, None] & np.ones(shape, bool)
    )
    return np.logical_and.accumulate(there, 2) if ended else there


def group_advantage(
    rewards: np.ndarray,
    mask: np.ndarray | None,
    eps: float,
    ddof: int,
    std_floor: float,
    scale: str = "group",
) -> np.ndarray:
    """Standardized rewards within each row, exact until the last step."""
    out = np.zeros(rewards.shape)
    for b, row in enumerate(rewards):
        values = {g: float(row[g]) for g in range(len(row)) if mask is None or mask[b, g]}
        mean = _mean(list(values.values())) if values else 0
        if len(values) < 2 or (math.isfinite(mean) and len(set(values.values())) < 2):
            continue
        std = 1.0 if scale == "none" else max(_std(list(values.values()), ddof), std_floor) + eps
        for g, value in values.items():
            out[b, g] = float(Fraction(value) - mean) / std if math.isfinite(mean) else math.nan
    return out


def sibling_advantage(
    tokens: np.ndarray,
    rewards: np.ndarray,
    mask: np.ndarray | None,
    eps: float,
    ddof: int,
    std_floor: float,
    min_siblings: int,
    baseline: str,
    scale: str = "siblings",
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Advantage, valid, node and count, each ``[B, G, L]``, level by level in dictionaries of prefixes."""
    batch, group, length = tokens.shape
    there = tokens_there(tokens.shape, mask)
    advantage, valid = np.zeros(tokens.shape), np.zeros(tokens.shape, bool)
    node, count = np.full(tokens.shape, -1), np.zeros(tokens.shape, np.int64)
    for b in range(batch):
        reward = [float(x) for x in rewards[b]]
        request = _std([reward[g] for g in range(group) if there[b, g].any()] or [0.0], ddof)
        number = 0
        for depth in range(1, length + 1):
            through: dict[tuple[int, ...], list[int]] = {}
            for g in range(group):
                if there[b, g, depth - 1]:
                    through.setdefault(tuple(int(t) for t in tokens[b, g, :depth]), []).append(g)
            families: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
            for p in sorted(through):
                families.setdefault(p[:-1], []).append(p)
                node[b, through[p], depth - 1], count[b, through[p], depth - 1] = number, len(through[p])
                number += 1
            for family in families.values():
                mean = {p: _mean([reward[g] for g in through[p]]) for p in family}
                std = {"siblings": _std(list(mean.values()), ddof), "group": request, "none": 0.0}[scale]
                divisor = (
                    1.0 if scale == "none" else float(np.fmax(std, std_floor) if std == std else std) + eps
                )
                for p in family:
                    if baseline == "sibling":
                        base = _mean(list(mean.values()))
                    elif baseline == "parent":
                        base = _mean([reward[g] for q in family for g in through[q]])
                    else:
                        base = _mean([mean[q] for q in family if q != p] or [0])
                    enough = len(family) >= min_siblings
                    valid[b, through[p], depth - 1] = enough
                    if not all(map(math.isfinite, mean.values())):
                        advantage[b, through[p], depth - 1] = math.nan if enough else 0
                    elif enough and len(set(mean.values())) > 1:
                        advantage[b, through[p], depth - 1] = float(mean[p] - base) / divisor
    return advantage, valid, node, count


def prefix_returns(
    tokens: np.ndarray,
    embedding: np.ndarray,
    target: np.ndarray,
    target_embedding: np.ndarray,
    mask: np.ndarray | None,
    weights: Sequence[float],
) -> tuple[np.ndarray, np.ndarray]:
    """Returns and similarity, each ``[B, G, L]``, bucket by bucket."""
    batch, group, length = tokens.shape
    returns, similarity = np.zeros(tokens.shape), np.zeros(tokens.shape)
    there = tokens_there(tokens.shape, mask, ended=True)
    for b in range(batch):
        for depth in range(1, length + 1):
            present = [g for g in range(group) if there[b, g, depth - 1]]
            for g in present:
                bucket = [h for h in present if tuple(tokens[b, h, :depth]) == tuple(tokens[b, g, :depth])]
                mean = sum(embedding[b, h] for h in bucket) / len(bucket)
                norm = math.sqrt(float(mean @ mean)) * math.sqrt(
                    float(target_embedding[b] @ target_embedding[b])
                )
                cosine = float(mean @ target_embedding[b]) / norm if norm else 0.0
                hit = tuple(tokens[b, g, :depth]) == tuple(target[b, :depth])
                w = weights[depth - 1]
                returns[b, g, depth - 1] = w if hit else -w * (1 - cosine)
                similarity[b, g, depth - 1] = cosine
    return returns, similarity


def prefix_tree(tokens: np.ndarray, mask: np.ndarray | None) -> dict[str, np.ndarray]:
    """The fields of the tree by name, from a sorted set of prefixes."""
    batch, group, length = tokens.shape
    out = {name: np.full((batch, group * length), -1, np.int64) for name in ("parent", "token", "first")}
    out |= {name: np.zeros((batch, group * length), np.int64) for name in ("depth", "num_candidates")}
    out |= {"node": np.full(tokens.shape, -1), "size": np.zeros(batch, np.int64)}
    ends = tokens_there(tokens.shape, mask, ended=True).sum(2)
    for b in range(batch):
        rows = {g: tuple(int(t) for t in tokens[b, g, : ends[b, g]]) for g in range(group)}
        prefixes = {row[:depth] for row in rows.values() for depth in range(1, len(row) + 1)}
        number = {p: n for n, p in enumerate(sorted(prefixes, key=lambda p: (len(p), p)))}
        out["size"][b] = len(number)
        for p, n in number.items():
            through = [g for g, row in rows.items() if row[: len(p)] == p]
            out["parent"][b, n] = number.get(p[:-1], -1)
            out["token"][b, n], out["depth"][b, n] = p[-1], len(p)
            out["first"][b, n], out["num_candidates"][b, n] = min(through), len(through)
            out["node"][b, through, len(p) - 1] = n
    return out


# ---------------------------------------------------------------- beams


def advance_beams(
    parent: np.ndarray,
    token: np.ndarray,
    node: np.ndarray,
    sequence: np.ndarray,
    slot: np.ndarray,
    evaluated: np.ndarray | None = None,
    row: np.ndarray | None = None,
    row_slot: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """The fields of the new beams by name, one beam after the other."""
    (batch, winners), (_, width, length) = parent.shape, sequence.shape
    out = {
        name: np.full((batch, winners), fill) for name, fill in (("slot", -1), ("token", 0), ("evaluated", 0))
    }
    out["sequence"] = np.full((batch, winners, length + 1), -1)
    for b, k in np.ndindex(batch, winners):
        w = int(parent[b, k])
        if node[b, k] < 0 or not 0 <= w < width:
            continue
        out["sequence"][b, k] = [*sequence[b, w], token[b, k]]
        out["token"][b, k] = token[b, k]
        if row is not None and row_slot is not None and 0 <= row[b, w] < len(row_slot):
            out["slot"][b, k], out["evaluated"][b, k] = row_slot[row[b, w]], length
        else:
            known = length if evaluated is None else evaluated[b, w]
            out["slot"][b, k], out["evaluated"][b, k] = slot[b, w], known
    return out


def filter_items(
    children: Sequence[Sequence[Any]],
    item_offset: Sequence[int],
    alive: np.ndarray,
    allowed: np.ndarray,
    row: np.ndarray | None,
    allow: bool,
    within: np.ndarray | None,
) -> dict[str, np.ndarray]:
    """Both fields, from sets of items and of nodes. A request at a time."""
    inner, items = len(children) - len(item_offset) + 1, item_offset[-1]
    out = {"alive": np.zeros(alive.shape, np.uint32), "allowed": allowed.view(np.uint32).copy()}

    def members(words: np.ndarray) -> set[int]:
        return {i for i in range(items) if int(words[i // 32]) >> i % 32 & 1}

    for r in range(len(alive)):
        kept = members(allowed.view(np.uint32)[r])
        if row is not None:
            listed = {int(i) for i in row[r] if 0 <= i < items}
            if allow and within is not None:
                listed &= members(within.view(np.uint32)[r % len(within)])
            kept = kept | listed if allow else kept - listed
            out["allowed"][r] = _words(kept, allowed.shape[1])
        nodes = {
            inner + n
            for n, ends in enumerate(zip(item_offset, item_offset[1:]))
            if kept.intersection(range(*ends))
        }
        for n in reversed(range(inner)):
            if any(child in nodes for _, child in children[n]):
                nodes.add(n)
        out["alive"][r] = _words(nodes, alive.shape[1])
    return {name: x.view(np.int32) for name, x in out.items()}


def _words(members: set[int], number: int) -> list[int]:
    words = [0] * number
    for i in members:
        words[i // 32] |= 1 << i % 32
    return words


def rows_to_run(
    children: Sequence[Sequence[Any]],
    node: np.ndarray,
    sequence: np.ndarray,
    slot: np.ndarray,
    evaluated: np.ndarray,
) -> dict[str, np.ndarray]:
    """The fields by name, from lists of what each stage runs."""
    batch, width, length = sequence.shape
    row, spent = np.full((batch, width), -1), np.zeros(batch, np.int64)
    parents: list[int] = []
    stages: list[list[tuple[int, int]]] = [[] for _ in range(length)]
    for b, w in np.ndindex(batch, width):
        n, known = int(node[b, w]), max(int(evaluated[b, w]), 0)
        if not 0 <= n < len(children) or len(children[n]) < 2 or known >= length:
            continue
        row[b, w] = len(parents)
        for s in range(known, length):
            stages[s].append((int(sequence[b, w, s]), len(parents)))
        spent[b] += length - known
        parents.append(int(slot[b, w]))
    unused = batch * width
    token, place = np.zeros((length, unused), np.int64), np.full((length, unused), -1)
    for s, stage in enumerate(stages):
        for i, (its_token, its_row) in enumerate(stage):
            token[s, i], place[s, i] = its_token, its_row
    parent = np.array(parents + [-1] * (unused - len(parents)), np.int64)
    number = np.array([len(stage) for stage in stages], np.int64)
    return {
        "row": row, "parent": parent, "token": token, "place": place, "num_rows": number, "num_tokens": spent,
    }  # fmt: skip


# ---------------------------------------------------------------- draws


def draw_children(
    logp: np.ndarray,
    token: np.ndarray,
    node: np.ndarray,
    sequence: np.ndarray,
    seeds: Sequence[int],
    row: np.ndarray | None = None,
    prefix: np.ndarray | None = None,
    cum_logp: np.ndarray | None = None,
    pack: bool = False,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The fields by name, one draw after the other, and by how much each draw beats the second best."""
    (batch, candidates, length), (rows, children) = sequence.shape, logp.shape
    out: dict[str, np.ndarray] = {"sequence": np.full((batch, candidates, length + 1), -1)}
    out |= {"node": np.full((batch, candidates), -1), "logp": np.full((batch, candidates), NEG_INF)}
    margin = np.full((batch, candidates), math.inf)
    out["num_valid"] = np.zeros(batch, np.int64)
    for b in range(batch):
        drawn: list[tuple[Any, ...]] = []
        for k in range(candidates):
            r, n = b if row is None else int(row[b, k]), 0 if prefix is None else int(prefix[b, k])
            key = int(seeds[b]) + (k + 1) * 0x5851F42D4C957F2D
            there = range(children if 0 <= r < rows else 0)
            scores = [
                (float(logp[r, c]) + gumbel(key, n, int(token[r, c])), -c)
                for c in there
                if node[r, c] >= 0 and logp[r, c] > NEG_INF
            ]
            if not scores:
                continue
            best = max(scores)
            others = [score for score, c in scores if c != best[1]]
            c, total = (
                -best[1],
                (0.0 if cum_logp is None else float(cum_logp[b, k])) + float(logp[r, -best[1]]),
            )
            won = best[0] - max(others) if others and best[0] < math.inf else math.inf
            drawn.append((k, [*sequence[b, k], token[r, c]], node[r, c], total, won))
        for to, (k, *fields) in enumerate(drawn):
            at = b, to if pack else k
            out["sequence"][at], out["node"][at], out["logp"][at], margin[at] = fields
        out["num_valid"][b] = len(drawn)
    return out, margin


def distinct_rows(
    node: np.ndarray, token: np.ndarray, slot: np.ndarray, row: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """The fields by name, from sorted sets of nodes."""
    batch, candidates = node.shape
    own, number = np.full(node.shape, -1), np.zeros(batch, np.int64)
    rows: list[tuple[int, int, int]] = []
    for b in range(batch):
        nodes = sorted({int(n) for n in node[b] if n >= 0})
        for k in range(candidates):
            own[b, k] = len(rows) + nodes.index(node[b, k]) if node[b, k] >= 0 else -1
        for n in nodes:
            k = node[b].tolist().index(n)
            r = b if row is None else int(row[b, k])
            rows.append((int(slot[r]) if 0 <= r < len(slot) else -1, int(token[b, k]), n))
        number[b] = len(nodes)
    total = np.array([len(rows)])
    rows += [(-1, 0, -1)] * (node.size - len(rows))
    parent, its_token, its_node = np.array(rows, np.int64).reshape(-1, 3).T
    return {
        "row": own, "parent": parent, "token": its_token, "node": its_node, "num_rows": total,
        "num_tokens": number,
    }  # fmt: skip


# ---------------------------------------------------------------- token_logp


def token_logp(
    z: Sequence[float],
    domain: Sequence[int],
    targets: Sequence[int],
    grad_logp: Sequence[float],
    grad_entropy: float,
    tau: float,
    rounded: Callable[[float], float] = float32,
) -> tuple[list[float], float, dict[int, float]]:
    """One row of logits: log-probabilities of the targets, entropy, and the gradient by column.

    The gradient comes from the Jacobian of the softmax, d log p_u / d z_v = ([u = v] - p_v) / tau.
    """
    table = {v: clean(float(z[v])) for v in domain}
    logp = dict(zip(table, log_softmax(list(table.values()), list(table.values()), tau)))
    alive = [v for v in logp if logp[v] > NEG_INF]
    p = {v: math.exp(logp[v]) for v in alive}
    entropy = -math.fsum(p[v] * logp[v] for v in alive)
    chosen = [0.0 if y < 0 else logp.get(y, NEG_INF) for y in targets]
    # d loss / d log p_u: the targets' own, and of H = -sum p log p, which is -p_u (log p_u + 1).
    pull = {u: -grad_entropy * p[u] * (logp[u] + 1) for u in alive}
    for y, g in zip(targets, grad_logp):
        if y in pull and rounded(logp[y]) > NEG_INF:
            pull[y] += g
    total = math.fsum(pull.values())
    return chosen, entropy, {v: (pull[v] - p[v] * total) / tau for v in alive}
