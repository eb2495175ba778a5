"""SASRec (arXiv 1808.09781) on the rows of a study, for scale: a transformer over items, not SID tokens.

Cross entropy over all items at every step, as recent comparisons have it, with the windows, item dropout and
number of epochs of the supervised policy. An item is a distinct semantic ID, so a hit is counted alike.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vstar_ops.train.data import Split, UserWindows
from vstar_ops.train.model import Block
from vstar_ops.train.trainer import Batches, Run

DIM, LAYERS, HEADS, DROPOUT, LR = 128, 2, 4, 0.3, 1e-3


class SASRec(nn.Module):
    """Scores of all items after every item of histories ``[B, T]``, -1 past their ends."""

    def __init__(self, items: int, longest: int) -> None:
        super().__init__()
        self.item, self.position = nn.Embedding(items, DIM), nn.Embedding(longest, DIM)
        self.blocks = nn.ModuleList(Block(DIM, HEADS, DROPOUT) for _ in range(LAYERS))
        self.norm, self.dropout = nn.LayerNorm(DIM), nn.Dropout(DROPOUT)
        for table in (self.item, self.position):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, history: Tensor) -> Tensor:
        real, length = history >= 0, history.shape[1]
        x = self.item(history.clamp(min=0)) + self.position(torch.arange(length))
        x = self.dropout(x)
        mask = torch.ones(length, length, dtype=torch.bool).tril() & (
            real[:, None] | torch.eye(length, dtype=torch.bool)
        )
        for block in self.blocks:
            q, k, v = (part.transpose(1, 2) for part in block.project(x))
            x = block.finish(x, block.attend(q, k, v, mask).transpose(1, 2))
        return self.norm(x) @ self.item.weight.T


def sasrec(run: Run, test_rows: int | None = None) -> dict[str, Tensor]:
    """NDCG@10 and HR@10 of every test request, by the weights that are best on the valid split."""
    c, data, trie = run.config, run.dataset, run.trie
    torch.manual_seed(run.seed)
    windows, first = UserWindows(data.train), trie.level_offset[-2]

    def leaves(sequences: Tensor) -> Tensor:
        node = trie.lookup(sequences).long()
        return torch.where(node >= first, node - first, -1)

    model = SASRec(trie.num_sequences, windows.longest)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=c.weight_decay)
    batches = Batches(windows.draw, c.sft_batch_size)
    steps = c.sft_epochs * -(-len(windows) // c.sft_batch_size)
    best, kept = -1.0, model.state_dict()
    for step in range(1, steps + 1):
        model.train()
        items = leaves(windows.items(next(batches), c.item_dropout))
        target = items[:, 1:]
        scores = model(items[:, :-1])[target >= 0]
        loss = F.cross_entropy(scores, target[target >= 0], label_smoothing=c.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(1, steps // c.sft_evals) == 0 or step == steps:
            found = _scores(model, data.valid.part(c.valid_rows), leaves)["NDCG@10"].mean().item()
            if found > best:
                best, kept = found, {name: x.clone() for name, x in model.state_dict().items()}
    model.load_state_dict(kept)
    return _scores(model, data.test.part(test_rows), leaves)


@torch.no_grad()
def _scores(model: SASRec, split: Split, leaves: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    model.eval()
    ranks = []
    for rows in torch.arange(len(split)).split(256):
        part = split[rows]
        scores = model(leaves(part.history))[torch.arange(len(rows)), part.items.clamp(min=1) - 1]
        own = scores.gather(1, leaves(part.target)[:, None])
        ranks.append((scores > own).sum(1))
    rank = torch.cat(ranks).double()
    return {"NDCG@10": ((1 / torch.log2(rank + 2)) * (rank < 10)).float(), "HR@10": (rank < 10).float()}
