#include "cuda/sibling_grpo_loss.cuh"
#include "torch/cuda.cuh"
#include "torch/sibling_grpo_loss.h"

VSTAR_REGISTER(Cuda, sibling_grpo_loss);
