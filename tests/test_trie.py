"""The trie against dictionaries of prefixes."""

from __future__ import annotations

import json
import os
import time
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from vstar_ops import Trie
from vstar_ops.decoding import beam_search
from vstar_ops.verify.oracles import DictTrie

SMALL = [[0, 3], [0, 4], [2, 3], [0, 3]]


def random_rows(seed, num, length, high):
    return np.random.default_rng(seed).integers(0, high, (num, length))


def agree(trie: Trie, rows: np.ndarray) -> None:
    """Every query of every node, and the arrays, against the oracle."""
    want = DictTrie(rows.tolist(), rows.shape[1])
    nodes = torch.arange(len(want.prefixes))
    assert trie.num_nodes == len(want.prefixes)
    assert list(trie.level_offset) == want.level_offset
    assert trie.length == want.length
    assert trie.num_items == len(rows)
    assert trie.num_sequences == len({tuple(r) for r in rows.tolist()})
    assert trie.max_token == (int(rows.max()) if len(rows) else -1)
    assert trie.max_children == max(len(c) for c in want.children)
    assert [t.dtype for t in (trie.offset, trie.token, trie.item_offset)] == [torch.int32] * 3
    assert trie.item_ids.dtype == torch.int64
    offset = trie.offset.tolist()
    for n, children in enumerate(want.children):
        tokens = trie.token[offset[n] : offset[n + 1]].tolist()
        assert list(zip(tokens, range(offset[n] + 1, offset[n + 1] + 1))) == children
        assert trie.children(n).token.tolist() == [t for t, _ in children]
        assert trie.children(n).node.tolist() == [c for _, c in children]
        assert trie.items(n).tolist() == want.items[n]
    assert trie.num_children(nodes).tolist() == [len(c) for c in want.children]
    assert trie.depth(nodes).tolist() == [len(p) for p in want.prefixes]
    leaf = list(range(len(want.prefixes)))
    for n in reversed(range(want.level_offset[-2])):
        leaf[n] = leaf[want.children[n][0][1]] if len(want.children[n]) == 1 else -1
    assert trie.only_leaf.tolist() == leaf and trie.only_leaf.dtype == torch.int32
    assert trie.parent(nodes).tolist() == [want.node[p[:-1]] if p else -1 for p in want.prefixes]
    pad = [list(p) + [-1] * (want.length - len(p)) for p in want.prefixes]
    assert trie.sequences(nodes).tolist() == pad
    begin, end = trie.item_range(nodes)
    assert (end - begin).tolist() == [len(i) for i in want.items]
    for depth in range(want.length + 1):
        prefixes = [p for p in want.prefixes if len(p) == depth]
        found = trie.lookup(torch.tensor(prefixes, dtype=torch.int64).reshape(len(prefixes), depth))
        assert found.dtype == torch.int32
        assert found.tolist() == [want.node[p] for p in prefixes]


@given(
    seed=st.integers(0, 2**32 - 1),
    num=st.integers(0, 60),
    length=st.integers(1, 5),
    high=st.sampled_from([1, 2, 3, 10, 1000, 150_000, 2**31 - 1]),
    dtype=st.sampled_from([np.int32, np.int64, np.uint32]),
)
def test_oracle(seed, num, length, high, dtype):
    rows = random_rows(seed, num, length, high).astype(dtype)
    agree(Trie.from_sequences(rows), rows)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.uint32, np.uint64])
def test_narrow_inputs(dtype):
    rows = random_rows(0, 200, 4, 100).astype(dtype)
    agree(Trie.from_sequences(rows), rows)


@pytest.mark.parametrize("make", [torch.from_numpy, np.ndarray.tolist, np.asfortranarray, lambda x: x])
def test_kinds_of_input(make):
    rows = random_rows(1, 50, 3, 5)
    agree(Trie.from_sequences(make(rows)), rows)


