"""Stage 2: policy gradient on the candidates of a decoder, from the supervised weights.

On-policy: a batch of candidates is used for one step, so the old policy is the current one and the ratio is 1
in value (its gradient is that of the log-probability). Dropout is off, so that the policy of the loss is the
policy that searched.
"""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import Tensor

from .. import sibling_grpo_loss
from .config import Variant
from .data import Split, on_device
from .decode import Decoded, Decoder
from .model import SIDTransformer
from .rewards import make_reward, reward_name
from .scoring import CandidateScores, candidate_rows
from .trainer import Batches, Evaluate, Run, Schedule, fit, optimizer_of
from .value import DenseReturn, RewardReturn, item_embeddings, squared_error, td_target


def reinforce(
    run: Run, variant: Variant, sft: SIDTransformer, evaluate: Evaluate
) -> tuple[SIDTransformer, dict[str, float]]:
    """The policy trained from ``sft`` as the variant says, and the figures of :func:`fit`.

    Early stopping looks at what the reward is about: the mean true reward of the top 10 for ``true``,
    otherwise NDCG@10.
    """
    c, train = run.config, run.dataset.train
    model = new_policy(run, variant, sft)
    figures = fit(
        run,
        str(variant),
        model,
        optimizer_of(model, c.rl_lr, 0.0, c.value_lr),
        Batches(lambda: (torch.arange(len(train)), train.items), c.rl_batch_size),
        PolicyGradient(run, variant, model, sft),
        evaluate,
        schedule=Schedule(steps=c.rl_steps, evals=c.rl_evals, warmup=10),
        metric="true_reward@10" if reward_name(c.reward, run.dataset) == "true" else "NDCG@10",
    )
    return model, figures


def new_policy(run: Run, variant: Variant, sft: SIDTransformer) -> SIDTransformer:
    """A copy of the supervised policy, with a new value head where the variant's search asks for values."""
    c = run.config
    torch.manual_seed(run.seed)
    model = copy.deepcopy(sft)
    if variant.decoder == "ved" and c.ved.value_weight != 0:
        model.add_value_head(child_values=c.ved.child_values)
    return model.to(run.device)


