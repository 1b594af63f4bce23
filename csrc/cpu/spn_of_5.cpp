#define PIXNORM_SPN_SIZE 5
#include "cpu/spn_instances.h"