def test_wide_keys():
    """Five columns of 150k values need more than one 64-bit sort key; most prefixes are shared."""
    rng = np.random.default_rng(2)
    rows = rng.choice(np.array([0, 1, 75_000, 149_998, 149_999]), (3000, 5))
    trie = Trie.from_sequences(rows)
    assert trie.sequences(trie.lookup(rows)).tolist() == rows.tolist()
    distinct = sorted({tuple(r) for r in rows.tolist()})
    leaves = torch.arange(trie.level_offset[-2], trie.num_nodes)
    assert [tuple(r) for r in trie.sequences(leaves).tolist()] == distinct


def test_largest_tokens():
    rows = np.array([[2**31 - 2] * 4, [0] * 4, [2**31 - 2, 0, 2**31 - 2, 1]])
    agree(Trie.from_sequences(rows), rows)


def test_input_is_not_changed_or_kept():
    rows = random_rows(3, 20, 1, 50)
    copy = rows.copy()
    trie = Trie.from_sequences(rows)
    assert (rows == copy).all()
    rows[:] = 0
    agree(trie, copy)


def test_collisions_keep_their_order():
    trie = Trie.from_sequences(SMALL, item_ids=[9, 8, 7, -6])
    assert trie.items(trie.lookup([0, 3])).tolist() == [9, -6]
    assert trie.items(0).tolist() == [9, -6, 8, 7]
    assert trie.num_items == 4
    assert trie.num_sequences == 3


def test_empty():
    for rows in (np.zeros((0, 3), np.int64), torch.zeros(0, 3, dtype=torch.int32)):
        trie = Trie.from_sequences(rows)
        assert (trie.num_nodes, trie.num_items, trie.max_token, trie.max_children) == (1, 0, -1, 0)
        assert trie.level_offset == (0, 1, 1, 1, 1)
        assert trie.lookup(torch.zeros(2, 0, dtype=torch.int64)).tolist() == [0, 0]
        assert trie.lookup([[0, 0], [1, 2]]).tolist() == [-1, -1]
        assert trie.children(0).token.tolist() == []
        assert trie.items(0).tolist() == []
        assert [x.tolist() for x in trie.item_range([0, -1, 5])] == [[0, 0, 0], [0, 0, 0]]
        assert trie.num_children([0, -1]).tolist() == [0, 0]
        assert trie.sequences([0]).tolist() == [[-1, -1, -1]]


def test_lookup_of_what_is_not_legal():
    trie = Trie.from_sequences(SMALL)
    queries = [
        [0, 3],
        [0, 5],
        [1, 3],
        [2, 4],
        [-1, 3],
        [0, -1],
        [2**31, 3],
        [0, 2**62],
        [-(2**63), 3],
        [2, 3],
    ]
    want = [3, -1, -1, -1, -1, -1, -1, -1, -1, 5]
    assert trie.lookup(torch.tensor(queries)).tolist() == want
    assert trie.lookup(torch.tensor(queries).view(2, 5, 2)).tolist() == [want[:5], want[5:]]
    assert trie.lookup(torch.zeros(0, 2, dtype=torch.int64)).shape == (0,)
    assert trie.lookup([0]).tolist() == 1
    with pytest.raises(ValueError, match=r"^prefixes "):
        trie.lookup([0, 3, 1])
    with pytest.raises(ValueError, match=r"^prefixes "):
        trie.lookup(3)
    with pytest.raises(TypeError, match=r"^prefixes "):
        trie.lookup(torch.zeros(1, 2))


@given(seed=st.integers(0, 2**32 - 1), high=st.integers(1, 6))
def test_lookup_of_random_prefixes(seed, high):
    rows = random_rows(seed, 25, 3, high)
    want = DictTrie(rows.tolist(), 3)
    trie = Trie.from_sequences(rows)
    queries = np.random.default_rng(seed + 1).integers(-1, high + 1, (100, 3))
    for depth in range(4):
        expected = [want.node.get(tuple(q), -1) for q in queries[:, :depth].tolist()]
        assert trie.lookup(queries[:, :depth]).tolist() == expected


