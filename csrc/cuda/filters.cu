#include "cuda/filters.cuh"
#include "torch/cuda.cuh"
#include "torch/filters.h"

VSTAR_REGISTER(Cuda, filter_items);
