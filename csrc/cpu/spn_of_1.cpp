#define PIXNORM_SPN_SIZE 1
#include "cpu/spn_instances.h"
