#include "cuda/prefix_returns.cuh"
#include "torch/cuda.cuh"
#include "torch/prefix_returns.h"

VSTAR_REGISTER(Cuda, prefix_returns);
