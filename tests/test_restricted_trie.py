"""``Trie.restrict``: what is allowed, how it is changed in place, and who honors it.

The oracle is the catalogue of the allowed items alone, ``Trie.from_sequences(rows[allowed])``: walking gives
the same under both, and so does every search.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from other_device import OTHER, other_device
from test_beam import COLUMNS, TableModel
from test_decoding import DECODERS, Masked, check_empty, every_decoder
from torch._dynamo.testing import CompileCounterWithBackend

import vstar_ops
from vstar_ops import RestrictedTrie, Trie
from vstar_ops.decoding import VEDConfig, beam_search, topk_sampling, ved
from vstar_ops.noise import gumbel
from vstar_ops.reference.filters import unpack_bits
from vstar_ops.reference.ved_search import ved_search

ROWS = [[0, 3], [0, 3], [0, 4], [2, 3]]
IDS = [70, 71, 72, 73]


def small() -> Trie:
    return Trie.from_sequences(ROWS, IDS)


def ids_of(view: Trie, request: int = 0) -> set[int]:
    assert isinstance(view, RestrictedTrie)
    return set(view.item_ids[view.allowed[request]].tolist())


# ---------------------------------------------------------------- what is allowed


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        ({"allow": [70, 73]}, {70, 73}),
        ({"ban": [70, 73]}, {71, 72}),
        ({"allow": [70, 73], "ban": [73, 72]}, {70}),
        ({"allow": []}, set()),
        ({"ban": []}, set(IDS)),
        ({"ban": [99, -1, 70, 70]}, {71, 72, 73}),
        ({"allow": [73, -1, 73]}, {73}),
        ({"allow": [True, False, False, True]}, {70, 73}),
        ({"ban": [True, False, False, True]}, {71, 72}),
        ({"allow": [True, True, False, True], "ban": [70]}, {71, 73}),
        ({"allow": [70, 72], "ban": [True, False, False, True]}, {72}),
        ({"allow": {70, 72}}, {70, 72}),
        ({"allow": np.array([70], np.uint8)}, {70}),
        ({"allow": range(71, 73)}, {71, 72}),
        ({"ban": np.array([2**40])}, set(IDS)),
        ({"ban": torch.tensor([73], dtype=torch.int16)}, {70, 71, 72}),
        ({"ban": torch.tensor([[73, 0, 72, 0]])[:, ::2]}, {70, 71}),
        ({"ban": [[73, 72]]}, {70, 71}),
    ],
)
def test_items_and_masks(backend, arguments, allowed):
    view = small().restrict(**arguments)
    assert ids_of(view) == allowed
    assert view.num_requests == 1


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        ({"ban": [[70, 73], [], [72]]}, [{71, 72}, set(IDS), {70, 71, 73}]),
        ({"ban": ({70, 73}, set(), [72])}, [{71, 72}, set(IDS), {70, 71, 73}]),
        ({"ban": [torch.tensor([70, 73]), torch.tensor([72])]}, [{71, 72}, {70, 71, 73}]),
        ({"ban": [np.array([70, 73]), np.array([72])]}, [{71, 72}, {70, 71, 73}]),
        ({"ban": torch.tensor([[70, 73], [-1, -1]])}, [{71, 72}, set(IDS)]),
        ({"allow": [[70], [-1]], "ban": [70]}, [set(), set()]),
        ({"allow": [70, 72], "ban": [[70], [71]]}, [{72}, {70, 72}]),
        ({"allow": [[True, False, False, False], [False] * 4]}, [{70}, set()]),
        ({"allow": torch.eye(4, dtype=torch.bool), "ban": [[71], [71], [], []]}, [{70}, set(), {72}, {73}]),
        ({"ban": torch.empty(0, 3, dtype=torch.int64)}, []),
    ],
)
def test_filters_of_requests(backend, arguments, allowed):
    view = small().restrict(**arguments)
    assert view.num_requests == len(allowed)
    assert [ids_of(view, b) for b in range(len(allowed))] == allowed


def test_several_items_of_an_id(backend):
    """All of them are meant, as in ``without_items``."""
    trie = Trie.from_sequences([[0, 1], [2, 3], [4, 5], [6, 7]], [5, 9, 5, 5])
    view = trie.restrict(ban=[5])
    assert view.allowed.tolist() == [[False, True, False, False]]
    view.update(allow=[5], ban=[9])
    assert view.allowed.tolist() == [[True, False, True, True]]


@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(["near", "far", "few", "clustered"]))
def test_ids_of_any_kind_are_found(seed, kind):
    """Against Python's dictionary."""
    rng = np.random.default_rng(seed)
    num = int(rng.integers(1, 300))
    ids = {
        "near": np.arange(num) - num // 2,
        "far": rng.integers(-(2**63), 2**63 - 1, num),
        "few": rng.integers(0, 9, num),
        "clustered": (rng.lognormal(0, 4, num) * 1e6).astype(np.int64) << rng.integers(0, 20),
    }[kind]
    ids[ids == -1] = 7
    trie = Trie.from_sequences(rng.integers(0, 20, (num, 2)), ids)
    listed = np.concatenate([rng.choice(ids, num // 2 + 1), rng.integers(-(2**63), 2**63 - 1, 5), [-1]])
    view = trie.restrict(ban=listed)
    assert ids_of(view) == set(ids.tolist()) - set(listed.tolist())


def test_a_view_of_a_view(backend):
    """Both filters, when it is made or reset; and never more than the other allows now."""
    stock = small().restrict(ban=[70])
    mine = stock.restrict(ban=[[73], []])
    assert [ids_of(mine, b) for b in range(2)] == [{71, 72}, {71, 72, 73}]
    mine.update(allow=[70, 73])
    assert [ids_of(mine, b) for b in range(2)] == [{71, 72, 73}] * 2
    mine.update(allow=[True] * 4)
    assert [ids_of(mine, b) for b in range(2)] == [{71, 72, 73}] * 2
    stock.update(allow=[70], ban=[71])
    assert ids_of(mine) == {71, 72, 73}, "until it is reset"
    mine.update(allow=[71, 70], ban=[[], [72]])
    assert [ids_of(mine, b) for b in range(2)] == [{70, 71, 72, 73}, {70, 71, 73}]
    mine.reset(ban=[[72], [73]])
    assert [ids_of(mine, b) for b in range(2)] == [{70, 73}, {70, 72}]
    mine.reset(allow=[71, 72])
    assert [ids_of(mine, b) for b in range(2)] == [{72}] * 2
    assert ids_of(mine.restrict(allow=[[72], [73]]), 1) == set()
    assert mine.unrestricted is stock.unrestricted


@given(seed=st.integers(0, 2**32 - 1))
def test_changes_in_place(backend, seed):
    """A view after any changes is one made at once, at the addresses where it was."""
    rng = np.random.default_rng(seed)
    num, requests = int(rng.integers(1, 60)), int(rng.integers(1, 4))
    trie = Trie.from_sequences(rng.integers(0, 4, (num, 3)), rng.permutation(3 * num)[:num])
    masks = np.ones((requests, num), bool)
    view = trie.restrict(ban=[[]] * requests)
    addresses = view.alive.data_ptr(), view.bits.allowed.data_ptr()
    for _ in range(5):
        listed = {
            name: rng.random((requests if rng.random() < 0.5 else 1, num)) < rng.choice([0.1, 0.9])
            for name in ("allow", "ban")
            if rng.random() < 0.7
        } or {"ban": np.zeros((1, num), bool)}
        start = rng.random() < 0.3
        if start:
            masks = np.zeros_like(masks) if "allow" in listed else np.ones_like(masks)
        masks = (masks | listed.get("allow", False)) & ~listed.get("ban", np.zeros((1, num), bool))

        def given_as(mask):
            mask = mask if len(mask) > 1 or (requests == 1 and rng.random() < 0.5) else mask[0]
            if rng.random() < 0.5:
                return mask
            ids = trie.item_ids.numpy()
            return ids[mask] if mask.ndim == 1 else [ids[m].tolist() for m in mask]

        (view.reset if start else view.update)(**{name: given_as(mask) for name, mask in listed.items()})
        want = trie.restrict(allow=masks)
        assert torch.equal(view.alive, want.alive) and torch.equal(view.bits.allowed, want.bits.allowed)
    assert addresses == (view.alive.data_ptr(), view.bits.allowed.data_ptr())


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "allow or ban must be given, got neither", {}),
        (ValueError, "allow must hold ids of the trie's items, got 99, which is none", {"allow": [70, 99]}),
        (ValueError, r"allow must have the shape \[4\] or \[B, 4\], got \[3\]", {"allow": [True] * 3}),
        (ValueError, r"ban must have the shape \[M\] or \[B, M\], got \[\]", {"ban": 70}),
        (ValueError, r"ban must have the shape \[M\] or \[B, M\], got \[1, 1, 1\]", {"ban": [[[70]]]}),
        (TypeError, "ban must be item ids .* or a mask .*, got torch.float32", {"ban": torch.zeros(2)}),
        (TypeError, "allow must be integers, got float64", {"allow": [0.5]}),
        (TypeError, "allow must be integers", {"allow": ["70"]}),
        (ValueError, "ban must fit in int64", {"ban": [2**64]}),
        (ValueError, "ban must fit in int64", {"ban": np.array([2**63], np.uint64)}),
        (ValueError, "ban must be rectangular", {"ban": [[True, False], [True]]}),
        (ValueError, "allow must have one row for each of the 3 requests of the trie's filter, got 2",
         {"allow": [[70], [71]], "ban": [[70], [71], [72]]}),
    ],
)  # fmt: skip
def test_errors_name_the_argument(error, message, arguments):
    with pytest.raises(error, match=f"^{message}"):
        small().restrict(**arguments)


