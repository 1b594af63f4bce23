// Loops over the elements of an image, with coefficients and sums of channels. Vector code, compiled once per
// instruction set. Vectors run over contiguous memory in both layouts: over the pixels of a plane in NCHW, and over the
// channels of a pixel in channels_last.

// ---- vectors and, for remainders, scalars: V is Vec<A> or A ----

template <class V, class T>
PIXNORM_INLINE V read(const T* from) {
  if constexpr (std::is_arithmetic_v<V>) {
    return static_cast<V>(*from);
  } else {
    return load_as<T>(from);
  }
}

template <class V, class T>
PIXNORM_INLINE void write(T* to, V value) {
  if constexpr (std::is_arithmetic_v<V>) {
    *to = static_cast<T>(value);
  } else {
    store_as<T>(to, value);
  }
}

// A number for each lane, or one for all: those of channels from i on are kVector in channels_last, those of pixels in
// NCHW.
template <class V, bool kVector, class A>
PIXNORM_INLINE V coefficient(const A* of, int64_t i) {
  if constexpr (kVector || std::is_arithmetic_v<V>) {
    return read<V>(of + i);
  } else {
    return broadcast<A>(of[i]);
  }
}

// Visits the elements of a piece, `pixels` of each channel: values<V>(c) gives the coefficients of channels from c on,
// at(values, i, p, sums) processes the elements from i on, which start at pixel p, and adds to kSums sums. sums[of]
// points to those of each channel; they are added in a fixed order.
template <bool kChannelsLast, int kSums, class A, class Body>
PIXNORM_INLINE void for_run(int64_t pixels, int64_t channels, A* const* sums, const Body& body) {
  using V = Vec<A>;
  constexpr int n = kLanes<A>, kWays = 4, kCount = kSums > 0 ? kSums : 1;
  if constexpr (kChannelsLast) {
    int64_t p = 0;
    const auto visit = [&](auto ways) __attribute__((always_inline)) {
      constexpr int kPixels = decltype(ways)::value;
      int64_t c = 0;
      for (; c + n <= channels; c += n) {
        const auto values = body.template values<V>(c);
        V sum[kCount] = {};
#pragma GCC unroll 4
        for (int i = 0; i < kPixels; ++i) body.at(values, (p + i) * channels + c, p + i, sum);
        for (int of = 0; of < kSums; ++of) store(sums[of] + c, load(sums[of] + c) + sum[of]);
      }
      for (; c < channels; ++c) {
        const auto values = body.template values<A>(c);
        A sum[kCount] = {};
        for (int i = 0; i < kPixels; ++i) body.at(values, (p + i) * channels + c, p + i, sum);
        for (int of = 0; of < kSums; ++of) sums[of][c] += sum[of];
      }
    };
    for (; p + kWays <= pixels; p += kWays) visit(std::integral_constant<int, kWays>{});
    for (; p < pixels; ++p) visit(std::integral_constant<int, 1>{});
  } else {
    // Sums over lanes for as many planes at once as a vector has lanes: of small planes they take as long as the rest.
    V totals[kCount][n];
    for (int64_t c = 0; c < channels; ++c) {
      const auto values = body.template values<V>(c);
      V sum[kWays][kCount] = {};
      const int64_t first = c * pixels;
      int64_t p = 0;
      for (; p + kWays * n <= pixels; p += kWays * n) {
#pragma GCC unroll 4
        for (int way = 0; way < kWays; ++way) body.at(values, first + p + way * n, p + way * n, sum[way]);
      }
      for (; p + n <= pixels; p += n) body.at(values, first + p, p, sum[0]);
      A tail[kCount] = {};
      if (p < pixels) {
        const auto scalars = body.template values<A>(c);
        for (; p < pixels; ++p) body.at(scalars, first + p, p, tail);
      }
      const int64_t in_group = c % n, group = c - in_group;
      for (int of = 0; of < kSums; ++of) {
        V& total = totals[of][in_group];
        total = (sum[0][of] + sum[1][of]) + (sum[2][of] + sum[3][of]);
        total[0] += tail[of];
        if (group + n > channels) {
          sums[of][c] += sum_lanes<A>(total);
        } else if (in_group == n - 1) {
          store(sums[of] + group, V(load(sums[of] + group) + sum_each<A>(totals[of])));
        }
      }
    }
  }
}

template <bool kChannelsLast, class A, class Body>
PIXNORM_INLINE void for_run(int64_t pixels, int64_t channels, const Body& body) {
  for_run<kChannelsLast, 0>(pixels, channels, static_cast<A* const*>(nullptr), body);
}
