#include "cuda/expand_topk.cuh"
#include "torch/cuda.cuh"
#include "torch/expand_topk.h"

VSTAR_REGISTER(Cuda, expand_topk);
