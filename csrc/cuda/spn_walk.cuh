// How SPN's kernels walk over an image, and the work of a thread on a row.
//
// Both layouts share the code. A thread owns V adjacent columns of one channel and walks down the rows with the three
// rows of the mask that a 3x3 stencil needs in registers. The columns to the left and right come from the neighbouring
// thread: the next lane in NCHW, the next warp in channels_last, where lanes are channels.
//
// With upsampling, as much as possible stays at the resolution of x: a thread owns V columns of x and 2V of y.
#pragma once

#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/parameter.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"
#include "dispatch.h"
#include "spn_sums.h"

namespace pixnorm::spn {

// ---- mapping of threads to pixels ----

struct Shape {
  int n, c, h, w;  // of x

  PIXNORM_HOST_DEVICE int pixels() const { return h * w; }
  int64_t numel() const { return int64_t{n} * c * h * w; }
};

// A strip is `rows` rows of x, and `positions` threads wide with V columns each. Positions are lanes of a warp in NCHW,
// warps of a block in channels_last. Wider rows are cut into overlapping windows: `own` positions own their columns,
// and `halo` positions at either end recompute columns of the next window.
struct Plan {
  int positions, groups;  // a block processes `groups` strips at a time
  int own, halo, windows;
  int rows, strips_down;
  int samples;                  // whose blocks are separate: n where parameters differ between samples, else 1
  int strips;                   // of one channel and sample: (n / samples) x strips_down x windows
  int channels;                 // of one block
  int threads, blocks, splits;  // the grid is (samples x blocks of channels, splits of their strips)

  // Sets `splits` for at most `most_blocks` blocks, whose numbers of rounds differ by at most one.
  void split(int most_blocks) {
    const int rounds = ceil_div(strips, groups);
    const int most = std::clamp(ceil_div(most_blocks, blocks * samples), 1, rounds);
    splits = ceil_div(rounds, ceil_div(rounds, most));
  }
};

// Warps per block: up to 4 in NCHW; in channels_last 8, or 16 if a row is wide enough. double needs twice the registers
// and shared memory, and gets at most 8.
template <class T, bool kChannelsLast>
constexpr int kMostWarps = !kChannelsLast              ? 4
                           : std::is_same_v<T, double> ? 8
                                                       : 16;
template <class T, bool kChannelsLast>
constexpr int kMostThreads = kMostWarps<T, kChannelsLast> * kWarp;
// Minimum resident blocks per SM: 16 warps, so at most 128 registers per thread. (No bound for double.)
template <class T, bool kChannelsLast>
constexpr int kBlocksAtOnce = std::is_same_v<T, double> ? 1 : 16 / kMostWarps<T, kChannelsLast>;

template <class T, int kColumns, bool kChannelsLast>
Plan make_plan(const Shape& s, bool per_sample) {
  constexpr int kTargetBlocks = kChannelsLast ? 1 << 9 : 1 << 11;
  Plan plan{};
  const int most = kChannelsLast ? kMostWarps<T, true> : kWarp;
  const int vectors = ceil_div(s.w, kColumns);
  plan.positions = 1;
  while (plan.positions < std::min(vectors, most)) plan.positions *= 2;
  plan.halo = vectors <= most ? 0 : ceil_div(2, kColumns);  // dγ beside an owned column, and the mask beside that
  plan.windows = ceil_div(vectors, most - 2 * plan.halo);
  plan.own = ceil_div(vectors, plan.windows);

  plan.channels = kChannelsLast ? kWarp : 1;
  plan.blocks = ceil_div(s.c, plan.channels);
  const int64_t threads_of_a_row = int64_t{s.n} * s.c * plan.windows * plan.positions;
  // Strips recompute the rows at their ends, so use no more strips than fill any GPU; but where strips are long, fill
  // it several times, or the tail would leave most of it idle.
  const auto too_few = [&] {
    return threads_of_a_row * ceil_div(s.h, plan.rows) < (plan.rows > 32 ? 1 << 18 : 1 << 16);
  };
  plan.rows = s.h;
  while (plan.rows > 8 && too_few()) plan.rows = ceil_div(plan.rows, 2);
  plan.strips_down = ceil_div(s.h, plan.rows);
  plan.samples = per_sample ? s.n : 1;
  plan.strips = s.n / plan.samples * plan.strips_down * plan.windows;

  const int most_groups = (kChannelsLast ? 8 : kMostThreads<T, false>) / plan.positions;
  plan.groups = kChannelsLast ? 1 : kWarp / plan.positions;
  while (plan.groups * 2 <= most_groups && plan.groups < plan.strips) plan.groups *= 2;
  plan.threads = plan.groups * plan.positions * (kChannelsLast ? kWarp : 1);
  plan.split(kTargetBlocks);
  return plan;
}

// The position of a thread in its block and, after enter(), in a strip.
template <int kColumns, bool kChannelsLast>
struct Place {
  int c;  // its channel; `channel`: whether c < C
  bool channel;
  int lane_channel;  // index of c within the block
  int sample;        // of the block, or 0
  int position, group;