class PolicyGradient:
    """The step of reinforcement: search, reward, losses, backward.

    With a value head the search uses V as it stands, and the step then refines policy and V on what was
    found. The number of the policy's own candidates rises from ``ved.num_policy_candidates`` to all of them
    at the last step: what the search finds teaches early, what the policy itself would answer is polished
    late.
    """

    def __init__(self, run: Run, variant: Variant, model: SIDTransformer, sft: SIDTransformer) -> None:
        c = self.config = run.config
        self.run, self.model, self.sft = run, model, sft.eval()
        self.call = run.world.wrap(model)
        constant = run.world.constant_shapes
        self.decoder = Decoder(variant.decoder, c.candidates, c.ved, constant_shapes=constant)
        self.values = model.value_head is not None
        self.child_values = self.values and c.ved.child_values
        self.global_weight = 0.0 if variant.objective == "sibling" else 1.0
        self.depth_weights = [c.sibling_decay**level for level in range(run.trie.length)]
        self.sibling_weight = {"grpo": 0.0, "sibling": 1.0, "joint": c.sibling_weight}[variant.objective]
        name = reward_name(c.reward, run.dataset)
        self.reward_of = make_reward(name, run.dataset)
        # The true reward says something of every candidate; others are too sparse to learn V from.
        self.returns_of: DenseReturn | RewardReturn = RewardReturn(self.reward_of)
        if self.values and name != "true":
            items = item_embeddings(c.item_embeddings, run.dataset, run.host_trie)
            self.returns_of = DenseReturn(items.to(run.device))

    def __call__(self, rows: Tensor, progress: float) -> dict[str, float]:
        """One step on the requests ``rows[B]`` of the train split; see :func:`fit`."""
        c, shard = self.config, self.run.world.shard(rows)
        self.model.eval()
        requests = self.run.dataset.train[shard.rows].on(self.run.device)
        found = self.search(rows, requests, progress)
        tokens, mask = found.sequence.long(), found.node >= 0
        reward = self.reward_of(requests, tokens)
        laid_out = candidate_rows(
            self.model,
            requests.context,
            self.run.trie,
            tokens,
            values=self.values,
            leaves=c.ved.evaluate_leaves,
            pack=c.pack,
            compact=not self.run.world.constant_shapes,
        )
        scores = laid_out.scores(lambda rows: self.call("packed", rows, child_values=self.child_values))
        with torch.no_grad():
            reference = laid_out.scores(self.sft.packed).logp
        per_request, per_candidate = shard.weights(len(tokens), mask.sum())
        policy = sibling_grpo_loss(
            scores.logp,
            tokens,
            reward,
            ref_logp=reference,
            mask=mask,
            global_weight=per_candidate * self.global_weight,
            sibling_weight=per_request * self.sibling_weight,
            kl_weight=per_candidate * c.kl_weight,
            form=c.sibling_form,
            depth_weights=self.depth_weights,
        )
        value_loss = self.value_loss(scores, requests, tokens, mask, laid_out.child.view(tokens.shape))
        loss = policy.loss + per_candidate * value_loss  # of this shard, and already weighted
        loss.backward()
        best = reward.max(1).values
        spread = best > reward.masked_fill(~mask, torch.inf).min(1).values
        by_request = {
            "best_reward": best.mean(),
            "groups_with_signal": spread.float().mean(),
            "forward_tokens": found.forward_tokens.float().mean(),
        }
        mean = (reward * mask).sum() / mask.sum()
        by_candidate = {"reward": mean, "kl": policy.kl, "value_loss": value_loss}
        weights = dict.fromkeys(by_request, per_request) | dict.fromkeys(by_candidate, per_candidate)
        means = {"loss": loss.detach()} | by_request | by_candidate
        return shard.averages(means, {"loss": 1.0} | weights)

    def search(self, rows: Tensor, requests: Split, progress: float) -> Decoded:
        """Candidates of this process' ``requests``, whose seeds are drawn for the whole batch ``rows``."""
        c, decoder, seed = self.config, self.decoder, torch.zeros(0)
        if decoder.name != "beam":
            seed = self.run.world.shard(torch.randint(2**62, (len(rows),))).rows
        if own := c.ved.num_policy_candidates:
            own = round(own + (c.candidates - own) * progress)
            decoder = dataclasses.replace(decoder, ved=c.ved.replace(num_policy_candidates=own))
        return decoder(self.model, requests.context, self.run.trie, on_device(seed, self.run.device))

    def value_loss(
        self, scores: CandidateScores, requests: Split, tokens: Tensor, mask: Tensor, node: Tensor
    ) -> Tensor:
        """The squared error of V, and of V + child value of each parent, against Eq. 9; 0 without values.

        A prefix that stands for its leaf in the search is worth what the leaf is. ``node[B, G, L]`` are the
        nodes of the candidates' prefixes.
        """
        if scores.value is None:
            return tokens.new_zeros((), dtype=torch.float32)
        returns, value = self.returns_of(requests, tokens, mask), scores.value
        if not self.config.ved.evaluate_leaves:  # the worth of a leaf is known, and nobody asks V for it
            value = torch.cat([value[..., :-1], returns[..., -1:]], 2)
        target = td_target(value, returns, self.config.gamma)
        if self.config.ved.skip_forced:
            complete = self.run.trie.only_leaf[node.clamp(min=0)] >= 0
            target = torch.where(complete, returns[..., -1:], target)
        loss = squared_error(value, target, mask)
        if scores.value_from_parent is not None:
            loss = loss + squared_error(scores.value_from_parent, target, mask)
        return loss
