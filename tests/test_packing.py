"""Packed rows: masks, outputs and gradients against the conventional computation, a row per candidate."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

import vstar_ops
from vstar_ops.packing import PackedRows, pack_prompts
from vstar_ops.train import scoring
from vstar_ops.train.model import SIDTransformer
from vstar_ops.trie import Trie

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB = 11


class Decoder(nn.Module):
    """A decoder as any other: token ids, position ids and a mask of four dimensions in, logits out."""

    def __init__(self, layers: int = 2, dim: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCAB, dim), nn.Embedding(32, dim)
        self.layers = nn.ModuleList(nn.Linear(dim, 3 * dim) for _ in range(layers))
        self.ups = nn.ModuleList(nn.Linear(dim, dim) for _ in range(layers))
        self.heads = heads

    def forward(self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.token(input_ids) + self.position(position_ids)
        for qkv, up in zip(self.layers, self.ups):
            q, k, v = qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            x = x + F.scaled_dot_product_attention(q, k, v, attention_mask).transpose(1, 2).flatten(2)
            x = x + torch.tanh(up(x))
        return x @ self.token.weight.T


def make(seed: int, batch: int, group: int, length: int, columns: int, padding: str):
    """Prompts, padding of which holds garbage, candidates that share prefixes, masks."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(VOCAB, (batch, columns), generator=generator)
    real = torch.randint(1, columns + 1, (batch, 1), generator=generator)
    place = torch.arange(columns)
    prompt_mask = {"none": place >= 0 * real, "right": place < real, "left": place >= columns - real}[padding]
    tokens = torch.randint(3, (batch, group, length), generator=generator)
    return prompt, prompt_mask, tokens, torch.rand(batch, group, generator=generator) < 0.8


def conventional(
    model: nn.Module, prompt: Tensor, prompt_mask: Tensor, tokens: Tensor, mask: Tensor
) -> Tensor:
    """``[B, G, L]`` from a row for each candidate, one after the other, no padding anywhere."""
    logp = []
    for b, g in ((b, g) for b in range(len(prompt)) for g in range(tokens.shape[1])):
        row = torch.cat([prompt[b][prompt_mask[b]], tokens[b, g]])[None]
        causal = torch.ones(1, 1, row.shape[1], row.shape[1], dtype=torch.bool).tril()
        logits = model(row, torch.arange(row.shape[1])[None], causal)[0].log_softmax(-1)
        before = row.shape[1] - tokens.shape[2] - 1
        logp.append(logits[before:-1].gather(1, tokens[b, g][:, None])[:, 0] * mask[b, g])
    return torch.stack(logp).view(tokens.shape)


def log_softmax(packed: PackedRows, logits: Tensor) -> Tensor:
    """What ``packed.logp`` computes, of double precision too."""
    return packed.chosen(logits) - packed.unpack(logits.logsumexp(2), packed.source)


def gradients(model: nn.Module, logp: Tensor) -> list[Tensor]:
    weight = torch.linspace(-1, 1, logp.numel(), dtype=logp.dtype).view_as(logp)
    return list(torch.autograd.grad((weight * logp.exp()).sum(), list(model.parameters())))


@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 3),
    group=st.integers(1, 6),
    length=st.integers(1, 4),
    columns=st.integers(1, 5),
    padding=st.sampled_from(["none", "left", "right"]),
    leaves=st.booleans(),
    compact=st.booleans(),
    additive=st.booleans(),
)
def test_log_probabilities_and_gradients_in_double(
    seed, batch, group, length, columns, padding, leaves, compact, additive
) -> None:
    torch.manual_seed(seed)
    model = Decoder().double()
    prompt, prompt_mask, tokens, mask = make(seed, batch, group, length, columns, padding)
    packed = pack_prompts(prompt, tokens, mask, prompt_mask=prompt_mask, leaves=leaves, compact=compact)
    see = packed.mask(torch.float64 if additive else None)
    logits = model(packed.input_ids, packed.position_ids, see)
    logp = log_softmax(packed, packed.select(logits))
    want = conventional(model, prompt, prompt_mask, tokens, mask)
    torch.testing.assert_close(logp, want, rtol=0, atol=1e-10)
    single, entropy = packed.logp_and_entropy(packed.select(logits).float(), temperature=0.7)
    policy = (packed.select(logits) / 0.7).log_softmax(2)
    want_entropy = packed.unpack(-(policy.exp() * policy).sum(2), packed.source).float()
    torch.testing.assert_close(entropy, want_entropy, rtol=1e-5, atol=1e-5)
    want_single = log_softmax(packed, packed.select(logits) / 0.7).float()
    torch.testing.assert_close(single, want_single, rtol=1e-5, atol=1e-5)
    for got, expected in zip(gradients(model, logp), gradients(model, want)):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    if not compact:
        assert packed.depth.shape[1] == group * (length if leaves else length - 1)
    if padding != "right":  # what a model that keeps the last logits gives
        assert torch.equal(logits[:, -packed.outputs.shape[1] :], packed.select(logits))


