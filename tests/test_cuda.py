"""The CUDA C++ kernels beyond the tests of the ops: large sizes, order of threads, counts, sanitizers."""

from __future__ import annotations

import sys

import cuda_emulator
import numpy as np
import pytest
import torch
from helpers import assert_close, assert_same, map_tensors, op_arguments

import vstar_ops
from vstar_ops import SearchTrees, Trie
from vstar_ops.ops import OPS
from vstar_ops.verify import cases, generators
from vstar_ops.verify.calls import Call

pytestmark = pytest.mark.skipif(not cuda_emulator.COMPILER, reason="no C++ compiler")
REFERENCE = {name: op.overloads["reference"] for name, op in OPS.items()}


def run(name, *arguments):
    cuda_emulator.load()
    return getattr(torch.ops.vstar_ops_cuda, name).default(*arguments)


def expansion(logits, trie, k, *, seed=None):
    """Arguments of the op ``expand_topk`` for prefixes at the root."""
    node = torch.zeros(logits.shape[:2], dtype=torch.int32)
    options = {"entropy_weight": 0.1, "gumbel_seed": seed}
    return op_arguments("expand_topk", lambda: vstar_ops.expand_topk(logits, trie, node, k, **options))


def flat(columns):
    return Trie.from_sequences(np.arange(columns)[:, None])


# ---------------------------------------------------------------- the paths that large sizes take


@pytest.mark.parametrize("k", [1, 5, 100, 700, 3000])
@pytest.mark.parametrize("columns", [40, 1500])
def test_ties_beyond_the_list(columns, k):
    """Equal logits: whole segments reach the bound, more than the list of candidates takes."""
    for logits in (torch.zeros(2, 4, columns), torch.arange(columns).div(9).floor().expand(2, 4, columns)):
        case = expansion(logits, flat(columns), k)
        assert_close(run("expand_topk", *case), REFERENCE["expand_topk"](*case))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_no_bit_depends_on_alignment(dtype):
    """Rows that begin anywhere, against the same rows at a multiple of 16 bytes."""
    columns, trie = (
        2061,
        flat(2061),
    )  # two tiles, of which the second is shifted as a whole where rows are skewed
    values = torch.randn(3 * columns + 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    for start in range(9):
        row = values[start : start + columns].clone().view(1, 1, -1)
        moved = torch.empty(columns + 16, dtype=dtype)[start:][:columns].copy_(row.flatten()).view(1, 1, -1)
        for seed in (None, torch.tensor([5])):
            straight, skewed = (run("expand_topk", *expansion(x, trie, 50, seed=seed)) for x in (row, moved))
            assert all(torch.equal(a, b) for a, b in zip(straight, skewed))
            assert_close(straight, REFERENCE["expand_topk"](*expansion(row, trie, 50, seed=seed)))


def test_strides_beyond_32_bits():
    """Only the touched pages of these tensors exist."""
    far, trie = 2**31 + 16, flat(64)
    values = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1))
    logits = torch.empty(far + 3 * 64).as_strided((2, 3, 64), (far, 64, 1)).copy_(values)
    assert_close(
        run("expand_topk", *expansion(logits, trie, 9)), run("expand_topk", *expansion(values, trie, 9)), 0
    )
    tokens = torch.randint(0, 3, (2, 8, 3), generator=torch.Generator().manual_seed(2))
    wide = torch.empty(far + 64, dtype=torch.int64).as_strided((2, 8, 3), (far, 3, 1)).copy_(tokens)
    options = (None, 1e-4, 0, 0.0, 2, "sibling", "siblings")
    rewards = torch.rand(2, 8)
    assert_close(
        run("sibling_advantage", wide, rewards, *options),
        run("sibling_advantage", tokens, rewards, *options),
        0,
    )


def test_more_children_than_32_bits_number():
    trie = flat(4)
    logits = torch.empty(1, 1, 4).expand(1, 2**30, 4)
    node = torch.zeros(1, 1, dtype=torch.int32).expand(1, 2**30)
    case = list(expansion(torch.zeros(1, 1, 4), trie, 3))
    with pytest.raises(RuntimeError, match=r"logits must have fewer than 2\^32 legal children per request"):
        run("expand_topk", logits, *case[1:4], node, *case[5:])


