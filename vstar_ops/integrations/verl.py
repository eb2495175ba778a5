"""Sibling advantages as an advantage estimator of verl, chosen by its configuration alone:

.. code-block:: bash

    python -m verl.trainer.main_ppo algorithm.adv_estimator=sibling_grpo \\
        +algorithm.sibling.sibling_weight=1.0 ...

``import verl`` loads this module in every process, by an entry point of the group ``verl.plugins``. The
advantages are those of :func:`vstar_ops.token_advantages`, for the actor's ``loss_agg_mode``.

verl gives an estimator rewards, masks and uids, but not the tokens. So the two places that call estimators,
``compute_advantage`` and the newer trainer's ``_compute_advantage``, are wrapped when they are imported, to
keep the tokens at hand. All other estimators run as before.
"""

from __future__ import annotations

import contextvars
import functools
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import require

try:
    require("verl", "0.9.1", "0.10")
except ImportError as problem:
    if "verl" in sys.modules:  # which is loading its plugins, and would not tell
        warnings.warn(str(problem), stacklevel=1)
    raise

from ..advantages import token_advantages

NAME = "sibling_grpo"

#: The ``normalizer`` of :func:`vstar_ops.token_advantages` for every ``loss_agg_mode`` of verl.
NORMALIZER = {
    "token-mean": "token",
    "token-sum": "sum",
    "seq-mean-token-mean": "sequence",
    "seq-mean-token-sum": "sum",
    "seq-mean-token-sum-norm": "constant",
}
_OPTIONS = ("global_weight", "sibling_weight", "form", "weighting", "singleton", "loss_agg_mode", "horizon")
_SIBLING_OPTIONS = ("eps", "ddof", "std_floor", "min_siblings", "baseline", "scale")

_responses: contextvars.ContextVar[Tensor | None] = contextvars.ContextVar("responses", default=None)


