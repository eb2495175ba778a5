"""Exact, fast decoding ops for generative recommendation: value-scored top-k prefix expansion under a
trie of legal semantic IDs, value-guided tree search, and sibling advantages for reinforcement learning
(V-STAR, arXiv 2602.10699).
"""

import torch

from ._backends import BackendStatus, backends, initialize, use_backend
from ._triton import warmup
from .advantages import token_advantages
from .noise import derive_seeds
from .ops import (
    AdvancedBeams,
    DistinctRows,
    DrawnChildren,
    ExpandTopK,
    ItemFilter,
    LeafCandidates,
    ModelInputs,
    NodeEvaluation,
    PrefixReturns,
    PrefixTree,
    RowsToRun,
    SearchTrees,
    SelectedRows,
    SiblingAdvantage,
    SiblingGRPOLoss,
    TokenLogp,
    advance_beams,
    distinct_rows,
    draw_children,
    expand_topk,
    filter_items,
    group_advantage,
    loss_counts,
    prefix_returns,
    prefix_tree,
    rows_to_run,
    sibling_advantage,
    sibling_grpo_loss,
    sibling_grpo_loss_from_logits,
    token_logp,
    validation,
    ved_beams,
    ved_candidates,
    ved_evaluate,
    ved_inputs,
    ved_insert,
    ved_select,
)
from .ops._registry import install_on_cuda
from .restricted_trie import RestrictedTrie
from .trie import Trie

initialize()
if torch.version.cuda:
    torch.cuda._lazy_call(install_on_cuda)  # when the first CUDA tensor is made; at once if there was one
del initialize, install_on_cuda

__version__ = "0.1.0"
__all__ = [
    "AdvancedBeams",
    "BackendStatus",
    "DistinctRows",
    "DrawnChildren",
    "ExpandTopK",
    "ItemFilter",
    "LeafCandidates",
    "ModelInputs",
    "NodeEvaluation",
    "PrefixReturns",
    "PrefixTree",
    "RestrictedTrie",
    "RowsToRun",
    "SearchTrees",
    "SelectedRows",
    "SiblingAdvantage",
    "SiblingGRPOLoss",
    "TokenLogp",
    "Trie",
    "advance_beams",
    "backends",
    "derive_seeds",
    "distinct_rows",
    "draw_children",
    "expand_topk",
    "filter_items",
    "group_advantage",
    "loss_counts",
    "prefix_returns",
    "prefix_tree",
    "rows_to_run",
    "sibling_advantage",
    "sibling_grpo_loss",
    "sibling_grpo_loss_from_logits",
    "token_advantages",
    "token_logp",
    "use_backend",
    "validation",
    "ved_beams",
    "ved_candidates",
    "ved_evaluate",
    "ved_inputs",
    "ved_insert",
    "ved_select",
    "warmup",
]