def test_groups_beyond_shared_memory():
    """The scratch lies in a workspace, which the emulator fills with junk."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 12, (1, 2200, 3), generator=generator)
    rewards = torch.randn(1, 2200, generator=generator)
    mask = torch.rand(1, 2200, generator=generator) > 0.1
    case = (tokens, rewards, mask, 1e-4, 0, 0.0, 2, "sibling", "siblings")
    want = REFERENCE["sibling_advantage"](*case)
    assert_close(run("sibling_advantage", *case), want)
    item = torch.randn(1, 2200, 5, generator=generator)
    weights = torch.tensor([0.3, 0.5, 1.0], dtype=torch.float64)
    got = run("prefix_returns", tokens, item, tokens[:, 0], item[:, 0], mask, weights)
    assert_close(got[2:], want[2:])
    mine = int(mask[0].nonzero()[0])
    bucket = (tokens[0, :, 0] == tokens[0, mine, 0]) & mask[0]
    total = item[0, bucket].double().sum(0)
    cosine = torch.nn.functional.cosine_similarity(total, item[0, 0].double(), dim=0)
    assert float(got[1][0, mine, 0]) == pytest.approx(float(cosine), abs=1e-5)


# ---------------------------------------------------------------- what no seed may change


@pytest.mark.parametrize("name", OPS)
def test_the_order_of_threads_does_not_show(name):
    cuda_emulator.load()
    for make in (*cases.CASES[name].values(), *cases.PATHS[name]):
        arguments, results = op_arguments(name, make(3)), []
        for seed in range(5):
            cuda_emulator.seed(seed << 32)
            copies = map_tensors(torch.Tensor.clone, arguments)
            results.append((run(name, *copies), *copies))  # what it returns, and what it may have changed
        for other in results[1:]:
            assert_same(other, results[0])


# ---------------------------------------------------------------- counts by design


def counted(name, *case):
    run(name, *case)
    cuda_emulator.count(sectors=True)
    run(name, *case)
    found = cuda_emulator.counts()
    cuda_emulator.count()
    return found


def test_idle_launches_are_counted_and_run_nothing():
    """As ``benchmarks.overhead`` needs them."""
    arguments = op_arguments("group_advantage", cases.CASES["group_advantage"]["plain"](2))
    with cuda_emulator.idle():
        found = counted("group_advantage", *arguments)
    assert (found.launches, found.blocks) == (1, 0)
    assert counted("group_advantage", *arguments).blocks == 2


def test_dense_logits_are_read_once():
    """Two launches; all logits once, in whole sectors, and of everything else a few percent."""
    logits = torch.randn(1, 4, 8192, generator=torch.Generator().manual_seed(5)).bfloat16()
    found = counted("expand_topk", *expansion(logits, flat(8192), 1))
    ideal = logits.numel() * 2 // 32
    assert found.launches == 2
    assert found.blocks == 2 + 1  # a warp per 4,096 columns
    assert ideal <= found.sectors <= 1.1 * ideal
    assert found.bytes <= 1.2 * logits.numel() * 2


def test_only_legal_logits_are_read():
    """One launch, and traffic by the number of legal children, whatever the number of columns."""
    tokens = np.random.default_rng(6).choice(30_000, 64, replace=False)
    trie = Trie.from_sequences(tokens[:, None])
    logits = torch.randn(2, 8, 30_000)
    found = counted("expand_topk", *expansion(logits, trie, 16))
    children = 2 * 8 * 64
    assert found.launches == 1
    assert found.blocks == 2
    assert found.bytes <= 64 * children  # 4 a logit; tokens, maxima and row statistics are the rest


@pytest.mark.parametrize("columns", [8, 64, 1500])
def test_neither_dead_beams_nor_ties_cost_barriers(columns):
    """Few live rows leave fewer segments than winners; equal logits reach every bound."""
    logits, trie = torch.randn(1, 128, columns, generator=torch.Generator().manual_seed(20)), flat(columns)
    for live in (1, 20, 100, 128):
        for values in (logits, logits.round(), torch.zeros_like(logits)):
            case = list(expansion(values, trie, 128))
            case[3] = torch.where(torch.arange(128) < live, 0, -1).int()[None]
            found = counted("expand_topk", *case)
            assert found.barriers <= 45, (live, found)
            got, want = run("expand_topk", *case), REFERENCE["expand_topk"](*case)
            assert_close(got[:2], want[:2])  # scores of rounded logits nearly tie: the winners may be others


@pytest.mark.parametrize("group", [16, 64, 128, 300, 2000])
def test_sibling_advantage_is_one_launch(group):
    tokens = torch.randint(0, 6, (2, group, 3), generator=torch.Generator().manual_seed(7))
    rewards = torch.rand(2, group)
    found = counted("sibling_advantage", tokens, rewards, None, 1e-4, 0, 0.0, 2, "sibling", "siblings")
    assert (found.launches, found.blocks, found.atomics) == (1, 2, 0)
    once, small = tokens.numel() * 8 + rewards.numel() * 4, group <= 64
    # A small group's tokens are read twice, then from the cache; idle lanes read one of theirs. Of two warps
    # the first lane looks at the token before its own.
    lanes, before = (64, 2) if group > 32 else (32, 0)
    assert found.bytes == (rewards.numel() * 4 + 2 * 3 * 8 * (2 * lanes + before) if small else once)
    if group <= 128:
        assert found.barriers <= 2 * (20 if small else 30)


def test_candidates_read_no_list_if_enough_leaves_were_evaluated():
    """One launch, without barriers for each of the best."""
    arguments = list(op_arguments("ved_candidates", cases.ranking(4)))
    arguments[4] = torch.full_like(arguments[4], 3)  # all nodes are leaves
    few, many = (counted("ved_candidates", *arguments[:10], k, 0.0) for k in (1, 40))
    assert (few.launches, few.blocks) == (many.launches, many.blocks) == (1, 4)
    assert few.barriers <= 4 * 3
    assert few.warp_operations == 0
    assert few.barriers < many.barriers <= 4 * 6


def test_prefix_returns_reads_an_embedding_once_a_level():
    tokens = torch.randint(0, 6, (2, 32, 3), generator=torch.Generator().manual_seed(8))
    item, wanted = torch.randn(2, 32, 64), torch.randn(2, 64)
    weights = torch.tensor([0.3, 0.5, 1.0], dtype=torch.float64)
    found = counted("prefix_returns", tokens, item, tokens[:, 0], wanted, None, weights)
    assert found.launches == 1
    node = run("prefix_returns", tokens, item, tokens[:, 0], wanted, None, weights)[2]
    nodes = int(node.amax(dim=(1, 2)).add(1).sum())
    own = 3 * item.numel() * 4 + tokens.numel() * 8
    assert own <= found.bytes <= own + (nodes + 2 * 8) * (64 * 4 + 3 * 8)  # the target's, once a bucket


def test_prefix_tree_reads_the_tokens_once():
    tokens = torch.randint(0, 6, (2, 64, 3), generator=torch.Generator().manual_seed(9))
    found = counted("prefix_tree", tokens, None)
    assert (found.launches, found.blocks, found.atomics) == (1, 2, 0)
    assert found.bytes == tokens.numel() * 8


def test_token_logp_reads_the_logits_once_per_pass():
    """One launch per pass, one block per row; of everything else a target and a few numbers per row."""
    for name, make in (("token_logp", generators.scored), ("token_logp_backward", generators.differentiated)):
        call = make(4, columns=8192, targets=40, dtype=torch.bfloat16)
        found = counted(name, *op_arguments(name, call))
        assert (found.launches, found.blocks, found.atomics) == (1, 4, 0)
        logits = 4 * 8192 * 2
        targets = 4 * 40 * (8 + 4)
        # Backward, a target looks for the others that are equal to it.
        assert logits <= found.bytes <= logits + targets * (3 if name == "token_logp" else 100)


@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_reads_everything_once(masked):
    """Two launches, one more to count the tokens of a mask."""
    case = generators.policies(11, 3, 40, 3)
    mask = generators.random_mask(12, 3, 40) if masked else None
    call = Call(vstar_ops.sibling_grpo_loss, {**case, "mask": mask, "clip": (0.2, 0.2)})
    found = counted("sibling_grpo_loss", *op_arguments("sibling_grpo_loss", call))
    assert (found.launches, found.blocks, found.atomics) == (2 + masked, 3 * (1 + masked) + 1, 0)
    # logp, old, ref, advantage, count, valid, and the group's advantage for every token; the mask twice
    assert found.bytes <= case["tokens"].numel() * (5 * 4 + 1 + 4 + 2 * masked)


def test_a_round_of_the_search_is_two_launches():
    trees = SearchTrees.empty(8, 20, 3, children=4, leaves=2)
    select = [getattr(trees, name) for name in vstar_ops.ops.ved._SELECT]
    found = counted("ved_select", *select, 3, 1.0, 1, 10)
    assert (found.launches, found.blocks, found.barriers, found.atomics) == (1, 2, 0, 0)
    insert = [getattr(trees, name) for name in vstar_ops.ops.ved._INSERT]
    rows = [getattr(trees, name)[:, :3].clone() for name in vstar_ops.ops.ved._ROWS]
    found = counted("ved_insert", *insert, *rows, 0.0, 0.1)
    assert (found.launches, found.blocks, found.barriers, found.atomics) == (1, 2, 0, 0)


# ---------------------------------------------------------------- sanitizers


@pytest.mark.slow
@pytest.mark.skipif(bool(cuda_emulator.SANITIZERS), reason="this is the inner run")
def test_under_sanitizers():
    """The tests of the ops on kernels built with AddressSanitizer and UBSan, in a process of their own."""
    if not cuda_emulator.runtime("address"):
        pytest.skip("the compiler has no AddressSanitizer")
    files = [*sorted({f"tests/test_{op.module}.py" for op in OPS.values()}), "tests/test_every_op.py"]
    # Without capture: what a sanitizer prints when it ends the process would be lost.
    command = [sys.executable, "-m", "pytest", "-qxs", "-p", "no:cacheprovider", "-k", "emulated", *files]
    done = cuda_emulator.run_under("address,undefined", *command, ASAN_OPTIONS="detect_leaks=0")
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
