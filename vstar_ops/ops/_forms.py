"""The named forms of the sibling term; what each means stands in ``sibling_grpo_loss``."""

from __future__ import annotations

from typing import Any, NamedTuple

from ._checks import check_choice


class SiblingForm(NamedTuple):
    """Keywords of ``sibling_advantage``, and whether a node or a candidate counts once."""

    options: dict[str, Any]
    weighting: str


FORMS = {
    "centered": SiblingForm({"baseline": "parent", "scale": "group", "ddof": 1}, "candidate"),
    "paper": SiblingForm({"baseline": "sibling", "scale": "siblings", "ddof": 0}, "node"),
}


def sibling_form(form: Any, weighting: Any) -> SiblingForm:
    """The checked form, with another weighting unless that is None."""
    check_choice("form", form, tuple(FORMS))
    if weighting is None:
        return FORMS[form]
    check_choice("weighting", weighting, ("node", "candidate"))
    return FORMS[form]._replace(weighting=weighting)