  // Of the strip:
  int n, row;        // image; first row
  int column;        // first column
  bool inside;       // its columns (all or none) are in the image
  bool owns;         // and it owns them
  bool first, last;  // its first (last) column is the first (last) of the image

  __device__ Place(const Shape& s, const Plan& plan) {
    const int thread = threadIdx.x;
    const int across = kChannelsLast ? thread / kWarp : thread;
    lane_channel = kChannelsLast ? thread % kWarp : 0;
    sample = blockIdx.x / plan.blocks;
    c = (blockIdx.x - sample * plan.blocks) * plan.channels + lane_channel;
    channel = c < s.c;
    position = across % plan.positions;
    group = across / plan.positions;
  }

  __device__ void enter(int strip, const Shape& s, const Plan& plan) {
    const int window = strip % plan.windows, rest = strip / plan.windows;
    n = sample + rest / plan.strips_down;
    row = rest % plan.strips_down * plan.rows;
    const int place = position - plan.halo;
    const int vector = window * plan.own + place;
    column = vector * kColumns;
    inside = channel && strip < plan.strips && vector >= 0 && column < s.w;
    owns = inside && place >= 0 && place < plan.own;
    first = column == 0;
    last = column + kColumns == s.w;
  }

  // Offset of the first pixel of the plane, in a tensor `scale` times as high and wide as x.
  __device__ int64_t base(const Shape& s, int scale) const {
    const int64_t pixels = int64_t{s.pixels()} * scale * scale;
    return kChannelsLast ? int64_t{n} * s.c * pixels + c : (int64_t{n} * s.c + c) * pixels;
  }
};

// ---- V columns of a row in memory ----

template <class T, int N, bool kChannelsLast>
struct Row {
  Vec<T, N> vec;
};

template <class T, int N>
struct Row<T, N, true> {
  T at[N];
};

// `stride`: between adjacent pixels, for channels_last.
template <class T, int N>
__device__ __forceinline__ void load(Row<T, N, false>& row, const T* from, int) {
  load(row.vec, from);
}

template <class T, int N>
__device__ __forceinline__ void load(Row<T, N, true>& row, const T* from, int stride) {
#pragma unroll
  for (int j = 0; j < N; ++j) row.at[j] = from[j * stride];
}

template <class T, int N>
__device__ __forceinline__ void unpack(const Row<T, N, false>& row, acc_t<T>* to) {
  unpack(row.vec, to);
}

template <class T, int N>
__device__ __forceinline__ void unpack(const Row<T, N, true>& row, acc_t<T>* to) {
#pragma unroll
  for (int j = 0; j < N; ++j) to[j] = static_cast<acc_t<T>>(row.at[j]);
}

template <bool kChannelsLast, int N, class T>
__device__ __forceinline__ void store(T* to, const acc_t<T>* from, int stride) {
  if constexpr (kChannelsLast) {
#pragma unroll
    for (int j = 0; j < N; ++j) to[j * stride] = static_cast<T>(from[j]);
  } else {
    Vec<T, N> vec;
    pack(vec, from);
    store(to, vec);
  }
}

// ---- the mask ----

// The mask m = sigmoid(q), represented by v with m = kScale v + kShift and v = value(kArgument q); taps are scaled to
// act on v. For most types v = m, from one exponential and one reciprocal. For bfloat16 v = tanh(q / 2), one
// instruction; its error of 2^-11 would be visible in float16, which rounds a saturated mask to 1.
template <class T>
struct Mask {
  static constexpr float kScale = 1, kShift = 0, kArgument = -1.4426950408889634f;  // -log2 e
  static __device__ __forceinline__ float value(float argument) { return rcp_approx(1 + ex2_approx(argument)); }
  static __device__ __forceinline__ float derivative(float v) { return fmaf(-v, v, v); }  // dv / dq
};

template <>
struct Mask<BFloat16> {
  static constexpr float kScale = 0.5f, kShift = 0.5f, kArgument = 0.5f;
  static __device__ __forceinline__ float value(float argument) { return tanh_approx(argument); }
  static __device__ __forceinline__ float derivative(float v) { return fmaf(-0.5f * v, v, 0.5f); }
};

template <>
struct Mask<double> {
  static constexpr double kScale = 1, kShift = 0, kArgument = -1;
  static __device__ __forceinline__ double value(double argument) { return 1 / (1 + exp(argument)); }
  static __device__ __forceinline__ double derivative(double v) { return fma(-v, v, v); }
};

// ---- parameters ----

#include "activation_functions.h"

// Arguments of both forward and backward.
template <class T>
struct Call {
  using A = acc_t<T>;
  Shape shape;
  Plan plan;
  bool activated;
  A slope;
  A eps;
  const T *x, *p;
  Parameter<T> mask_weight, mask_bias;  // (G, masks)
  Parameter<T> taps[4];                 // gamma, gamma_inv, beta, beta_inv, each (G, C, k²)
  int masks;                            // C, or 1 for all channels
  int kernel_size;                      // k
  Parameter<T> rows[2];                 // gamma_bias and beta_bias, (N, C); data == nullptr: none
  const int64_t* index;                 // (N,), the group of each sample; nullptr: G = 1
  int groups;                           // G
  bool per_sample;                      // there are groups or rows: no block straddles samples

