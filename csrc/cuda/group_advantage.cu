#include "cuda/group_advantage.cuh"
#include "torch/cuda.cuh"
#include "torch/group_advantage.h"

VSTAR_REGISTER(Cuda, group_advantage);
