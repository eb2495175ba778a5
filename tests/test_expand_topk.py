"""``expand_topk``: by hand, against its oracle, at its edges.

The table below teaches the op; read it first.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers import LONG, SHORT, assert_as_expected, assert_same, restricted_tries
from hypothesis import given
from hypothesis import strategies as st

import vstar_ops
from vstar_ops import Trie, expand_topk
from vstar_ops.verify import oracles
from vstar_ops.verify.calls import Call, with_alive
from vstar_ops.verify.generators import prefixes, restricted

INF = float("inf")
NAN = float("nan")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]

# ---------------------------------------------------------------- by hand

# Three items: tokens (0, 3), (0, 4) and (2, 3). The nodes are numbered level by level:
#
#   node 0 (root) --- token 0 --- node 1 --- token 3 --- node 3
#        |                          +------- token 4 --- node 4
#        +----------- token 2 --- node 2 --- token 3 --- node 5
CATALOGUE = Trie.from_sequences([[0, 3], [0, 4], [2, 3]])


class Example(NamedTuple):
    """One request. Probabilities and weights are written without the logarithm.

    Attributes:
        weights: ``exp(logits)``, a row for each prefix; of two tokens, one of weight 3 is 3 times as probable
            as one of weight 1.
        node: the node of each prefix.
        winners: ``(parent, token, node, probability)``, best first; fewer than ``k`` leave empty slots.
        score: of each winner; None where it is the log-probability.
    """

    lesson: str
    weights: list[list[float]]
    node: list[int]
    k: int
    winners: list[tuple[int, int, int, float]]
    options: dict[str, Any] | None = None
    score: list[float] | None = None
    entropy: list[float] | None = None


def log(*values: float) -> list[float]:
    return [math.log(x) for x in values]


EXAMPLES = [
    Example(
        "The root has two legal tokens, 0 and 2. The larger logits of other tokens do not count.",
        [[3, 9, 1, 9, 9]], [0], 2, [(0, 0, 1, 3 / 4), (0, 2, 2, 1 / 4)],
    ),
    Example(
        "If fewer than k continuations exist, num_valid says how many; the other slots hold -inf and -1.",
        [[3, 9, 1, 9, 9]], [0], 5, [(0, 0, 1, 3 / 4), (0, 2, 2, 1 / 4)],
    ),
    Example(
        "All prefixes of a request compete: 3/4 * 3/4 beats 1/4 * 1, which beats 3/4 * 1/4.",
        [[9, 9, 9, 1, 3], [9, 9, 9, 5, 9]], [1, 2], 3,
        [(0, 4, 4, 9 / 16), (1, 3, 5, 1 / 4), (0, 3, 3, 3 / 16)], {"cum_logp": log(3 / 4, 1 / 4)},
    ),
    Example(
        "A forced token: a single legal child is certain whatever its logit, and its entropy is exactly 0.",
        [[9, 9, 9, 0.01, 9]], [2], 1, [(0, 3, 5, 1.0)], entropy=[0.0],
    ),
    Example(
        "Equal scores: the earlier prefix first, then the lower token.",
        [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1]], [0, 0], 3,
        [(0, 0, 1, 1 / 2), (0, 2, 2, 1 / 2), (1, 0, 1, 1 / 2)],
    ),
    Example(
        "Node -1 is a dead prefix, and node 5 is a leaf: neither has a continuation.",
        [[1, 1, 1, 1, 1]] * 3, [-1, 5, 0], 3, [(2, 0, 1, 1 / 2), (2, 2, 2, 1 / 2)],
        entropy=[0.0, 0.0, math.log(2)],
    ),
    Example(
        "normalize='vocab' divides by the weights of all columns, legal or not.",
        [[3, 2, 1, 1, 1]], [0], 2, [(0, 0, 1, 3 / 8), (0, 2, 2, 1 / 8)], {"normalize": "vocab"},
    ),
    Example(
        "The entropy is always that of the legal children, whatever the log-probabilities are of.",
        [[1, 5, 1, 1, 8]], [0], 1, [(0, 0, 1, 1 / 16)], {"normalize": "vocab", "entropy_weight": 2.0},
        [math.log(1 / 16) + 2 * math.log(2)], [math.log(2)],
    ),
    Example(
        "Logits are divided by the temperature: at 2, weights 9 and 1 count as 3 and 1.",
        [[9, 1, 1, 1, 1]], [0], 2, [(0, 0, 1, 3 / 4), (0, 2, 2, 1 / 4)], {"temperature": 2.0},
    ),
    Example(
        "A child whose logit is NaN or -inf has no probability, and is never a winner.",
        [[NAN, 1, 1, 1, 1], [1, 1, 0, 1, 1], [NAN, 1, 0, 1, 1]], [0] * 3, 3,
        [(0, 2, 2, 1.0), (1, 0, 1, 1.0)], entropy=[0.0, 0.0, 0.0],
    ),
    Example(
        "A logit of +inf reads as the largest float: it takes all the probability.",
        [[1, 1, INF, 1, 1]], [0], 1, [(0, 2, 2, 1.0)],
    ),
    Example(
        "value: the second prefix is worth 2 more, so its children come first; logp stays as it was.",
        [[3, 1, 1, 1, 1]] * 2, [0, 0], 2, [(1, 0, 1, 3 / 4), (1, 2, 2, 1 / 4)],
        {"value": [1.0, 3.0], "value_weight": 1.0}, [math.log(3 / 4) + 3, math.log(1 / 4) + 3],
    ),
    Example(
        "child_value: what each child adds to the value of its prefix; here it outweighs the policy.",
        [[3, 1, 1, 1, 1]], [0], 2, [(0, 2, 2, 1 / 4), (0, 0, 1, 3 / 4)],
        {"child_value": [[0.0, 9.0, 4.0, 9.0, 9.0]], "value_weight": 0.5},
        [math.log(1 / 4) + 2, math.log(3 / 4)],
    ),
    Example(
        "entropy_weight: prefixes that leave more open come first, though their children are less probable.",
        [[9, 9, 9, 1, 1], [9, 9, 9, 1, 9]], [1, 2], 3,
        [(0, 3, 3, 1 / 2), (0, 4, 4, 1 / 2), (1, 3, 5, 1.0)], {"entropy_weight": 2.0},
        [math.log(2), math.log(2), 0.0], [math.log(2), 0.0],
    ),
    Example(
        "bonus: added to the score as it is.",
        [[3, 1, 1, 1, 1]] * 2, [0, 0], 1, [(1, 0, 1, 3 / 4)], {"bonus": [0.0, 0.25]},
        [math.log(3 / 4) + 0.25],
    ),
    Example(
        "logp_weight=0 ranks by the rest alone; logp is still returned.",
        [[3, 1, 1, 1, 1]], [0], 2, [(0, 2, 2, 1 / 4), (0, 0, 1, 3 / 4)],
        {"logp_weight": 0.0, "child_value": [[1.0, 0.0, 2.0, 0.0, 0.0]], "value_weight": 1.0}, [2.0, 1.0],
    ),
    Example(
        "row: prefixes may share a row of logits, and -1 is one that was not run: its logits read as 0.",
        [[9, 9, 9, 1, 3]], [1, 1, 2], 4,
        [(2, 3, 5, 1.0), (0, 4, 4, 3 / 4), (1, 4, 4, 3 / 4), (0, 3, 3, 1 / 4)], {"row": [0, 0, -1]},
    ),
    Example(
        "gumbel_seed: noise of the seed, the prefix's node and the token, so that top-k samples without"
        " replacement. Here it lifts the less probable child to the top.",
        [[3, 1, 1, 1, 1]], [0], 2, [(0, 2, 2, 1 / 4), (0, 0, 1, 3 / 4)], {"gumbel_seed": [3]},
        [math.log(1 / 4) + 2.586859, math.log(3 / 4) - 0.5285],
    ),
]  # fmt: skip


@pytest.mark.parametrize("example", EXAMPLES, ids=[x.lesson.partition(":")[0][:60] for x in EXAMPLES])
def test_by_hand(backend, example):
    options = {}
    for name, x in (example.options or {}).items():
        options[name] = torch.tensor(x if name == "gumbel_seed" else [x]) if isinstance(x, list) else x
    logits = torch.tensor(example.weights).log()
    logits = logits if "row" in options else logits[None]
    out = expand_topk(logits, CATALOGUE, torch.tensor([example.node]), example.k, **options)
    n, empty = len(example.winners), example.k - len(example.winners)
    parent, token, node, probability = map(list, zip(*example.winners))
    score = log(*probability) if example.score is None else example.score
    assert out.num_valid.tolist() == [n]
    assert out.parent[0].tolist() == parent + [-1] * empty
    assert out.token[0].tolist() == token + [-1] * empty
    assert out.node[0].tolist() == node + [-1] * empty
    assert out.logp[0].tolist() == pytest.approx(log(*probability) + [-INF] * empty, abs=1e-6)
    assert out.score[0].tolist() == pytest.approx(score + [-INF] * empty, abs=1e-5)
    if example.entropy is not None:
        assert out.entropy[0].tolist() == pytest.approx(example.entropy, rel=1e-6, abs=1e-30)


# ---------------------------------------------------------------- against the oracle


def close(a: float, b: float, tolerance: float) -> bool:
    return a == b or abs(a - b) <= tolerance


def compare(
    out, k: int, trie: oracles.DictTrie, logits: torch.Tensor, node: torch.Tensor, **options: Any
) -> None:
    """Ids exact except where two scores lie within 1e-5; order total; padding as documented."""
    tensors = {n: v.double().numpy() for n, v in options.items() if isinstance(v, torch.Tensor)}
    ranked, entropy = oracles.expand_topk(
        logits.double().numpy(), trie, node.numpy(), **{**options, **tensors}
    )
    assert [x.dtype for x in out] == [torch.float32] * 2 + [torch.int32] * 4 + [torch.float32]
    assert all(x.shape == (len(ranked), k) for x in out[:5])
    assert out.num_valid.tolist() == [min(k, len(row)) for row in ranked]
    got_entropy = out.entropy.double().numpy()
    np.testing.assert_allclose(got_entropy, entropy, rtol=1e-5, atol=1e-5)
    children = [
        [len(trie.children[n]) if 0 <= n < len(trie.children) else 0 for n in row] for row in node.tolist()
    ]
    alone = np.array(children, dtype=int).reshape(node.shape) < 2
    assert not got_entropy[alone].any()
    assert (got_entropy >= 0).all()
    for b, row in enumerate(ranked):
        score, logp, parent, token, child = (x[b].tolist() for x in out[:5])
        n = min(k, len(row))
        assert score[n:] == logp[n:] == [-INF] * (k - n)
        assert parent[n:] == token[n:] == child[n:] == [-1] * (k - n)
        index = {(c.parent, c.token): c for c in row}
        place = {key: i for i, key in enumerate(zip(parent[:n], token[:n]))}
        assert len(place) == n, "a child won twice"
        for i, want in enumerate(row[:n]):
            own = index[parent[i], token[i]]
            tolerance = 1e-5 * max(own.scale, want.scale)
            assert child[i] == own.node
            assert close(score[i], oracles.float32(own.score), tolerance)
            assert close(logp[i], oracles.float32(own.logp), 1e-5 * max(1, abs(own.logp), own.scale))
            assert close(own.score, want.score, tolerance), "a worse child won"
            if i:
                assert score[i - 1] >= score[i]
                if score[i - 1] == score[i]:
                    assert (parent[i - 1], token[i - 1]) < (parent[i], token[i])
        if "gumbel_seeds" not in options:  # twins of one prefix are ties: the lower token first
            first: dict[Any, tuple[int, int]] = {}
            for c in sorted(row, key=lambda c: (c.parent, c.token)):
                key = (c.parent, c.token)
                before = first.get((c.parent, c.twin))
                if before is not None and key in place:
                    assert before in place and place[before] < place[key]
                first[c.parent, c.twin] = key


def make_logits(rng, shape, kind, dtype, layout):
    """Logits ``[B, W, V]`` of a kind of values, in a memory layout."""
    batch, width, columns = shape
    size = {
        "plain": shape,
        "transposed": (batch, columns, width),
        "every_second": (batch, width, 2 * columns + 1),
        "expanded": (1, width, columns),
        "permuted": (columns, width, batch),
    }[layout]
    values = rng.normal(size=size) * 3
    if kind == "ties":
        values = rng.integers(-1, 2, size).astype(float)
    elif kind == "equal":
        values = np.full(size, 0.7)
    elif kind == "large":
        values *= 1000
    elif kind == "special":
        special = np.array([-INF, INF, NAN, -0.0, 0.0, 1.0])
        values = np.where(rng.random(size) < 0.5, rng.choice(special, size), values)
    elif kind == "masked":
        values = np.where(rng.random(size) < 0.7, -INF, values)
    z = torch.tensor(values, dtype=torch.float32).reshape(size).to(dtype)
    return {
        "plain": lambda: z,
        "transposed": lambda: z.transpose(1, 2),
        "every_second": lambda: z[..., 1::2],
        "expanded": lambda: z.expand(shape),
        "permuted": lambda: z.permute(2, 1, 0),
    }[layout]()


def beam_values(rng, shape, dtype, special):
    values = rng.normal(size=shape) * 2
    if special:
        values = np.where(rng.random(shape) < 0.4, rng.choice(np.array([-INF, NAN, 0.0]), shape), values)
    return torch.tensor(values, dtype=torch.float32).reshape(shape).to(dtype)


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(1, 40)),
    items=st.integers(0, 60),
    length=st.integers(1, 3),
    k=st.one_of(st.integers(1, 8), st.integers(1, 300)),
    kind=st.sampled_from(["normal", "ties", "equal", "large", "special", "masked"]),
    layout=st.sampled_from(["plain", "transposed", "every_second", "expanded", "permuted"]),
    dtype=st.sampled_from(FLOATS),
    integers=st.sampled_from([torch.int32, torch.int64]),
    normalize=st.sampled_from(["legal", "vocab"]),
    given_=st.sets(st.sampled_from(["cum_logp", "value", "bonus", "child_value", "gumbel_seed"])),
    special=st.booleans(),
    logp_weight=st.sampled_from([1.0, 0.0, 0.5, -1.0, 2.0]),
    value_weight=st.sampled_from([0.0, 1.0, -0.5]),
    entropy_weight=st.sampled_from([0.0, 0.1, -2.0]),
    temperature=st.sampled_from([1.0, 0.5, 3.0]),
)
def test_oracle(
    backend,
    seed,
    shape,
    items,
    length,
    k,
    kind,
    layout,
    dtype,
    integers,
    normalize,
    given_,
    special,
    logp_weight,
    value_weight,
    entropy_weight,
    temperature,
):
    rng = np.random.default_rng(seed)
    batch, width, columns = shape
    rows = rng.integers(0, columns, (items, length))
    trie, want = Trie.from_sequences(rows), oracles.DictTrie(rows.tolist(), length)
    logits = make_logits(rng, shape, kind, dtype, layout)
    node = rng.integers(-1, trie.num_nodes + 1, (batch, width))
    if items:  # mostly inner nodes
        node = np.where(rng.random((batch, width)) < 0.7, node % trie.level_offset[-2], node)
    node = np.where(
        rng.random((batch, width)) < 0.05, rng.choice([-7, 2**31 - 1, -(2**31)], (batch, width)), node
    )
    nodes = torch.from_numpy(node).reshape(batch, width).to(integers)
    options: dict[str, Any] = {
        "logp_weight": logp_weight,
        "value_weight": value_weight,
        "entropy_weight": entropy_weight,
        "temperature": temperature,
        "normalize": normalize,
    }
    for name in ("cum_logp", "value", "bonus"):
        if name in given_:
            options[name] = beam_values(rng, (batch, width), FLOATS[rng.integers(3)], special)
    if "child_value" in given_:
        options["child_value"] = make_logits(rng, shape, "ties", FLOATS[rng.integers(3)], layout)
    seeds = torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, batch)) if "gumbel_seed" in given_ else None
    out = expand_topk(logits, trie, nodes, k, gumbel_seed=seeds, **options)
    if seeds is not None:
        options["gumbel_seeds"] = seeds.tolist()
    compare(out, k, want, logits, nodes, **options)


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(0, 3), st.integers(0, 5), st.sampled_from([1, 7, 40, 1100])),
    rows=st.integers(0, 6),
    k=st.integers(1, 60),
    transposed=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    integers=st.sampled_from([torch.int32, torch.int64]),
    normalize=st.sampled_from(["legal", "vocab"]),
    extra=st.sets(st.sampled_from(["child_value", "gumbel_seed"])),
)
def test_rows_of_a_table(backend, seed, shape, rows, k, transposed, dtype, integers, normalize, extra):
    """The same bits as with every prefix's row in its place, and zeros for what is no row."""
    rng = np.random.default_rng(seed)
    batch, width, columns = shape
    trie = Trie.from_sequences(rng.integers(0, columns, (columns + 20, 2)))
    nodes = torch.from_numpy(rng.integers(-1, trie.level_offset[2], (batch, width))).to(integers)
    row = torch.from_numpy(rng.integers(-2, rows + 2, (batch, width))).to(integers)
    row[rng.random((batch, width)) < 0.1] = 2**31 - 1

    def table(special):
        x = torch.from_numpy(rng.normal(size=(columns, rows) if transposed else (rows, columns)) * 3).to(
            dtype
        )
        x[torch.from_numpy(rng.random(x.shape) < 0.2)] = special
        return x.T if transposed else x

    def dense(x):
        padded = torch.cat([x, x.new_zeros(1, columns)])
        return padded[torch.where((row >= 0) & (row < rows), row, rows).long()]

    logits = table(NAN)
    options = {"entropy_weight": 0.5, "normalize": normalize}
    if "gumbel_seed" in extra:
        options["gumbel_seed"] = torch.arange(batch)
    ours = dict(options)
    if "child_value" in extra:
        values = table(1.0)
        ours |= {"child_value": values, "value_weight": 0.5}
        options |= {"child_value": dense(values), "value_weight": 0.5}
    got = expand_topk(logits, trie, nodes, k, row=row, **ours)
    assert_same(got, expand_topk(dense(logits), trie, nodes, k, **options))


