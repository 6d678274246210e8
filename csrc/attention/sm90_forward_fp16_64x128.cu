#include "attention/forward_sm90_unit.cuh"

EFFKERN_FORWARD_SM90(Fp16, 64, 128);
