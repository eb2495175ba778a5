#include "cuda/prefix_tree.cuh"
#include "torch/cuda.cuh"
#include "torch/prefix_tree.h"

VSTAR_REGISTER(Cuda, prefix_tree);