def test_errors_of_changes():
    """What is refused changes nothing."""
    view, mine = small().restrict(ban=[70]), small().restrict(ban=[[70], [71]])
    with pytest.raises(
        ValueError, match="^ban must have one row for all requests of the trie's filter, got 2"
    ):
        view.update(allow=[70], ban=[[71], [72]])
    for change in (mine.update, mine.reset, mine.restrict):
        with pytest.raises(ValueError, match="^ban must have one row for each of the 2 requests .*, got 1"):
            change(ban=[[71]])
        with pytest.raises(TypeError, match="^allow or ban must be given"):
            change()
    with pytest.raises(ValueError, match="^allow must hold ids of the trie's items, got 99"):
        mine.reset(allow=[99])
    mine.update(allow=[99], ban=[98])
    assert (ids_of(view), ids_of(mine), ids_of(mine, 1)) == ({71, 72, 73}, {71, 72, 73}, {70, 72, 73})


# ---------------------------------------------------------------- walking


def catalogues(
    seed: int, requests: int = 1, length: int | None = None
) -> tuple[Trie, np.ndarray, list[Trie], Trie]:
    """A catalogue with collisions, allowed items ``[R, N]``, a trie of these per request, and the view."""
    rng = np.random.default_rng(seed)
    num, length = int(rng.integers(1, 90)), length or int(rng.integers(1, 5))
    rows = rng.integers(0, rng.integers(1, 7, length), (num, length))
    ids = rng.permutation(1000)[:num]
    allowed = rng.random((requests, num)) < rng.choice([0.05, 0.5, 0.95])
    trie = Trie.from_sequences(rows, ids)
    only = [Trie.from_sequences(rows[a].reshape(-1, length), ids[a]) for a in allowed]
    banned = [ids[~a].tolist() for a in allowed]
    return trie, allowed, only, trie.restrict(ban=banned if requests > 1 else banned[0])


