#define PIXNORM_SPN_SIZE 3
#include "cpu/spn_instances.h"
