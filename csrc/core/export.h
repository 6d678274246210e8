// What other libraries of ours may use of this one. No standard headers: the units see this.
#pragma once

#define EFFKERN_API __attribute__((visibility("default")))
