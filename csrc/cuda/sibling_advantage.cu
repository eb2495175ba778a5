#include "cuda/sibling_advantage.cuh"
#include "torch/cuda.cuh"
#include "torch/sibling_advantage.h"

VSTAR_REGISTER(Cuda, sibling_advantage);
