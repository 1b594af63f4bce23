// The arithmetic of activation.h, for numbers and for vectors of them. To be included inside a namespace: vector code
// must be compiled for one instruction set (cpu/vec.h), where this is as much a part of it as the rest.

// NaN stays; slope 0 makes 0 of infinity too.
template <class V, class A>
PIXNORM_HOST_DEVICE PIXNORM_ALWAYS_INLINE void activate(V& value, A slope) {
  const V low = slope == A(0) ? V{} : V(value * slope);
  value = value < A(0) ? low : value;
}

// The gradient that it lets through, of the value before it. At 0 it is that of negative values, as in PyTorch.
template <class V, class A>
PIXNORM_HOST_DEVICE PIXNORM_ALWAYS_INLINE void activate_gradient(const V& value, V& gradient, A slope) {
  const V low = slope == A(0) ? V{} : V(gradient * slope);
  gradient = value <= A(0) ? low : gradient;
}