def node_map(trie: Trie, only: Trie) -> torch.Tensor:
    """The node in ``trie`` of each node of a smaller catalogue; behind the last one -1."""
    sequences, depth = only.sequences(torch.arange(only.num_nodes)), only.depth(torch.arange(only.num_nodes))
    found = torch.full((only.num_nodes + 1,), -1, dtype=torch.int32)
    for d in range(trie.length + 1):
        here = (depth == d).nonzero()[:, 0]
        found[here] = trie.lookup(sequences[here][:, :d])
    return found


@given(seed=st.integers(0, 2**32 - 1))
def test_walking_of_all_requests(seed):
    """Every method at every node, and at those that are none, against the catalogue of the allowed items."""
    trie, _, (only,), view = catalogues(seed)
    to = node_map(trie, only)
    if only.num_items == 0:
        to[0] = -1  # the root is dead too
    back = torch.full((trie.num_nodes + 1,), -1)
    back[to[to >= 0].long()] = torch.arange(len(to))[to >= 0]
    nodes = torch.cat([torch.arange(trie.num_nodes), torch.tensor([-1, -7, trie.num_nodes])])
    alive = torch.where((nodes >= 0) & (nodes < trie.num_nodes), back[nodes.clamp(-1, trie.num_nodes)], -1)
    assert torch.equal(view.num_children(nodes), only.num_children(alive))
    want = only.children(alive)
    assert torch.equal(view.children(nodes).token, want.token)
    assert torch.equal(view.children(nodes).node, to[want.node.long()])
    assert torch.equal(view.items(nodes), only.items(alive))
    for node, its in zip(nodes[:20].tolist(), alive.tolist()):
        assert view.items(node).tolist() == only.items(its).tolist()
        assert view.children(node).token.tolist() == only.children(its).token.tolist()
    for depth in range(trie.length + 1):
        prefixes = trie.sequences(torch.arange(trie.num_nodes))[:, :depth]
        found = only.lookup(prefixes) if only.num_items else torch.full((len(prefixes),), -1)
        assert torch.equal(view.lookup(prefixes), to[found.long()])
    bits = unpack_bits(view.alive, trie.num_nodes)[0]
    assert torch.equal(bits, back[:-1] >= 0)


