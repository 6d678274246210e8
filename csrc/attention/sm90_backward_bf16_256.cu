#include "attention/backward_sm90_unit.h"

EFFKERN_BACKWARD_SM90(Bf16, 256);
