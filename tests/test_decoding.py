"""What holds for all decoders: nothing to find, and logits that forbid what the catalogue allows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_same
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import vstar_ops
from vstar_ops import Trie
from vstar_ops.decoding import VEDConfig, beam_search, topk_sampling, ved

INF, NAN = float("inf"), float("nan")
WITHOUT_VALUES = {"value_weight": 0.0, "child_values": False, "num_value_beams": 0}
DECODERS: dict[str, Callable[..., Any]] = {
    "beam": beam_search,
    "beam, all prefixes": lambda *a: beam_search(*a, skip_forced=False),
    "beam, vocab": lambda *a: beam_search(*a, normalize="vocab"),
    "topk": topk_sampling,
    "topk, constant shapes": lambda *a: topk_sampling(*a, constant_shapes=True),
    "ved": lambda *a: ved(*a, VEDConfig(**WITHOUT_VALUES)),
    "ved, leaves": lambda *a: ved(*a, VEDConfig(**WITHOUT_VALUES, evaluate_leaves=True)),
    "ved, constant shapes": lambda *a: ved(*a, VEDConfig(**WITHOUT_VALUES), constant_shapes=True),
    "ved, rounds": lambda *a: ved(*a, VEDConfig(**WITHOUT_VALUES), num_rounds=3),
}
every_decoder = pytest.mark.parametrize("decoder", DECODERS)


class Masked:
    """A PrefixModel with the logits 0, but for those of some (prefix, token); it notes what it evaluates."""

    def __init__(self, columns: int, logits: dict[tuple[int, ...], float] | None = None) -> None:
        self.columns, self.given = columns, logits or {}
        self.evaluated: list[tuple[int, ...]] = []

    def rows(self, prefixes: list[tuple[int, ...]]) -> Tensor:
        logits = torch.zeros(len(prefixes), self.columns)
        for row, prefix in enumerate(prefixes):
            for token in range(self.columns):
                logits[row, token] = self.given.get((*prefix, token), 0.0)
        return logits

    def prefill(self, context: int) -> tuple[Tensor, Any]:
        state: list[tuple[int, ...]] = [()] * context
        return self.rows(state), state

    def extend(self, state: Any, parent: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        assert ((token >= 0) & (token < self.columns)).all()
        logits, slot = torch.full((len(parent), self.columns), NAN), torch.full_like(parent, -1)
        for row, (p, t) in enumerate(zip(parent.tolist(), token.tolist())):
            if p >= 0:
                slot[row] = len(state)
                state.append((*state[p], t))
                self.evaluated.append(state[-1])
                logits[row] = self.rows(state[-1:])[0]
        return logits, slot


def check_empty(out: Any, batch: int, k: int, length: int) -> None:
    assert out.sequence.shape == (batch, k, length)
    assert (out.sequence == -1).all() and (out.node == -1).all() and (out.logp == -INF).all()
    assert out.num_valid.tolist() == [0] * batch
    assert out.forward_tokens.tolist() == [1] * batch


@every_decoder
@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_an_empty_catalogue(backend, decoder, length, batch):
    """No candidates, and nothing is run but the prompt."""
    model = Masked(8)
    out = DECODERS[decoder](model, batch, Trie.from_sequences(torch.empty(0, length, dtype=torch.int64)), 4)
    check_empty(out, batch, 4, length)
    assert model.evaluated == []


@every_decoder
def test_no_requests(backend, decoder):
    out = DECODERS[decoder](Masked(8), 0, Trie.from_sequences([[0, 2, 4], [1, 3, 6]]), 4)
    assert [x.shape[:2] for x in (out.sequence, out.node, out.logp)] == [(0, 4)] * 3
    assert out.num_valid.shape == out.forward_tokens.shape == (0,)


@every_decoder
@pytest.mark.parametrize("none", [0, -1])
def test_no_candidates_are_an_error(decoder, none):
    with pytest.raises(ValueError, match=r"must be at least 1"):
        DECODERS[decoder](Masked(8), 1, Trie.from_sequences([[0, 2, 4]]), none)


@every_decoder
def test_what_is_no_model_of_the_trie(decoder):
    """A Hugging Face model as it is; the catalogue where the model has the columns of ``model.trie``."""
    trie = Trie.from_sequences([[3, 7], [4, 9]])
    with pytest.raises(
        TypeError, match=r"^model must have .* prefill and extend, got Linear; .*prefix_model"
    ):
        DECODERS[decoder](torch.nn.Linear(2, 2), 1, trie, 2)
    model = Masked(4)
    model.trie = trie.compact()[0]
    assert DECODERS[decoder](model, 1, model.trie, 2).num_valid.item() > 0
    with pytest.raises(ValueError, match=r"^trie must be the model's own, .* 4 columns, got .* up to 9"):
        DECODERS[decoder](model, 1, trie, 2)


@every_decoder
@pytest.mark.parametrize("nothing", [-INF, NAN])
@pytest.mark.parametrize("length", [1, 2, 3])
def test_logits_that_forbid_everything(backend, decoder, nothing, length):
    """All first tokens are forbidden: as an empty catalogue."""
    model = Masked(8, {(0,): nothing, (1,): nothing})
    out = DECODERS[decoder](
        model, 2, Trie.from_sequences(torch.tensor([[0, 2, 4], [1, 3, 6]])[:, :length]), 4
    )
    check_empty(out, 2, 4, length)
    assert model.evaluated == []


@every_decoder
@pytest.mark.parametrize("nothing", [-INF, NAN])
def test_a_forced_token_that_is_forbidden(backend, decoder, nothing):
    """After 1 only 3 is legal, and the logits forbid it: [1, 3, 6] is no candidate, nor is [1, 3] run."""
    model = Masked(8, {(1, 3): nothing})
    out = DECODERS[decoder](model, 2, Trie.from_sequences([[0, 2, 4], [0, 2, 5], [1, 3, 6]]), 16)
    for b in range(2):
        n = int(out.num_valid[b])
        found = {tuple(s) for s in out.sequence[b, :n].tolist()}
        assert found <= {(0, 2, 4), (0, 2, 5)} and n > 0
        assert (out.node[b, :n] >= 0).all() and (out.logp[b, :n] > -INF).all()
        assert (out.node[b, n:] == -1).all() and (out.logp[b, n:] == -INF).all()
    assert (1, 3) not in model.evaluated
    assert int(out.forward_tokens.sum()) == 2 + len(model.evaluated)


@pytest.mark.parametrize("finite", [1.0, INF])
def test_a_forced_token_with_any_other_logit_is_certain(backend, finite):
    model = Masked(8, {(1, 3): finite, (1,): 1.0})
    out = beam_search(model, 1, Trie.from_sequences([[0, 2, 4], [0, 2, 5], [1, 3, 6]]), 3)
    assert out.sequence[0, 0].tolist() == [1, 3, 6]
    assert out.logp[0, 0].item() == pytest.approx(-math.log1p(math.exp(-1.0)))


@given(
    seed=st.integers(0, 2**32 - 1),
    items=st.integers(0, 12),
    length=st.integers(1, 4),
    width=st.integers(1, 6),
    masked=st.sampled_from([0.2, 0.5, 0.9]),
    finite=st.booleans(),
)
def test_skipping_forced_tokens_changes_nothing(backend, seed, items, length, width, masked, finite):
    """A model that promises finite logits is run less, and finds the same; without it nothing is skipped."""
    random = torch.Generator().manual_seed(seed)
    rows = torch.randint(4, (items, length), generator=random)
    logits = {}
    for prefix in {tuple(row[: i + 1]) for row in rows.tolist() for i in range(length)}:
        special = torch.rand((), generator=random) < masked and not finite
        kind = int(torch.randint(3, (), generator=random))
        logits[prefix] = [-INF, NAN, INF][kind] if special else float(torch.randn((), generator=random))
    found = []
    for skip in (True, False):
        model = Masked(4, logits)
        model.finite_logits = finite
        found.append(
            (beam_search(model, 2, Trie.from_sequences(rows), width, skip_forced=skip), model.evaluated)
        )
    (fast, ran), (slow, all_) = found
    assert_same(fast[:-1], slow[:-1])
    assert len(ran) <= len(all_) if finite else ran == all_


def test_a_promise_of_finite_logits_that_is_broken(backend):
    """The forbidden token is met where it is run, which validation tells."""
    model = Masked(8, {(0, 2, 4): -INF})
    model.finite_logits = True
    trie = Trie.from_sequences([[0, 2, 4], [0, 2, 5], [1, 3, 6]])
    beam_search(model, 1, trie, 3)
    with vstar_ops.validation(), pytest.raises(ValueError, match="model must have finite_logits False"):
        beam_search(model, 1, trie, 3)


class Largest(TorchDispatchMode):
    """The largest storage behind a tensor that an operation has returned, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize(("decoder", "skips"), [("beam", True), ("topk", False)])
