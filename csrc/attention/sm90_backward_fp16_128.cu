#include "attention/backward_sm90_unit.h"

EFFKERN_BACKWARD_SM90(Fp16, 128);
