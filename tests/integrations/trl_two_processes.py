"""What ``test_two_processes`` runs in one process and in two: the advantages of all rows, in their order."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from test_trl import GROUP, PROMPTS, TRIE, make, trie_rollout


def fixed_rollout(prompts: list[str], trainer):
    """Completions by the place of a row among all."""
    first = trainer.accelerator.process_index * len(prompts)
    rows = [[11 + i % 3, *([12 + i % 2] * (i % 4))] for i in range(first, first + len(prompts))]
    return {"prompt_ids": trainer._tokenize_prompts(prompts)[0], "completion_ids": rows, "logprobs": None}


out = Path(sys.argv[1])
trainer = make(out.parent / "run", rollout=fixed_rollout, per_device_train_batch_size=3 * GROUP)
processes, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
everything = [{"prompt": prompt} for prompt in PROMPTS for _ in range(GROUP)]
share = len(everything) // processes
mine = everything[rank * share : (rank + 1) * share]  # of two processes, each has half of the second group
batch = trainer._generate_and_score_completions(mine)
padded = trainer.accelerator.pad_across_processes(batch["advantages"], dim=1)
advantages = trainer.accelerator.gather(padded)
error = ""
try:
    trie_rollout(TRIE)([row["prompt"] for row in mine], trainer)
except ValueError as problem:
    error = str(problem)
if rank == 0:
    torch.save({"advantages": advantages, "error": error}, out)
trainer.accelerator.wait_for_everyone()
