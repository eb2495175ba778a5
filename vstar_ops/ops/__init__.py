"""The public ops, one module each: documentation, checks, schema and registration."""

from ._checks import validation
from ._registry import OPS
from .beams import AdvancedBeams, RowsToRun, advance_beams, rows_to_run
from .draws import DistinctRows, DrawnChildren, distinct_rows, draw_children
from .expand_topk import ExpandTopK, expand_topk
from .filters import ItemFilter, filter_items
from .group_advantage import group_advantage
from .prefix_returns import PrefixReturns, prefix_returns
from .prefix_tree import PrefixTree, prefix_tree
from .sibling_advantage import SiblingAdvantage, sibling_advantage
from .sibling_grpo_loss import SiblingGRPOLoss, loss_counts, sibling_grpo_loss, sibling_grpo_loss_from_logits
from .token_logp import TokenLogp, token_logp
from .ved import (
    LeafCandidates,
    NodeEvaluation,
    SearchTrees,
    SelectedRows,
    ved_candidates,
    ved_insert,
    ved_select,
)
from .ved_rows import ModelInputs, ved_beams, ved_evaluate, ved_inputs

__all__ = [
    "OPS",
    "AdvancedBeams",
    "DistinctRows",
    "DrawnChildren",
    "ExpandTopK",
    "ItemFilter",
    "LeafCandidates",
    "ModelInputs",
    "NodeEvaluation",
    "PrefixReturns",
    "PrefixTree",
    "RowsToRun",
    "SearchTrees",
    "SelectedRows",
    "SiblingAdvantage",
    "SiblingGRPOLoss",
    "TokenLogp",
    "advance_beams",
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
    "token_logp",
    "validation",
    "ved_beams",
    "ved_candidates",
    "ved_evaluate",
    "ved_inputs",
    "ved_insert",
    "ved_select",
]