  __device__ __forceinline__ int group_of(int sample) const {
    if (!index) return 0;
    const int64_t group = index[sample];
    return group < 0 ? 0 : group >= groups ? groups - 1 : static_cast<int>(group);
  }
  // The channel's index in (G, C), and its mask's in (G, masks).
  __device__ __forceinline__ int in_group(int group, int c) const { return group * shape.c + c; }
  __device__ __forceinline__ int mask_in_group(int group, int c) const { return group * masks + (masks == 1 ? 0 : c); }
  __device__ __forceinline__ A row(int of, int sample, int c) const {
    return rows[of].data ? rows[of][sample * shape.c + c] : A(0);
  }
};

// Statistics of a channel, and the affine map that they give the mask.
template <class T>
struct Channel {
  using A = acc_t<T>;
  A mean, rstd, mask_mean, mask_rstd, scale, shift;  // v = value(scale (p - mask_mean) + shift)

  // i: the mask's index in (G, masks)
  __device__ void set(const Call<T>& call, int i, A mean_, A var, A mask_mean_, A mask_var) {
    mean = mean_;
    mask_mean = mask_mean_;
    rstd = 1 / sqrt(var + call.eps);
    mask_rstd = 1 / sqrt(mask_var + call.eps);
    scale = Mask<T>::kArgument * call.mask_weight[i] * mask_rstd;
    shift = Mask<T>::kArgument * call.mask_bias[i];
  }

