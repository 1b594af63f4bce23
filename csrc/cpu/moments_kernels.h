// Moments of activations. Vector code, compiled once per instruction set.

// Moments of `count` contiguous values. Two passes over runs that fit in L1: the first finds the run's mean, the second
// sums deviations from it and corrects it. Stable for |mean| >> std.
template <class T>
Moments moments_of(const T* data, int64_t count) {
  using A = acc_t<T>;
  constexpr int64_t kRun = 2048;
  constexpr int n = kLanes<A>, kWays = 4;
  Moments moments{0, 0};
  for (int64_t first = 0; first < count; first += kRun) {
    const T* run = data + first;
    const int64_t size = count - first < kRun ? count - first : kRun;
    Vec<A> sums[kWays] = {};
    A tail = 0;
    int64_t i = 0;
    for (; i + kWays * n <= size; i += kWays * n) {
      for (int way = 0; way < kWays; ++way) sums[way] += load_as<T>(run + i + way * n);
    }
    for (; i < size; ++i) tail += static_cast<A>(run[i]);
    const A mean = (sum_lanes<A>((sums[0] + sums[1]) + (sums[2] + sums[3])) + tail) / A(size);

    Vec<A> rests[kWays] = {}, squares[kWays] = {};
    A rest = 0, square = 0;
    for (i = 0; i + kWays * n <= size; i += kWays * n) {
      for (int way = 0; way < kWays; ++way) {
        const Vec<A> d = load_as<T>(run + i + way * n) - mean;
        rests[way] += d;
        squares[way] += d * d;
      }
    }
    for (; i < size; ++i) {
      const A d = static_cast<A>(run[i]) - mean;
      rest += d;
      square += d * d;
    }
    rest += sum_lanes<A>((rests[0] + rests[1]) + (rests[2] + rests[3]));
    square += sum_lanes<A>((squares[0] + squares[1]) + (squares[2] + squares[3]));
    const double correction = double(rest) / size;
    merge(moments, first, {mean + correction, square - correction * rest}, size);
  }
  return moments;
}

// Moments of each channel of [pixel][channel], by the same two passes. `scratch` holds 3 * channels numbers.
template <class T>
void moments_by_channel(const T* data, int64_t pixels, int64_t channels, acc_t<T>* scratch, Moments* moments) {
  using A = acc_t<T>;
  constexpr int64_t kRun = 32;
  constexpr int n = kLanes<A>;
  A *means = scratch, *rests = scratch + channels, *squares = rests + channels;
  for (int64_t c = 0; c < channels; ++c) moments[c] = {0, 0};
  for (int64_t first = 0; first < pixels; first += kRun) {
    const T* run = data + first * channels;
    const int64_t size = pixels - first < kRun ? pixels - first : kRun;
    for (int64_t c = 0; c < 3 * channels; ++c) scratch[c] = 0;
    for (int64_t i = 0; i < size; ++i) {
      const T* pixel = run + i * channels;
      int64_t c = 0;
      for (; c + n <= channels; c += n) store(means + c, load(means + c) + load_as<T>(pixel + c));
      for (; c < channels; ++c) means[c] += static_cast<A>(pixel[c]);
    }
    for (int64_t c = 0; c < channels; ++c) means[c] /= A(size);
    for (int64_t i = 0; i < size; ++i) {
      const T* pixel = run + i * channels;
      int64_t c = 0;
      for (; c + n <= channels; c += n) {
        const Vec<A> d = load_as<T>(pixel + c) - load(means + c);
        store(rests + c, load(rests + c) + d);
        store(squares + c, load(squares + c) + d * d);
      }
      for (; c < channels; ++c) {
        const A d = static_cast<A>(pixel[c]) - means[c];
        rests[c] += d;
        squares[c] += d * d;
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      const double correction = double(rests[c]) / size;
      merge(moments[c], first, {means[c] + correction, squares[c] - correction * rests[c]}, size);
    }
  }
}
