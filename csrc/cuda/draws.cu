#include "cuda/draws.cuh"
#include "torch/cuda.cuh"
#include "torch/draws.h"

VSTAR_REGISTER(Cuda, draw_children);
VSTAR_REGISTER(Cuda, distinct_rows);
