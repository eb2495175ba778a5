"""RL of a MiniOneRec model: its folders, its prompts, our beams and sibling advantages in TRL's trainer.

    pip install "vstar_ops[trl]"
    python examples/minionerec.py                                   # a made-up data set, a tiny random model
    python examples/minionerec.py --data DIR --category NAME --model PATH --epochs 1

Below DIR are train/NAME*.csv, with the columns history_item_sid and item_sid, and index/NAME.index.json. PATH
is a checkpoint after supervised training, whose tokenizer knows every code as one token.
"""

import argparse
import ast
import csv
import json
import math
import os
import random
import tempfile
from pathlib import Path

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func is experimental in TRL

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import GRPOConfig

from vstar_ops import Trie
from vstar_ops.integrations.trl import SiblingGRPOTrainer, trie_rollout

# What MiniOneRec's checkpoints were trained on: this text, then the semantic ID and a line break.
PROMPT = (
    "### User Input: \nThe user has interacted with items {history} in chronological order. "
    "Can you predict the next possible item that the user may expect?\n\n### Response:\n"
)
GROUP = 16


def requests(folder: Path, category: str) -> Dataset:
    """Prompts, and the semantic ID of the item that followed."""
    (path,) = sorted((folder / "train").glob(f"{category}*.csv"))
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    histories = [ast.literal_eval(row["history_item_sid"]) for row in rows]
    prompts = [PROMPT.format(history=", ".join(history)) for history in histories]
    return Dataset.from_dict({"prompt": prompts, "target": [row["item_sid"] for row in rows]})


def rule(completions, target, **_):
    """1 for the item that followed."""
    return [float(text.split() == [sid]) for text, sid in zip(plain(completions), target)]


def ranking(completions, target, **_):
    """Where a group has a hit, a miss costs the more the higher it is ranked."""
    hits = rule(completions, target)
    discount = [1 / math.log2(rank + 2) for rank in range(GROUP)]
    scores = []
    for first in range(0, len(hits), GROUP):
        group = hits[first : first + GROUP]
        scores += [-d / sum(discount) if any(group) and not hit else 0.0 for hit, d in zip(group, discount)]
    return scores


def plain(completions):
    """Without the spaces that some tokenizers put between codes."""
    return [text.replace("> <", "><") for text in completions]


def made_up(folder: Path) -> str:
    """A small data set in the same layout: who bought an item buys the one after it."""
    random.seed(0)
    sids = sorted({tuple(random.randrange(8) for _ in range(3)) for _ in range(60)})
    sids = ["".join(f"<{level}_{code}>" for level, code in zip("abc", sid)) for sid in sids]
    (folder / "index").mkdir(parents=True)
    (folder / "train").mkdir()
    index = {str(i): sid.replace("><", "> <").split() for i, sid in enumerate(sids)}
    (folder / "index" / "made_up.index.json").write_text(json.dumps(index))
    with (folder / "train" / "made_up.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user_id", "history_item_sid", "item_sid"])
        for user in range(200):
            at = random.randrange(len(sids) - 4)
            writer.writerow([user, str(sids[at : at + 3]), sids[at + 3]])
    return "made_up"


def tiny(index: Path):
    """A tokenizer of the codes and of the prompt's words, and a model that knows nothing."""
    codes = {code for sid in json.loads(index.read_text()).values() for code in sid}
    words = PROMPT.replace("\n", " \n ").replace("{history}", ",").split(" ")
    vocabulary = {
        word: i for i, word in enumerate(dict.fromkeys(["<pad>", "<eos>", "\n", *sorted(codes), *words]))
    }
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    split = [pre_tokenizers.Split(mark, "isolated") for mark in ("\n", ",")]
    codes_apart = pre_tokenizers.Split("<", "merged_with_next")
    made.pre_tokenizer = pre_tokenizers.Sequence([*split, codes_apart, pre_tokenizers.Split(" ", "removed")])
    config = transformers.Qwen2Config(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>"
    )
    return transformers.Qwen2ForCausalLM(config), tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder in MiniOneRec's layout (default: made up)")
    parser.add_argument("--category", help="the beginning of the files' names")
    parser.add_argument("--model", help="a checkpoint (default: a tiny random model)")
    parser.add_argument("--epochs", type=float, default=0.1)
    parser.add_argument("--output", default=tempfile.mkdtemp(), help="for checkpoints")
    options = parser.parse_args()
    if options.data is None:
        options.data = Path(options.output) / "data"
        options.category = made_up(options.data)
    index = options.data / "index" / f"{options.category}.index.json"
    if options.model is None:
        model, tokenizer = tiny(index)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(options.model)
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)

    sids = ["".join(sid) for sid in json.loads(index.read_text()).values()]
    trie = Trie.from_sequences(tokenizer([f"{sid}\n" for sid in sids], add_special_tokens=False)["input_ids"])
    trainer = SiblingGRPOTrainer(
        model,
        [rule, ranking],
        args=GRPOConfig(
            options.output,
            per_device_train_batch_size=4 * GROUP,
            num_generations=GROUP,
            max_completion_length=trie.length + 1,
            num_train_epochs=options.epochs,
            learning_rate=1e-5 if options.model else 1e-3,
            beta=0.0,
            loss_type="grpo",
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=not torch.cuda.is_available(),
            bf16=torch.cuda.is_available(),
        ),
        train_dataset=requests(options.data, options.category),
        processing_class=tokenizer,
        rollout_func=trie_rollout(trie, "beam"),  # 16 different items per request, best first
        trie=trie,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    hits = sum(GROUP * entry["rewards/rule/mean"] for entry in logs) / len(logs)
    print(f"{len(logs)} steps, {len(sids)} items; share of requests with a hit in {GROUP} beams: {hits:.2f}")


if __name__ == "__main__":
    main()
