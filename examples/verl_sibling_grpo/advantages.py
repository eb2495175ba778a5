"""What the configuration beside this file gives a small batch, by verl's own function, on a CPU.

python examples/verl_sibling_grpo/advantages.py
"""

import re
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from reward import compute_score
from verl import DataProto
from verl.trainer.ppo.ray_trainer import compute_advantage

HERE = str(Path(__file__).resolve().parent)
TARGET = "<a_1><b_2><c_3>"
RESPONSES = ["<a_1><b_2><c_3>", "<a_1><b_2><c_4>", "<a_1><b_5><c_3>", "<a_7><b_2><c_3>", "<a_7><b_2><c_9>"]

with initialize_config_dir(config_dir=HERE, version_base=None):
    config = compose("sibling_grpo")

tokens = torch.tensor([[int(code) for code in re.findall(r"\d+", response)] for response in RESPONSES])
scores = torch.tensor([compute_score("items", response, TARGET) for response in RESPONSES])
rewards = torch.zeros(tokens.shape)
rewards[:, -1] = scores  # verl puts the score of a response at its last token
batch = DataProto.from_dict(
    tensors={"responses": tokens, "response_mask": torch.ones_like(tokens), "token_level_rewards": rewards},
    non_tensors={"uid": np.array(["one prompt"] * len(tokens), dtype=object)},
)
found = compute_advantage(batch, config.algorithm.adv_estimator, config=config.algorithm).batch["advantages"]
for response, score, row in zip(RESPONSES, scores.tolist(), found.tolist()):
    print(f"{response}  reward {score:.2f}  advantages", *(f"{x:6.2f}" for x in row))
