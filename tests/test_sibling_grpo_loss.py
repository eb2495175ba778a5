"""``sibling_grpo_loss``: by hand, against its oracle, finite differences and the loss in plain torch.

The table below teaches the op; read it first.
"""

from __future__ import annotations

import math
import warnings
from itertools import product
from typing import Any, NamedTuple

import loss_reference
import numpy as np
import pytest
import torch
from conftest import BACKENDS
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import vstar_ops
from vstar_ops import (
    SiblingAdvantage,
    Trie,
    group_advantage,
    loss_counts,
    sibling_advantage,
    sibling_grpo_loss,
    sibling_grpo_loss_from_logits,
    token_logp,
)
from vstar_ops.ops._forms import FORMS
from vstar_ops.verify.generators import policies
from vstar_ops.verify.loss import whole_loss

FIELDS = vstar_ops.SiblingGRPOLoss._fields


# ---------------------------------------------------------------- by hand


class Example(NamedTuple):
    """One request of single-token candidates; what the loss is and how it changes with each logp.

    Ratios of the policies, ``exp(logp - old_logp)`` and ``exp(ref_logp - logp)``, are written as such.
    """

    lesson: str
    tokens: list[int]
    rewards: list[float]
    loss: float
    gradient: list[float]
    options: dict[str, Any]
    ratio: list[float] | None = None
    reference: list[float] | None = None
    metrics: dict[str, float] | None = None


# Rewards 1 and 0 have the group advantages +-C, with the sample standard deviation 1 / sqrt(2) and eps 1e-4,
# and the paper's sibling advantages +-S, with the population's, 1/2. D is 1 - 2/3 over the sample standard
# deviation of the rewards 1, 1 and 0, 1 / sqrt(3).
C, S, D = 0.5 / (0.5**0.5 + 1e-4), 0.5 / (0.5 + 1e-4), 1 / 3 / (3**-0.5 + 1e-4)
ONLY_GLOBAL = {"sibling_weight": 0.0, "kl_weight": 0.0}
ONLY_SIBLING = {"global_weight": 0.0, "kl_weight": 0.0}
PAPER = {**ONLY_SIBLING, "form": "paper"}
ONLY_KL = {"global_weight": 0.0, "sibling_weight": 0.0, "kl_weight": 1.0}
EXAMPLES = [
    Example(
        "The global term is GRPO: minus the mean of ratio times advantage. On-policy the ratio is 1, the"
        " loss 0, and its gradient raises the candidate with the larger reward.",
        [7, 8], [1, 0], 0.0, [-C / 2, C / 2], ONLY_GLOBAL, metrics={"ratio": 1.0},
    ),
    Example(
        "Off-policy, a candidate that became twice as probable counts twice.",
        [7, 8], [1, 0], -C / 2, [-C, C / 2], ONLY_GLOBAL, [2.0, 1.0],
        metrics={"global_term": C / 2, "ratio": 1.5},
    ),
    Example(
        "clip=(low, high) bounds the ratio by 1 - low and 1 + high: where the bound is reached in the"
        " direction of the advantage, there is no gradient.",
        [7, 8], [1, 0], -(1.25 - 1) * C / 2, [0.0, C / 2], {**ONLY_GLOBAL, "clip": (0.5, 0.25)}, [2.0, 1.0],
        metrics={"global_clip_fraction": 0.5},
    ),
    Example(
        "Clipping is pessimistic: a ratio of 2 with a negative advantage is not bounded.",
        [7, 8], [1, 0], (2 - 1) * C / 2, [-C / 2, C], {**ONLY_GLOBAL, "clip": (0.5, 0.25)}, [1.0, 2.0],
        metrics={"global_clip_fraction": 0.0},
    ),
    Example(
        "The sibling term: by how much each token changed the mean reward, over GRPO's standard deviation."
        " Of one level it is GRPO.",
        [7, 8], [1, 0], 0.0, [-C / 2, C / 2], ONLY_SIBLING, metrics={"valid_fraction": 1.0},
    ),
    Example(
        "Each candidate counts once: two raise the mean from 2/3 to 1, one lowers it to 0.",
        [7, 7, 8], [1, 1, 0], 0.0, [-D / 3, -D / 3, 2 * D / 3], ONLY_SIBLING,
    ),
    Example(
        "weighting='node': two candidates through one node share it, so the sum is (D - 2 D) / 3.",
        [7, 7, 8], [1, 1, 0], D / 3, [-D / 6, -D / 6, 2 * D / 3], {**ONLY_SIBLING, "weighting": "node"},
    ),
    Example(
        "form='paper': children against their mean 1/2, over their standard deviation, and each node once.",
        [7, 7, 8], [1, 1, 0], 0.0, [-S / 6, -S / 6, S / 3], PAPER,
    ),
    Example(
        "The paper's advantages with weighting='candidate': the sum is (2 S - S) / 3.",
        [7, 7, 8], [1, 1, 0], -S / 3, [-S / 3, -S / 3, S / 3], {**PAPER, "weighting": "candidate"},
    ),
    Example(
        "Without siblings there is no sibling term: no gradient, nothing valid.",
        [7, 7], [1, 0], 0.0, [0.0, 0.0], ONLY_SIBLING, metrics={"valid_fraction": 0.0},
    ),
    Example(
        "kl='k3', the default: with r = reference / policy, the mean of r - 1 - log r, never negative.",
        [7, 8], [0, 0], (1 - math.log(2)) / 2, [-1 / 2, 0.0], ONLY_KL, None, [2.0, 1.0],
    ),
    Example(
        "kl='k2': half of the squared logarithm.",
        [7, 8], [0, 0], math.log(2) ** 2 / 4, [-math.log(2) / 2, 0.0], {**ONLY_KL, "kl": "k2"},
        None, [2.0, 1.0],
    ),
    Example(
        "kl='k1': minus the logarithm. Of its samples only the mean is a divergence.",
        [7, 8], [0, 0], -math.log(2) / 2, [1 / 2, 1 / 2], {**ONLY_KL, "kl": "k1"}, None, [2.0, 1.0],
    ),
    Example(
        "The loss is the sum: kl_weight KL - global_weight J_global - sibling_weight J_sibling.",
        [7, 8], [1, 0], 0.1 * (1 - math.log(2)) / 2, [-C / 2 - 2 * S / 2 - 0.1 / 2, C / 2 + 2 * S / 2],
        {"global_weight": 1.0, "sibling_weight": 2.0, "kl_weight": 0.1, "form": "paper"}, None, [2.0, 1.0],
    ),
    Example(
        "mask: a candidate that is left out is in no mean, whatever its reward.",
        [7, 8, 9], [1, 0, float("nan")], 0.0, [-C / 2, C / 2, 0.0],
        {**ONLY_SIBLING, "mask": [True, True, False]},
    ),
    Example(
        "depth_weights: each level's share of the sibling term.",
        [7, 8], [1, 0], 0.0, [-3 * C / 2, 3 * C / 2], {**ONLY_SIBLING, "depth_weights": [3.0]},
    ),
    Example(
        "loss_type='dr_grpo' divides by the size of the batch, padding included.",
        [7, 8, 9], [1, 0, 0], 0.0, [-C / 3, C / 3, 0.0],
        {**ONLY_GLOBAL, "mask": [True, True, False], "loss_type": "dr_grpo"},
    ),
    Example(
        "horizon: of loss_type='dr_grpo', in place of the length 1 of the tensor.",
        [7, 8], [1, 0], 0.0, [-C / 8, C / 8], {**ONLY_GLOBAL, "loss_type": "dr_grpo", "horizon": 4},
    ),
    Example(
        "dual_clip bounds what clip leaves open, a large ratio with a negative advantage: 3 counts as 1.5.",
        [7, 8], [1, 0], (1.5 - 1) * C / 2, [-C / 2, 0.0],
        {**ONLY_GLOBAL, "clip": (0.5, 0.25), "dual_clip": 1.5}, [1.0, 3.0],
        metrics={"global_clip_fraction": 0.5},
    ),
    Example(
        "dual_clip needs no clip.",
        [7, 8], [1, 0], (1.5 - 1) * C / 2, [-C / 2, 0.0], {**ONLY_GLOBAL, "dual_clip": 1.5}, [1.0, 3.0],
    ),
    Example(
        "clip_terms='joint': the sum of both advantages is clipped once. Here it is 2 S - C, positive, so the"
        " ratio 2 is cut at 1.25, also in the global term, which alone would not be cut.",
        [7, 8], [0, 1], -(1.25 - 1) * (2 * S - C) / 2, [(2 * S - C) / 2, 0.0],
        {"global_weight": -1.0, "sibling_weight": 2.0, "clip": (0.5, 0.25), "clip_terms": "joint",
         "form": "paper"},
        [1.0, 2.0],
        metrics={"global_term": (1.25 - 1) * C / 2, "sibling_term": (1.25 - 1) * S / 2,
                 "global_clip_fraction": 0.5, "sibling_clip_fraction": 0.5},
    ),
    Example(
        "log_ratio_bound: ratios within exp(+-bound), without gradient beyond it.",
        [7, 8], [1, 0], -(2 - 1) * C / 2, [0.0, C / 2], {**ONLY_GLOBAL, "log_ratio_bound": math.log(2)},
        [3.0, 1.0],
    ),
    Example(
        "It bounds the reference's ratio too.",
        [7, 8], [0, 0], (1 - math.log(2)) / 2, [0.0, 0.0], {**ONLY_KL, "log_ratio_bound": math.log(2)},
        None, [9.0, 1.0],
    ),
    Example(
        "scale='none': rewards minus their mean, in both terms.",
        [7, 8], [3, 0], 0.0, [-3 / 2, 3 / 2], {"kl_weight": 0.0, "scale": "none"},
    ),
]  # fmt: skip