@given(
    seed=st.integers(0, 2**32 - 1),
    leaves=st.booleans(),
    compact=st.booleans(),
)
def test_candidates_that_end_early(seed, leaves, compact) -> None:
    """What lies behind an end is in no row, is not predicted, and changes nothing."""
    torch.manual_seed(seed)
    model = Decoder().double()
    prompt, prompt_mask, tokens, _ = make(seed, 2, 5, 4, 3, "left")
    there = torch.arange(4) < torch.randint(0, 5, (2, 5, 1))
    whole = pack_prompts(prompt, tokens, prompt_mask=prompt_mask)
    want = whole.logp(whole.select(model(whole.input_ids, whole.position_ids, whole.mask())).float())
    options = {"prompt_mask": prompt_mask, "leaves": leaves, "compact": compact}
    rows = [pack_prompts(prompt, tokens.masked_fill(~there, pad), there, **options) for pad in (0, 2)]
    for packed in rows:
        logits = model(packed.input_ids, packed.position_ids, packed.mask())
        torch.testing.assert_close(
            packed.logp(packed.select(logits).float()), want * there, rtol=1e-5, atol=1e-5
        )
        assert torch.equal(packed.source >= 0, there)
    assert torch.equal(rows[0].input_ids, rows[1].input_ids)
    nodes = [
        {
            tuple(tokens[b, g, :n].tolist())
            for g in range(5)
            for n in range(1, int(there[b, g].sum()) + leaves)
        }
        for b in range(2)
    ]
    assert (packed.depth > 0).sum(1).tolist() == [len(x) for x in nodes]


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_gradients_in_float32(padding: str) -> None:
    torch.manual_seed(0)
    model = Decoder()
    prompt, prompt_mask, tokens, mask = make(1, 4, 8, 3, 6, padding)
    packed = pack_prompts(prompt, tokens, mask, prompt_mask=prompt_mask)
    logp = packed.logp(packed.select(model(packed.input_ids, packed.position_ids, packed.mask())))
    want = conventional(model, prompt, prompt_mask, tokens, mask)
    torch.testing.assert_close(logp, want, rtol=1e-5, atol=1e-5)
    for got, expected in zip(gradients(model, logp), gradients(model, want)):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def see_by_hand(packed: PackedRows, prompt_mask: Tensor) -> Tensor:
    """The mask from its definition: a node's prefix begins with that of what it sees."""
    batch, columns = packed.input_ids.shape
    start = packed.prompt_columns
    see = torch.eye(columns, dtype=torch.bool).repeat(batch, 1, 1)
    for b in range(batch):
        prefix: dict[int, list[int]] = {}
        for g, row in enumerate(packed.tokens[b].tolist()):
            for level, own in enumerate(packed.own[b, g].tolist()):
                if own > 0:
                    prefix[start + own - 1] = row[: level + 1]
        assert sorted(prefix) == [i for i in range(start, columns) if packed.real[b, i]]
        for i in range(columns):
            for j in range(start):
                see[b, i, j] |= bool(prompt_mask[b, j]) and (i >= start or j <= i)
        for i, own in prefix.items():
            for j, above in prefix.items():
                see[b, i, j] |= own[: len(above)] == above
    return see


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("leaves", [True, False])
def test_masks_by_hand(padding: str, leaves: bool) -> None:
    prompt, prompt_mask, tokens, mask = make(3, 3, 5, 3, 4, padding)
    packed = pack_prompts(prompt, tokens, mask, prompt_mask=prompt_mask, leaves=leaves)
    see = packed.mask()
    assert see.shape == (3, 1, *packed.input_ids.shape[1:] * 2)
    want = see_by_hand(packed, prompt_mask)
    # A column of padding or an unused node only matters to itself: what it sees is nobody's business.
    lively = packed.real[:, :, None] & packed.real[:, None] | torch.eye(want.shape[1], dtype=torch.bool)
    assert torch.equal(see[:, 0] & lively, want & lively)
    assert not (see[:, 0] & packed.real[:, :, None] & ~packed.real[:, None]).any()
    numbers = packed.mask(torch.bfloat16)
    assert torch.equal(numbers == 0, see) and (numbers[~see] == torch.finfo(torch.bfloat16).min).all()
    prompt_length = prompt_mask.sum(1)
    real = packed.real[:, packed.prompt_columns :]
    positions = packed.position_ids[:, packed.prompt_columns :]
    assert torch.equal(positions[real], (prompt_length[:, None] - 1 + packed.depth)[real])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("length", [1, 3])
