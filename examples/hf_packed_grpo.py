"""GRPO with sibling advantages on a Hugging Face model, each prompt run once, with a value head and VED.

    pip install "vstar_ops[transformers]"
    python examples/hf_packed_grpo.py

A tiny random model learns to recommend items whose second token is even, a value head learns to expect them.
"""

import tempfile
from pathlib import Path

import torch
import transformers

from vstar_ops import Trie, sibling_grpo_loss
from vstar_ops.decoding import VEDConfig, topk_sampling, ved
from vstar_ops.integrations.transformers import ValueHead, prefix_model

VOCAB, GROUP, STEPS = 2_000, 16, 20
torch.set_num_threads(1)  # a model this small only loses time to threads
torch.manual_seed(0)
config = transformers.Qwen2Config(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.1,
    pad_token_id=0,
)
model = transformers.Qwen2ForCausalLM(config).train()
items = torch.randint(32, (500, 3)) + torch.arange(3) * 32 + VOCAB - 96
trie = Trie.from_sequences(items)
inputs = {"input_ids": torch.randint(5, 1000, (8, 20))}  # and an attention_mask where prompts are padded


def rewards(tokens: torch.Tensor) -> torch.Tensor:
    """float32 ``[B, G]`` of ``tokens[B, G, L]``."""
    return (tokens[..., 1] % 2 == 0).float()


lm = prefix_model(model, trie)
head = lm.add_value_head()
optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=2e-3)
for step in range(STEPS):
    found = topk_sampling(lm, inputs, lm.trie, GROUP, seed=step)  # in eval mode, then back in train mode
    candidates = lm.token_ids(found.node)
    reward = rewards(candidates)

    scores = lm.score(inputs, candidates, values=True)  # one row per prompt, not one per candidate
    policy_loss = sibling_grpo_loss(scores.logp, candidates, reward).loss
    value_loss = (scores.value - reward[..., None]).square().mean()
    value_loss = value_loss + (scores.value_from_parent - reward[..., None]).square().mean()
    optimizer.zero_grad()
    (policy_loss + value_loss).backward()
    optimizer.step()
    if step % 5 == 0 or step == STEPS - 1:
        print(f"step {step:3d}  mean reward {reward.mean():.2f}  value loss {value_loss:.3f}")

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "value_head.safetensors"
    head.save(path)
    lm = prefix_model(model, trie, value_head=ValueHead.load(path))
found = ved(lm, inputs, lm.trie, GROUP, VEDConfig(value_weight=3.0))
reward = rewards(lm.token_ids(found.node))
print(f"VED after {found.forward_tokens.max()} tokens: mean reward {reward.mean():.2f}")