@pytest.mark.parametrize("example", EXAMPLES, ids=[x.lesson.partition(":")[0][:60] for x in EXAMPLES])
def test_by_hand(backend, example):
    options = {k: torch.tensor([x]) if k == "mask" else x for k, x in example.options.items()}
    logp = torch.full((1, len(example.tokens), 1), -1.0, requires_grad=True)
    for name, ratio, sign in (("old_logp", example.ratio, -1), ("ref_logp", example.reference, 1)):
        if ratio is not None:
            options[name] = logp.detach() + sign * torch.tensor(ratio).log().view(1, -1, 1)
    tokens = torch.tensor(example.tokens).view(1, -1, 1)
    out = sibling_grpo_loss(logp, tokens, torch.tensor([example.rewards]).float(), **options)
    (gradient,) = torch.autograd.grad(out.loss, logp)
    assert out.loss.item() == pytest.approx(example.loss, rel=1e-5, abs=1e-6)
    assert gradient.flatten().tolist() == pytest.approx(example.gradient, rel=1e-5, abs=1e-7)
    for name, want in (example.metrics or {}).items():
        assert getattr(out, name).item() == pytest.approx(want, rel=1e-6), name


# ---------------------------------------------------------------- against the oracle


@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(0, 3),
    group=st.integers(0, 5),
    length=st.integers(0, 4),
    masked=st.sampled_from(["no", "candidates", "tokens"]),
    present=st.sets(st.sampled_from(["old_logp", "ref_logp"])),
    far=st.sampled_from([None, "logp", "old_logp"]),
    strided=st.booleans(),
    options=st.fixed_dictionaries(
        {
            "global_weight": st.sampled_from([0.7, 0.0]),
            "sibling_weight": st.sampled_from([1.3, 0.0]),
            "kl_weight": st.sampled_from([0.3, 0.0]),
            "clip": st.sampled_from([None, (0.2, 0.3), (math.inf, 0.1), (0.0, 0.0)]),
            "dual_clip": st.sampled_from([None, 1.1, 3.0]),
            "clip_terms": st.sampled_from(["separate", "joint"]),
            "importance_sampling_level": st.sampled_from(["token", "sequence"]),
            "log_ratio_bound": st.sampled_from([None, 0.5, 20.0]),
            "kl": st.sampled_from(["k1", "k2", "k3"]),
            "form": st.sampled_from(sorted(FORMS)),
            "weighting": st.sampled_from([None, "node", "candidate"]),
            "loss_type": st.sampled_from(["grpo", "bnpo", "dr_grpo"]),
        }
    ),
    weighted=st.booleans(),
    horizon=st.sampled_from([None, 7]),
    window=st.sampled_from([None, (9, 50, 33, 100)]),
)
def test_oracle(
    backend, seed, batch, group, length, masked, present, far, strided, options, weighted, horizon, window
):
    """Every option with every other: loss, gradient and statistics."""
    case = policies(seed, batch, group, length)
    generator = torch.Generator().manual_seed(seed + 1)
    if far is not None:  # log-ratios of up to 84
        case[far] = case[far] * 28
    for name in {"old_logp", "ref_logp"} - present:
        del case[name]
    if masked != "no":
        shape = case["logp"].shape if masked == "tokens" else case["rewards"].shape
        case["mask"] = torch.rand(shape, generator=generator) < 0.7
        there = case["mask"] if masked == "tokens" else case["mask"][:, :, None].expand(case["logp"].shape)
        for name in ("logp", "old_logp", "ref_logp"):
            if name in case:  # padding may hold anything
                case[name] = case[name].masked_fill(~there, float("nan"))
        case["rewards"] = case["rewards"].masked_fill(~there.any(2), float("nan"))
    if strided:
        for name in set(case) - {"mask"}:
            case[name] = torch.stack([case[name], case[name]], -1)[..., 1]
    if weighted:
        options["depth_weights"] = [0.0, 1.0, 0.5, 2.0][:length]
    if options["loss_type"] == "dr_grpo":
        options["horizon"] = horizon
    logp = case["logp"].detach().requires_grad_()
    counts = None if window is None else torch.tensor(window)
    got = sibling_grpo_loss(**{**case, "logp": logp}, **options, normalizer=counts)
    (gradient,) = torch.autograd.grad(got.loss, logp)

    mask = case.get("mask")
    candidates = mask.any(2) if masked == "tokens" else mask
    of_form, weighting = FORMS[options.pop("form")]
    options["weighting"] = options["weighting"] or weighting
    x = case["logp"].nan_to_num().double().requires_grad_()
    want, sizes = whole_loss(
        x,
        sibling_advantage(case["tokens"], case["rewards"], mask, **of_form),
        group_advantage(case["rewards"], candidates),
        **{k: case[k].nan_to_num().double() for k in ("old_logp", "ref_logp") if k in case},
        mask=mask,
        **options,
        normalizer=window,
    )
    (expected,) = torch.autograd.grad(want["loss"], x)
    for name in FIELDS:
        value = getattr(got, name)
        assert value.shape == ()
        assert value.dtype == torch.float32
        large = max(1.0, sizes.get(name, 0.0))
        assert value.item() == pytest.approx(want[name].item(), rel=1e-5, abs=2e-6 * large), name
    largest = max(expected.abs().max().item(), 1.0) if expected.numel() else 1.0
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-7 * largest)