def sibling_grpo(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any = None,
    config: Any = None,
    responses: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """The estimator ``sibling_grpo``: the advantage of a response plus the sibling advantages of its tokens.

    The first term is GRPO's as verl has it: a response's score is the sum of its rewards, and within its uid
    ``(score - mean) / (std + 1e-6)``, or not divided under ``norm_adv_by_std_in_grpo=False``. Equal scores
    give exactly 0.

    ``algorithm.sibling`` may hold ``global_weight``, ``sibling_weight``, ``form`` and ``weighting`` of
    :func:`vstar_ops.token_advantages`, with the defaults there; ``eps``, ``ddof``, ``std_floor``,
    ``min_siblings``, ``baseline`` and ``scale`` of :func:`vstar_ops.sibling_advantage`, by default those of
    ``form``; and:

    - ``singleton``: the first term of a response that is alone in its group: ``"reward"``, its score, as in
      verl (which divides it by 1 + 1e-6), or ``"zero"``. It has no siblings in either case.
    - ``loss_agg_mode``, ``horizon``: what the loss has. By default they are the actor's ``loss_agg_mode`` and
      ``loss_scale_factor``, where the configuration of the whole run is at hand.

    The actor's loss of the whole batch is then that of :func:`vstar_ops.sibling_grpo_loss` wherever no ratio
    is clipped; mini-batches average to it as far as their rows and tokens are equally many.

    Args:
        token_level_rewards: floats ``[N, T]``.
        response_mask: ``[N, T]``, 1 up to EOS. A response without any token takes no part.
        index: ``N`` uids, groups of any sizes in any order.
        config: verl's ``algorithm`` configuration.
        responses: ints ``[N, T]``; by default those of the batch that verl computes advantages for.

    Returns:
        Advantages and returns, the same float32 ``[N, T]``.

    Raises:
        RuntimeError: the tokens are not at hand.
        ValueError: rewards are not finite, uids are missing, or an option is wrong, by name.
    """
    responses = _responses.get() if responses is None else responses
    if responses is None:
        raise RuntimeError(
            f"{NAME} needs the tokens: it finds them in verl's compute_advantage and PPOTrainer, "
            "and called from elsewhere it must be given responses"
        )
    if index is None:
        raise ValueError(f"{NAME} needs a uid for every response, got None")
    options = _options(config)
    mask = response_mask.bool()
    scores = token_level_rewards.sum(-1).float()
    if not bool(torch.where(mask.sum(-1) > 0, scores, 0).isfinite().all()):
        raise ValueError("token_level_rewards must be finite, got NaN or infinity")
    mode = _setting(config, options, "loss_agg_mode", "loss_agg_mode")
    if mode not in NORMALIZER:
        raise ValueError(
            f"algorithm.sibling.loss_agg_mode must be the loss's, one of {tuple(NORMALIZER)}, got {mode!r}"
        )
    horizon = _setting(config, options, "horizon", "loss_scale_factor")
    scaled = config is None or config.get("norm_adv_by_std_in_grpo", True)
    advantages = token_advantages(
        responses,
        scores,
        index,
        mask,
        normalizer=NORMALIZER[mode],
        horizon=horizon if NORMALIZER[mode] == "constant" else None,
        singleton=options.pop("singleton", "reward"),
        group_options={"eps": 1e-6, "scale": "group" if scaled else "none"},
        sibling_options={name: options.pop(name) for name in _SIBLING_OPTIONS if name in options},
        **options,
    )
    return advantages, advantages


def _options(config: Any) -> dict[str, Any]:
    """``algorithm.sibling``."""
    options = dict((config.get("sibling") if config is not None else None) or {})
    known = (*_OPTIONS, *_SIBLING_OPTIONS)
    if other := sorted(set(options) - set(known)):
        raise ValueError(f"algorithm.sibling must hold only {', '.join(known)}, got {', '.join(other)}")
    return options


def _setting(config: Any, options: dict[str, Any], name: str, actors: str) -> Any:
    """An option, by default the actor's setting in the configuration that ``config`` is a part of."""
    if options.get(name) is not None:
        return options.pop(name)
    options.pop(name, None)
    root = config._get_root() if hasattr(config, "_get_root") else {}
    for key in ("actor_rollout_ref", "actor", actors):
        root = (root or {}).get(key)
    return root


# ---------------------------------------------------------------- the tokens at hand


@contextmanager
def _at_hand(responses: Tensor) -> Iterator[None]:
    token = _responses.set(responses)
    try:
        yield
    finally:
        _responses.reset(token)


def _register(core_algos: ModuleType) -> None:
    core_algos.register_adv_est(NAME)(sibling_grpo)


def _wrap_function(ray_trainer: ModuleType) -> None:
    """``compute_advantage``, and the copies that other modules have imported."""
    original = ray_trainer.compute_advantage

    @functools.wraps(original)
    def compute_advantage(data: Any, *args: Any, **kwargs: Any) -> Any:
        if "responses" not in data.batch.keys():  # noqa: SIM118 (a TensorDict iterates over its rows)
            return original(data, *args, **kwargs)
        with _at_hand(data.batch["responses"]):
            return original(data, *args, **kwargs)

    for name, module in list(sys.modules.items()):
        if name.startswith("verl.") and getattr(module, "compute_advantage", None) is original:
            module.compute_advantage = compute_advantage  # type: ignore[attr-defined]


def _wrap_method(trainer_base: ModuleType) -> None:
    """``PPOTrainer._compute_advantage``, whose batch lies in a queue."""
    original = trainer_base.PPOTrainer._compute_advantage

    @functools.wraps(original)
    def _compute_advantage(self: Any, batch: Any, metrics: dict[str, Any]) -> Any:
        if self.config.algorithm.adv_estimator != NAME:
            return original(self, batch, metrics)
        found = trainer_base.tq.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=["responses"]
        )
        with _at_hand(found["responses"].to_padded_tensor(padding=0)):
            return original(self, batch, metrics)

    trainer_base.PPOTrainer._compute_advantage = _compute_advantage


_PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "verl.trainer.ppo.core_algos": _register,
    "verl.trainer.ppo.ray_trainer": _wrap_function,
    "verl.trainer.ppo.v1.trainer_base": _wrap_method,
}


class _PatchOnImport(importlib.abc.MetaPathFinder):
    """Most of verl's processes import none of these modules, and need not for this."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        patch = _PATCHES.get(fullname)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target) if patch else None
        if patch is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            patch(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _PatchOnImport())
for _name, _patch in _PATCHES.items():
    if _name in sys.modules:
        _patch(sys.modules[_name])
