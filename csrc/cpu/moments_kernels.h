// Moments of activations. Vector code, compiled once per instruction set.

// Sums over a run of what add(values, sums) adds for each vector, and for each value of the remainder, which counts as
// lane 0.
template <int kSums, class T, class Add>
PIXNORM_INLINE void sum_run(const T* run, int64_t size, Vec<acc_t<T>> (&sums)[kSums], const Add& add) {
  using A = acc_t<T>;
  constexpr int n = kLanes<A>, kWays = 4;
  Vec<A> ways[kWays][kSums] = {};
  int64_t i = 0;
  for (; i + kWays * n <= size; i += kWays * n) {
#pragma GCC unroll 4
    for (int way = 0; way < kWays; ++way) add(load_as<T>(run + i + way * n), ways[way]);
  }
  for (; i + n <= size; i += n) add(load_as<T>(run + i), ways[0]);
#pragma GCC unroll 2
  for (int of = 0; of < kSums; ++of) sums[of] = (ways[0][of] + ways[1][of]) + (ways[2][of] + ways[3][of]);
  if (i == size) return;
  A tail[kSums] = {};
  for (; i < size; ++i) add(static_cast<A>(run[i]), tail);
#pragma GCC unroll 2
  for (int of = 0; of < kSums; ++of) sums[of][0] += tail[of];
}

template <class T>
PIXNORM_INLINE Vec<acc_t<T>> sum_of(const T* run, int64_t size) {
  Vec<acc_t<T>> sums[1];
  sum_run(run, size, sums, [](const auto& v, auto& sum) __attribute__((always_inline)) { sum[0] += v; });
  return sums[0];
}

// Sums of deviations from `mean`, and of their squares.
template <class T>
PIXNORM_INLINE void sum_deviations(const T* run, int64_t size, acc_t<T> mean, Vec<acc_t<T>> (&sums)[2]) {
  sum_run(run, size, sums, [&](const auto& v, auto& sum) __attribute__((always_inline)) {
    const auto d = v - mean;
    sum[0] += d;
    sum[1] += d * d;
  });
}

// Moments of a plane. Two passes over runs that fit in L1: the first finds the run's mean, the second sums deviations
// from it and corrects it. Stable for |mean| >> std.
template <class T>
Moments moments_of_plane(const T* data, int64_t pixels) {
  using A = acc_t<T>;
  constexpr int64_t kRun = 2048;
  Moments moments{0, 0};
  for (int64_t first = 0; first < pixels; first += kRun) {
    const T* run = data + first;
    const int64_t size = pixels - first < kRun ? pixels - first : kRun;
    const A mean = sum_lanes<A>(sum_of(run, size)) / A(size);
    Vec<A> sums[2];
    sum_deviations(run, size, mean, sums);
    const double rest = sum_lanes<A>(sums[0]), correction = rest / size;
    const Moments found{mean + correction, sum_lanes<A>(sums[1]) - correction * rest};
    merge(&moments, first, &found, size, 1);
  }
  return moments;
}

// Moments of consecutive planes. Small ones are taken by as many as a vector has lanes: otherwise sums over lanes would
// take as long as sums over pixels.
template <class T>
void moments_of_planes(const T* data, int64_t planes, int64_t pixels, Moments* moments) {
  using A = acc_t<T>;
  constexpr int n = kLanes<A>;
  constexpr int64_t kSmall = 256;
  int64_t plane = 0;
  for (; pixels <= kSmall && plane + n <= planes; plane += n) {
    const T* const group = data + plane * pixels;
    Vec<A> sums[n], squares[n];
    for (int j = 0; j < n; ++j) sums[j] = sum_of(group + j * pixels, pixels);
    const Vec<A> means = sum_each<A>(sums) / A(pixels);
    A mean[n], rest[n], square[n];
    store(mean, means);
    for (int j = 0; j < n; ++j) {
      Vec<A> of_plane[2];
      sum_deviations(group + j * pixels, pixels, mean[j], of_plane);
      sums[j] = of_plane[0], squares[j] = of_plane[1];
    }
    store(rest, sum_each<A>(sums));
    store(square, sum_each<A>(squares));
    const double share = 1 / double(pixels);
    for (int j = 0; j < n; ++j) {
      const double correction = rest[j] * share;
      moments[plane + j] = {mean[j] + correction, square[j] - correction * rest[j]};
    }
  }
  for (; plane < planes; ++plane) moments[plane] = moments_of_plane(data + plane * pixels, pixels);
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

constexpr int64_t kMomentsRun = 32;  // pixels

// Moments of each channel of [pixel][channel], by the same two passes. run_of(first, size) gives up to kMomentsRun
// pixels. `scratch` holds 3 * channels numbers.
template <class T, class RunOf>
PIXNORM_INLINE void moments_of_runs(const RunOf& run_of, int64_t pixels, int64_t channels, acc_t<T>* scratch,
                                    Moments* moments) {
  using A = acc_t<T>;
  A *const rests = scratch, *const squares = scratch + channels, *const means = squares + channels;
  for (int64_t c = 0; c < channels; ++c) moments[c] = {0, 0};
  for (int64_t first = 0; first < pixels; first += kMomentsRun) {
    const int64_t size = pixels - first < kMomentsRun ? pixels - first : kMomentsRun;
    const T* const run = run_of(first, size);
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

template <class T>
void moments_by_channel(const T* data, int64_t pixels, int64_t channels, acc_t<T>* scratch, Moments* moments) {
  const auto run_of = [&](int64_t first, int64_t) __attribute__((always_inline)) { return data + first * channels; };
  moments_of_runs<T>(run_of, pixels, channels, scratch, moments);
}