@given(seed=st.integers(0, 2**32 - 1))
def test_walking_of_each_request(seed):
    """The first dimension is the request; each finds what a view of its own finds."""
    trie, _, only, view = catalogues(seed, requests=3)
    single = [trie.restrict(allow=its.item_ids) for its in only]
    nodes = torch.from_numpy(np.random.default_rng(seed).integers(-1, trie.num_nodes + 1, (3, 2, 4)))
    for name in ("num_children", "children", "items"):
        got = getattr(view, name)(nodes)
        for b in range(3):
            want = getattr(single[b], name)(nodes[b])
            pairs = zip(got, want) if name == "children" else [(got, want)]
            for x, y in pairs:
                if name != "num_children":
                    assert (x[b, ..., y.shape[-1] :] == -1).all()
                    x = x[..., : y.shape[-1]]
                assert torch.equal(x[b], y)
    prefixes = trie.sequences(nodes.clamp(0, trie.num_nodes - 1))[..., :1]
    assert torch.equal(view.lookup(prefixes), torch.stack([s.lookup(p) for s, p in zip(single, prefixes)]))
    for name, what in (("children", "node"), ("items", "node"), ("lookup", "prefixes")):
        for wrong in (nodes[:2], nodes[0, 0, 0]) if what == "node" else (prefixes[:2],):
            with pytest.raises(ValueError, match=f"^{what} must have one row for each of the 3 requests"):
                getattr(view, name)(wrong)


def test_what_stays_that_of_the_catalogue():
    trie = small()
    view = trie.restrict(ban=IDS)
    nodes = torch.arange(trie.num_nodes)
    for name in ("parent", "depth", "sequences"):
        assert torch.equal(getattr(view, name)(nodes), getattr(trie, name)(nodes))
    assert view.only_leaf.data_ptr() == trie.only_leaf.data_ptr()
    for name in ("offset", "token", "item_offset", "item_ids"):
        assert getattr(view, name).data_ptr() == getattr(trie, name).data_ptr()
    assert type(RestrictedTrie.from_sequences(ROWS)) is Trie
    assert (trie.alive, trie.unrestricted, view.unrestricted) == (None, trie, trie)
    assert "4 items" in repr(view) and "restricted for all requests" in repr(view)
    assert "restricted for 2 requests" in repr(trie.restrict(ban=[[], []]))


