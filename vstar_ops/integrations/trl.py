"""Sibling advantages, constrained rollouts and packed prefix trees in TRL's ``GRPOTrainer``.

>>> trainer = SiblingGRPOTrainer(model, reward, args=config, train_dataset=prompts,
...                              processing_class=tokenizer, rollout_func=trie_rollout(trie), trie=trie)
>>> trainer.train()

Rewards, loss, metrics, checkpoints and the training loop are TRL's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import require

require("trl", "1.16", "1.17")

from trl import GRPOTrainer
from trl.models.utils import unwrap_model_for_generation

from ..advantages import GroupLayout, token_advantages
from ..decoding import beam_search, topk_sampling, ved
from ..ops._checks import check_choice, check_finite
from ..ops._forms import sibling_form
from ..packing import pack_prompts
from ..trie import Trie
from .transformers import CausalPrefixModel, ValueHead, prefix_model
from .transformers.head import HeadTap

#: The ``normalizer`` of :func:`vstar_ops.token_advantages` for every ``loss_type`` of TRL.
NORMALIZER = {
    "grpo": "sequence",
    "sapo": "sequence",
    "bnpo": "token",
    "dapo": "token",
    "cispo": "token",
    "vespo": "token",
    "dr_grpo": "constant",
    "luspo": "sum",
}
_DECODERS: dict[str, Callable[..., Any]] = {"sample": topk_sampling, "beam": beam_search, "ved": ved}


class SiblingGRPOTrainer(GRPOTrainer):
    r"""TRL's ``GRPOTrainer`` with an advantage per token: TRL's own of the row, plus the sibling advantage.

    :math:`w_{global} A_i + w_{sib} f_i A^{sib}_{it} / n_{it}` of :func:`vstar_ops.token_advantages`, so that
    TRL's loss is that of :func:`vstar_ops.sibling_grpo_loss` wherever no ratio is clipped. Advantages are
    made where TRL makes its own: of the whole groups of all processes, before rows are shuffled. ``"bnpo"``
    divides by the tokens of each micro-batch, so that it is exact for one micro-batch per step only. The
    weights 1 and 0 are TRL itself, bit for bit. Completions that no reward function scored take no part.

    Args:
        *args, **kwargs: as for ``GRPOTrainer``.
        global_weight, sibling_weight, form, weighting, sibling_options: as for
            :func:`vstar_ops.token_advantages`. ``scale_rewards`` of the configuration is for TRL's own term.
        packed: run each distinct prompt of a micro-batch once, with the prefix tree of its completions behind
            it (:mod:`vstar_ops.packing`). The results are the same up to rounding; it saves most where a
            micro-batch holds whole groups, as with ``steps_per_generation=1``.
        trie: the catalogue, in token ids: log-probabilities are over the legal tokens alone, as a rollout
            draws them that is constrained by the trie, and the head is applied to these tokens only. What
            follows an item, such as EOS, is certain. Includes ``packed``. It may be restricted, for all
            requests alike.

    Raises:
        ImportError: TRL is missing or of a version that this class was not tested with.
        ValueError: a configuration for which this would not be true, by the name of its option.
    """

    def __init__(
        self,
        *args: Any,
        global_weight: float = 1.0,
        sibling_weight: float = 1.0,
        form: str = "centered",
        weighting: str | None = None,
        sibling_options: Mapping[str, Any] | None = None,
        packed: bool = False,
        trie: Trie | None = None,
        **kwargs: Any,
    ) -> None:
        self.global_weight = check_finite("global_weight", global_weight)
        self.sibling_weight = check_finite("sibling_weight", sibling_weight)
        sibling_form(form, weighting)  # checked before the model is loaded
        self.form, self.weighting, self.sibling_options = form, weighting, sibling_options
        self.trie, self.packed = trie, packed or trie is not None
        self._prefix_models = _PrefixModels(trie or Trie.from_sequences([[0]]), full_head=trie is None)
        super().__init__(*args, **kwargs)
        self._check_options()

    def _check_options(self) -> None:
        def refuse(wrong: bool, option: str, why: str) -> None:
            if wrong:
                raise ValueError(f"SiblingGRPOTrainer cannot do {option}: {why}")

        check_choice("loss_type", self.loss_type, tuple(NORMALIZER))
        aggregation = f"multi_objective_aggregation={self.multi_objective_aggregation!r}"
        refuse(
            self.multi_objective_aggregation != "sum_then_normalize",
            aggregation,
            "siblings are compared by one reward per completion, the weighted sum",
        )
        refuse(
            self.off_policy_mask_threshold is not None,
            "off_policy_mask_threshold",
            "it drops whole completions by the sign of their advantage, which differs by token",
        )
        if not self.packed:
            return
        for wrong, option, why in (
            (self._is_vlm, "packed with a multimodal model", "images are not packed"),
            (self.aux_loss_enabled, "packed with router_aux_loss_coef", "the loss counts every run token"),
            (_sharded(self), "packed with FSDP or ZeRO-3", "the head needs its whole weight"),
        ):
            refuse(wrong, option, why)
        fp32 = self.trie is not None and self.args.cast_lm_head_to_fp32
        refuse(fp32, "trie with cast_lm_head_to_fp32", "the head is applied to some columns")
        self._prefix_models.of(
            self.accelerator.unwrap_model(self.model)
        )  # raises where a model cannot be packed

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        self._rewards_per_func: Tensor = super()._calculate_rewards(*args, **kwargs)
        return self._rewards_per_func

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        mode = "train" if self.model.training else "eval"
        mask = batch["completion_mask"]
        if "tool_mask" in batch:
            mask = mask * batch["tool_mask"]

        def of_all_processes(x: Tensor) -> Tensor:
            return self.accelerator.gather(self.accelerator.pad_across_processes(x, dim=1))

        # As TRL: the weighted sum of the rewards that there are, NaN being none.
        per_func = self._rewards_per_func
        scored = ~per_func.isnan().all(1)
        there = (of_all_processes(mask) != 0) & scored[:, None]
        siblings = token_advantages(
            of_all_processes(batch["completion_ids"]),
            (per_func * self.reward_weights.to(per_func.device)).nansum(1),
            self.num_generations if mode == "train" else self.num_generations_eval,
            there,
            normalizer=NORMALIZER[self.loss_type],
            horizon=self.max_completion_length if self.loss_type == "dr_grpo" else None,
            global_weight=0.0,
            sibling_weight=self.sibling_weight,
            form=self.form,
            weighting=self.weighting,
            sibling_options=self.sibling_options,
        )
        first = self.accelerator.process_index * len(inputs)
        mine = siblings[first : first + len(inputs), : mask.shape[1]]
        batch["advantages"] = self.global_weight * batch["advantages"][:, None] + mine
        compared = (siblings != 0).sum() / there.sum().clamp(min=1)
        self._metrics[mode]["sibling_advantage/nonzero"].append(compared.item())
        return batch

    # ---------------------------------------------------------------- packed prefix trees

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if not self.packed:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **kwargs
            )
        chunks = [
            self._packed_logps(model, ids, mask, logits_to_keep)
            for ids, mask in zip(
                input_ids.split(batch_size or len(input_ids)),
                attention_mask.split(batch_size or len(input_ids)),
            )
        ]
        logp, entropy = (torch.cat(parts) for parts in zip(*chunks))
        return logp, entropy if compute_entropy else None, None

    def _packed_logps(self, model: Any, ids: Tensor, mask: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies ``[N, T]`` of the last ``T = length`` columns of ``ids[N, S]``."""
        prompt, tokens = ids[:, :-length], ids[:, -length:]
        prompt_mask, there = mask[:, :-length] != 0, mask[:, -length:] != 0
        on_host = prompt.masked_fill(~prompt_mask, -1).cpu().numpy()
        layout = GroupLayout.of([row.tobytes() for row in on_host], len(ids), ids.device)
        first = layout.grid(torch.arange(len(ids), device=ids.device))[:, 0]
        grid, present = layout.grid(tokens), layout.grid(there)

        lm = self._prefix_models.of(self.accelerator.unwrap_model(model))
        needed, node = present, None
        if self.trie is not None:
            node = _nodes(lm.catalogue, grid, present)
            needed = lm.trie.num_children(node) > 1
        rows = pack_prompts(
            prompt[first], grid, present.any(2), prompt_mask=prompt_mask[first], needed=needed, compact=True
        )
        tap = HeadTap(lm._inner, lm.columns)
        tap.at = torch.arange(len(first), device=ids.device)[:, None], rows.outputs
        position = rows.position_ids
        with self.accelerator.autocast():
            logits = lm._call(model, tap, rows.input_ids, position, position, rows.mask()[:, 0], {}).logits
        if node is None:
            found = rows.logp_and_entropy(logits, temperature=self.temperature)
        else:
            columns = torch.where(node > 0, lm.trie.token[(node - 1).clamp(min=0)].long(), -1)
            at_outputs = F.pad(rows.of_nodes(node), (1, 0))
            found = replace(rows, tokens=columns).logp_and_entropy(
                logits, lm.trie, at_outputs, self.temperature
            )
        return tuple(torch.where(there, x.flatten(0, 1)[layout.slot], 0) for x in found)  # type: ignore[return-value]


