"""Which Hugging Face models are refused, and which wrappers they may have."""

from __future__ import annotations

import pytest
import torch
from needs import needs
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

needs("transformers")

import transformers
from plain import ROWS, TRIE, assert_ranked, prompts
from tiny import CAUSAL, SIZE, VOCAB, causal

from vstar_ops import Trie
from vstar_ops.decoding import VEDConfig, beam_search, ved
from vstar_ops.integrations.transformers import prefix_model


def config(kind, **changes):
    settings = {**SIZE, **changes}
    return getattr(transformers, f"{kind}Config")(**settings)


def refused():
    """Models that cannot be run exactly, and a part of the reason that is given."""
    small = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": VOCAB}
    make = transformers
    yield (
        "no position ids",
        lambda: make.BloomForCausalLM(make.BloomConfig(n_layer=1, n_head=2, **small)),
        "it takes no position_ids",
    )
    yield (
        "recurrent",
        lambda: make.MambaForCausalLM(make.MambaConfig(state_size=4, **small)),
        "it takes no position_ids",
    )
    yield (
        "alibi",
        lambda: make.FalconForCausalLM(make.FalconConfig(alibi=True, num_attention_heads=2, **small)),
        "ALiBi goes by the column",
    )
    yield (
        "local",
        lambda: make.GPTNeoForCausalLM(
            make.GPTNeoConfig(
                hidden_size=16,
                num_layers=2,
                num_heads=2,
                vocab_size=VOCAB,
                attention_types=[[["global", "local"], 1]],
            )
        ),
        "its local attention goes by the column",
    )
    yield (
        "linear",
        lambda: make.Qwen3NextForCausalLM(
            config(
                "Qwen3Next",
                num_experts=2,
                num_experts_per_tok=1,
                head_dim=8,
                linear_num_value_heads=2,
                linear_num_key_heads=2,
                linear_key_head_dim=8,
                linear_value_head_dim=8,
                layer_types=["linear_attention", "full_attention"],
            )
        ),
        "linear_attention",
    )
    yield (
        "absolute positions",
        lambda: make.BartForConditionalGeneration(
            make.BartConfig(
                d_model=16,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                vocab_size=VOCAB,
            )
        ),
        "of encoder-decoders only t5 and mt5 can, got 'bart'",
    )
    yield "no head", lambda: make.Qwen2Model(config("Qwen2")), "model must have a language model head"
    yield "no model", lambda: nn.Linear(2, 2), "model must be a Hugging Face model, got Linear"


@pytest.mark.parametrize(("make", "reason"), [pytest.param(*x[1:], id=x[0]) for x in refused()])
def test_models_that_would_not_be_exact(make, reason):
    with pytest.raises(TypeError, match=reason):
        prefix_model(make(), TRIE)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_attention_that_takes_no_such_mask(attention):
    model = CAUSAL["qwen2"]()
    lm = prefix_model(model, TRIE)
    model.config._attn_implementation = attention
    for call in (lambda: prefix_model(model, TRIE), lambda: lm.prefill(prompts())):
        with pytest.raises(ValueError, match=f"'sdpa' or 'eager', got '{attention}': model.set_attn_impl"):
            call()


def test_heads_that_are_not_linear_layers():
    class Head(nn.Linear):
        pass

    model = CAUSAL["qwen2"]()
    want = beam_search(prefix_model(model, TRIE), prompts(), TRIE.compact().trie, 4)
    head = Head(32, VOCAB, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    with pytest.raises(TypeError, match="must be a torch.nn.Linear .* got Head: use full_head=True"):
        prefix_model(model, TRIE)
    got = beam_search(prefix_model(model, TRIE, full_head=True), prompts(), TRIE, 4)
    assert torch.equal(got.node, want.node)


def test_normalizing_over_the_vocabulary_needs_the_full_head():
    lm = prefix_model(CAUSAL["qwen2"](), TRIE)
    paper = VEDConfig.paper(normalize="vocab", value_weight=0)
    for call in (
        lambda: beam_search(lm, prompts(), lm.trie, 4, normalize="vocab"),
        lambda: ved(lm, prompts(), lm.trie, 4, paper),
        lambda: lm.score(prompts(), ROWS[None].expand(3, -1, -1), normalize="vocab"),
    ):
        with pytest.raises(ValueError, match="normalize='vocab' needs the logits of all columns"):
            call()
    with pytest.raises(ValueError, match="trie"):  # in token ids, with the compact logits
        beam_search(lm, prompts(), TRIE, 4)


def test_a_catalogue_of_another_model():
    for full_head in (False, True):
        with pytest.raises(ValueError, match="trie must hold tokens of the model, below 97, got 97"):
            prefix_model(CAUSAL["qwen2"](), Trie.from_sequences([[97, 5]]), full_head=full_head)


def test_errors_name_the_argument():
    lm = prefix_model(CAUSAL["qwen2"](), TRIE)
    ids, mask = prompts().values()
    for context, error, message in (
        ("a prompt", TypeError, "context must hold input_ids and attention_mask, got str"),
        ({"input_ids": ids, "token_type_ids": ids}, ValueError, "got also token_type_ids"),
        ({"input_ids": ids.float()}, TypeError, "input_ids must be .* got float32"),
        ({"input_ids": ids, "attention_mask": mask[:, 1:]}, ValueError, "attention_mask must have the shape"),
        (
            {"input_ids": ids, "attention_mask": 0 * mask},
            ValueError,
            "attention_mask must leave every prompt",
        ),
    ):
        with pytest.raises(error, match=message):
            lm.prefill(context)
    for candidates, message in (
        (ROWS[:4], r"candidates must have the shape \[B, G, T\]"),
        (ROWS[None, :4].expand(2, -1, -1), r"candidates must have the shape \[B, G, T\]"),
        (torch.zeros(3, 2, 5, dtype=torch.int64), "candidates must have at most L = 3 tokens, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            lm.score(prompts(), candidates)
    with pytest.raises(ValueError, match="normalize must be 'legal' or 'vocab', got 'all'"):
        lm.score(prompts(), ROWS.expand(3, -1, -1), normalize="all")
    with pytest.raises(ValueError, match="values needs a value head"):
        lm.score(prompts(), ROWS.expand(3, -1, -1), values=True)


def test_peft():
    """LoRA layers take part in decoding and training, and get the gradients."""
    peft = pytest.importorskip("peft")
    model, inputs = CAUSAL["qwen2"](), prompts()
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, lora)
    lm = prefix_model(wrapped, TRIE)
    assert_ranked(beam_search(lm, inputs, lm.trie, len(ROWS)), lm, model, inputs)
    lm.score(inputs, ROWS.expand(3, -1, -1)).logp.square().sum().backward()
    learning = {name for name, parameter in wrapped.named_parameters() if parameter.grad is not None}
    assert learning
    assert all("lora" in name for name in learning)


def test_a_compiled_model():
    """The same items, and a second decode compiles nothing, also of longer prompts."""
    counter = CompileCounterWithBackend("eager")
    model, inputs = causal("Qwen2", num_hidden_layers=1)(), prompts()
    lm = prefix_model(model, TRIE)
    compiled = prefix_model(torch.compile(model, backend=counter, dynamic=True), TRIE)
    graphs = []
    for columns in (9, 9, 11):
        inputs = prompts(columns=columns)
        got, want = (beam_search(x, inputs, lm.trie, 6) for x in (compiled, lm))
        assert torch.equal(got.node, want.node)
        torch.testing.assert_close(got.logp, want.logp)
        graphs.append(counter.frame_count)
    assert 0 < graphs[0] == graphs[1] == graphs[2]
