"""Sibling-GRPO of a Hugging Face model in TRL's trainer, on a catalogue of semantic IDs.

    pip install "vstar_ops[trl]"
    python examples/trl_sibling_grpo.py

A tiny random model and a made-up catalogue stand for yours. Half a minute on a CPU, without a download.
"""

import argparse
import os
import tempfile

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func is experimental in TRL

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import GRPOConfig

from vstar_ops import Trie
from vstar_ops.integrations.trl import SiblingGRPOTrainer, trie_rollout

LEVELS, CODES = 3, 8


def tokenizer_of_codes():
    """Three levels of codes, <a_0> ... <c_7>, and users."""
    words = ["<pad>", "<eos>", *(f"<{level}_{code}>" for level in "abc" for code in range(CODES))]
    words += [f"user{i}" for i in range(8)]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--sibling-weight", type=float, default=1.0)
    options = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = tokenizer_of_codes()
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config)

    # The catalogue: an item is a token of each level. Every user likes one of them.
    items = 2 + torch.arange(LEVELS) * CODES + torch.unique(torch.randint(0, CODES, (60, LEVELS)), dim=0)
    trie = Trie.from_sequences(items)
    liked = {f"user{i}": items[7 * i].tolist() for i in range(8)}

    def reward(prompts, completion_ids, **_):
        """The share of levels that are right from the first one on."""
        scores = []
        for prompt, tokens in zip(prompts, completion_ids):
            right = [a == b for a, b in zip(tokens, liked[prompt])]
            scores.append([*right, False].index(False) / LEVELS)
        return scores

    trainer = SiblingGRPOTrainer(
        model,
        reward,
        args=GRPOConfig(
            tempfile.mkdtemp(),
            per_device_train_batch_size=64,  # 4 users of 16 items: whole groups, each prompt run once
            num_generations=16,
            max_completion_length=LEVELS + 1,
            max_steps=options.steps,
            learning_rate=3e-3,
            gradient_checkpointing=False,
            lr_scheduler_type="constant",
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=Dataset.from_dict({"prompt": list(liked) * options.steps}),
        processing_class=tokenizer,
        rollout_func=trie_rollout(trie),  # only items of the catalogue
        trie=trie,  # log-probabilities over its tokens
        sibling_weight=options.sibling_weight,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    tenth = max(1, len(rewards) // 10)
    before, after = (sum(part) / tenth for part in (rewards[:tenth], rewards[-tenth:]))
    print(f"mean reward of sampled items: {before:.2f} at first, {after:.2f} after {options.steps} steps")


if __name__ == "__main__":
    main()
