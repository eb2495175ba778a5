"""``token_logp`` and its gradient: by hand, against their oracle, at their edges.

The table below teaches the op; read it first.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers import LONG, SHORT, assert_as_expected, restricted_tries
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import vstar_ops
from vstar_ops import Trie, token_logp
from vstar_ops.verify import oracles
from vstar_ops.verify.calls import Call, token_logp_gradient
from vstar_ops.verify.generators import restricted

OP = vstar_ops.ops.OPS["token_logp"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def some_trie(rng: np.random.Generator, columns: int) -> Trie:
    return Trie.from_sequences(rng.integers(0, columns, (rng.integers(1, 40), 2)))


def children(trie: Trie, node: int) -> list[int]:
    if not 0 <= node < trie.num_nodes:
        return []
    return [int(v) for v in trie.children(torch.tensor([node])).token[0] if v >= 0]


def gradients(
    logits: Tensor, *arguments: object, grad_logp: Tensor, grad_entropy: Tensor, **options: object
) -> tuple[Tensor, Tensor, Tensor]:
    """logp, entropy and the gradient of the logits."""
    z = logits.detach().requires_grad_()
    out = token_logp(z, *arguments, **options)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad([out.logp, out.entropy], [z], [grad_logp, grad_entropy])
    return out.logp.detach(), out.entropy.detach(), gradient


# ---------------------------------------------------------------- by hand

# Three items: tokens (0, 3), (0, 4) and (2, 3). Node 0 is the root, 1 the prefix (0), 2 the prefix (2).
CATALOGUE = Trie.from_sequences([[0, 3], [0, 4], [2, 3]])
QUARTERS = math.log(4) - 0.75 * math.log(3)  # the entropy of (3/4, 1/4)
SLOPE = 3 / 16 * math.log(3)  # and how it changes with the first logit, up to the sign


class Example(NamedTuple):
    """One row of logits, written as weights: a token of weight 3 is 3 times as probable as one of 1.

    Attributes:
        probability: of each target.
        gradient: of the sum of the log-probabilities plus ``grad_entropy`` times the entropy, by column.
    """

    lesson: str
    weights: list[float]
    targets: list[int]
    probability: list[float]
    entropy: float
    gradient: list[float]
    node: int | None = None
    temperature: float = 1.0
    grad_entropy: float = 0.0


EXAMPLES = [
    Example(
        "The logarithm of the softmax at the target. Its gradient: 1 at the target, less the probabilities.",
        [3, 1, 0, 0, 0], [0], [3 / 4], QUARTERS, [1 / 4, -1 / 4, 0, 0, 0],
    ),
    Example(
        "Several targets of one row, which may repeat: their gradients add up.",
        [3, 1, 0, 0, 0], [0, 0, 1], [3 / 4, 3 / 4, 1 / 4], QUARTERS, [2 - 9 / 4, 1 - 3 / 4, 0, 0, 0],
    ),
    Example(
        "A negative target is padding: log-probability 0, no gradient.",
        [3, 1, 0, 0, 0], [-1, -100], [1, 1], QUARTERS, [0, 0, 0, 0, 0],
    ),
    Example(
        "A target whose logit is -inf has the log-probability -inf and no gradient.",
        [3, 1, 0, 0, 0], [0, 4], [3 / 4, 0], QUARTERS, [1 / 4, -1 / 4, 0, 0, 0],
    ),
    Example(
        "The entropy pulls towards uniform probabilities: up for the less probable token.",
        [3, 1, 0, 0, 0], [-1], [1], QUARTERS, [-SLOPE, SLOPE, 0, 0, 0], grad_entropy=1.0,
    ),
    Example(
        "temperature=2: logits are divided by 2, so weights 9 and 1 count as 3 and 1; so is the gradient.",
        [9, 1, 0, 0, 0], [0], [3 / 4], QUARTERS, [1 / 8, -1 / 8, 0, 0, 0], temperature=2.0,
    ),
    Example(
        "With a trie only legal tokens count, 0 and 2 at the root, whatever the other logits are.",
        [3, 9, 1, float("nan"), 9], [0], [3 / 4], QUARTERS, [1 / 4, 0, -1 / 4, 0, 0], node=0,
    ),
    Example(
        "A target that is not legal has the log-probability -inf and no gradient.",
        [3, 9, 1, 9, 9], [1, 2], [0, 1 / 4], QUARTERS, [-3 / 4, 0, 3 / 4, 0, 0], node=0,
    ),
    Example(
        "A forced token: the single legal child is certain. Its log-probability and gradient are exactly 0.",
        [9, 9, 9, 0.01, 9], [3, 3], [1, 1], 0, [0, 0, 0, 0, 0], node=2, grad_entropy=1.0,
    ),
    Example(
        "Node -1 is dead: nothing is legal there.",
        [1, 1, 1, 1, 1], [0, -1], [0, 1], 0, [0, 0, 0, 0, 0], node=-1, grad_entropy=1.0,
    ),
    Example(
        "Equal logits: the entropy is the logarithm of the number of tokens, and at its maximum.",
        [1, 1, 1, 1, 1], [4], [1 / 5], math.log(5), [-1 / 5] * 4 + [4 / 5], grad_entropy=1.0,
    ),
]  # fmt: skip


@pytest.mark.parametrize("example", EXAMPLES, ids=[x.lesson.partition(":")[0][:60] for x in EXAMPLES])
def test_by_hand(backend, example):
    where: list[Any] = [] if example.node is None else [CATALOGUE, torch.tensor([example.node])]
    logp, entropy, gradient = gradients(
        torch.tensor([example.weights]).float().log(), torch.tensor([example.targets]), *where,
        temperature=example.temperature, grad_logp=torch.ones(1, len(example.targets)),
        grad_entropy=torch.tensor([example.grad_entropy]),
    )  # fmt: skip
    want = [math.log(p) if p else float("-inf") for p in example.probability]
    assert logp[0].tolist() == pytest.approx(want, rel=1e-6, abs=1e-30)
    assert entropy.tolist() == pytest.approx([example.entropy], rel=1e-6, abs=1e-30)
    assert gradient[0].tolist() == pytest.approx(example.gradient, rel=1e-5, abs=1e-7)
    outside = [v for v, g in enumerate(example.gradient) if g == 0]
    assert not gradient[0, outside].any()


# ---------------------------------------------------------------- against the oracle


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.lists(st.integers(0, 3), max_size=3).map(tuple),
    columns=st.one_of(st.integers(1, 9), st.integers(10, 150)),
    number=st.sampled_from([None, 0, 1, 3]),
    legal=st.booleans(),
    temperature=st.sampled_from([1.0, 0.3, 2.5]),
    dtype=st.sampled_from(DTYPES),
    wild=st.booleans(),
    strided=st.booleans(),
)
def test_oracle(backend, seed, rows, columns, number, legal, temperature, dtype, wild, strided):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(*rows, columns)) * 3
    if wild:
        odd = rng.choice([np.nan, np.inf, -np.inf, 0.0], values.shape)
        values = np.where(rng.random(values.shape) < 0.2, odd, values)
    logits = torch.tensor(values, dtype=torch.float32).reshape(*rows, columns).to(dtype)
    if strided:
        logits = torch.stack([logits, logits + 1], -1)[..., 0]
    shape = rows if number is None else (*rows, number)
    targets = torch.from_numpy(rng.integers(-2, columns, shape))
    arguments: list[object] = [targets.int() if seed % 2 else targets]
    domains = [list(range(columns))] * int(np.prod(rows))
    if legal:
        trie = some_trie(rng, columns)
        node = torch.from_numpy(rng.integers(-2, trie.num_nodes + 2, rows)).int()
        arguments += [trie, node]
        domains = [children(trie, int(n)) for n in node.flatten()]
    grad_logp = torch.from_numpy(rng.normal(size=shape)).float()
    grad_entropy = torch.from_numpy(rng.normal(size=rows)).float()
    logp, entropy, gradient = gradients(
        logits, *arguments, grad_logp=grad_logp, grad_entropy=grad_entropy, temperature=temperature
    )
    assert (logp.shape, entropy.shape, gradient.shape) == (shape, rows, logits.shape)
    assert (logp.dtype, entropy.dtype, gradient.dtype) == (torch.float32, torch.float32, dtype)
    flat = [x.reshape(len(domains), -1) for x in (logits.float(), targets, grad_logp) if domains]
    for r, domain in enumerate(domains):
        want = oracles.token_logp(
            *(flat[0][r].tolist(), domain, flat[1][r].tolist(), flat[2][r].tolist()),
            float(grad_entropy.flatten()[r]),
            temperature,
        )
        got = logp.reshape(len(domains), -1)[r]
        torch.testing.assert_close(got, torch.tensor(want[0], dtype=torch.float32), rtol=2e-6, atol=2e-6)
        assert float(entropy.flatten()[r]) == pytest.approx(want[1], rel=2e-6, abs=5e-6)
        dense = torch.zeros(columns)
        for v, g in want[2].items():
            dense[v] = g
        row = gradient.reshape(len(domains), -1)[r].float()
        # Twice what rounding to the dtype costs at most, and some float32 arithmetic.
        torch.testing.assert_close(row, dense, rtol=2 * ROUNDING[dtype] + 2e-6, atol=1e-5)
        assert not row[[v for v in range(columns) if v not in want[2]]].any(), "gradient outside the domain"


@pytest.mark.parametrize("dtype", DTYPES)
def test_single_legal_child_is_certain(backend, dtype):
    """Exactly 0, whatever the logit, and no gradient, also summed over targets that repeat."""
    trie = Trie.from_sequences([[3, 0], [4, 1], [4, 2]])
    logits = (torch.randn(64, 6, generator=torch.Generator().manual_seed(0)) * 30).to(dtype)
    node = torch.ones(64, dtype=torch.int32)  # the prefix [3], whose one child is 0
    generator = torch.Generator().manual_seed(1)
    logp, entropy, gradient = gradients(
        logits, torch.zeros(64, 5, dtype=torch.int64), trie, node,
        grad_logp=torch.randn(64, 5, generator=generator), grad_entropy=torch.randn(64, generator=generator),
    )  # fmt: skip
    assert not logp.any()
    assert not torch.signbit(logp).any()
    assert not entropy.any()
    assert not gradient.any()


def test_illegal_targets_and_dead_nodes(backend):
    trie = Trie.from_sequences([[3, 0], [4, 1]])
    logits = torch.randn(4, 6)
    node = torch.tensor([0, -1, 99, 0])
    targets = torch.tensor([[3, 5, -1], [3, 5, -1], [3, 5, -1], [1000, 2**31 - 1, -100]])
    logp, entropy, gradient = gradients(
        logits, targets, trie, node, grad_logp=torch.ones(4, 3), grad_entropy=torch.ones(4)
    )
    none = float("-inf")
    assert (logp[:, 1] == none).all()
    assert (logp[:3, 2] == 0).all()
    assert (logp[1:, 0] == none).all()
    assert logp[3].tolist() == [none, none, 0.0]
    assert (entropy[1:3] == 0).all()
    assert not gradient[1:3].any()
    assert not gradient[:, [0, 1, 2, 5]].any()
    # An illegal target has no gradient: row 0 has one legal target, row 3 none.
    assert gradient[0, 3] != 0
    entropy_only = token_logp(z := logits[3:].clone().requires_grad_(), targets[3:], trie, node[3:]).entropy
    (want,) = torch.autograd.grad(entropy_only.sum(), z)
    assert torch.equal(want[0], gradient[3])


def test_an_empty_catalogue(backend):
    """Nothing is legal, wherever the memory of an empty tensor is: a GPU's has none."""
    trie = Trie.from_sequences(torch.empty(0, 2, dtype=torch.int64))
    trie.token = torch.empty(0, dtype=torch.int32)
    assert trie.token.data_ptr() == 0
    logits = torch.randn(2, 3, 7, requires_grad=True)
    out = token_logp(logits, torch.full((2, 3, 2), 4), trie, torch.zeros(2, 3, dtype=torch.int32))
    assert (out.logp == -torch.inf).all() and (out.entropy == 0).all()
    (gradient,) = torch.autograd.grad(out.entropy.sum() + out.logp.clamp(min=-1).sum(), logits)
    assert (gradient == 0).all()