def test_copies(tmp_path):
    """``compact`` and ``to`` the same device share the filter; another device gets a copy."""
    view = small().restrict(ban=[70])
    compact, columns = view.compact()
    same, other = view.to("cpu"), view.to("meta")
    view.update(allow=[70], ban=[73])
    assert columns.tolist() == [0, 2, 3, 4]
    assert ids_of(compact) == ids_of(same) == {70, 71, 72}
    assert compact.lookup([[0, 2], [1, 2]]).tolist() == [3, -1]
    compact.update(allow=[73])
    assert ids_of(view) == set(IDS)
    assert isinstance(other, RestrictedTrie) and other.alive.device.type == other.device.type == "meta"
    apart = copy.deepcopy(view)
    apart.update(ban=[70])
    assert ids_of(view) == set(IDS)
    for refused in (
        lambda: view.save(tmp_path / "trie"),
        lambda: view.with_items([[1, 1]]),
        lambda: view.without_items([70]),
        lambda: view.item_range(0),
    ):
        with pytest.raises(NotImplementedError, match="^a restricted trie"):
            refused()
    assert list(tmp_path.iterdir()) == []


def test_an_empty_catalogue(backend):
    trie = Trie.from_sequences(np.zeros((0, 2), np.int64))
    for view in (trie.restrict(ban=[5]), trie.restrict(allow=[]), trie.restrict(allow=np.zeros(0, bool))):
        view.update(allow=[5])
        assert view.lookup([[0], [1]]).tolist() == [-1, -1]
        assert view.items([0, -1]).tolist() == [[], []]
        check_empty(beam_search(Masked(4), 2, view, 3), 2, 3, 2)


# ---------------------------------------------------------------- searches


class Valued(TableModel):
    """With values that are functions of context and prefix."""

    def value(self, state: Any, slot: torch.Tensor) -> torch.Tensor:
        return torch.tensor([0.0 if s < 0 else float(self.row(state[s])[0]) for s in slot.tolist()])

    def child_value(self, state: Any, slot: torch.Tensor) -> torch.Tensor:
        rows = [np.zeros(COLUMNS) if s < 0 else self.row(state[s])[1:] for s in slot.tolist()]
        return torch.from_numpy(np.stack(rows)).float() if rows else torch.empty(0, COLUMNS)

    @staticmethod
    def row(entry: tuple[int, int, tuple[int, ...]]) -> np.ndarray:
        _, context, prefix = entry
        return np.random.default_rng([7, context, len(prefix), *prefix]).normal(size=COLUMNS + 1)


# Forced tokens are those of the whole catalogue, which changes what VED spends its budget on.
EVERY: dict[str, Any] = {"skip_forced": False}
SEARCHES: dict[str, Callable[..., Any]] = {
    "beam": lambda model, context, trie, k, _: beam_search(model, context, trie, k),
    "beam, all prefixes": lambda *a: beam_search(*a[:4], skip_forced=False),
    "beam, vocab": lambda *a: beam_search(*a[:4], normalize="vocab", temperature=0.7),
    "topk": lambda *a: topk_sampling(*a[:4], top_k=3, temperature=1.3, seed=a[4]),
    "topk, constant shapes": lambda *a: topk_sampling(*a[:4], seed=a[4], constant_shapes=True),
    "ved": lambda *a: ved(*a[:4], VEDConfig(**EVERY), seed=a[4]),
    "ved, leaves": lambda *a: ved(*a[:4], VEDConfig(**EVERY, evaluate_leaves=True, budget=20), seed=a[4]),
    "ved, paper": lambda *a: ved(*a[:4], VEDConfig.paper(budget=17).replace(**EVERY), seed=a[4]),
    "ved, vocab": lambda *a: ved(*a[:4], VEDConfig(**EVERY, normalize="vocab"), seed=a[4]),
}