def by_hand(case: dict[str, Tensor], mask: Tensor, clip: tuple[float, float] | None, form: str) -> Tensor:
    """The loss as the training loop writes it, by torch's autograd."""
    options, weighting = FORMS[form]
    x, old = case["logp"].double().requires_grad_(), case["old_logp"].double()
    a = group_advantage(case["rewards"], mask)
    siblings = sibling_advantage(case["tokens"], case["rewards"], mask, **options)
    value = loss_reference.grpo_term(x, old, a, mask, clip)
    value = value + 0.5 * loss_reference.sibling_term(x, old, siblings, mask, clip, weighting=weighting)
    loss = 0.1 * loss_reference.kl_term(x, case["ref_logp"].double(), mask) - value
    (gradient,) = torch.autograd.grad(loss, x)
    return torch.cat([loss.detach()[None], gradient.flatten()])


@pytest.mark.parametrize("clip", [None, (0.2, 0.3)])
@pytest.mark.parametrize("form", FORMS)
def test_training_objective(backend, clip, form):
    case = policies(1, 5, 6, 3)
    mask = torch.rand(5, 6, generator=torch.Generator().manual_seed(2)) < 0.8
    want = by_hand(case, mask, clip, form)
    case["logp"].requires_grad_()
    out = sibling_grpo_loss(**case, mask=mask, clip=clip, form=form, sibling_weight=0.5, kl_weight=0.1)
    (gradient,) = torch.autograd.grad(out.loss, case["logp"])
    got = torch.cat([out.loss.detach()[None], gradient.flatten()])
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo"])
@pytest.mark.parametrize("weighting", ["node", "candidate"])
def test_gradcheck(kl, loss_type, weighting):
    """float64 log-probabilities, also the ones of users' code, have float64 losses and gradients."""
    case = policies(3, 2, 4, 3)
    case["mask"] = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(4)) < 0.7
    case |= {name: case[name].double() for name in ("logp", "old_logp", "ref_logp")}
    options = {"kl": kl, "loss_type": loss_type, "weighting": weighting, "clip": (0.2, 0.3), "kl_weight": 0.4}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is no lack of a backend
        assert torch.autograd.gradcheck(
            lambda x: sibling_grpo_loss(**{**case, "logp": x}, **options).loss, case["logp"].requires_grad_()
        )


@pytest.mark.parametrize("clip", [None, (0.2, 0.2), (0.0, 0.0)])
def test_on_policy_is_the_old_policy_now(backend, clip):
    case = policies(5, 3, 6, 3)
    case["logp"].requires_grad_()
    now = sibling_grpo_loss(**{**case, "old_logp": None}, clip=clip)
    same = sibling_grpo_loss(**{**case, "old_logp": case["logp"].detach()}, clip=clip)
    for one, two in zip(now, same):
        torch.testing.assert_close(one, two)
    assert now.ratio.item() == 1
    assert now.global_clip_fraction.item() == now.sibling_clip_fraction.item() == 0
    first, second = (torch.autograd.grad(out.loss, case["logp"])[0] for out in (now, same))
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("form", FORMS)
def test_on_policy_gradient_is_zero_outside_the_sibling_tokens(backend, form):
    """Ratio 1, sibling term alone: exactly 0 where nothing branches. Both forms agree on two children."""
    tokens = torch.tensor([[[1, 5, 7], [1, 5, 8], [1, 5, 8]]])
    logp = torch.zeros(1, 3, 3, requires_grad=True)
    rewards = torch.tensor([[1.0, 0.0, 0.5]])
    sibling_grpo_loss(logp, tokens, rewards, global_weight=0, form=form).loss.backward()
    assert not logp.grad[:, :, :2].any()
    assert logp.grad[0, :, 2].tolist() == pytest.approx([-1 / 3, 1 / 6, 1 / 6], rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_input(backend, dtype):
    """Float32 inside: the gradient is off by its own rounding alone."""
    case = policies(6, 3, 5, 3)
    for name in ("logp", "old_logp", "ref_logp"):
        case[name] = case[name].to(dtype)
    wide = {name: x.float() if x.dtype == dtype else x for name, x in case.items()}
    results = []
    for inputs in (case, wide):
        inputs["logp"].requires_grad_()
        out = sibling_grpo_loss(**inputs)
        out.loss.backward()
        results.append((out.loss.detach(), inputs["logp"].grad))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1].dtype == dtype
    assert torch.equal(results[0][1], results[1][1].to(dtype))