def _nodes(trie: Trie, tokens: Tensor, there: Tensor) -> Tensor:
    """The node of every prefix of ``l + 1`` tokens, int64 ``[B, G, T]``, -1 past the last level."""
    found = [trie.lookup(tokens[..., : d + 1]).long() for d in range(min(trie.length, tokens.shape[2]))]
    node = torch.stack(found, 2).masked_fill(~there[..., : len(found)], -1)
    illegal = there[..., : len(found)] & (node < 0)
    if bool(illegal.any()):
        b, g = (int(x) for x in illegal.any(2).nonzero()[0])
        raise ValueError(
            f"a completion must be an item of the trie, got {tokens[b, g][there[b, g]].tolist()}"
        )
    return F.pad(node, (0, tokens.shape[2] - len(found)), value=-1)


class _PrefixModels:
    """Prefix models of the few models that a trainer has; the trie is made compact once for each."""

    def __init__(self, trie: Trie, **options: Any) -> None:
        if trie.alive is not None and len(trie.alive) != 1:
            raise ValueError(
                f"trie must be restricted for all requests alike, got filters of {len(trie.alive)} requests: "
                "a trainer chooses the prompts of a step"
            )
        self._trie, self._options = trie, options
        self._made: dict[int, CausalPrefixModel] = {}

    def of(self, model: Any) -> CausalPrefixModel:
        """That of an unwrapped Hugging Face model."""
        if id(model) not in self._made:
            self._made[id(model)] = prefix_model(model, self._trie, **self._options)
        return self._made[id(model)]