@contextlib.contextmanager
def noise_of(to: torch.Tensor) -> Iterator[None]:
    """Noise is a function of the node: that of a smaller catalogue is drawn as in the whole one."""

    def mapped(seed: torch.Tensor, node: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        inside = (node >= 0) & (node < len(to) - 1)
        return gumbel(seed, torch.where(inside, to[torch.where(inside, node, -1).long()].long(), node), token)

    with pytest.MonkeyPatch.context() as patch, vstar_ops.use_backend("reference"):
        for module in ("expand_topk", "draws"):
            patch.setattr(sys.modules[f"vstar_ops.reference.{module}"], "gumbel", mapped)
        yield


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("requests", [1, 3])
def test_a_search_is_that_of_the_allowed_items(backend, search, requests):
    """Shared and per request; no prefix is run that is not alive."""
    few = backend in ("triton", "emulated")
    for seed in range(2 if few else 6):
        trie, _, only, view = catalogues(seed, requests)
        k, model, contexts = 1 + seed % 9, Valued(), [seed + 3 * b for b in range(3)]
        seeds = torch.arange(3) + seed
        out = SEARCHES[search](model, contexts, view, k, seeds)
        for b, context in enumerate(contexts):
            its = only[b % requests]
            to = node_map(trie, its)
            with noise_of(to):
                want = SEARCHES[search](Valued(), [context], its, k, seeds[b : b + 1])
            assert out.num_valid[b] == want.num_valid[0]
            assert out.node[b].tolist() == to[want.node[0].long()].tolist()
            assert out.sequence[b].tolist() == want.sequence[0].tolist()
            torch.testing.assert_close(out.logp[b], want.logp[0], rtol=1e-5, atol=1e-5)
            alive = {
                tuple(s[:d]) for s in trie.sequences(trie.lookup(rows_of(its))).tolist() for d in range(9)
            }
            assert {prefix for r, prefix in model.evaluated if r == b} <= alive


def rows_of(only: Trie) -> torch.Tensor:
    return only.sequences(torch.arange(only.level_offset[-2], only.num_nodes))


@pytest.mark.parametrize("case", range(4))
def test_ved_skips_forced_tokens_as_the_sequential_search(backend, case):
    """Of the whole catalogue: under any filter what leads to one leaf leads to no other."""
    trie, _, _, view = catalogues(case)
    model, config = Valued(), VEDConfig(budget=trie.length + 12, num_value_beams=2)
    out = ved(model, [case], view, 6, config, seed=torch.tensor([case]))
    leaves, tree = ved_search(Valued(), [case], view, 6, config, seed=case)
    assert out.trees.node[0, : int(out.trees.size[0])].tolist() == [s.node for s in tree]
    assert out.node[0, : int(out.num_valid[0])].tolist() == [leaf.node for leaf in leaves]
    assert len(leaves) > 0 or view.lookup(torch.empty(0, dtype=torch.int64)) == -1


@every_decoder
def test_a_request_with_nothing_allowed(backend, decoder):
    """It has no candidates, and nothing is run for it but the prompt; the others are as they were."""
    trie, model = Trie.from_sequences([[0, 2, 4], [0, 2, 5], [1, 3, 6]]), Masked(8)
    out = DECODERS[decoder](model, 3, trie.restrict(ban=[[], [0, 1, 2], [1]]), 3)
    check_empty(type(out)(*(x[1:2] if isinstance(x, torch.Tensor) else x for x in out)), 1, 3, 3)
    assert set(out.node[0].tolist()) - {-1} <= {5, 6, 7} and out.num_valid[0] > 0
    assert set(out.node[2].tolist()) - {-1} <= {5, 7} and out.num_valid[2] > 0
    nothing = DECODERS[decoder](Masked(8), 2, trie.restrict(allow=[]), 3)
    check_empty(nothing, 2, 3, 3)


@every_decoder
def test_filters_of_other_requests_are_refused(decoder):
    with pytest.raises(ValueError, match="^trie is restricted for 2 requests, got logits of 3"):
        DECODERS[decoder](Masked(8), 3, Trie.from_sequences([[0, 2]]).restrict(ban=[[], []]), 2)


@pytest.mark.parametrize("requests", [1, 3])
def test_validation_knows_what_is_allowed(cpu, requests):
    """A model keeps its promise of finite logits where only banned tokens have others."""
    trie = Trie.from_sequences([[0, 2, 4], [0, 2, 5], [1, 3, 6], [1, 2, 2]])
    model = Masked(8, {(1,): float("nan"), (0, 2, 5): -float("inf")})
    model.finite_logits = True
    view = trie.restrict(ban=[[1, 2, 3]] * requests if requests > 1 else [1, 2, 3])
    config = VEDConfig(value_weight=0.0, child_values=False, num_value_beams=0)
    with vstar_ops.validation():
        for search in (beam_search, lambda *a: ved(*a, config)):
            assert (search(model, 3, view, 2).num_valid == 1).all()
            with pytest.raises(ValueError, match="finite_logits"):
                search(model, 3, trie, 2)


def test_inference_mode(backend):
    trie = Trie.from_sequences(ROWS, IDS)
    with torch.inference_mode():
        view = trie.restrict(ban=[70])
        view.update(allow=[70], ban=[[73]])
        view.reset(ban=[72, 73])
        assert beam_search(Masked(5), 1, view, 3).node.tolist() == [[3, -1, -1]]


def test_a_change_is_seen_by_what_is_compiled():
    """And nothing is compiled again."""
    trie = Trie.from_sequences([[0], [1], [2], [3]])
    view, logits, node = trie.restrict(ban=[[0], [1]]), torch.zeros(2, 1, 4), torch.zeros(2, 1).int()
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda z: vstar_ops.expand_topk(z, view, node, 4), fullgraph=True, backend=counter
    )
    assert compiled(logits).token.tolist() == [[1, 2, 3, -1], [0, 2, 3, -1]]
    view.update(allow=[0], ban=[[2, 3], [0, 1]])
    assert compiled(logits).token.tolist() == [[0, 1, -1, -1], [2, 3, -1, -1]]
    assert counter.frame_count == 1