def test_targets_beyond_int32(backend):
    out = token_logp(torch.zeros(1, 5), torch.tensor([[2**32, 2**32 + 1, 2**62, -(2**32)]]))
    assert out.logp.tolist() == [[float("-inf")] * 3 + [0.0]]


def test_only_legal_columns_are_read(backend):
    """What is not legal may hold anything."""
    trie = Trie.from_sequences([[1, 0], [4, 1]])
    logits = torch.full((2, 8), float("nan"))
    logits[:, [1, 4]] = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    node = torch.zeros(2, dtype=torch.int64)
    logp, entropy, gradient = gradients(
        logits, torch.tensor([1, 4]), trie, node, grad_logp=torch.ones(2), grad_entropy=torch.ones(2)
    )
    short = gradients(
        logits[:, [1, 4]], torch.tensor([0, 1]), grad_logp=torch.ones(2), grad_entropy=torch.ones(2)
    )
    torch.testing.assert_close(logp, short[0])
    torch.testing.assert_close(entropy, short[1])
    torch.testing.assert_close(gradient[:, [1, 4]], short[2])


@pytest.mark.parametrize("shape", [(7, 9000), (2, 3, 4097), (1, 20000)])
def test_long_rows(backend, shape):
    """More columns than a block, against torch in double."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(shape, generator=generator) * 5
    logits[..., -1] = 40.0  # the last block changes everything
    targets = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    w, h = torch.randn(shape[:-1], generator=generator), torch.randn(shape[:-1], generator=generator)
    got = gradients(logits, targets, grad_logp=w, grad_entropy=h, temperature=0.7)
    z = logits.double().requires_grad_()
    table = (z / 0.7).log_softmax(-1)
    logp = table.gather(-1, targets[..., None])[..., 0]
    entropy = -(table.exp() * table).sum(-1)
    (gradient,) = torch.autograd.grad([logp, entropy], [z], [w.double(), h.double()])
    for ours, want in zip(got, (logp, entropy, gradient)):
        torch.testing.assert_close(ours.double(), want.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_torch(backend, dtype):
    """Against float64, at most twice the error of torch in the same dtype."""
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(16, 700, generator=generator) * 4).to(dtype)
    targets = torch.randint(0, 700, (16,), generator=generator)

    def by_torch(z: Tensor) -> tuple[Tensor, Tensor]:
        logp = z.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        return logp, torch.autograd.grad(logp.sum(), z)[0]

    exact = by_torch(logits.double().requires_grad_())
    theirs = by_torch(logits.clone().requires_grad_())
    logp, _, gradient = gradients(logits, targets, grad_logp=torch.ones(16), grad_entropy=torch.zeros(16))
    for ours, other, want in zip((logp, gradient), theirs, exact):
        error = (ours.double() - want).abs().max()
        assert error <= 2 * (other.double() - want).abs().max() + 1e-6


def test_leading_dimensions_and_strides(backend):
    """Any leading shape; a slice of a sequence, a transposed and an expanded tensor are read in place."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(2, 5, 3, 11, generator=generator)
    targets = torch.randint(-1, 11, (2, 5, 3), generator=generator)
    whole = token_logp(logits, targets)
    for b in range(2):
        part = token_logp(logits[b].transpose(0, 1), targets[b].t())
        assert torch.equal(part.logp.t(), whole.logp[b])
        assert torch.equal(part.entropy.t(), whole.entropy[b])
    shifted = token_logp(logits[:, :-1, 0], targets[:, 1:, 0])
    assert torch.equal(shifted.entropy, whole.entropy[:, :-1, 0])
    one = token_logp(logits[0, 0, 0], targets[0, 0, 0])
    assert one.logp.shape == one.entropy.shape == ()
    assert torch.equal(one.logp, whole.logp[0, 0, 0])
    same = token_logp(logits[0, 0, :1].expand(4, 11), targets[0, 0, :1].expand(4))
    assert torch.equal(same.logp, whole.logp[0, 0, :1].expand(4))