def test_no_tensor_is_larger_than_the_logits_of_the_rows_run(cpu, decoder, skips):
    """Of 8 beams per request one has several children: no frontier of all beams is made."""
    columns, batch = 5000, 3
    forced = [[v, v + 1, v + 2] for v in range(7)]
    trie, model = Trie.from_sequences([*forced, [9, 1, 1], [9, 1, 2]]), Masked(columns)
    model.rows = lambda prefixes: torch.zeros(len(prefixes), columns)  # type: ignore[method-assign]
    model.finite_logits = skips
    with Largest() as largest:
        out = DECODERS[decoder](model, batch, trie, 8)
    rows = batch if skips else batch * 8
    assert out.num_valid.tolist() == [8] * batch
    assert largest.bytes <= 4 * columns * rows


class Constant:
    """A model whose own ops are outside of any mode: what is counted is the decoder's."""

    finite_logits = True

    def __init__(self, columns: int, batch: int) -> None:
        random = torch.Generator().manual_seed(0)
        self.logits, self.batch = torch.randn(10 * batch, columns, generator=random), batch

    def prefill(self, context: Any) -> tuple[Tensor, Any]:
        with torch.utils._python_dispatch._disable_current_modes():
            return self.logits[: self.batch], [self.batch]

    def extend(self, state: Any, parent: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        with torch.utils._python_dispatch._disable_current_modes():
            first = state[0]
            state[0] += len(parent)
            slot = torch.arange(first, state[0])
            return self.logits[slot % len(self.logits)], slot

    def value(self, state: Any, slot: Tensor) -> Tensor:
        with torch.utils._python_dispatch._disable_current_modes():
            return self.logits[slot % len(self.logits), 0]

    def child_value(self, state: Any, slot: Tensor) -> Tensor:
        with torch.utils._python_dispatch._disable_current_modes():
            return self.logits[slot % len(self.logits)]


class Launches(TorchDispatchMode):
    """Counts what would be a launch on a GPU: all ops but views."""

    number = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += not (op.is_view or op is torch.ops.aten._unsafe_view.default)
        return op(*args, **kwargs or {})


@pytest.mark.parametrize(
    ("decoder", "most"),
    [
        (lambda *a: beam_search(*a, skip_forced=False), 13),
        (beam_search, 15),
        (topk_sampling, 17),
        (lambda *a: ved(*a, VEDConfig(skip_forced=False)), 150),
        (ved, 155),
        (lambda *a: ved(*a, VEDConfig.paper()), 170),
    ],
    ids=["beam, all prefixes", "beam", "topk", "ved, all prefixes", "ved", "ved, paper"],
)
def test_the_ops_of_a_whole_decode(cpu, decoder, most):
    """Three levels, 16 candidates. On a GPU each op is a launch, on a CPU a small model waits for them."""
    random = torch.Generator().manual_seed(1)
    trie = Trie.from_sequences(torch.randint(64, (5000, 3), generator=random))
    decoder(Constant(64, 8), None, trie, 16)  # what is computed once per trie
    with Launches() as launches:
        decoder(Constant(64, 8), None, trie, 16)
    assert 0.8 * most < launches.number <= most


class Marked(Constant):
    """It notes how many ops there were before each of its forwards."""

    def __init__(self, launches: Launches) -> None:
        super().__init__(64, 8)
        self.launches, self.before = launches, []

    def extend(self, state: Any, parent: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        self.before.append(self.launches.number)
        return super().extend(state, parent, token)


@pytest.mark.parametrize(
    "config",
    [
        VEDConfig(),
        VEDConfig(skip_forced=False),
        VEDConfig(num_value_beams=0),
        VEDConfig(**WITHOUT_VALUES),
        VEDConfig.paper(),
        VEDConfig.training(),
    ],
    ids=["default", "all prefixes", "no value beams", "no values", "paper", "training"],
)
@pytest.mark.parametrize("num_rounds", [None, 3])
def test_the_ops_of_a_round_of_ved(cpu, config, num_rounds):
    """Between two forwards: of a level of beams at most 8, of a round 7, and 5 if the host never looks."""
    random = torch.Generator().manual_seed(1)
    trie = Trie.from_sequences(torch.randint(64, (5000, 3), generator=random))
    with Launches() as launches:
        model = Marked(launches)
        ved(model, None, trie, 16, config, num_rounds=num_rounds)
    levels = 3 if config.evaluate_leaves else 2
    ops = [after - before for before, after in zip(model.before, model.before[1:])]
    assert max(ops[: levels - 1]) <= 8
    assert set(ops[levels:]) == ({5} if num_rounds else {7} if len(ops) > levels else set())