def _sharded(trainer: GRPOTrainer) -> bool:
    """Whether no process has all parameters."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return trainer.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)


# ---------------------------------------------------------------- rollouts


def trie_rollout(
    trie: Trie,
    decoder: str = "sample",
    *,
    value_head: ValueHead | None = None,
    full_head: bool = False,
    append_eos: bool = True,
    **options: Any,
) -> Callable[[list[Any], GRPOTrainer], dict[str, Any]]:
    """A ``rollout_func`` for ``GRPOTrainer`` whose completions are items of a catalogue.

    Each distinct prompt is run once and its candidates share one cache, see
    :func:`vstar_ops.integrations.transformers.prefix_model`. Seeds come from torch's default generator, which
    the trainer seeds for each process, and which its checkpoints keep.

    Args:
        trie: the catalogue, in token ids.
        decoder: ``"sample"``: :func:`vstar_ops.decoding.topk_sampling` at the trainer's ``temperature`` and
            ``top_k`` (all legal tokens if there is none). ``"beam"``: :func:`vstar_ops.decoding.beam_search`.
            ``"ved"``: :func:`vstar_ops.decoding.ved`. The candidates of the last two are distinct.
        value_head: for ``"ved"``.
        full_head: compute the logits of the whole vocabulary, which ``normalize="vocab"`` needs.
        append_eos: end each completion with the tokenizer's EOS token, unless the item ends with one itself.
            Without EOS, TRL counts a completion as truncated, and ``mask_truncated_completions`` drops it.
        options: keywords of the decoder, such as ``top_k`` or ``config``, but for ``seed``.

    Raises:
        TypeError: an option that the decoder does not have.
        ValueError: filters per request in the trie; the prompts of a process are no whole groups; the
            catalogue has fewer items than ``num_generations``; completions are longer than
            ``max_completion_length``; the trainer samples in a way that the decoder does not.
    """
    check_choice("decoder", decoder, tuple(_DECODERS))
    parameters = inspect.signature(_DECODERS[decoder]).parameters.values()
    known = {x.name for x in parameters if x.kind is x.KEYWORD_ONLY or x.name == "config"} - {"seed"}
    if unknown := sorted(options.keys() - known):
        raise TypeError(f"options of {decoder!r} must be some of {sorted(known)}, got {unknown}")
    models = _PrefixModels(trie, value_head=value_head, full_head=full_head)

    def rollout(prompts: list[Any], trainer: GRPOTrainer) -> dict[str, Any]:
        _check_sampling(trainer, decoder)
        group = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
        if len(prompts) % group or any(prompts[i] != prompts[i - i % group] for i in range(len(prompts))):
            raise ValueError(
                f"prompts must be whole groups of num_generations = {group} in every process, got "
                f"{len(prompts)}: per_device_train_batch_size * steps_per_generation must be a multiple of it"
            )
        prompt_ids, *_ = trainer._tokenize_prompts(prompts)
        with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model:
            lm = models.of(model)
            context = _left_padded(prompt_ids[::group], trainer.accelerator.device)
            with torch.no_grad():
                found = _decode(lm, context, group, decoder, trainer, options)
        if bool((found.num_valid < group).any()):
            raise ValueError(
                f"the catalogue must have num_generations = {group} items, the decoder found only "
                f"{int(found.num_valid.min())}"
            )
        ends = trainer.eos_token_ids
        completions = []
        for row in lm.catalogue.sequences(found.node).flatten(0, 1).tolist():
            stop = next((i for i, token in enumerate(row) if token in ends), None)
            if stop is not None:
                row = row[: stop + 1]
            elif append_eos:
                row = [*row, ends[0]]
            completions.append(row)
        longest = max(map(len, completions), default=0)
        if longest > trainer.max_completion_length:
            raise ValueError(
                f"max_completion_length must be at least {longest}, the tokens of a completion with its end, "
                f"got {trainer.max_completion_length}"
            )
        return {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": None}

    return rollout


def _decode(
    lm: CausalPrefixModel,
    context: Any,
    number: int,
    decoder: str,
    trainer: GRPOTrainer,
    options: dict[str, Any],
) -> Any:
    if decoder == "beam":
        return beam_search(lm, context, lm.trie, number, **options)
    seed = int(torch.randint(2**62, ()))
    if decoder == "ved":
        return ved(lm, context, lm.trie, number, seed=seed, **options)
    drawn = {
        "top_k": trainer.args.top_k or lm.trie.max_children,
        "temperature": trainer.temperature,
        **options,
    }
    return topk_sampling(lm, context, lm.trie, number, seed=seed, **drawn)


def _check_sampling(trainer: GRPOTrainer, decoder: str) -> None:
    """Refuse what the rollout would silently leave out."""
    args = trainer.args
    for option, off in (("top_p", 1.0), ("min_p", None), ("repetition_penalty", 1.0)):
        if decoder == "sample" and getattr(args, option) != off:
            raise ValueError(
                f"trie_rollout cannot sample with {option}={getattr(args, option)!r}, only {off!r}"
            )
    for used, option in (
        (trainer.use_vllm, "use_vllm=True"),
        (trainer.tools, "tools"),
        (trainer._is_vlm, "a multimodal model"),
        (_sharded(trainer), "FSDP or ZeRO-3"),
    ):
        if used:
            raise ValueError(
                f"trie_rollout cannot be used with {option}: it runs the trainer's own text model"
            )


def _left_padded(rows: list[list[int]], device: torch.device) -> dict[str, Tensor]:
    """Token ids and their mask, ``[B, T]``."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.int64)
    for at, row in enumerate(rows):
        ids[at, width - len(row) :] = torch.tensor(row)
        mask[at, width - len(row) :] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
