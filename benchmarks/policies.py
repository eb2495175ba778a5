"""The policies of the study, and how each is made of the supervised one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vstar_ops.decoding import VEDConfig
from vstar_ops.train.config import Config

CANDIDATES = 16
POLICY_ALONE = {"num_value_beams": 0, "beam_width": CANDIDATES, "num_policy_candidates": CANDIDATES}


@dataclass(frozen=True)
class Policy:
    """How a policy is made of the supervised one.

    Attributes:
        variant: as text; None: not at all.
        changes: fields of :class:`Config`.
        ved: fields of its search; ``paper`` starts from the paper's.
        prior: of the item prior, ``"fitted"``, ``"none"``, or ``"by hand"``: one weight for all levels, in
            units of the cosine, chosen on the valid split.
    """

    variant: str | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    ved: dict[str, Any] = field(default_factory=dict)
    paper: bool = False
    prior: str = "fitted"

    def config(self, base: Config) -> Config:
        """``base`` with what is changed here. All steps are taken; the valid split says which is kept."""
        ved = VEDConfig.paper() if self.paper else base.ved
        return base.replace(**self.changes, ved=ved.replace(**self.ved), patience=base.rl_evals)


SFT, GRPO, VSTAR = "SFT", "GRPO", "V-STAR"
PLAIN = "SFT without item prior"
PAPER = {"sibling_form": "paper", "sibling_weight": 1.0}
POLICIES = {
    PLAIN: Policy(prior="none"),
    SFT: Policy(),
    "SFT, prior by hand": Policy(prior="by hand"),
    GRPO: Policy("beam+grpo"),
    "Sibling-GRPO": Policy("beam+joint"),
    "Sibling-GRPO, the paper's": Policy("beam+joint", PAPER),
    "sibling advantages alone": Policy("beam+sibling"),
    "GRPO, V learned beside": Policy("ved+grpo", ved=POLICY_ALONE),
    VSTAR: Policy("ved+joint"),
    "V-STAR, the paper's": Policy("ved+joint", PAPER, paper=True),
}