def test_flex_attention_is_the_dense_mask(padding: str, length: int) -> None:
    prompt, prompt_mask, tokens, mask = make(4, 3, 5, length, 4, padding)
    packed = pack_prompts(prompt, tokens, mask, prompt_mask=prompt_mask)
    columns = packed.input_ids.shape[1]
    size = {"B": 3, "H": None, "Q_LEN": columns, "KV_LEN": columns, "device": "cpu"}
    assert torch.equal(create_mask(packed.mask_mod(), **size), packed.mask())
    q, k, v = torch.randn(3, 3, 2, columns, 16).unbind(0)
    block_mask = create_block_mask(packed.mask_mod(), **size)
    got = flex_attention(q, k, v, block_mask=block_mask)
    want = F.scaled_dot_product_attention(q, k, v, packed.mask())
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_only_needed_prefixes_are_run() -> None:
    """A prefix is run for a longer one that is needed; the others have no output, and log-probability 0."""
    tokens = torch.tensor([[[1, 2, 3], [1, 2, 4], [5, 6, 7]]])
    needed = torch.tensor([[[False, True, True], [False, False, False], [False, False, False]]])
    packed = pack_prompts(torch.tensor([[9]]), tokens, needed=needed, compact=True)
    assert packed.input_ids.tolist() == [[9, 1, 2]] and packed.depth.tolist() == [[1, 2]]
    assert packed.source.tolist() == [[[0, 1, 2], [0, 1, 2], [0, -1, -1]]]
    assert packed.own.tolist() == [[[1, 2, -1], [1, 2, -1], [-1, -1, -1]]]
    assert packed.ancestor.tolist() == [[[0, -1, -1], [0, 1, -1]]]
    logp = packed.logp(torch.randn(1, 3, VOCAB))
    assert (logp[0, 2, 1:] == 0).all() and (logp[0, :2] != 0).all()
    assert packed.of_nodes(tokens).tolist() == [[1, 2]]
    values = packed.unpack(torch.tensor([[1.0, 2.0, 3.0]]), packed.own)
    assert values.tolist() == [[[2, 3, 0], [2, 3, 0], [0, 0, 0]]]


def test_empty_shapes() -> None:
    for batch, group, length in ((0, 2, 3), (2, 0, 3), (2, 3, 1)):
        prompt, tokens = torch.ones(batch, 2, dtype=torch.int64), torch.ones(batch, group, length).long()
        for compact in (True, False):
            packed = pack_prompts(prompt, tokens, compact=compact)
            assert packed.mask().shape == (batch, 1, *packed.input_ids.shape[1:] * 2)
            logp = packed.logp(torch.randn(batch, packed.outputs.shape[1], VOCAB))
            assert logp.shape == (batch, group, length)
    nobody = pack_prompts(torch.ones(2, 3).long(), torch.ones(2, 4, 3).long(), torch.zeros(2, 4) > 0)
    assert (nobody.source == -1).all() and not nobody.real[:, 3:].any()
    assert not nobody.logp(torch.randn(2, nobody.outputs.shape[1], VOCAB)).any()


