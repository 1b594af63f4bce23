// Leaky ReLU and its gradient, for scalars and vectors. Included inside a namespace, not at global scope: CPU vector
// code compiles this file once per instruction set (cpu/vec.h).

// NaN propagates. Slope 0 maps -inf to 0, not to NaN.
template <class V, class A>
PIXNORM_HOST_DEVICE PIXNORM_ALWAYS_INLINE void activate(V& value, A slope) {
  const V low = slope == A(0) ? V{} : V(value * slope);
  value = value < A(0) ? low : value;
}

// Masks `gradient` by the pre-activation `value`. At 0 the slope is that of negative values, as in PyTorch.
template <class V, class A>
PIXNORM_HOST_DEVICE PIXNORM_ALWAYS_INLINE void activate_gradient(const V& value, V& gradient, A slope) {
  const V low = slope == A(0) ? V{} : V(gradient * slope);
  gradient = value <= A(0) ? low : gradient;
}
