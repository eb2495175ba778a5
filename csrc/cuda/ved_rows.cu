#include "cuda/ved_rows.cuh"
#include "torch/cuda.cuh"
#include "torch/ved_rows.h"

VSTAR_REGISTER(Cuda, ved_inputs);
VSTAR_REGISTER(Cuda, ved_evaluate);
VSTAR_REGISTER(Cuda, ved_beams);