# ---------------------------------------------------------------- float32's range and beyond


def one_token(
    log_ratio: float, group: float = 0.0, sibling: float = 0.0, *, difference: float = 0.0, **options: Any
) -> tuple[vstar_ops.SiblingGRPOLoss, float]:
    """Result and gradient of the first of two tokens, which has these log-ratios and advantages."""
    logp = torch.tensor([[[-1.0], [-1.0]]], requires_grad=True)
    old, ref = (logp.detach() + torch.tensor([x, 0.0]).view(1, 2, 1) for x in (-log_ratio, difference))
    valid = torch.tensor([[[True], [True]]])
    siblings = SiblingAdvantage(
        torch.tensor([[[sibling], [0.0]]]), valid, valid.int(), torch.ones(1, 2, 1, dtype=torch.int32)
    )
    options = {"kl_weight": 0.0, "sibling_advantage": siblings} | options
    out = sibling_grpo_loss(
        logp, old_logp=old, ref_logp=ref, group_advantage=torch.tensor([[group, 0.0]]), **options
    )
    return out, torch.autograd.grad(out.loss, logp)[0][0, 0].item()


JOINT_OR_NOT = pytest.mark.parametrize("clip_terms", ["separate", "joint"])


@JOINT_OR_NOT
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("log_ratio", [89.0, 710.0, math.inf])
def test_an_advantage_of_zero_has_no_term(backend, log_ratio, level, clip_terms):
    """Whatever the ratio: every group without signal has such advantages."""
    options = {"importance_sampling_level": level, "clip_terms": clip_terms}
    for clip in (None, (0.2, 0.2)):
        out, gradient = one_token(log_ratio, clip=clip, **options)
        assert out.loss.item() == out.global_term.item() == out.sibling_term.item() == gradient == 0
        assert out.global_clip_fraction.item() == out.sibling_clip_fraction.item() == 0
        ratio = torch.tensor(log_ratio, dtype=torch.float64).exp() / 2 + 0.5
        torch.testing.assert_close(out.ratio, ratio.float(), rtol=1e-5, atol=0)
    out, gradient = one_token(math.nan, **options)
    assert math.isnan(out.loss.item())
    assert math.isnan(gradient)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_policy_without_numbers_is_not_hidden(backend, wrong):
    """Its ratio to itself is no number, whether it is given twice or once; padding may hold anything."""
    logp = torch.tensor([[[wrong, -1.0], [-1.0, wrong]]])
    tokens, rewards = torch.tensor([[[1, 2], [3, 4]]]), torch.tensor([[0.0, 1.0]])
    there = logp.isfinite()
    for old, mask in product((None, logp), (None, there)):
        x = logp.clone().requires_grad_()
        out = sibling_grpo_loss(x, tokens, rewards, old_logp=old, mask=mask)
        (gradient,) = torch.autograd.grad(out.loss, x)
        assert math.isnan(out.loss.item()) is (mask is None)
        assert torch.equal(gradient.isnan(), ~there & (mask is None))


@JOINT_OR_NOT
def test_a_weight_of_zero_turns_a_term_off(backend, clip_terms):
    """Even if the term is infinite; what is left is the other term alone."""
    infinite = {"clip_terms": clip_terms, "difference": math.inf}
    want = -math.exp(3) / 2
    for options in (
        {"sibling_weight": 0.0, "group": 1.0, "sibling": math.inf},
        {"global_weight": 0.0, "group": math.inf, "sibling": 1.0},
    ):
        out, gradient = one_token(3.0, **options, **infinite)
        assert out.loss.item() == pytest.approx(want, rel=1e-6)
        assert gradient == pytest.approx(want, rel=1e-6)
    off = {"depth_weights": [0.0], "global_weight": 0.0, "sibling_weight": 1.0}
    out, gradient = one_token(3.0, sibling=math.inf, **off, **infinite)
    assert out.loss.item() == out.sibling_term.item() == gradient == 0


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_dual_clip_out_of_reach_changes_nothing(backend, kl, masked):
    """Without it a backend may compute many tokens at once."""
    case = policies(21, 3, 13, 5)
    if masked:
        case["mask"] = torch.rand(3, 13, 5, generator=torch.Generator().manual_seed(2)) < 0.6
    case["logp"].requires_grad_()
    results = []
    for dual_clip in (None, 1e6):
        out = sibling_grpo_loss(
            **case, kl=kl, clip=(0.2, 0.3), kl_weight=0.3, form="paper", dual_clip=dual_clip
        )
        results.append((torch.autograd.grad(out.loss, case["logp"])[0], torch.stack(out).detach()))
    (gradient, sums), (want, expected) = results
    assert torch.equal(gradient, want)
    torch.testing.assert_close(sums, expected, rtol=1e-6, atol=1e-7)


