#include "cuda/beams.cuh"
#include "torch/cuda.cuh"
#include "torch/beams.h"

VSTAR_REGISTER(Cuda, advance_beams);
VSTAR_REGISTER(Cuda, rows_to_run);
