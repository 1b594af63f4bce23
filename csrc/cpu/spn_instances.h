// Compiles SPN's vector code for one size of kernels, PIXNORM_SPN_SIZE.
#include "cpu/spn.h"

#define PIXNORM_VECTOR_CODE "cpu/spn_kernels.h"
#include "cpu/foreach_isa.h"

#define PIXNORM_CONCAT_(a, b) a##b
#define PIXNORM_CONCAT(a, b) PIXNORM_CONCAT_(a, b)
#define PIXNORM_KERNELS_OF PIXNORM_CONCAT(kernels_of_, PIXNORM_SPN_SIZE)

namespace pixnorm::spn {
namespace {

template <class T, int U>
Kernels<T> instances() {
  using A = acc_t<T>;
  constexpr int K = PIXNORM_SPN_SIZE;
  return {sizeof(baseline::Table<A, K, U>),       PIXNORM_BY_ISA(fill_table<A, K, U>),
          baseline::forward_scratch<A, K, U>,     baseline::backward_scratch<A, K, U>,
          PIXNORM_BY_ISA(forward<T, K, U>),       PIXNORM_BY_ISA(backward_reduce<T, K, U>),
          PIXNORM_BY_ISA(backward_apply<T, K, U>)};
}

}  // namespace

template <class T>
Kernels<T> PIXNORM_KERNELS_OF(int64_t upsample) {
  return upsample == 2 ? instances<T, 2>() : instances<T, 1>();
}

template Kernels<double> PIXNORM_KERNELS_OF(int64_t);
template Kernels<float> PIXNORM_KERNELS_OF(int64_t);
template Kernels<BFloat16> PIXNORM_KERNELS_OF(int64_t);
template Kernels<Half> PIXNORM_KERNELS_OF(int64_t);

}  // namespace pixnorm::spn
