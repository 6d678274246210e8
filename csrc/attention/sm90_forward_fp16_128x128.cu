#include "attention/forward_sm90_unit.h"

EFFKERN_FORWARD_SM90(Fp16, 128, 128);