@JOINT_OR_NOT
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_what_takes_no_part_may_hold_anything(backend, junk, clip_terms):
    """Sibling advantages that are not valid, and all that is masked."""
    case = policies(14, 3, 5, 4)
    case["mask"] = torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(1)) < 0.6
    case["mask"][1, 2] = False
    siblings = sibling_advantage(case.pop("tokens"), case["rewards"], case["mask"])
    group = group_advantage(case.pop("rewards"), case["mask"].any(2))
    results = []
    for fill in (0.0, junk):
        x = {k: v.masked_fill(~case["mask"], fill) for k, v in case.items() if k != "mask"}
        x["logp"].requires_grad_()
        apart = siblings._replace(advantage=siblings.advantage.masked_fill(~siblings.valid, fill))
        whole = group.masked_fill(~case["mask"].any(2), fill)
        out = sibling_grpo_loss(
            **x, mask=case["mask"], sibling_advantage=apart, group_advantage=whole, clip_terms=clip_terms
        )
        results.append((*map(torch.Tensor.detach, out), *torch.autograd.grad(out.loss, x["logp"])))
    assert all(map(torch.equal, *results))
    assert results[0][0].isfinite()


@JOINT_OR_NOT
@pytest.mark.parametrize(
    ("log_ratio", "advantage"),
    [(79.0, 3e3), (-79.0, 1e30), (85.0, 1e-20), (95.0, -1e-9), (160.0, 1e-38), (-160.0, 3e38), (3.0, 1e38)],
)
def test_ratios_overflow_where_the_loss_does(backend, log_ratio, advantage, clip_terms):
    """A ratio or a product beyond float32 is no infinity as long as the loss is none."""
    options = {"clip_terms": clip_terms, "global_weight": 1e-3, "sibling_weight": 1e-3}
    want = torch.tensor(-1e-3 * math.exp(log_ratio) / 2 * advantage, dtype=torch.float64).float()
    assert want.isfinite()
    for name in ("group", "sibling"):
        out, gradient = one_token(log_ratio, **{name: advantage}, **options)
        torch.testing.assert_close(out.loss.detach(), want, rtol=1e-5, atol=1e-40)
        torch.testing.assert_close(torch.tensor(gradient), want, rtol=1e-5, atol=1e-40)


@pytest.mark.parametrize(
    ("kl", "difference"),
    [("k3", x) for x in (-math.inf, -90.0, 79.0, 90.0, 100.0, 700.0, 720.0, math.inf)]
    + [("k2", 90.0), ("k2", math.inf), ("k1", 90.0), ("k1", -math.inf)],
)
def test_divergence_far_from_the_reference(backend, kl, difference):
    """Every backend overflows where float64 does; a bound on the log-ratio keeps all finite."""
    for bound in (None, 20.0):
        out, gradient = one_token(0.0, difference=difference, kl=kl, kl_weight=1e-3, log_ratio_bound=bound)
        x = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
        d = -1.0 + difference - x if bound is None else (-1.0 + difference - x).clamp(-bound, bound)
        estimate = {"k1": -d, "k2": d * d / 2, "k3": d.exp() - d - 1}[kl] / 2
        (want,) = torch.autograd.grad(1e-3 * estimate, x)
        for got, value in ((out.kl, estimate), (out.loss, 1e-3 * estimate), (torch.tensor(gradient), want)):
            value = value.detach().float()
            torch.testing.assert_close(got.float(), value, rtol=1e-5, atol=1e-12, equal_nan=True)
        assert bound is None or math.isfinite(out.loss.item())


def test_extreme_ratios(backend):
    """Ratios that leave float32 are infinite or 0, as exp says; clipping bounds them."""
    case = policies(7, 1, 3, 1)
    case["tokens"][0, :, 0] = torch.arange(3)
    case["rewards"] = torch.tensor([[3.0, 1.0, 2.0]])
    case["logp"] = torch.tensor([[[0.0], [-200.0], [-50.0]]])
    case["old_logp"] = torch.tensor([[[-300.0], [0.0], [-40.0]]])
    del case["ref_logp"]
    out = sibling_grpo_loss(**case, clip=(0.2, 0.2))
    a = group_advantage(case["rewards"])[0].tolist()
    assert out.ratio.item() == math.inf
    assert math.isfinite(out.loss.item())
    assert out.global_term.item() == pytest.approx((1.2 * a[0] + 0.8 * a[1]) / 3, abs=1e-4)
    assert out.global_clip_fraction.item() == pytest.approx(2 / 3)


def test_small_divergence_keeps_its_digits(backend):
    """k3 of a d of 1e-4 is 5e-9; ``exp(d) - 1 - d`` in float32 would be noise."""
    logp = torch.full((2, 3, 2), -1.0, requires_grad=True)
    ref = logp.detach() + 1e-4
    d = (ref.double() - logp.detach().double()).mean().item()
    siblings, group = (
        sibling_advantage(torch.zeros(2, 3, 2, dtype=torch.int64), torch.zeros(2, 3)),
        torch.zeros(2, 3),
    )
    out = sibling_grpo_loss(
        logp, sibling_advantage=siblings, group_advantage=group, ref_logp=ref, kl_weight=1.0
    )
    assert out.kl.item() == pytest.approx(math.expm1(d) - d, rel=1e-3)
    (gradient,) = torch.autograd.grad(out.loss, logp)
    torch.testing.assert_close(gradient, torch.full_like(gradient, -math.expm1(d) / 12), rtol=1e-4, atol=0)


@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("masked", ["no", "candidates", "tokens"])
def test_advantages_are_those_of_their_ops(backend, masked, form, scale):
    """Of what the mask leaves: a masked token is no sibling. The weighting of given ones is the form's."""
    case = policies(15, 4, 6, 3)
    mask = torch.rand(4, 6, 3, generator=torch.Generator().manual_seed(2)) < 0.7
    masks = {"no": (None, None), "candidates": (mask[..., 0],) * 2, "tokens": (mask, mask.any(2))}
    mask, candidates = masks[masked]
    got = sibling_grpo_loss(**case, mask=mask, form=form, scale=scale)
    options, weighting = FORMS[form]
    no_scale = {} if scale == "std" else {"scale": "none"}
    siblings = sibling_advantage(case.pop("tokens"), case["rewards"], mask, **{**options, **no_scale})
    group = group_advantage(case.pop("rewards"), candidates, **no_scale)
    given = {**case, "mask": mask, "sibling_advantage": siblings, "group_advantage": group}
    for named in ({"form": form}, {"weighting": weighting}):
        assert all(map(torch.equal, got, sibling_grpo_loss(**given, **named)))


