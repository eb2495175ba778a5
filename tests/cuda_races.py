"""Runs every CUDA C++ kernel under ThreadSanitizer, which ends the process at the first race.

Part of test_races.py. Every case has requests for two blocks or more, because blocks may race too.
"""

from __future__ import annotations

import cuda_emulator
import torch
from helpers import map_tensors, op_arguments

from vstar_ops.verify import cases

SEEDS = 2
# Requests, for a second block.
SEVERAL_PER_BLOCK = {"token_logp": 9, "ved_select": 5, "ved_insert": 5, "ved_beams": 5}

library = cuda_emulator.load()
for name, found in cases.CASES.items():
    for make in (*found.values(), *cases.PATHS[name]):
        arguments = op_arguments(name, make(SEVERAL_PER_BLOCK.get(name, 2)))
        for seed in range(SEEDS):
            cuda_emulator.seed(seed << 32)
            copies = map_tensors(torch.Tensor.clone, arguments)
            getattr(torch.ops.vstar_ops_cuda, name).default(*copies)
    print(name, flush=True)
every, launched = cuda_emulator.kernels()
assert every, "no kernels were found"
assert every <= launched, f"never launched: {sorted(every - launched)}"
print(f"no race in {len(every)} kernels", flush=True)

library.emulator_race()
print("a race was not reported")