  __device__ __forceinline__ A mask(A p) const { return Mask<T>::value(fma(scale, p - mask_mean, shift)); }
};

// Per-channel tables in shared memory, for gamma (of = 0, scaled by `gamma_factor`) and beta (of = 1):
// - the taps that multiply the mask's v;
// - the constant term, which sums the taps inside the image, for outputs in the first (1) or last (2) row and column,
//   both (3) or neither (0), and the sample's row, which thus costs the walk nothing;
// - with upsampling, taps that fall on the same pixel of x, merged: a 2x2 kernel for each output of a 2x2 block.
template <class T, int U, bool kChannelsLast>
class Table {
 public:
  using A = acc_t<T>;
  static constexpr int kChannels = kChannelsLast ? kWarp : 1;
  static constexpr int kBorder = 2 * kTaps, kMerged = kBorder + 2 * 4 * 4, kEntries = kMerged + (U == 2 ? 2 * 16 : 0);
  static constexpr int kRaw = 4 * kTaps * kChannels, kNumbers = kEntries * kChannels + kRaw;

  __device__ Table(A* memory, int lane_channel) : raw_(memory + kEntries * kChannels), at_(memory + lane_channel) {}

  // Called by all threads of a block; the table is valid after the next barrier.
  template <class Place>
  __device__ void fill(const Call<T>& call, const Place& place, A gamma_factor) {
    const int lane_channel = place.lane_channel, first = place.c - lane_channel;
    const int from = call.in_group(call.group_of(place.sample), first) * kTaps;
    const A row_gamma = place.channel ? call.row(0, place.sample, place.c) : A(0);
    const A row_beta = place.channel ? call.row(1, place.sample, place.c) : A(0);
    for (int i = threadIdx.x; i < kRaw; i += blockDim.x) {
      const int kernel = i / (kTaps * kChannels), j = i % (kTaps * kChannels);
      raw_[i] = first + j / kTaps < call.shape.c ? call.taps[kernel][from + j] : A(0);
    }
    __syncthreads();
    const int worker = kChannelsLast ? threadIdx.x / kWarp : threadIdx.x;
    const int workers = kChannelsLast ? blockDim.x / kWarp : blockDim.x;
    for (int entry = worker; entry < kEntries; entry += workers) {
      const int of = entry < kBorder ? entry / kTaps : (entry - kBorder) / 16 % 2, within = (entry - kBorder) % 16;
      const A* const tap = raw_ + (2 * of * kChannels + lane_channel) * kTaps;
      const A* const tap_inv = tap + kChannels * kTaps;
      A value = entry < kBorder || entry >= kMerged ? A(0) : of == 0 ? row_gamma : row_beta;
      for (int k = 0; k < kTaps; ++k) {
        const int ky = k / 3, kx = k % 3;
        const A on_mask = Mask<T>::kScale * (tap[k] - tap_inv[k]);
        if (entry < kBorder) {
          if (entry % kTaps == k) value = on_mask;
        } else if (entry < kMerged) {
          const int row = within / 4, column = within % 4;
          const bool outside =
              (ky == 0 && row & 1) || (ky == 2 && row & 2) || (kx == 0 && column & 1) || (kx == 2 && column & 2);
          if (!outside) value += Mask<T>::kShift * tap[k] + (1 - Mask<T>::kShift) * tap_inv[k];
        } else {
          const int a = within / 8, b = within / 4 % 2, i = within / 2 % 2, j = within % 2;
          if ((a + ky + 1) / 2 - a == i && (b + kx + 1) / 2 - b == j) value += on_mask;
        }
      }
      at_[entry * kChannels] = of == 0 ? gamma_factor * value : value;
    }
  }

  __device__ __forceinline__ A tap(int of, int k) const { return at_[(of * kTaps + k) * kChannels]; }
  __device__ __forceinline__ A border(int of, int row, int column) const {
    return at_[(kBorder + (of * 4 + row) * 4 + column) * kChannels];
  }
  __device__ __forceinline__ A merged(int of, int a, int b, int i, int j) const {
    return at_[(kMerged + (((of * 2 + a) * 2 + b) * 2 + i) * 2 + j) * kChannels];
  }

 private:
  A *raw_, *at_;
};

// ---- the work of a thread on a row ----

// Exchanges edge values with the threads to the left and right; 0 beyond the ends of the strip.
template <class A, int K, bool kChannelsLast>
class Neighbours {
 public:
  static constexpr int numbers(int threads) { return kChannelsLast ? 2 * 2 * K * threads : 0; }