@pytest.mark.parametrize("node", [-1, -2, -(2**62), 6, 7, 2**40])
def test_dead_nodes_stay_dead(node):
    trie = Trie.from_sequences(SMALL)
    assert trie.children(node).token.tolist() == []
    assert trie.items(node).tolist() == []
    assert int(trie.num_children(node)) == 0
    assert int(trie.parent(node)) == -1
    assert int(trie.depth(node)) == -1
    assert trie.sequences(node).tolist() == [-1, -1]
    begin, end = trie.item_range(node)
    assert int(begin) == int(end)


def test_many_nodes_at_once_are_padded():
    trie = Trie.from_sequences(SMALL)
    children = trie.children([[0, 1], [2, -1]])
    assert children.token.tolist() == [[[0, 2], [3, 4]], [[3, -1], [-1, -1]]]
    assert children.node.tolist() == [[[1, 2], [3, 4]], [[5, -1], [-1, -1]]]
    assert trie.items([1, 2, -1]).tolist() == [[0, 3, 1], [2, -1, -1], [-1, -1, -1]]
    assert trie.children(torch.zeros(0, dtype=torch.int64)).token.shape == (0, 0)


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        (([1, 2],), ValueError, "sequences"),
        ((np.zeros((3, 0), np.int64),), ValueError, "sequences"),
        (([[1, 2], [3]],), ValueError, "sequences"),
        (([[1.0, 2.0]],), TypeError, "sequences"),
        ((torch.zeros(2, 2),), TypeError, "sequences"),
        ((torch.zeros(2, 2, dtype=torch.bool),), TypeError, "sequences"),
        (([["a"]],), TypeError, "sequences"),
        (([[0, -1]],), ValueError, "sequences"),
        (([[0, 2**31 - 1]],), ValueError, "sequences"),
        (([[0, 2**40]],), ValueError, "sequences"),
        (([[0, 1]], [1, 2]), ValueError, "item_ids"),
        (([[0, 1]], [[1]]), ValueError, "item_ids"),
        (([[0, 1]], [0.5]), TypeError, "item_ids"),
    ],
)
def test_errors_name_the_argument(arguments, error, name):
    with pytest.raises(error, match=f"^{name} must"):
        Trie.from_sequences(*arguments)


def test_items_of_different_lengths_are_told_what_they_need():
    with pytest.raises(ValueError, match="rows of different lengths; short items end with an end token"):
        Trie.from_sequences([[1, 2], [3]])


