#include "cuda/token_logp.cuh"
#include "torch/cuda.cuh"
#include "torch/token_logp.h"

VSTAR_REGISTER(Cuda, token_logp);
VSTAR_REGISTER(Cuda, token_logp_backward);
