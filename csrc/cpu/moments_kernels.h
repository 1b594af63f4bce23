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

// Adds to each channel's sums, [kSums][channels], what body(pixel values, c, sums of kSums) adds for kPixels pixels. So
// the sums are loaded and stored once for several pixels. V is Vec<A>, or A for a remainder.
template <int kPixels, int kSums, class T, class Body>
PIXNORM_INLINE void add_pixels(const T* pixels, int64_t channels, acc_t<T>* sums, const Body& body) {
  using A = acc_t<T>;
  constexpr int n = kLanes<A>;
  int64_t c = 0;
  for (; c + n <= channels; c += n) {
    Vec<A> values[kPixels], sum[kSums] = {};
#pragma GCC unroll 4
    for (int i = 0; i < kPixels; ++i) values[i] = load_as<T>(pixels + i * channels + c);
    body(values, load(sums + kSums * channels + c), sum);
#pragma GCC unroll 2
    for (int of = 0; of < kSums; ++of) store(sums + of * channels + c, load(sums + of * channels + c) + sum[of]);
  }
  for (; c < channels; ++c) {
    A values[kPixels], sum[kSums] = {};
    for (int i = 0; i < kPixels; ++i) values[i] = static_cast<A>(pixels[i * channels + c]);
    body(values, sums[kSums * channels + c], sum);
    for (int of = 0; of < kSums; ++of) sums[of * channels + c] += sum[of];
  }
}

template <int kSums, class T, class Body>
PIXNORM_INLINE void add_run(const T* run, int64_t size, int64_t channels, acc_t<T>* sums, const Body& body) {
  constexpr int kWays = 4;
  int64_t i = 0;
  for (; i + kWays <= size; i += kWays) add_pixels<kWays, kSums>(run + i * channels, channels, sums, body);
  for (; i < size; ++i) add_pixels<1, kSums>(run + i * channels, channels, sums, body);
}

// Moments of each channel of [pixel][channel], by the same two passes. `scratch` holds 3 * channels numbers.
template <class T>
void moments_by_channel(const T* data, int64_t pixels, int64_t channels, acc_t<T>* scratch, Moments* moments) {
  using A = acc_t<T>;
  constexpr int64_t kRun = 32;
  A *const rests = scratch, *const squares = scratch + channels, *const means = squares + channels;
  for (int64_t c = 0; c < channels; ++c) moments[c] = {0, 0};
  for (int64_t first = 0; first < pixels; first += kRun) {
    const T* run = data + first * channels;
    const int64_t size = pixels - first < kRun ? pixels - first : kRun;
    for (int64_t c = 0; c < 3 * channels; ++c) scratch[c] = 0;
    add_run<1>(run, size, channels, squares,
               [](const auto& values, const auto&, auto& sum) __attribute__((always_inline)) {
#pragma GCC unroll 4
                 for (const auto& value : values) sum[0] += value;
               });
    for (int64_t c = 0; c < channels; ++c) {
      means[c] = squares[c] / A(size);
      squares[c] = 0;
    }
    add_run<2>(run, size, channels, rests,
               [](const auto& values, const auto& mean, auto& sum) __attribute__((always_inline)) {
#pragma GCC unroll 4
                 for (const auto& value : values) {
                   const auto d = value - mean;
                   sum[0] += d;
                   sum[1] += d * d;
                 }
               });
    const double share = 1 / double(size), weight = size / double(first + size);
    for (int64_t c = 0; c < channels; ++c) {
      // merge(), with one division for all channels
      const double correction = double(rests[c]) * share, delta = means[c] + correction - moments[c].mean;
      moments[c].mean += delta * weight;
      moments[c].m2 += (squares[c] - correction * rests[c]) + delta * delta * first * weight;
    }
  }
}
