"""The options of value-guided decoding, and the presets that are worth using."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..ops._checks import check_finite, check_int, check_positive


@dataclass(frozen=True)
class VEDConfig:
    r"""Options of :func:`vstar_ops.decoding.ved`.

    The defaults are this library's search as a decoder. :meth:`paper` is the search of V-STAR (arXiv
    2602.10699); :meth:`training` finds candidates to learn from. A config is checked when it is made.

    What the search is worth, and what of it does it, is measured in ``docs/evidence.md``.

    Attributes:
        budget: forward tokens per request, a hard limit: 1 for the root and 1 for each other evaluated
            prefix. None: ``1 + (L - 1) * num_candidates``, what a beam search of that width may spend.
        beam_width: width of the initial beam search, each node of which is evaluated; narrowed to what the
            budget allows.
        entropy_weight: :math:`\lambda`, weight of the entropy in the priority G.
        exploration: :math:`\beta` of the upper confidence bound U, at least 0.
        value_weight: :math:`w_v`, weight of the value. With 0, and without ``child_values``, this is a
            best-first search by probability, and the model needs no values. 1 was chosen on logged clicks, 10
            on the synthetic catalogue, where V learns the true reward itself (``docs/evidence.md``).
        logp_weight: :math:`w_p`, weight of the log-probability in G and in the ranking of leaves; 0 is the
            paper.
        evaluate_leaves: True: leaves are evaluated, cost a token each, and are ranked by their own value.
            False: the whole budget goes to inner prefixes, and a leaf is ranked by its parent's value.
        child_values: rank leaves that were not evaluated by V plus the model's ``child_value``.
            The value beams need it.
        num_value_beams: number of initial beams chosen by
            :math:`w_p \log\pi + w_v (V + \text{child value})` among those that log pi does not choose;
            needs ``child_values``. 0 is the paper. With this and ``beam_width`` at the number of candidates
            or above, the search is a beam search by value.
        num_policy_candidates: number of candidates that are the policy's own: the most probable leaves of
            the tree, whatever their value, in front of the others. Only for training, which must see the
            mistakes that V avoids.
        max_leaves_per_prefix: number of leaves listed below one evaluated prefix that may be candidates
            before those of other prefixes are used up; None is no limit. A parent's value says the same of
            all its leaves, so without a limit the candidates crowd below few prefixes. Only for training.
        traversals_per_round: traversals between two forwards of the model. More than 1, of which those after
            the first do not know yet what the others find, saves forwards; 1 is the paper.
        max_idle: number of traversals in a row that may expand nothing before the search of a request ends.
            It bounds the time of a search that never finds a node to expand, which ``exploration`` 0 may be.
        expand_root: False leaves the root out of the expansion: of the evaluated prefixes only the initial
            beams have first tokens.
        normalize, temperature: of the policy, as in :func:`vstar_ops.expand_topk`.
        skip_forced: True: a prefix from which only one leaf can be reached is never evaluated and costs no
            token. It stands for that leaf, whose log-probability is the prefix's, and is ranked like a leaf
            below its parent. The initial beam search passes over such prefixes: its beams are the others
            among the first ``LISTED_PER_BEAM`` extensions per beam. A prefix with a single child that
            branches further down costs its token, since longer prefixes attend to it. Without effect, as in
            :func:`beam_search`, under ``"vocab"`` and for models that do not promise ``finite_logits``
            (:class:`~vstar_ops.decoding.PrefixModel`), and with ``evaluate_leaves``, where the model must
            run all tokens of a leaf. False is the paper.

    Raises:
        TypeError, ValueError: a field's type or value, by name.
    """

    budget: int | None = None
    beam_width: int = 12
    entropy_weight: float = 0.1
    exploration: float = 1.0
    value_weight: float = 1.0
    logp_weight: float = 1.0
    evaluate_leaves: bool = False
    child_values: bool = True
    num_value_beams: int = 6
    num_policy_candidates: int = 0
    max_leaves_per_prefix: int | None = None
    traversals_per_round: int = 4
    max_idle: int = 1000
    expand_root: bool = True
    normalize: str = "legal"
    temperature: float = 1.0
    skip_forced: bool = True

    LISTED_PER_BEAM: ClassVar[int] = 2

    def __post_init__(self) -> None:
        for name in ("budget", "max_leaves_per_prefix"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 1)
        for name in ("beam_width", "traversals_per_round"):
            check_int(name, getattr(self, name), 1)
        for name in ("num_value_beams", "num_policy_candidates", "max_idle"):
            check_int(name, getattr(self, name), 0)
        for name in ("entropy_weight", "exploration", "value_weight", "logp_weight"):
            check_finite(name, getattr(self, name))
        for name in ("evaluate_leaves", "child_values", "expand_root", "skip_forced"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {type(getattr(self, name)).__name__}")
        if self.exploration < 0:
            raise ValueError(f"exploration must be >= 0, got {self.exploration}")
        if self.normalize not in ("legal", "vocab"):
            raise ValueError(f"normalize must be 'legal' or 'vocab', got {self.normalize!r}")
        check_positive("temperature", self.temperature)
        if self.num_value_beams and not self.child_values:
            raise ValueError(f"num_value_beams must be 0 with child_values=False, got {self.num_value_beams}")

    @classmethod
    def paper(cls, **changes: Any) -> VEDConfig:
        """The search of the paper, with some fields changed."""
        fields: dict[str, Any] = {"beam_width": 8, "logp_weight": 0.0}
        fields |= {"evaluate_leaves": True, "child_values": False, "num_value_beams": 0}
        fields |= {"traversals_per_round": 1, "skip_forced": False}
        return cls(**{**fields, **changes})

    @classmethod
    def training(cls, **changes: Any) -> VEDConfig:
        """The search that finds candidates for reinforcement learning, with some fields changed.

        Of 16 candidates 8 are the policy's own. The others are the best leaf of each other prefix, which
        spreads what V learns from.
        """
        return cls(**{"num_policy_candidates": 8, "max_leaves_per_prefix": 1, **changes})

    def replace(self, **changes: Any) -> VEDConfig:
        """This config with some fields changed."""
        return replace(self, **changes)

    def for_evaluation(self) -> VEDConfig:
        """The decoder of a config for training: all candidates by rank."""
        return self.replace(num_policy_candidates=0, max_leaves_per_prefix=None)

    def forward_budget(self, length: int, num_candidates: int) -> int:
        """``budget``, or what stands for None; ``length`` is ``L``.

        Raises:
            ValueError: the budget is below ``L``, what one prefix of length ``L - 1`` costs.
        """
        if self.budget is None:
            return 1 + (length - 1) * num_candidates
        return check_int("budget", self.budget, length)
