"""Beam search over a Hugging Face model and a catalogue, beside ``generate()`` with a mask.

    pip install "vstar_ops[transformers]"
    python examples/hf_beam_search.py

A tiny random model stands for ``AutoModelForCausalLM.from_pretrained(...)``. Semantic IDs are the last 768
tokens of a vocabulary of 151,936.
"""

import time

import torch
import transformers

from vstar_ops import Trie
from vstar_ops.decoding import beam_search
from vstar_ops.integrations.transformers import TrieLogitsProcessor, prefix_model

VOCAB, BEAMS = 151_936, 16
torch.set_num_threads(1)
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
model = transformers.Qwen2ForCausalLM(config).eval()

items = torch.randint(256, (10_000, 3)) + torch.arange(3) * 256 + VOCAB - 768
trie = Trie.from_sequences(items)  # its items are the row numbers of what is given

# Two prompts, as a tokenizer returns them, padded on the left.
input_ids = torch.randint(5, 1000, (2, 40))
attention_mask = torch.ones_like(input_ids)
attention_mask[1, :12] = 0
inputs = {"input_ids": input_ids, "attention_mask": attention_mask}

start = time.perf_counter()
lm = prefix_model(model, trie)
found = beam_search(lm, inputs, lm.trie, BEAMS)
tokens = lm.token_ids(found.node)  # int64 [2, 16, 3]
ours = time.perf_counter() - start
print(f"best items of prompt 0: {trie.items(found.node[0, :4]).tolist()}, logp {found.logp[0, :4].tolist()}")

start = time.perf_counter()
generated = model.generate(
    **inputs,
    logits_processor=[TrieLogitsProcessor(trie, prompt_length=input_ids.shape[1])],
    max_new_tokens=trie.length,
    num_beams=BEAMS,
    num_return_sequences=BEAMS,
    do_sample=False,
    length_penalty=0.0,
)
theirs = time.perf_counter() - start
same = (generated[:, input_ids.shape[1] :].view_as(tokens) == tokens).all(2).float().mean()
print(
    f"beam_search {1000 * ours:.0f} ms, generate() {1000 * theirs:.0f} ms, same sequences: {100 * same:.0f} %"
)