  __device__ Neighbours(A* memory, int position, int positions)
      : memory_(memory), position_(position), positions_(positions) {}

  // Collective over the block (channels_last) or the warp (NCHW).
  template <int kCount>
  __device__ __forceinline__ void exchange(const A (&first)[kCount], const A (&last)[kCount], A (&left)[kCount],
                                           A (&right)[kCount]) {
    static_assert(kCount <= K);
    const bool has_left = position_ > 0, has_right = position_ < positions_ - 1;
    if constexpr (kChannelsLast) {
      // Double buffering: a thread that is ahead writes to the half that nobody reads.
      const int threads = blockDim.x, thread = threadIdx.x;
      A* const half = memory_ + turn_ * 2 * K * threads;
      turn_ ^= 1;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        half[2 * i * threads + thread] = first[i];
        half[(2 * i + 1) * threads + thread] = last[i];
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        left[i] = has_left ? half[(2 * i + 1) * threads + thread - kWarp] : A(0);
        right[i] = has_right ? half[2 * i * threads + thread + kWarp] : A(0);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        left[i] = __shfl_up_sync(kAllLanes, last[i], 1, positions_);
        right[i] = __shfl_down_sync(kAllLanes, first[i], 1, positions_);
        if (!has_left) left[i] = 0;
        if (!has_right) right[i] = 0;
      }
    }
  }

 private:
  A* memory_;
  int position_, positions_, turn_ = 0;
};

// gamma (kOf = 0) or beta (kOf = 1) for a row of x, that is U rows of U V outputs, from three rows of the mask with one
// column of halo on either side. Taps are in registers or, under register pressure, in the table.
template <class T, int V, int U, bool kChannelsLast, bool kTapsInRegisters>
struct Affine {
  using A = acc_t<T>;
  Table<T, U, kChannelsLast> table;
  A taps[2][kTaps];

  __device__ void take_taps() {
#pragma unroll
    for (int k = 0; kTapsInRegisters && k < kTaps; ++k) taps[0][k] = table.tap(0, k), taps[1][k] = table.tap(1, k);
  }
  __device__ __forceinline__ A tap(int of, int k) const { return kTapsInRegisters ? taps[of][k] : table.tap(of, k); }

  template <int kOf>
  __device__ __forceinline__ void row(int a, int h, int height, bool first, bool last, const A (&mask)[3][V + 2],
                                      A (&to)[U * V]) const {
    const int out = U * h + a;
    const int row_class = (out == 0 ? 1 : 0) | (out == U * height - 1 ? 2 : 0);
    const int first_class = (first ? 1 : 0) | (U * V == 1 && last ? 2 : 0);
    const int last_class = (last ? 2 : 0) | (U * V == 1 && first ? 1 : 0);
    const A middle = table.border(kOf, row_class, 0);
#pragma unroll
    for (int j = 0; j < U * V; ++j) to[j] = middle;
    to[0] = table.border(kOf, row_class, first_class);
    to[U * V - 1] = table.border(kOf, row_class, last_class);
    if constexpr (U == 1) {
#pragma unroll
      for (int k = 0; k < kTaps; ++k) {
        const A weight = tap(kOf, k);
#pragma unroll
        for (int j = 0; j < V; ++j) to[j] = fma(weight, mask[k / 3][j + k % 3], to[j]);
      }
    } else {
#pragma unroll
      for (int b = 0; b < 2; ++b) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const A tap = table.merged(kOf, a, b, k / 2, k % 2);
#pragma unroll
          for (int j = 0; j < V; ++j) to[2 * j + b] = fma(tap, mask[a + k / 2][j + b + k % 2], to[2 * j + b]);
        }
      }
    }
  }
};

template <class A, int V>
__device__ __forceinline__ void slide(A (&mask)[3][V + 2]) {
#pragma unroll
  for (int j = 0; j < V + 2; ++j) mask[0][j] = mask[1][j], mask[1][j] = mask[2][j];
}

}  // namespace pixnorm::spn