@given(seed=st.integers(0, 2**32 - 1), num=st.integers(0, 40), length=st.integers(1, 4))
def test_compact(seed, num, length):
    """The same nodes, under tokens that leave out no number."""
    rows = random_rows(seed, num, length, 2**31 - 2)
    rows[: num // 2] %= 5
    trie = Trie.from_sequences(rows)
    compact, columns = trie.compact()
    assert columns.dtype == torch.int64
    assert columns.tolist() == sorted(set(rows.flatten().tolist()))
    assert (compact.max_token, compact.max_children) == (len(columns) - 1, trie.max_children)
    assert torch.equal(columns[compact.token.long()], trie.token.long())
    agree(compact, np.searchsorted(columns.numpy(), rows))
    nodes = torch.arange(trie.num_nodes)
    assert torch.equal(compact.items(nodes), trie.items(nodes))
    again = compact.compact()
    assert torch.equal(again.columns, torch.arange(len(columns)))
    assert torch.equal(again.trie.token, compact.token)
    assert compact.offset.data_ptr() == trie.offset.data_ptr(), "what is the same is shared"


def test_repr_and_to():
    trie = Trie.from_sequences(SMALL)
    assert "4 items" in repr(trie)
    moved = trie.to("meta")
    assert moved.device.type == "meta"
    assert trie.device.type == "cpu"
    assert (moved.level_offset, moved.max_token, moved.max_children) == ((0, 1, 3, 6), 4, 2)


# ---------------------------------------------------------------- storage


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(("num", "length"), [(0, 1), (0, 3), (1, 1), (1, 4), (500, 3)])
def test_save_and_load(tmp_path, num, length, verify):
    rows = random_rows(num, num, length, 9)
    path = tmp_path / "trie"
    Trie.from_sequences(rows).save(path)
    agree(Trie.load(path, verify=verify), rows)
    assert os.listdir(tmp_path) == ["trie"]


def test_save_replaces(tmp_path):
    path = tmp_path / "trie.safetensors"
    for rows in (SMALL, [[1, 1]]):
        Trie.from_sequences(rows).save(str(path))
        agree(Trie.load(str(path)), np.array(rows))


def test_a_trie_in_use_survives_a_replaced_file(tmp_path):
    path = tmp_path / "trie"
    Trie.from_sequences(SMALL).save(path)
    old = Trie.load(path)
    Trie.from_sequences([[1, 1]]).save(path)
    agree(old, np.array(SMALL))


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        Trie.load(tmp_path / "nothing")


def damaged(path) -> None:
    with pytest.raises(ValueError, match=r"damaged|expected the format") as error:
        Trie.load(path)
    assert str(path) in str(error.value)


def test_truncated_files(tmp_path):
    path = tmp_path / "trie"
    Trie.from_sequences(SMALL).save(path)
    whole = path.read_bytes()
    for size in [0, 1, 7, 8, 9, 60, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:size])
        damaged(path)


def test_foreign_files(tmp_path):
    path = tmp_path / "trie"
    path.write_bytes(os.urandom(500))
    damaged(path)
    save_file({"weight": torch.zeros(3)}, path)
    damaged(path)
    save_file({"weight": torch.zeros(3)}, path, {"format": "vstar_ops.trie.v1"})
    damaged(path)


@pytest.mark.parametrize(
    "meta",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"level_offset": [0, 1, 3, 6]}',
        '{"max_children": 2}',
        '{"level_offset": 3, "max_children": 2}',
        '{"level_offset": [0, 1, "x", 6], "max_children": 2}',
        '{"level_offset": [0, 1, 3, 6], "max_children": null}',
    ],
)
def test_damaged_metadata(tmp_path, meta):
    path = tmp_path / "trie"
    trie = Trie.from_sequences(SMALL)
    arrays = {n: getattr(trie, n) for n in ("offset", "token", "item_offset", "item_ids")}
    save_file(arrays, path, {"format": "vstar_ops.trie.v1", "trie": meta})
    damaged(path)


@pytest.mark.parametrize(
    "levels", [[0, 1, 2, 6], [0, 1, 4, 6], [0, 1, 6], [0, 1, 3, 5], [0, 2, 3, 6], [0, 6]]
)
def test_wrong_levels(tmp_path, levels):
    path = tmp_path / "trie"
    trie = Trie.from_sequences(SMALL)
    trie.level_offset = tuple(levels)
    trie.save(path)
    damaged(path)


@pytest.mark.parametrize("name", ["offset", "token", "item_offset"])
@pytest.mark.parametrize("value", [-1, 10**9, "swap", "shape", "dtype"])
def test_damaged_arrays(tmp_path, name, value):
    """Every element of every array: what loads is a trie again, what is none raises."""
    path = tmp_path / "trie"
    for at in range(len(getattr(Trie.from_sequences(SMALL), name))):
        trie = Trie.from_sequences(SMALL)
        array = getattr(trie, name)
        if value == "swap":
            other = (at + 1) % len(array)
            if array[at] == array[other]:
                continue
            array[[at, other]] = array[[other, at]]
        elif value == "shape":
            setattr(trie, name, array[:-1])
        elif value == "dtype":
            setattr(trie, name, array.long())
        else:
            array[at] = value
        trie.save(path)
        loaded = load_or_refuse(path)
        if loaded is not None:
            assert name == "token"  # another token may make another trie
            agree_with_itself(loaded)


