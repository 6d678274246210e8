#include "attention/backward_sm90_unit.cuh"

EFFKERN_BACKWARD_SM90(Bf16, 256);