class Flat:
    """A model on any device whose logits are the same after every prefix of so many tokens."""

    def __init__(self, device: torch.device | str) -> None:
        self.logits = torch.randn(12, COLUMNS, generator=torch.Generator().manual_seed(0)).to(device)

    def prefill(self, context: int) -> tuple[torch.Tensor, Any]:
        return self.logits[:context], None

    def extend(
        self, state: Any, parent: torch.Tensor, token: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.logits[: len(token)], parent.clone()


def test_on_a_device_the_host_waits_for_nothing(monkeypatch):
    """Changes by ids that are there, look-ups, searches of constant shapes; results are those of the CPU."""
    trie, _, _, _ = catalogues(11, requests=3, length=3)
    rng, results = np.random.default_rng(0), []
    first, second, prefixes = (
        torch.from_numpy(x)
        for x in (
            rng.choice(trie.item_ids, (3, 9)),
            rng.choice(trie.item_ids, 5),
            rng.integers(0, 6, (3, 4, 2)),
        )
    )
    for device in ("cpu", OTHER):
        with other_device(monkeypatch) as waits:
            model, there = Flat(device), trie.to(device)
            view = there.restrict(ban=[[], [1], [2]])
            a, b, p = first.to(device), second.to(device), prefixes.to(device)
            before = waits.total()
            view.update(allow=a, ban=b)
            view.reset(ban=a)
            found = [view.alive, view.lookup(p), view.bits.allowed]
            found += beam_search(model, 3, view, 4, skip_forced=False)
            found += topk_sampling(model, 3, view, 4, constant_shapes=True)
            assert waits.total() == before
            results.append([x.cpu() for x in found])
            assert {x.device for x in (view.alive, view.bits.allowed)} == {torch.device(device)}
    assert all(map(torch.equal, *results))


def test_token_logp_renormalizes(backend):
    """Over what stays legal for a request: as with the catalogue of its items."""
    _, _, only, view = catalogues(4, requests=3, length=3)
    logits = torch.randn(3, 5, COLUMNS, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets = torch.randint(0, COLUMNS, (3, 5), generator=torch.Generator().manual_seed(1))
    roots = torch.zeros(3, 5, dtype=torch.int64)
    out = vstar_ops.token_logp(logits, targets, view, roots)
    (got,) = torch.autograd.grad(out.logp.clamp(min=-50).sum(), logits)
    for b in range(3):
        z = logits[b].detach().requires_grad_()
        want = vstar_ops.token_logp(z, targets[b], only[b], roots[b])
        (gradient,) = torch.autograd.grad(want.logp.clamp(min=-50).sum(), z)
        for x, y in ((out.logp[b], want.logp), (out.entropy[b], want.entropy), (got[b], gradient)):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
