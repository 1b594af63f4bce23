// Shared by gate.cpp (tensors, threads) and gate_kernels.h (vector code).
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace pixnorm::gate {

// A part of a sample's matrix [rows][columns] in memory, with rows `stride` apart.
template <class T>
struct Tile {
  int64_t rows, columns, stride;
  const T *x, *dy;
  T* to;  // y or dx
};

// What becomes of a column or a row: sums, first maxima and where they are.
template <class A>
struct Found {
  double* sum;
  A* top;
  int32_t* place;
};

// The coefficients of columns or rows: dx = gate dy + mean, and `top` more at `place`.
template <class A>
struct Spread {
  const A *gate, *mean, *top;
  const int32_t* place;
};

}  // namespace pixnorm::gate
