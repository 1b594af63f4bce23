// The approximate instructions of PTX, with errors about as large as the manual allows on a GPU.

#include <math.h>

#include <cmath>
#include <limits>

#include "cuda_emulation.h"
#include "cuda_runtime.h"

namespace cuda_emulation {
namespace {

// Between -1 and 1, a hash of the bits of x.
double error_of(float x) {
  uint64_t z = static_cast<unsigned>(__float_as_int(x)) * 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 29)) * 0xbf58476d1ce4e5b9;
  return static_cast<double>(static_cast<int64_t>(z ^ (z >> 32))) / std::numeric_limits<int64_t>::max();
}

float flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

}  // namespace

// Relative error 2^-11; denormals are not flushed.
float tanh_approx(float x) {
  if (x == 0 || !std::isfinite(x)) return std::tanh(x);
  const double y = std::tanh(static_cast<double>(x)) * (1 + error_of(x) * 0x1p-11);
  return static_cast<float>(std::fmin(std::fmax(y, -1.0), 1.0));
}

// Relative error 2^-22.
float ex2_approx(float x) {
  x = flush(x);
  if (x == 0 || !std::isfinite(x)) return std::exp2(x);
  return flush(static_cast<float>(std::exp2(static_cast<double>(x)) * (1 + error_of(x) * 0x1p-22)));
}

// Error 1 ulp: one of the two neighbours of the exact result.
float rcp_approx(float x) {
  x = flush(x);
  const double exact = 1 / static_cast<double>(x);
  const float nearest = static_cast<float>(exact);
  if (nearest == exact || error_of(x) < 0) return flush(nearest);
  return flush(std::nextafter(nearest, exact > nearest ? INFINITY : -INFINITY));
}

}  // namespace cuda_emulation
