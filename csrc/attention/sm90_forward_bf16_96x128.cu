#include "attention/forward_sm90_unit.h"

EFFKERN_FORWARD_SM90(Bf16, 96, 128);