def load_or_refuse(path) -> Trie | None:
    """The trie, or None where the file is refused by an error that names it."""
    try:
        return Trie.load(path)
    except ValueError as error:
        if str(path) not in str(error):
            raise
        return None


def same(a: Trie, b: Trie) -> bool:
    arrays = ("offset", "token", "item_offset", "item_ids")
    return a.level_offset == b.level_offset and all(torch.equal(getattr(a, n), getattr(b, n)) for n in arrays)


@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_bit_is_told_or_changes_nothing(tmp_path, bit):
    """Every byte of the file; what is loaded is the catalogue that was saved."""
    path = tmp_path / "trie"
    trie = Trie.from_sequences(SMALL, np.arange(len(SMALL)) + 5)
    trie.save(path)
    whole, refused = path.read_bytes(), 0
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
        loaded = load_or_refuse(path)
        refused += loaded is None
        assert loaded is None or same(loaded, trie), at
    assert refused > 0.5 * len(whole)


@given(
    st.integers(0, 2**32),
    st.integers(0, 30),
    st.integers(0, 12),
    st.integers(1, 4),
    st.sampled_from([2, 9, 2**31 - 1]),
)
def test_a_catalogue_that_grows_and_shrinks(seed, old, new, length, high):
    """As a catalogue that was built at once; items of one sequence keep their order."""
    rows = random_rows(seed, old + new, length, high)
    ids = np.random.default_rng(seed).permutation(np.arange(-7, 100))[: old + new] - 2**60
    trie = Trie.from_sequences(rows[:old], ids[:old])
    grown = trie.with_items(rows[old:], ids[old:])
    assert same(grown, Trie.from_sequences(rows, ids))
    assert same(grown.without_items(ids[old:]), trie)
    assert same(grown.without_items(torch.from_numpy(ids[:old])), Trie.from_sequences(rows[old:], ids[old:]))
    assert same(grown.without_items(ids), Trie.from_sequences(rows[:0], ids[:0]))


def test_ids_of_new_items():
    trie = Trie.from_sequences(SMALL)
    assert same(trie.with_items([[2, 3], [1, 1]]), Trie.from_sequences([*SMALL, [2, 3], [1, 1]]))
    named = Trie.from_sequences([[1]], [40]).with_items([[0], [1]])
    assert named.items(0).tolist() == [41, 40, 42]
    assert same(Trie.from_sequences(np.zeros((0, 2), np.int64)).with_items(SMALL), trie)
    twice = Trie.from_sequences([[1], [2], [3]], [7, 8, 7])
    assert twice.without_items([7]).items(0).tolist() == [8]


def test_a_search_keeps_the_trie_that_it_was_given():
    """A catalogue is replaced while a search on it is under way."""
    trie, now = Trie.from_sequences(SMALL), {}

    class Replacing:
        finite_logits = True

        def prefill(self, context):
            return torch.zeros(len(context), 9), None

        def extend(self, state, parent, token):
            now["trie"] = trie.without_items([1]).with_items([[0, 8]])
            return torch.zeros(len(parent), 9), torch.arange(len(parent))

    for skip_forced in (True, False):
        found = beam_search(Replacing(), torch.zeros(1), trie, 9, skip_forced=skip_forced)
        assert found.sequence[0, :3].tolist() == [[2, 3], [0, 3], [0, 4]]
    found = beam_search(Replacing(), torch.zeros(1), now["trie"], 9)
    assert found.sequence[0, :3].tolist() == [[2, 3], [0, 3], [0, 8]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t.with_items([[1, 2, 3]]), ValueError, r"\[M, L\] with L = 2, got \[1, 3\]"),
        (lambda t: t.with_items([[1, -2]]), ValueError, "must hold tokens >= 0, got -2"),
        (lambda t: t.with_items([[1, 2]], [1, 2]), ValueError, r"\[N\] = \[1\], got \[2\]"),
        (lambda t: t.with_items([[1, 2]], [-1]), ValueError, "must not hold -1"),
        (lambda t: t.with_items([[1.0, 2]]), TypeError, "sequences must be integers"),
        (lambda t: t.without_items([3, 77]), ValueError, "must be ids of the trie's items, got 77"),
        (lambda t: t.without_items([0.5]), TypeError, "item_ids must be integers"),
        (
            lambda t: Trie.from_sequences([[1]], [2**63 - 1]).with_items([[2]]),
            ValueError,
            "item_ids must be given where the largest id is 9223372036854775807",
        ),
    ],
)
def test_changes_that_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        change(Trie.from_sequences(SMALL))