def test_unpacking_repeats_rows() -> None:
    """Values of several axes, and the gradient of rows that several candidates share."""
    prompt, _, tokens, mask = make(5, 2, 6, 3, 3, "none")
    packed = pack_prompts(prompt, tokens, mask, leaves=True)
    x = torch.randn(2, packed.outputs.shape[1], 2, 3, dtype=torch.float64, requires_grad=True)
    for at in (packed.source, packed.own):
        out = packed.unpack(x, at)
        assert out.shape == (2, 6, 3, 2, 3)
        for b, g, i in torch.cartesian_prod(torch.arange(2), torch.arange(6), torch.arange(3)).tolist():
            want = x[b, at[b, g, i]] if mask[b, g] else torch.zeros(2, 3).double()
            assert torch.equal(out[b, g, i], want)
    assert torch.autograd.gradcheck(lambda y: packed.unpack(y, packed.source), x, fast_mode=True)


def test_no_host_synchronization() -> None:
    """Without compact, nothing of the values reaches the host: the shapes alone are enough to trace it."""
    prompt, prompt_mask, tokens, mask = make(6, 2, 4, 3, 5, "left")

    def pack(prompt: Tensor, prompt_mask: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        packed = pack_prompts(prompt, tokens, mask, prompt_mask=prompt_mask)
        return packed.input_ids, packed.position_ids, packed.mask(), packed.source, packed.outputs

    compiled: Callable[..., tuple[Tensor, ...]] = torch.compile(pack, fullgraph=True, backend="aot_eager")
    arguments = (prompt, prompt_mask, tokens, mask)
    assert all(torch.equal(a, b) for a, b in zip(compiled(*arguments), pack(*arguments)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prompt": torch.ones(2, 3)}, TypeError, "prompt must be int32 or .*, got float32"),
        ({"prompt": torch.ones(3).long()}, ValueError, r"prompt must have the shape \[B, T\]"),
        ({"tokens": torch.ones(3, 2, 2).long()}, ValueError, r"tokens must have the shape \[B, G, L\]"),
        ({"mask": torch.ones(2, 2)}, TypeError, "mask must be bool"),
        ({"prompt_mask": torch.ones(2, 4).bool()}, ValueError, r"prompt_mask must have the shape \[B, T\]"),
        ({"needed": torch.ones(2, 2).bool()}, ValueError, r"needed must have the shape \[B, G, L\]"),
        ({"prompt_mask": torch.tensor([[0, 0, 0], [0, 0, 1]])}, ValueError, "padding alone"),
    ],
)
def test_errors_name_the_argument(change, error, message) -> None:
    given = {"prompt": torch.ones(2, 3).long(), "tokens": torch.ones(2, 2, 2).long()} | change
    with vstar_ops.validation(), pytest.raises(error, match=message):
        pack_prompts(given.pop("prompt"), given.pop("tokens"), **given)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("values", [True, False])
def test_the_reference_model(dtype: torch.dtype, tolerance: float, values: bool) -> None:
    """Outputs and gradients with packing are those of a row per candidate, on both sides of padding."""
    torch.manual_seed(0)
    catalogue = torch.unique(
        torch.stack([torch.randint(4, (30,)) + 4 * level for level in range(3)], 1), dim=0
    )
    trie = Trie.from_sequences(catalogue)
    model = SIDTransformer(12, 15, dim=16, layers=2, heads=2)
    if values:
        model.add_value_head(child_values=True)
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    model = model.to(dtype).eval()
    context = torch.tensor([[0, 4, 8, 1, 5, 9], [2, 6, 10, -1, -1, -1], [-1, -1, -1, 2, 6, 10], [-1] * 6])
    candidates = catalogue[torch.randint(len(catalogue), (4, 8))]
    candidates[2, 6:] = -1
    results = []
    for pack in (True, False):
        laid_out = scoring.candidate_rows(model, context, trie, candidates, values=True, pack=pack)
        rows = laid_out.rows
        if dtype == torch.float32:
            scores = laid_out.scores(lambda r: model.packed(r, child_values=values))
            given = [x for x in scores if x is not None]
        else:
            logits, value, child_value = model.packed(rows, child_values=values)
            given = [log_softmax(rows, logits).view(candidates.shape)]
            if value is not None and child_value is not None:
                given.append(rows.unpack(value, rows.own).view(candidates.shape))
                given.append(rows.chosen(child_value).view(candidates.shape))
        weight = torch.linspace(-1, 1, given[0].numel(), dtype=dtype).view_as(given[0])
        total = sum((weight * x).square().sum() for x in given)
        parameters = [p for name, p in model.named_parameters() if values or "value_head" not in name]
        results.append([*given, *torch.autograd.grad(total, parameters)])
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
