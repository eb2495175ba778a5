"""Pure-torch twins of the ops: short, obviously right, float64-capable, never optimized.

They are a backend like any other (``vstar_ops.use_backend("reference")``), what runs where nothing
faster was built, and what the other backends are tested against.
"""

from ..noise import derive_seeds, gumbel, philox
from .beams import advance_beams, rows_to_run
from .draws import distinct_rows, draw_children
from .expand_topk import expand_topk
from .filters import filter_items
from .group_advantage import group_advantage
from .prefix_returns import prefix_returns
from .prefix_tree import prefix_tree
from .sibling_advantage import sibling_advantage
from .sibling_grpo_loss import sibling_grpo_loss
from .token_logp import token_logp, token_logp_backward
from .ved import ved_candidates, ved_insert, ved_select
from .ved_rows import ved_beams, ved_evaluate, ved_inputs

__all__ = [
    "advance_beams",
    "derive_seeds",
    "distinct_rows",
    "draw_children",
    "expand_topk",
    "filter_items",
    "group_advantage",
    "gumbel",
    "philox",
    "prefix_returns",
    "prefix_tree",
    "rows_to_run",
    "sibling_advantage",
    "sibling_grpo_loss",
    "token_logp",
    "token_logp_backward",
    "ved_beams",
    "ved_candidates",
    "ved_evaluate",
    "ved_inputs",
    "ved_insert",
    "ved_select",
]