def test_files_of_the_format_without_a_checksum(tmp_path):
    trie = Trie.from_sequences(SMALL)
    arrays = {n: getattr(trie, n) for n in ("offset", "token", "item_offset", "item_ids")}
    meta = json.dumps({"level_offset": trie.level_offset, "max_children": trie.max_children})
    save_file(arrays, tmp_path / "trie", {"format": "vstar_ops.trie.v1", "trie": meta})
    assert same(Trie.load(tmp_path / "trie"), trie)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.array([7, 2**63 + 5], np.uint64), "item_ids must fit in int64, got 9223372036854775813"),
        (np.array([7, 2**64 - 1], np.uint64), "item_ids must fit in int64, got 18446744073709551615"),
        ([7, 2**63], "item_ids must fit in int64, got 9223372036854775808"),  # NumPy makes them floats
        ([7, 2**64], "item_ids must fit in int64, got 18446744073709551616"),  # and these objects
        ([7, -(2**63) - 1], "item_ids must fit in int64, got -9223372036854775809"),
        ([7, -1], "item_ids must not hold -1"),
    ],
)
def test_ids_that_would_become_others(ids, message):
    with pytest.raises(ValueError, match=message):
        Trie.from_sequences([[1], [2]], ids)


def test_hashed_ids():
    large = np.array([2**63 - 1, 5], np.uint64)
    for ids in (large, torch.tensor([-(2**63), -2]), np.array([3, 2], np.uint8)):
        trie = Trie.from_sequences([[1], [2]], ids)
        assert trie.items(trie.lookup([[1], [2]]))[:, 0].tolist() == [int(x) for x in ids]


def agree_with_itself(trie: Trie) -> None:
    leaves = torch.arange(trie.level_offset[-2], trie.num_nodes)
    rows = trie.sequences(leaves)
    assert torch.equal(trie.lookup(rows).long(), leaves)
    assert int(rows.min()) >= 0
    assert int(rows.max()) == trie.max_token


def test_flipped_bytes_in_the_header(tmp_path):
    path = tmp_path / "trie"
    Trie.from_sequences(SMALL).save(path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for at in range(header):
        for flip in (0x01, 0x10):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
            load_or_refuse(path)


# ---------------------------------------------------------------- time and memory


@pytest.mark.slow
def test_a_million_items():
    rows = np.random.default_rng(0).integers(0, 256, (1_000_000, 4))
    times = []
    for _ in range(2):
        start = time.process_time()  # all threads together
        trie = Trie.from_sequences(rows)
        times.append(time.process_time() - start)
    assert min(times) <= 3
    distinct = np.unique(rows @ (256 ** np.arange(3, -1, -1)))
    assert trie.num_sequences == len(distinct)
    sample = rows[::1000]
    assert trie.sequences(trie.lookup(sample)).tolist() == sample.tolist()


def test_memory_of_a_build():
    rows = np.random.default_rng(0).integers(0, 150_000, (200_000, 4))
    tracemalloc.start()
    try:
        Trie.from_sequences(rows)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10 * rows.nbytes