@pytest.mark.parametrize("normalize", ["legal", "vocab"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("columns", [64, 300, 1031])
def test_oracle_wide(backend, normalize, dtype, columns):
    """Rows long enough for every vector loop and its remainder, with many ties and holes."""
    rng = np.random.default_rng(columns)
    first = rng.permutation(columns)[: columns * 3 // 4]
    rows = np.stack([np.append(first, first[:40]), rng.integers(0, columns, len(first) + 40)], 1)
    trie, want = Trie.from_sequences(rows), oracles.DictTrie(rows.tolist(), 2)
    logits = make_logits(rng, (2, 3, columns), "normal", dtype, "plain")
    logits[:, :, ::7] = -INF
    logits[:, :, 1::11] = 0.25
    node = torch.tensor([[0, 1, 0], [0, -1, 5]])
    value = torch.tensor([[0.0, 1.0, -1.0], [0.5, 0.0, 2.0]])
    options = {"value": value, "value_weight": 1.0, "normalize": normalize}
    for k in (1, 16, 200, 2000 if backend == "triton" else 5000):  # its limit is 2,048 winners
        compare(expand_topk(logits, trie, node, k, **options), k, want, logits, node, **options)


def test_oracle_known_answers():
    """The oracle's own generator, against the published vectors."""
    ones = 2**32 - 1
    assert oracles.philox4x32((0,) * 4, (0,) * 2) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert oracles.philox4x32((ones,) * 4, (ones,) * 2)[0] == 0x408F276D
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    assert oracles.philox4x32(*pi) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)
    assert oracles.splitmix64(0, 1)[0] % 2**64 == 0xE220A8397B1DCDAF


# ---------------------------------------------------------------- edges


def test_ties_by_hand(backend):
    """Equal scores: prefix first, then token, whatever k cuts."""
    trie = Trie.from_sequences([[1], [3], [4], [6]])
    logits = torch.tensor([[[9.0, 1, 9, 1, 0, 9, 1], [9.0, 1, 9, 1, 0, 9, 1], [9.0, 0, 9, 1, 1, 9, 1]]])
    node = torch.zeros(1, 3, dtype=torch.int32)
    order = [(0, 1), (0, 3), (0, 6), (1, 1), (1, 3), (1, 6), (2, 3), (2, 4), (2, 6), (0, 4), (1, 4), (2, 1)]
    for k in range(1, 15):
        out = expand_topk(logits, trie, node, k)
        n = min(k, 12)
        assert out.num_valid.tolist() == [n]
        assert list(zip(out.parent[0].tolist(), out.token[0].tolist()))[:n] == order[:n]
        assert out.node[0, :n].tolist() == [{1: 1, 3: 2, 4: 3, 6: 4}[v] for _, v in order[:n]]


def test_negative_zero_ties_with_zero(backend):
    trie = Trie.from_sequences([[0], [1], [2]])
    node = torch.zeros(1, 2, dtype=torch.int64)
    bonus = torch.tensor([[-0.0, 0.0]])
    logits = torch.tensor([-0.0, 0.0, -0.0]).expand(1, 2, 3)
    out = expand_topk(logits, trie, node, 6, logp_weight=0.0, bonus=bonus)
    assert out.parent.tolist() == [[0, 0, 0, 1, 1, 1]]
    assert out.token.tolist() == [[0, 1, 2, 0, 1, 2]]


@pytest.mark.parametrize("width", [1, 96, 97, 200])
def test_a_score_of_zero_is_positive(backend, width):
    trie = Trie.from_sequences([[0, 0], [1, 0], [2, 0]])
    options = {
        "value": torch.zeros(1, width), "value_weight": -0.5, "bonus": torch.full((1, width), -0.0),
        "logp_weight": -1.0,
    }  # fmt: skip
    out = expand_topk(torch.zeros(1, width, 3), trie, torch.ones(1, width).int(), 100, **options)
    assert out.num_valid.tolist() == [min(width, 100)]
    assert not out.score[0, : min(width, 100)].signbit().any()


@pytest.fixture
def no_denormals():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormal numbers")
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("items", [20, 2000])
def test_ties_at_zero_without_denormals(cpu, no_denormals, items):
    trie = Trie.from_sequences(torch.arange(items)[:, None])
    out = expand_topk(torch.zeros(1, 1, items), trie, torch.zeros(1, 1).int(), 10, logp_weight=0.0)
    assert out.token.tolist() == [list(range(10))]


@pytest.mark.parametrize("logit", [0.0, 3.7, -1e30, 3e38, INF])
@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_a_single_child_is_certain(backend, logit, temperature):
    trie = Trie.from_sequences([[2]])
    logits = torch.tensor([[[5.0, NAN, logit, INF]]])
    out = expand_topk(logits, trie, torch.zeros(1, 1, dtype=torch.int64), 2, temperature=temperature)
    assert out.logp[0].tolist() == [0.0, -INF]
    assert out.score[0, 0] == 0
    assert out.entropy[0, 0] == 0
    assert out.num_valid.tolist() == [1]


@pytest.mark.parametrize("normalize", ["legal", "vocab"])
@pytest.mark.parametrize(
    "temperature", [5e-324, 1e-300, 1e-45, 1e-39, 1.1e-38, 1e-20, 1e30, 8.6e37, 1e39, 1e300]
)
def test_every_temperature(backend, temperature, normalize):
    """At 1e-39 a logit that is 0.1 lower has the log-probability -1e38, one that is 0.5 lower has none."""
    logits = torch.tensor([[[0.0, -0.5, -0.1, -INF, -1e38, -0.05], [1.0, 1.0, NAN, 2.0, 0.0, INF]]])
    items = [[v] for v in range(5)]
    out = expand_topk(
        logits, Trie.from_sequences(items), torch.zeros(1, 2, dtype=torch.int64), 12,
        temperature=temperature, normalize=normalize,
    )  # fmt: skip
    winners, entropy = oracles.expand_topk(
        logits.numpy(), oracles.DictTrie(items, 1), np.zeros((1, 2), int),
        temperature=temperature, normalize=normalize,
    )  # fmt: skip
    found = len(winners[0])
    assert out.num_valid.tolist() == [found]
    assert out.logp[0, :found].tolist() == pytest.approx([x.logp for x in winners[0]], rel=1e-5)
    assert out.entropy[0].tolist() == pytest.approx(entropy[0].tolist(), rel=1e-5, abs=1e-6)
    if temperature < 1:
        got = list(zip(out.parent[0, :found].tolist(), out.token[0, :found].tolist()))
        assert got == [(x.parent, x.token) for x in winners[0]]


def test_infinite_logits_share_the_mass(backend):
    trie = Trie.from_sequences([[0], [1], [2]])
    logits = torch.tensor([[[INF, 3.0, INF]]])
    out = expand_topk(logits, trie, torch.zeros(1, 1, dtype=torch.int64), 2)
    assert out.token.tolist() == [[0, 2]]
    assert out.logp[0].tolist() == pytest.approx([-math.log(2)] * 2)
    assert out.entropy[0, 0].item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("normalize", ["legal", "vocab"])
def test_infinity_reads_as_the_largest_float(backend, normalize):
    largest = torch.finfo(torch.float32).max
    trie = Trie.from_sequences([[0], [1], [2], [3]])
    logits = torch.tensor([[[3e38, largest, INF, -INF]]])
    out = expand_topk(logits, trie, torch.zeros(1, 1, dtype=torch.int64), 4, normalize=normalize)
    assert out.token.tolist() == [[1, 2, 0, -1]]
    assert out.logp[0, :2].tolist() == pytest.approx([-math.log(2)] * 2)
    assert out.logp[0, 2].item() == pytest.approx(3e38 - largest, rel=1e-5)


def test_legal_reads_only_legal_columns(backend):
    trie = Trie.from_sequences([[1], [3]])
    node = torch.zeros(1, 1, dtype=torch.int64)
    want = expand_topk(torch.tensor([[[0.0, 1, 0, 2]]]), trie, node, 3)
    for junk in (NAN, INF, -INF, 1e38):
        got = expand_topk(torch.tensor([[[junk, 1, junk, 2]]]), trie, node, 3)
        assert_same(got, want)


def test_terms_of_weight_zero_are_not_read(backend):
    trie = Trie.from_sequences([[1], [3]])
    logits, node = torch.randn(1, 2, 4), torch.zeros(1, 2, dtype=torch.int64)
    bad = torch.full((1, 2), NAN)
    want = expand_topk(logits, trie, node, 4)
    got = expand_topk(logits, trie, node, 4, value=bad, child_value=torch.full((1, 2, 4), NAN))
    assert_same(got, want)


@pytest.mark.parametrize("dead", [-1, -2, 6, 7, 2**31 - 1, -(2**31), 2**32, 2**32 + 1, 2**62, -(2**63)])
def test_dead_beams(backend, dead):
    trie = Trie.from_sequences([[0, 3], [0, 4], [2, 3]])
    logits = torch.zeros(1, 2, 5)
    dtypes = [torch.int64] if abs(dead) > 2**31 else [torch.int32, torch.int64]
    for dtype in dtypes:
        out = expand_topk(logits, trie, torch.tensor([[dead, 1]], dtype=dtype), 3)
        assert out.parent.tolist() == [[1, 1, -1]]
        assert out.node.tolist() == [[3, 4, -1]]
        assert out.entropy[0, 0] == 0
        assert not expand_topk(logits, trie, torch.full((1, 2), dead, dtype=dtype), 1).num_valid.any()


@pytest.mark.parametrize("shape", [(0, 2, 4), (2, 0, 4), (0, 0, 4), (2, 3, 0)])
@pytest.mark.parametrize("normalize", ["legal", "vocab"])
def test_zero_sizes(backend, shape, normalize):
    trie = Trie.from_sequences([[1]] if shape[2] else np.zeros((0, 1), np.int64))
    out = expand_topk(
        torch.zeros(shape), trie, torch.zeros(shape[:2], dtype=torch.int32), 3, normalize=normalize
    )
    assert all(x.shape == (shape[0], 3) for x in out[:5])
    assert out.entropy.shape == shape[:2]
    assert not out.num_valid.any()
    assert (out.score == -INF).all() and (out.node == -1).all()


@pytest.mark.parametrize("k", [5, 1000, 100_000])
def test_k_above_the_number_of_children(backend, k):
    trie = Trie.from_sequences([[0], [1], [2]])
    logits = torch.tensor([[[0.0, 2.0, 1.0]]])
    out = expand_topk(logits, trie, torch.zeros(1, 1, dtype=torch.int64), k)
    assert out.num_valid.tolist() == [3]
    assert out.token[0, :3].tolist() == [1, 2, 0]
    assert (out.token[0, 3:] == -1).all() and (out.score[0, 3:] == -INF).all()


# ---------------------------------------------------------------- Gumbel noise


def test_gumbel_belongs_to_node_and_token(backend):
    """A beam's noise does not depend on where it stands."""
    logits, trie, node = prefixes(batch=1, width=4)
    seeds = torch.tensor([123])
    plain = expand_topk(logits, trie, node, 300, gumbel_seed=seeds)
    turned = expand_topk(logits.flip(1), trie, node.flip(1), 300, gumbel_seed=seeds)
    assert torch.equal(plain.score, turned.score)
    assert torch.equal(plain.node, turned.node)


def test_nodes_of_any_strides(backend):
    logits, trie, node = prefixes(batch=3, width=4)
    strided = node.t().contiguous().t()
    assert not strided.is_contiguous()
    assert_same(expand_topk(logits, trie, strided, 9), expand_topk(logits, trie, node, 9))


def test_gumbel_of_an_int(backend):
    logits, trie, node = prefixes()
    for seed in (0, 5, -1, 2**63 - 1, -(2**63)):
        seeds = vstar_ops.derive_seeds(seed, 6)
        assert seeds.tolist() == oracles.splitmix64(seed, 6)
        a = expand_topk(logits, trie, node, 9, gumbel_seed=seed)
        b = expand_topk(logits, trie, node, 9, gumbel_seed=seeds)
        assert_same(a, b)
    other = expand_topk(logits, trie, node, 9, gumbel_seed=1)
    assert not torch.equal(other.score, a.score)


def test_gumbel_leaves_logp_alone(backend):
    logits, trie, node = prefixes(batch=1)
    noisy = expand_topk(logits, trie, node, 500, gumbel_seed=3)
    plain = expand_topk(logits, trie, node, 500)
    n = int(plain.num_valid)
    by_node = [
        dict(zip(zip(o.parent[0].tolist(), o.node[0].tolist()), o.logp[0].tolist())) for o in (noisy, plain)
    ]
    assert n == int(noisy.num_valid) > 5
    assert by_node[0] == by_node[1]


def test_gumbel_backends_agree(cpu):
    logits, trie, node = prefixes(batch=40, seed=1)
    got = expand_topk(logits, trie, node, 20, gumbel_seed=11)
    with vstar_ops.use_backend("reference"):
        want = expand_topk(logits, trie, node, 20, gumbel_seed=11)
    torch.testing.assert_close(got.score, want.score, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(got[2:6], want[2:6]))


@pytest.mark.slow
def test_gumbel_samples_the_policy(backend):
    """Chi-square of 20,000 first winners against the softmax; 7 degrees of freedom, p < 1e-5 at 36."""
    trie = Trie.from_sequences([[v] for v in (1, 2, 4, 5, 6, 9, 10, 11)])
    z = torch.linspace(-1.5, 1.5, 12)
    draws = 20_000
    out = expand_topk(
        z.expand(draws, 1, 12), trie, torch.zeros(draws, 1, dtype=torch.int32), 2, gumbel_seed=42
    )
    legal = trie.token.long()
    p = z[legal].double().softmax(0)
    seen = torch.bincount(out.token[:, 0].long(), minlength=12)[legal].double()
    assert float(((seen - draws * p) ** 2 / (draws * p)).sum()) < 36
    pair = (p.unsqueeze(1) * p / (1 - p.unsqueeze(1))).fill_diagonal_(0)  # without replacement
    seen = torch.bincount(out.token[:, 1].long(), minlength=12)[legal].double()
    second = pair.sum(0)
    assert float(((seen - draws * second) ** 2 / (draws * second)).sum()) < 36


# ---------------------------------------------------------------- large shapes


def agree_with_reference(logits, trie, node, k, **options):
    got = expand_topk(logits, trie, node, k, **options)
    with vstar_ops.use_backend("reference"):
        want = expand_topk(logits, trie, node, k, **options)
    assert torch.equal(got.num_valid, want.num_valid)
    torch.testing.assert_close(got.score, want.score, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.entropy, want.entropy, rtol=1e-5, atol=1e-5)
    same = (got.parent == want.parent) & (got.token == want.token) & (got.node == want.node)
    gap = (want.score[:, 1:] - want.score[:, :-1]).abs() > 1e-4
    edge = torch.ones_like(gap[:, :1])
    clear = torch.cat([edge, gap], 1) & torch.cat([gap, ~edge], 1)  # the last may differ from the next
    assert same[clear].all()
    assert same.float().mean() > 0.9


@pytest.mark.parametrize("normalize", ["legal", "vocab"])
def test_a_language_models_vocabulary(cpu, normalize):
    rng = np.random.default_rng(3)
    trie = Trie.from_sequences(rng.integers(151_000, 152_064, (3000, 3)))
    logits = torch.from_numpy(rng.standard_normal((2, 4, 152_064), dtype=np.float32)).bfloat16()
    node = torch.from_numpy(rng.integers(0, trie.level_offset[2], (2, 4)))
    node[0, 0] = 0
    agree_with_reference(logits, trie, node, 50, normalize=normalize)


@pytest.mark.slow
@pytest.mark.parametrize("k", [128, 3000])
def test_every_column_legal(cpu, k):
    rng = np.random.default_rng(4)
    trie = Trie.from_sequences(np.arange(8192)[:, None])
    logits = torch.from_numpy(rng.standard_normal((1, 128, 8192), dtype=np.float32))
    agree_with_reference(logits, trie, torch.zeros(1, 128, dtype=torch.int32), k, gumbel_seed=5)


@pytest.mark.parametrize("k", [10, 4000])
def test_rising_and_falling_scores(backend, k):
    """The worst orders for a heap or a threshold that adapts."""
    if backend == "triton":
        k = min(k, 2048)  # its limit
    trie = Trie.from_sequences(np.arange(4096)[:, None])
    rise = torch.arange(4096.0) / 64
    node = torch.zeros(1, 1, dtype=torch.int64)
    up = expand_topk(rise.view(1, 1, -1), trie, node, k)
    down = expand_topk(rise.flip(0).view(1, 1, -1), trie, node, k)
    assert up.token[0].tolist() == list(range(4095, 4095 - k, -1))
    assert down.token[0].tolist() == list(range(k))


def test_few_long_rows(backend):
    """Several programs or blocks may share a row."""
    rng = np.random.default_rng(6)
    trie = Trie.from_sequences(np.arange(0, 9000, 2)[:, None])
    logits = torch.from_numpy(rng.standard_normal((1, 2, 9000), dtype=np.float32))
    node = torch.zeros(1, 2, dtype=torch.int64)
    options = {
        "cum_logp": torch.tensor([[-1.0, -2.0]]), "value": torch.tensor([[0.5, 1.5]]), "value_weight": 0.5,
        "bonus": torch.tensor([[0.1, 0.0]]),
    }  # fmt: skip
    for normalize in ("legal", "vocab"):
        agree_with_reference(logits, trie, node, 20, normalize=normalize, **options)


@pytest.mark.parametrize("k", [7, 150, 2000])
@pytest.mark.parametrize("restricted", [False, True])
def test_rows_of_few_children(cpu, k, restricted):
    """Several of them are computed at once: each has the bits that it has alone."""
    rng = np.random.default_rng(k)
    rows = [(i, token) for i in range(60) for token in rng.permutation(80)[: 1 + i % 7]]
    trie = Trie.from_sequences(np.array(rows))
    if restricted:
        trie = trie.restrict(ban=torch.from_numpy(rng.random(len(rows)) < 0.3))
    logits = make_logits(rng, (1, 500, 80), "normal", torch.float32, "plain") * 20
    node = torch.from_numpy(rng.integers(1, 61, (1, 500)))
    agree_with_reference(logits, trie, node, k)
    for junk in (NAN, INF, -INF):
        logits[torch.from_numpy(rng.random(logits.shape) < 0.2)] = junk
    together = expand_topk(logits, trie, node, 2000)
    for w in range(0, 500, 7):
        alone = expand_topk(logits[:, w : w + 1], trie, node[:, w : w + 1], 7)
        assert torch.equal(together.entropy[:, w], alone.entropy[:, 0])
        assert torch.equal(together.logp[together.parent == w], alone.logp[alone.parent == 0])


@pytest.mark.parametrize("width", [0, 1, 6, 40])
@pytest.mark.parametrize("restricted", ["", "for all", "per request"])
@pytest.mark.parametrize("extra", [False, True])
def test_requests_of_few_and_of_many_children(cpu, width, restricted, extra):
    """Neighbors with few are computed at once: each has the bits that it has alone."""
    rng = np.random.default_rng(width)
    children = [1, 2, 3, 4, 5, 17, 95, 96, 97, 120]
    trie = Trie.from_sequences([(i, token) for i, n in enumerate(children) for token in range(n)])
    batch = 150
    node = rng.choice(len(children) + 1, (batch, width), p=[0.5, *[0.09] * 5, *[0.01] * 5])
    node[rng.random((batch, width)) < 0.3] = -1
    node = torch.from_numpy(node)
    logits = make_logits(rng, (batch, width, 128), "ties", torch.float32, "plain")
    options = {"gumbel_seed": torch.arange(batch)} if extra else {}
    if restricted:
        bits = rng.random((batch, trie.num_items)) < 0.7
        its_tries = [trie.restrict(torch.from_numpy(row)) for row in bits]
        trie = trie.restrict(torch.from_numpy(bits)) if restricted == "per request" else its_tries[0]
    together = expand_topk(logits, trie, node, 20, **options)
    agree_with_reference(logits, trie, node, 20, **options)
    for b in range(batch):
        its_trie = its_tries[b] if restricted == "per request" else trie
        its_options = {name: x[b : b + 1] for name, x in options.items()}
        alone = expand_topk(logits[b : b + 1], its_trie, node[b : b + 1], 20, **its_options)
        for name, mine, other in zip(alone._fields, together, alone):
            assert torch.equal(mine[b : b + 1], other), name


# ---------------------------------------------------------------- arguments


def arguments(**change: Any) -> dict[str, Any]:
    trie = Trie.from_sequences([[0, 3], [0, 4], [2, 3]])
    return {
        "logits": torch.zeros(2, 3, 5),
        "trie": trie,
        "node": torch.zeros(2, 3, dtype=torch.int64),
        "k": 2,
        **change,
    }


BY_ROW = {"row": torch.zeros(2, 3, dtype=torch.int64)}
BAD = [
    ({"logits": [[[0.0]]]}, TypeError, "logits"),
    ({"cum_logp": torch.zeros(2, 3, dtype=torch.float64)}, TypeError, "cum_logp"),
    ({"logits": torch.zeros(2, 3, 5, dtype=torch.int64)}, TypeError, "logits"),
    ({"logits": torch.zeros(6, 5)}, ValueError, "logits"),
    ({"logits": torch.zeros(2, 3, 4)}, ValueError, "logits"),
    ({"trie": [[0, 3]]}, TypeError, "trie"),
    ({"trie": Trie.from_sequences([[0]]).to("meta")}, ValueError, "trie"),
    ({"node": [[0]]}, TypeError, "node"),
    ({"node": torch.zeros(2, 3)}, TypeError, "node"),
    ({"node": torch.zeros(2, 3, dtype=torch.int16)}, TypeError, "node"),
    ({"node": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, "node"),
    ({"node": torch.zeros(6, dtype=torch.int64)}, ValueError, "node"),
    ({"node": torch.zeros(2, 3, dtype=torch.int64, device="meta")}, ValueError, "node"),
    ({"k": 0}, ValueError, "k"),
    ({"k": -1}, ValueError, "k"),
    ({"k": 1.5}, TypeError, "k"),
    ({"k": True}, TypeError, "k"),
    ({"k": None}, TypeError, "k"),
    ({"cum_logp": torch.zeros(2, 2)}, ValueError, "cum_logp"),
    ({"cum_logp": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "cum_logp"),
    ({"value": torch.zeros(2, 3, 1)}, ValueError, "value"),
    ({"value": 1.0}, TypeError, "value"),
    ({"bonus": torch.zeros(3, 2)}, ValueError, "bonus"),
    ({"bonus": torch.zeros(2, 3, device="meta")}, ValueError, "bonus"),
    ({"child_value": torch.zeros(2, 3)}, ValueError, "child_value"),
    ({"child_value": torch.zeros(2, 3, 6)}, ValueError, "child_value"),
    ({"child_value": torch.zeros(2, 3, 5, dtype=torch.bool)}, TypeError, "child_value"),
    ({"logp_weight": NAN}, ValueError, "logp_weight"),
    ({"logp_weight": "1"}, TypeError, "logp_weight"),
    ({"value_weight": INF}, ValueError, "value_weight"),
    ({"entropy_weight": -INF}, ValueError, "entropy_weight"),
    ({"entropy_weight": None}, TypeError, "entropy_weight"),
    ({"temperature": 0.0}, ValueError, "temperature"),
    ({"temperature": -1.0}, ValueError, "temperature"),
    ({"temperature": INF}, ValueError, "temperature"),
    ({"temperature": True}, TypeError, "temperature"),
    ({"normalize": "all"}, ValueError, "normalize"),
    ({"normalize": None}, ValueError, "normalize"),
    ({"gumbel_seed": 0.5}, TypeError, "gumbel_seed"),
    ({"gumbel_seed": True}, TypeError, "gumbel_seed"),
    ({"gumbel_seed": 2**63}, ValueError, "gumbel_seed"),
    ({"gumbel_seed": torch.zeros(3, dtype=torch.int64)}, ValueError, "gumbel_seed"),
    ({"gumbel_seed": torch.zeros(2)}, TypeError, "gumbel_seed"),
    ({"gumbel_seed": torch.zeros(2, dtype=torch.int32)}, TypeError, "gumbel_seed"),
    ({"row": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, "logits"),
    ({"logits": torch.zeros(6, 5), "row": [0]}, TypeError, "row"),
    ({"logits": torch.zeros(6, 5), "row": torch.zeros(2, 3)}, TypeError, "row"),
    ({"logits": torch.zeros(6, 5), "row": torch.zeros(6, dtype=torch.int64)}, ValueError, "row"),
    ({"logits": torch.zeros(6, 5), "row": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, "node"),
    (
        {"logits": torch.zeros(6, 5), "row": torch.zeros(2, 3, dtype=torch.int64, device="meta")},
        ValueError,
        "row",
    ),
    ({"logits": torch.zeros(6, 5), **BY_ROW, "child_value": torch.zeros(2, 3, 5)}, ValueError, "child_value"),
    ({"logits": torch.zeros(6, 5), **BY_ROW, "node": torch.zeros(6, dtype=torch.int64)}, ValueError, "node"),
]


@pytest.mark.parametrize(("change", "error", "name"), BAD)
def test_errors_name_the_argument(backend, change, error, name):
    expand_topk(**arguments())
    with pytest.raises(error, match=f"^{name} must"):
        expand_topk(**arguments(**change))


@pytest.mark.parametrize("bad", [-2, 6, 2**40])
def test_validation_looks_at_nodes(backend, bad):
    node = torch.tensor([[0, -1, 5], [1, 2, bad]])
    out = expand_topk(**arguments(node=node))
    with vstar_ops.validation():
        with pytest.raises(ValueError, match=rf"^node must lie in \[-1, 6\).*{bad}"):
            expand_topk(**arguments(node=node))
        with vstar_ops.validation(False):
            expand_topk(**arguments(node=node))
        with pytest.raises(ValueError, match=r"^node "):
            expand_topk(**arguments(node=node))
        fine = expand_topk(**arguments(node=node.clamp(max=5).clamp(min=-1)))
    assert fine.num_valid.shape == out.num_valid.shape
    expand_topk(**arguments(node=node))


@pytest.mark.parametrize("bad", [-2, 6, 2**40])
def test_validation_looks_at_rows(backend, bad):
    given = {"logits": torch.zeros(6, 5), "row": torch.tensor([[0, -1, 5], [1, 2, bad]])}
    expand_topk(**arguments(**given))
    with vstar_ops.validation(), pytest.raises(ValueError, match=rf"^row must lie in \[-1, 6\).*{bad}"):
        expand_topk(**arguments(**given))


def test_compile_with_an_int_as_seed():
    """Seeds are derived while tracing."""
    logits, trie, node = prefixes()

    def step(z):
        return expand_topk(z * 2, trie, node, 5, gumbel_seed=3)

    assert_same(torch.compile(step, fullgraph=True, backend="aot_eager")(logits), step(logits))


# ---------------------------------------------------------------- restricted tries


@pytest.mark.parametrize("sizes", [SHORT, LONG])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalize": "vocab", "entropy_weight": 0.5},
        {"gumbel_seed": torch.tensor([3, 4]), "temperature": 0.5},
        {"row": torch.tensor([[0, 1, 1, -1] * 3, [1, 0, -1, 1] * 3])},
    ],
    ids=lambda x: next(iter(x), "plain"),
)
def test_a_restricted_trie(backend, sizes, options):
    """Rows of which no child is alive, one, all but one, or some, against the brute force."""
    random = torch.Generator().manual_seed(0)
    for trie in restricted_tries(sizes, backend):
        inner = trie.level_offset[2]
        node = torch.stack([torch.arange(12) % inner, torch.randint(-1, inner, (12,), generator=random)])
        shape = (2, trie.max_token + 3) if "row" in options else (2, 12, trie.max_token + 3)
        logits = torch.randn(shape, generator=random)
        given: dict[str, Any] = {"gumbel_seed": None, "row": None, **options}
        for k in (7, 2000):
            call = Call(expand_topk, {"logits": logits, "trie": trie, "node": node, "k": k, **given})
            assert_as_expected("expand_topk", call)


def test_a_trie_that_is_restricted_to_all_of_it(backend):
    """The same bits as without bits, and in a batch as alone."""
    for columns in (50, 1300):
        logits, trie, node = prefixes(3, columns=columns, items=4000)
        node[:, 0] = 0
        every = restricted(trie, torch.ones(1, trie.num_sequences, dtype=torch.bool))
        for options in ({}, {"normalize": "vocab"}, {"gumbel_seed": torch.arange(3)}):
            assert_same(
                expand_topk(logits, every, node, 9, **options), expand_topk(logits, trie, node, 9, **options)
            )


@pytest.mark.parametrize("children", [3, 5, 16, 67])
@pytest.mark.parametrize("step", [1, 2])  # neighboring columns, others
@pytest.mark.parametrize("logit", [0.5, INF])
def test_dead_children_leave_no_trace(backend, children, step, logit):
    """One child is alive, whatever the logits of the dead ones are: it is certain, and the entropy is 0."""
    alive = torch.tensor([0, children // 2, children - 1])  # one for each request
    trie = Trie.from_sequences(step * torch.arange(children)[:, None])
    trie = restricted(trie, torch.eye(children)[alive].bool())
    all_bits = torch.tensor([-1], dtype=torch.int32).view(torch.float32)
    dead = torch.cat([torch.tensor([NAN, INF, -INF, 1e30, 2.0]), all_bits])
    logits = dead.repeat(children * step)[: children * step].repeat(3, 1)
    logits[torch.arange(3), step * alive] = logit
    out = expand_topk(logits[:, None], trie, torch.zeros(3, 1, dtype=torch.int32), 2)
    assert out.num_valid.tolist() == [1, 1, 1]
    assert out.node[:, 0].tolist() == (alive + 1).tolist()
    assert out.logp[:, 0].tolist() == out.entropy[:, 0].tolist() == [0, 0, 0]


def test_bits_that_change_are_read_at_the_next_call(backend):
    trie = restricted(CATALOGUE, torch.tensor([[True, False, True]]))
    root = torch.zeros(1, 1, dtype=torch.int32)
    logits = torch.tensor([3.0, 9, 1, 9, 9]).log().view(1, 1, 5)
    assert expand_topk(logits, trie, root, 2).token.tolist() == [[0, 2]]
    trie.alive.fill_(0b101001)  # the nodes 0, 3 and 5; 1 and 2 are dead
    assert expand_topk(logits, trie, root, 2).num_valid.tolist() == [0]
    trie.alive.fill_(0b101101)
    out = expand_topk(logits, trie, root, 2)
    assert out.token.tolist() == [[2, -1]] and out.logp[0, 0] == 0 and out.entropy.tolist() == [[0.0]]


WORDS = torch.zeros(1, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("alive", "error", "message"),
    [
        (WORDS.expand(3, 2).clone(), ValueError, "trie is restricted for 3 requests, got logits of 2"),
        (torch.zeros(0, 2).int(), ValueError, "trie is restricted for 0 requests, got logits of 2"),
        (WORDS[:, :1], ValueError, r"trie.alive must have the shape \[R, 2\], got \[1, 1\]"),
        (WORDS[0], ValueError, r"trie.alive must have the shape \[R, 2\], got \[2\]"),
        (WORDS.long(), TypeError, "trie.alive must be int32, got int64"),
        (WORDS.bool(), TypeError, "trie.alive must be int32, got bool"),
        (WORDS.to("meta"), ValueError, "trie.alive must be on cpu like the other tensors, got meta"),
        (
            torch.zeros(2, 4).int()[:, ::2],
            ValueError,
            r"trie.alive must be contiguous, got the strides \[4, 2\]",
        ),
    ],
)
def test_bad_bits_are_named(alive, error, message):
    trie, node = with_alive(CATALOGUE, alive), torch.zeros(2, 1, dtype=torch.int32)
    with pytest.raises(error, match=message):
        expand_topk(torch.zeros(2, 1, 5), trie, node, 2)
    with pytest.raises(error, match=message):
        vstar_ops.token_logp(torch.zeros(2, 1, 5), node, trie, node)
    trees = vstar_ops.SearchTrees.empty(2, 1, 1, children=2, leaves=2)
    rows = vstar_ops.SelectedRows(node, node, node.float())
    with pytest.raises(error, match=message):
        vstar_ops.ved_evaluate(trees, trie, rows, torch.zeros(2, 1, 5), node.long(), torch.arange(2))
