#include "cuda/ved.cuh"
#include "torch/cuda.cuh"
#include "torch/ved.h"

VSTAR_REGISTER(Cuda, ved_select);
VSTAR_REGISTER(Cuda, ved_insert);
VSTAR_REGISTER(Cuda, ved_candidates);