def test_the_default_is_centered(backend):
    case = policies(21, 4, 6, 3)
    default, centered, paper = (
        sibling_grpo_loss(**case, **x) for x in ({}, {"form": "centered"}, {"form": "paper"})
    )
    assert all(map(torch.equal, default, centered))
    assert not torch.equal(default.sibling_term, paper.sibling_term)


@given(
    seed=st.integers(0, 2**32 - 1),
    group=st.integers(0, 40),
    vocabulary=st.integers(1, 6),
    masked=st.sampled_from(["no", "candidates", "tokens"]),
    equal=st.booleans(),
)
def test_the_levels_of_the_centered_form_add_up_to_the_group_advantage(
    backend, seed, group, vocabulary, masked, equal
):
    """Also with duplicates, which share what they earned, unequal groups, and ends that a prefix decides.

    The advantages are read off the gradient on-policy, where an advantage has the weight -1 / (B G_b).
    """
    rng = np.random.default_rng(seed)
    tokens = torch.from_numpy(rng.integers(0, vocabulary, (3, group, 4)))
    rewards = torch.from_numpy(rng.normal(size=(3, group)).round(1)).float()
    if equal:
        rewards = torch.full_like(rewards, 0.35)
    there, mask = torch.ones(3, group, dtype=torch.bool), None
    if masked != "no":
        mask = there = torch.from_numpy(rng.random((3, group)) < rng.random((3, 1)))
    if masked == "tokens":
        goes_on = tokens[..., 2] != 0
        mask = there[..., None].repeat(1, 1, 4)
        mask[..., 3] &= goes_on
        tokens[..., 3] *= goes_on
    logp = torch.zeros(3, group, 4, requires_grad=True)
    out = sibling_grpo_loss(logp, tokens, rewards, mask=mask, global_weight=0.0, loss_type="dr_grpo")
    (gradient,) = torch.autograd.grad(out.loss, logp)
    advantage = -gradient.double() * 3 * group

    of_group = group_advantage(rewards, there).double()
    same = (tokens[:, :, None] == tokens[:, None]).all(3) & there[:, :, None] & there[:, None]
    want = (same * of_group[:, None]).sum(2) / same.sum(2).clamp(min=1)
    torch.testing.assert_close(advantage.sum(2), want, rtol=1e-5, atol=1e-5)
    siblings = sibling_advantage(tokens, rewards, mask, **FORMS["centered"].options)
    assert not advantage[~siblings.valid].any(), "a token without alternative must have exactly 0"
    assert not (equal and advantage.any()), "equal rewards must give exactly 0"


def test_padding_behind_an_early_end_is_no_sibling(backend):
    """Two completions of one token and two of two: the padding 0 is a child of neither."""
    tokens = torch.tensor([[[1, 0], [1, 5], [1, 6], [2, 0]]])
    mask = torch.tensor([[[True, False], [True, True], [True, True], [True, False]]])
    logp = torch.zeros(1, 4, 2, requires_grad=True)
    rewards = torch.tensor([[0.5, 1.0, 0.0, 0.5]])
    out = sibling_grpo_loss(logp, tokens, rewards, mask=mask, global_weight=0.0, form="paper")
    out.loss.backward()
    assert logp.grad[0, :, 1].tolist() == pytest.approx([0, -S / 4, S / 4, 0], rel=1e-5)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_sequence_level_gradient_is_that_of_gspo(backend, advantage):
    """Of the global term, whose advantage is one per sequence: the derivative of s A by the mean."""
    case = policies(16, 3, 4, 5)
    mask = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(3)) < 0.8
    mask[..., 0] = True
    group = advantage * torch.rand(3, 4, generator=torch.Generator().manual_seed(4))
    siblings = sibling_advantage(case["tokens"], case["rewards"])
    x = case["logp"].double().requires_grad_()
    log_ratio = torch.where(mask, x - case["old_logp"], 0)
    s = (log_ratio.sum(2) / mask.sum(2)).exp()
    want = -torch.minimum(s * group, s.clamp(0.9, 1.1) * group).mean()
    (expected,) = torch.autograd.grad(want, x)
    logp = case["logp"].requires_grad_()
    out = sibling_grpo_loss(
        logp, old_logp=case["old_logp"], mask=mask, sibling_advantage=siblings, group_advantage=group,
        sibling_weight=0.0, clip=(0.1, 0.1), importance_sampling_level="sequence",
    )  # fmt: skip
    assert out.loss.item() == pytest.approx(want.item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(out.loss, logp)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (2, 3), (4, 0, 1)])
