"""Part ``tuning`` of the study: one setting changed at a time, by the scores of the valid split.

The other parts, and the defaults of the training loop, have what was chosen by it: a sibling term that
weighs 0.3, and on clicks a V that weighs 1 in the search.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vstar_ops.train import report
from vstar_ops.train.config import Config

from .policies import POLICIES, Policy

BY_CLICK = {"reward: the click": {"reward": "rule"}, "reward: its prefixes": {"reward": "prefix"}}
ALL = {"3 x learning rate": {"rl_lr": 3.0}, "32 candidates": {"candidates": 32}}
# What all settings start from; V's weight is that on clicks.
BEFORE = {"sibling_weight": 1.0}
V_ON_CLICKS = 3.0
SIBLING = {
    "sibling term 0.3": {"sibling_weight": 0.3},
    "sibling term 3": {"sibling_weight": 3.0},
    "first tokens weigh more": {"sibling_decay": 0.5},
    "last tokens weigh more": {"sibling_decay": 2.0},
}
VALUE = {
    "0.3 x V in the search": {"value_weight": 0.3},
    "3 x V in the search": {"value_weight": 3.0},
    "3 x V's learning rate": {"value_lr": 3.0},
    "forced tokens paid": {"skip_forced": False},
    "no value beams": {"num_value_beams": 0},
}
# Policy -> change -> fields of the config or of its search; numbers of _FACTORS multiply what stands there.
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "GRPO": {"": {}} | BY_CLICK | ALL,
    "Sibling-GRPO": {"": {}} | BY_CLICK | ALL | SIBLING,
    "V-STAR": {"": {}} | BY_CLICK | ALL | VALUE | {"sibling term 0.3": {"sibling_weight": 0.3}},
}
_FACTORS = {"rl_lr", "value_lr", "value_weight"}


def settings(config: Config, *, on_clicks: bool) -> dict[str, Policy]:
    """Setting -> the policy to train, in a study of ``config``, on clicks or with a true reward."""
    found = {}
    for name, changes in SETTINGS.items():
        base = POLICIES[name]
        ved = base.ved | ({"value_weight": V_ON_CLICKS} if on_clicks else {})
        base = dataclasses.replace(base, changes=base.changes | BEFORE, ved=ved)
        for change, fields in changes.items():
            if on_clicks or "reward" not in fields:  # a true reward is what is asked for
                found[f"{name}, {change}" if change else name] = changed(base, fields, config)
    return found


def changed(policy: Policy, fields: Mapping[str, Any], config: Config) -> Policy:
    """The policy with some fields changed, in a study of ``config``."""
    before = policy.config(config)
    at = {name: before.ved if hasattr(before.ved, name) else before for name in fields}
    new = {name: getattr(at[name], name) * to if name in _FACTORS else to for name, to in fields.items()}
    ved = {name: value for name, value in new.items() if at[name] is before.ved}
    other = {name: value for name, value in new.items() if at[name] is before}
    return dataclasses.replace(policy, changes=policy.changes | other, ved=policy.ved | ved)


def table(looks: Mapping[str, Tensor]) -> str:
    """The best look, and every look, of each setting."""
    steps = next(iter(looks.values()))[:, 0]
    rows = [["setting", "best look", *(f"step {int(step)}" for step in steps)]]
    for setting, found in looks.items():
        rows.append([setting, *(f"{score:.4f}" for score in (found[:, 1].max(), *found[:, 1]))])
    return report.markdown(rows)


def read_looks(text: str, metric: str) -> list[tuple[float, float]]:
    """The steps and the scores of the looks in a file of metrics."""
    records = [json.loads(line) for line in text.splitlines()]
    return [(x["step"], x["valid"][metric]) for x in records if "valid" in x]