@pytest.mark.parametrize("entropy", [False, True])
def test_gradcheck(entropy):
    """The closed form against finite differences, in double; a second derivative is refused."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(1, 3, 7, dtype=torch.float64, generator=generator, requires_grad=True)
    trie = Trie.from_sequences([[0, 3], [0, 4], [2, 3]])
    some, legal = (
        torch.tensor([[[1, 1, -1], [0, 6, 2], [5, -2, 5]]]),
        torch.tensor([[[2, 0, -1], [3, 4, 4], [3, 3, -1]]]),
    )
    for rest in ((some,), (legal, trie, torch.tensor([[0, 1, 2]]))):

        def call(z, rest=rest):
            return token_logp(z, *rest, temperature=0.7)[1 if entropy else 0]

        assert torch.autograd.gradcheck(call, (logits,), check_batched_grad=True)
        with pytest.raises(NotImplementedError, match="token_logp has no second derivative"):
            torch.autograd.gradgradcheck(call, (logits,))


def test_the_backward_pass_keeps_the_backend_of_the_forward_pass():
    """Float64 is known to the reference alone."""
    z = torch.randn(1, 2, 5, dtype=torch.float64, requires_grad=True)
    with vstar_ops.use_backend("reference"):
        logp = OP(z.device, z, torch.tensor([[[1], [2]]]), None, None, None, None, 1.0, 0)[0]
    (gradient,) = torch.autograd.grad(logp.sum(), z)
    torch.testing.assert_close(gradient[0], torch.eye(5, dtype=z.dtype)[[1, 2]] - z.softmax(-1)[0])


def test_no_gradient_where_none_is_asked(backend):
    logits = torch.randn(2, 5)
    assert not token_logp(logits, torch.tensor([1, 2])).logp.requires_grad
    with torch.no_grad():
        assert not token_logp(logits.requires_grad_(), torch.tensor([1, 2])).logp.requires_grad


def test_second_derivative_is_refused(backend):
    z = torch.randn(2, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(token_logp(z, torch.tensor([1, 2])).logp.sum(), z, create_graph=True)
    for second in (
        gradient.sum().backward,
        lambda: torch.autograd.grad(gradient.sum(), z, allow_unused=True),
    ):
        with pytest.raises(NotImplementedError, match="token_logp has no second derivative"):
            second()


TEMPERATURES = [5e-324, 1e-300, 1e-45, 1e-39, 1.1e-38, 1e-30, 1e-18, 1e20, 8.6e37, 1e39, 1e300]


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("legal", [False, True])
def test_every_temperature(backend, legal, temperature):
    """Quotients and not products with a rounded 1 / temperature, which no float holds at both ends."""
    rows = [[0.0, -0.5, -0.1, 0.0, -1e30], [3.0, 2.0, 1.0, -math.inf, 2.9], [0.0, 1e38, -1e30, math.inf, 1.0]]
    targets = [[0, 2], [0, 4], [1, 3]]
    trie = Trie.from_sequences([[0], [2], [3], [4]])
    domain = [0, 2, 3, 4] if legal else range(5)
    generator = torch.Generator().manual_seed(1)
    grad_logp, grad_entropy = torch.randn(3, 2, generator=generator), torch.randn(3, generator=generator)
    rest = (trie, torch.zeros(3, dtype=torch.int32)) if legal else ()
    got = gradients(
        torch.tensor(rows), torch.tensor(targets), *rest,
        grad_logp=grad_logp, grad_entropy=grad_entropy, temperature=temperature,
    )  # fmt: skip
    for r, row in enumerate(rows):
        given = grad_logp[r].tolist(), grad_entropy[r].item(), temperature
        logp, entropy, gradient = oracles.token_logp(row, domain, targets[r], *given)
        want = [oracles.float32(gradient.get(v, 0.0)) for v in range(5)]
        assert got[0][r].tolist() == pytest.approx([oracles.float32(x) for x in logp], rel=1e-5, abs=1e-6)
        assert got[1][r].item() == pytest.approx(entropy, rel=1e-5, abs=1e-6)
        rounding = 1e-6 / temperature if temperature > 1e-30 else 1e-6  # of terms that cancel
        assert got[2][r].tolist() == pytest.approx(want, rel=1e-4, abs=rounding)


BAD = [
    ({"logits": [1.0]}, TypeError, "logits"),
    ({"logits": torch.tensor(1.0)}, ValueError, "logits"),
    ({"logits": torch.zeros(2, 5, dtype=torch.int64)}, TypeError, "logits"),
    ({"targets": [1, 2]}, TypeError, "targets"),
    ({"targets": torch.zeros(2)}, TypeError, "targets"),
    ({"targets": torch.zeros(3, dtype=torch.int64)}, ValueError, "targets"),
    ({"targets": torch.zeros(3, 1, dtype=torch.int64)}, ValueError, "targets"),
    ({"node": None}, ValueError, "node"),
    ({"trie": None}, ValueError, "trie"),
    ({"trie": "trie"}, TypeError, "trie"),
    ({"trie": Trie.from_sequences([[7]])}, ValueError, "logits"),
    ({"node": torch.zeros(3, dtype=torch.int64)}, ValueError, "node"),
    ({"node": torch.zeros(2)}, TypeError, "node"),
    ({"temperature": 0.0}, ValueError, "temperature"),
    ({"temperature": float("nan")}, ValueError, "temperature"),
    ({"temperature": "hot"}, TypeError, "temperature"),
]


@pytest.mark.parametrize(("change", "error", "name"), BAD)
def test_errors_name_the_argument(backend, change, error, name):
    arguments = {
        "logits": torch.zeros(2, 5),
        "targets": torch.zeros(2, dtype=torch.int64),
        "trie": Trie.from_sequences([[0], [1]]),
        "node": torch.zeros(2, dtype=torch.int64),
        **change,
    }
    with pytest.raises(error, match=f"^{name} "):
        token_logp(**arguments)


def test_validation_looks_at_values(backend):
    trie, node = Trie.from_sequences([[0], [1]]), torch.tensor([0])
    with vstar_ops.validation():
        token_logp(torch.zeros(1, 5), torch.tensor([4]))
        with pytest.raises(ValueError, match=r"^targets "):
            token_logp(torch.zeros(1, 5), torch.tensor([5]))
        with pytest.raises(ValueError, match=r"^node "):
            token_logp(torch.zeros(1, 5), torch.tensor([1]), trie, node + 9)


def test_legal_gradients_can_be_used_like_any_other(cpu):
    """Memory that the op asked of the system: written in place, accumulated, freed."""
    trie, node = Trie.from_sequences([[0], [2]]), torch.zeros(3, dtype=torch.int64)
    z = torch.zeros(3, 50, requires_grad=True)
    for _ in range(3):
        token_logp(z, torch.tensor([0, 2, 0]), trie, node).logp.sum().backward()
    z.grad.mul_(2)
    assert z.grad.data_ptr() % 64 == 0
    assert z.grad[:, :3].tolist() == [[3.0, 0.0, -3.0], [-3.0, 0.0, 3.0], [3.0, 0.0, -3.0]]
    assert not z.grad[:, 3:].any()


# ---------------------------------------------------------------- restricted tries


@pytest.mark.parametrize("sizes", [SHORT, LONG])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_restricted_trie(backend, sizes, dtype):
    """Rows of which no child is alive, one, all but one, or some, against the brute force."""
    random = torch.Generator().manual_seed(0)
    for trie in restricted_tries(sizes, backend):
        inner, columns = trie.level_offset[2], trie.max_token + 3
        node = torch.stack([torch.arange(9) % inner, torch.randint(-1, inner, (9,), generator=random)])
        a = {"logits": torch.randn(2, 9, columns, generator=random).to(dtype), "trie": trie, "node": node}
        a["targets"] = torch.randint(-1, columns, (2, 9, 4), generator=random)
        first = trie.children(node).token[..., :4]
        a["targets"][..., : first.shape[2]] = torch.where(first < 0, 1, first)
        assert_as_expected("token_logp", Call(token_logp, dict(a)))
        pull, slope = torch.randn(2, 9, 4, generator=random), torch.randn(2, 9, generator=random)
        for grad_logp, grad_entropy in ((pull, slope), (pull, None), (None, slope)):
            given = {**a, "grad_logp": grad_logp, "grad_entropy": grad_entropy}
            assert_as_expected("token_logp_backward", Call(token_logp_gradient, given))


def test_requests_of_a_restricted_trie_are_the_first_dimension(backend):
    """Of one to four dimensions of rows."""
    trie = restricted(CATALOGUE, torch.tensor([[True, True, False], [False, True, True]]))
    logits, node, target = (
        torch.zeros(2, 3, 2, 2, 5),
        torch.ones(2, 3, 2, 2).int(),
        torch.full((2, 3, 2, 2), 4),
    )
    half, alone = math.log(1 / 2), 0.0
    for index in ((..., 0, 0, 0, slice(None)), (..., 0, 0, slice(None)), (..., 0, slice(None)), (...,)):
        where = index if len(index) == 1 else index[:-1]
        logp = token_logp(logits[index], target[where], trie, node[where]).logp
        assert logp[0].flatten().tolist() == pytest.approx([half] * logp[0].numel())
        assert logp[1].flatten().tolist() == [alone] * logp[1].numel()


def test_bits_that_change_before_the_gradient(cpu):
    """The gradient would be that of another distribution."""
    trie = restricted(CATALOGUE, torch.tensor([[True, True, False]]))
    logits = torch.zeros(1, 5, requires_grad=True)
    logp = token_logp(logits, torch.tensor([4]), trie, torch.tensor([1])).logp
    trie.alive.fill_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logp.sum().backward()