@pytest.mark.parametrize("masked", ["no", "candidates", "tokens"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo"])
def test_micro_batches_add_up(backend, loss_type, masked, sizes):
    """With the counts of all as normalizer; groups are of 0 to 4 candidates. Statistics stay their own."""
    case = policies(17, 5, 4, 3)
    if masked != "no":
        case["mask"] = torch.rand(5, 4, 3, generator=torch.Generator().manual_seed(5)) < 0.6
        case["mask"][3] = False
        case["mask"] = case["mask"] if masked == "tokens" else case["mask"][..., 0]
    options = {
        "loss_type": loss_type, "clip": (0.2, 0.3), "kl_weight": 0.3,
        "clip_terms": "joint" if len(sizes) == 3 else "separate",
        "weighting": "candidate" if len(sizes) == 2 else "node",
    }  # fmt: skip
    parts = [dict(zip(case, part)) for part in zip(*(x.split(sizes) for x in case.values()))]
    counts = sum(loss_counts(part["tokens"], part.get("mask")) for part in parts)
    assert torch.equal(counts, loss_counts(case["logp"], case.get("mask")))
    results = []
    for calls, normalizer in (([case], None), (parts, counts)):
        leaves = [call["logp"].detach().requires_grad_() for call in calls]
        outs = [
            sibling_grpo_loss(**{**call, "logp": x}, **options, normalizer=normalizer)
            for call, x in zip(calls, leaves)
        ]
        gradients = [torch.autograd.grad(out.loss, x)[0] for out, x in zip(outs, leaves)]
        results.append((*[sum(x) for x in zip(*(out[:4] for out in outs))], torch.cat(gradients)))
    for whole, together in zip(*results):
        torch.testing.assert_close(together, whole, rtol=1e-5, atol=1e-7)
    alone = sibling_grpo_loss(**parts[0], **options)
    assert all(map(torch.equal, outs[0][4:], alone[4:]))


def test_loss_counts():
    """Requests, candidates, sequences with a token, tokens."""
    tokens = torch.zeros(2, 3, 4, dtype=torch.int64)
    mask = torch.tensor([[True, False, True], [False, False, False]])
    by_token = mask[:, :, None] & torch.tensor([True, False, True, False])
    assert loss_counts(tokens).tolist() == [2, 6, 6, 24]
    assert loss_counts(tokens, mask).tolist() == [2, 6, 2, 8]
    assert loss_counts(tokens.float(), by_token).tolist() == [2, 6, 2, 4]
    assert loss_counts(tokens[:, :, :0]).tolist() == [2, 6, 0, 0]
    assert loss_counts(tokens.to("meta")).device.type == "meta"  # no number from the device is looked at
    with pytest.raises(TypeError, match=r"^tokens must be a tensor \[B, G, L\], got list"):
        loss_counts([1])
    with pytest.raises(ValueError, match=r"^tokens must have the shape \[B, G, L\], got \[2, 3\]"):
        loss_counts(tokens[..., 0])
    with pytest.raises(ValueError, match=r"^mask "):
        loss_counts(tokens, mask[:1])


def test_normalizer_is_checked_under_validation(backend):
    case = policies(18, 2, 3, 2)
    with vstar_ops.validation():
        sibling_grpo_loss(**case, normalizer=loss_counts(case["logp"]) * 2)
        with pytest.raises(ValueError, match=r"^normalizer must count"):
            sibling_grpo_loss(**case, normalizer=loss_counts(case["logp"][:1]))


def test_nothing_there(backend):
    case = policies(9, 2, 3, 2)
    case["logp"].requires_grad_()
    out = sibling_grpo_loss(**case, mask=torch.zeros(2, 3, dtype=torch.bool))
    assert not any(out)
    out.loss.backward()
    assert not case["logp"].grad.any()


def test_only_the_loss_is_differentiable(backend):
    case = policies(10, 2, 3, 2)
    case["logp"].requires_grad_()
    out = sibling_grpo_loss(**case)
    assert [name for name, x in zip(FIELDS, out) if x.requires_grad] == ["loss"]
    (gradient,) = torch.autograd.grad(out.loss * 3, case["logp"], create_graph=True)
    (once,) = torch.autograd.grad(sibling_grpo_loss(**case).loss, case["logp"])
    torch.testing.assert_close(gradient, 3 * once)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


# ---------------------------------------------------------------- from logits


def candidates(seed: int) -> tuple[Trie, Tensor, Tensor, Tensor]:
    """A trie, candidates ``[B, G, L]`` of it, rewards, and the nodes of their prefixes ``[B, G, L]``."""
    rng = np.random.default_rng(seed)
    trie = Trie.from_sequences(rng.integers(0, 4, (20, 3)) + np.array([0, 4, 8]))
    leaves = trie.sequences(torch.arange(trie.level_offset[3], trie.level_offset[4]))
    tokens = leaves[torch.from_numpy(rng.integers(0, len(leaves), (2, 5)))].long()
    node = torch.stack([trie.lookup(tokens[..., :depth]) for depth in range(3)], 2).long()
    return trie, tokens, torch.from_numpy(rng.random((2, 5))).float(), node


@pytest.mark.parametrize("legal", [False, True])
def test_from_logits(backend, legal):
    """A row for each token, and a row for each distinct prefix: the same loss and the same gradient."""
    trie, tokens, rewards, node = candidates(0)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3] = False
    keys, row = torch.unique(torch.arange(2)[:, None, None] * trie.num_nodes + node, return_inverse=True)
    packed = torch.randn(len(keys), 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
    options = {"mask": mask, "temperature": 0.7, "old_logp": -torch.ones(2, 5, 3), "clip": (0.2, 0.2)}
    short = {"trie": trie, "node": keys % trie.num_nodes} if legal else {}
    full = {"trie": trie, "node": node} if legal else {}
    few = sibling_grpo_loss_from_logits(packed, tokens, rewards, row=row, **short, **options)
    many = sibling_grpo_loss_from_logits(packed[row], tokens, rewards, **full, **options)
    logp = token_logp(packed[row], tokens, *full.values(), temperature=0.7).logp
    del options["temperature"]
    for want in (many, sibling_grpo_loss(logp, tokens, rewards, **options)):
        for one, two in zip(few, want):
            torch.testing.assert_close(one, two)
        (got,), (expected,) = (
            torch.autograd.grad(out.loss, packed, retain_graph=True) for out in (few, want)
        )
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


def test_tokens_that_were_not_run(backend):
    """Row -1 is a log-probability of 0, as of a token without alternative."""
    trie, tokens, rewards, node = candidates(2)
    logits = torch.randn(2, 5, 3, 12, generator=torch.Generator().manual_seed(3))
    forced = trie.num_children(node) == 1
    assert forced.any()
    assert not forced.all()
    row = torch.arange(30).view(2, 5, 3)
    whole = sibling_grpo_loss_from_logits(logits, tokens, rewards, trie=trie, node=node)
    skipped = sibling_grpo_loss_from_logits(
        logits.flatten(0, 2), tokens, rewards, row=row.masked_fill(forced, -1), trie=trie, node=node.flatten()
    )
    for one, two in zip(whole, skipped):
        torch.testing.assert_close(one, two)


def test_rows_are_checked_under_validation(backend):
    _, tokens, rewards, _ = candidates(4)
    logits, row = torch.randn(30, 12), torch.arange(30).view(2, 5, 3)
    with vstar_ops.validation():
        sibling_grpo_loss_from_logits(logits, tokens, rewards, row=row)
        with pytest.raises(ValueError, match=r"^row must lie"):
            sibling_grpo_loss_from_logits(logits, tokens, rewards, row=row + 1)
        with pytest.raises(ValueError, match=r"^row must not be shared"):
            sibling_grpo_loss_from_logits(logits, tokens, rewards, row=row % 3)


# ---------------------------------------------------------------- interface

BAD = [
    ({"logp": [1.0]}, TypeError, "logp"),
    ({"logp": torch.zeros(2, 3)}, ValueError, "logp"),
    ({"old_logp": torch.zeros(2, 3, 2, dtype=torch.float64)}, TypeError, "old_logp"),
    ({"old_logp": torch.zeros(2, 3, 1)}, ValueError, "old_logp"),
    ({"ref_logp": torch.zeros(2, 3, 2, dtype=torch.int64)}, TypeError, "ref_logp"),
    ({"tokens": torch.zeros(2, 3, 3, dtype=torch.int64)}, ValueError, "tokens"),
    ({"tokens": torch.zeros(2, 3, 2)}, TypeError, "tokens"),
    ({"tokens": None}, ValueError, "tokens"),
    ({"rewards": torch.zeros(2, 4)}, ValueError, "rewards"),
    ({"rewards": None}, ValueError, "rewards"),
    ({"mask": torch.ones(2, 3)}, TypeError, "mask"),
    ({"mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, "mask"),
    ({"mask": torch.ones(2, 3, 1, dtype=torch.bool)}, ValueError, "mask"),
    ({"sibling_advantage": torch.zeros(2, 3, 2)}, TypeError, "sibling_advantage"),
    ({"group_advantage": torch.zeros(2, 2)}, ValueError, "group_advantage"),
    ({"clip": 0.2}, TypeError, "clip"),
    ({"clip": (-0.1, 0.2)}, ValueError, "clip"),
    ({"clip": (0.1, float("nan"))}, ValueError, "clip"),
    ({"kl": "k4"}, ValueError, "kl"),
    ({"form": "ours"}, ValueError, "form"),
    ({"form": None}, ValueError, "form"),
    ({"weighting": "both"}, ValueError, "weighting"),
    ({"loss_type": "ppo"}, ValueError, "loss_type"),
    ({"scale": "group"}, ValueError, "scale"),
    ({"clip_terms": "both"}, ValueError, "clip_terms"),
    ({"importance_sampling_level": "batch"}, ValueError, "importance_sampling_level"),
    ({"dual_clip": 1.0}, ValueError, "dual_clip"),
    ({"dual_clip": float("inf")}, ValueError, "dual_clip"),
    ({"dual_clip": (1, 2)}, TypeError, "dual_clip"),
    ({"log_ratio_bound": 0.0}, ValueError, "log_ratio_bound"),
    ({"log_ratio_bound": "20"}, TypeError, "log_ratio_bound"),
    ({"horizon": 4}, ValueError, "horizon"),
    ({"horizon": 0, "loss_type": "dr_grpo"}, ValueError, "horizon"),
    ({"horizon": 1.5, "loss_type": "dr_grpo"}, TypeError, "horizon"),
    ({"normalizer": 8}, TypeError, "normalizer"),
    ({"normalizer": torch.ones(4)}, TypeError, "normalizer"),
    ({"normalizer": torch.ones(3, dtype=torch.int64)}, ValueError, "normalizer"),
    ({"depth_weights": [1.0]}, ValueError, "depth_weights"),
    ({"depth_weights": torch.ones(3)}, ValueError, "depth_weights"),
    ({"kl_weight": float("inf")}, ValueError, "kl_weight"),
    ({"sibling_weight": "much"}, TypeError, "sibling_weight"),
]


@pytest.mark.parametrize(("change", "error", "name"), BAD)
def test_errors_name_the_argument(backend, change, error, name):
    arguments = {**policies(13, 2, 3, 2), **change}
    with pytest.raises(error, match=f"^{name} "):
        sibling_grpo_loss(**arguments)


def test_scale_of_advantages_that_are_given():
    case = policies(19, 2, 3, 2)
    given = {"sibling_advantage": sibling_advantage(case["tokens"], case["rewards"])}
    sibling_grpo_loss(**case, **given, scale="none")
    given["group_advantage"] = group_advantage(case["rewards"])
    with pytest.raises(ValueError, match="^scale must be 'std'"):
        sibling_grpo_loss(**case, **given, scale="none")


def test_float64_on_other_backends():
    """The reference computes in float64; a backend that was asked for says that it does not."""
    case = policies(20, 2, 3, 2)
    case["logp"] = case["logp"].double().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = sibling_grpo_loss(**case)
    assert {x.dtype for x in out} == {torch.float64}
    assert torch.autograd.grad(out.loss, case["logp"])[0].dtype == torch.float64
    with vstar_ops.use_backend("reference"):
        assert all(map(torch.equal, sibling_grpo_loss(**case), out))
    if "cpu" in BACKENDS:
        with vstar_ops.use_backend("cpu"), pytest.raises(TypeError, match="^logp must be float32"):
            sibling_grpo_loss(**case)


@pytest.mark.parametrize("packed", [False, True])
def test_float64_from_logits(packed):
    _, tokens, rewards, _ = candidates(6)
    row, old = torch.arange(30).view(2, 5, 3) if packed else None, -torch.ones(2, 5, 3)
    z = torch.randn(30, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    z = (z if packed else z.view(2, 5, 3, 12)).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.autograd.gradcheck(
            lambda z: sibling_grpo_loss_from_logits(z, tokens, rewards, row=row, old_logp=old).loss, z
        )


def test_compile_from_logits():
    trie, tokens, rewards, node = candidates(5)

    def step(z):
        return sibling_grpo_loss_from_logits(z, tokens, rewards, trie=trie, node=node).loss

    z = torch.randn(2, 5, 3, 12, requires_grad=True)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (got,), (want,) = (torch.autograd.grad(run(z), z) for run in (compiled, step))
    torch.testing.assert_close(got, want)


def test_depth_weights_that_inference_made_serve_training(backend):
    logp, tokens, rewards = torch.zeros(1, 2, 2), torch.tensor([[[1, 2], [1, 3]]]), torch.tensor([[1.0, 0.0]])
    with torch.inference_mode():
        sibling_grpo_loss(logp, tokens, rewards, depth_weights=(0.125, 0.75))
    logp.requires_grad_()
    sibling_grpo_loss(logp, tokens, rewards, depth_weights=(0.125, 0.75)).loss.backward()
    assert logp.grad is not None and logp.grad.any()
