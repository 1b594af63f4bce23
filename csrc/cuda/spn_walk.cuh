// How SPN's kernels walk over an image, and what a thread does for a row.
//
// Both layouts run the same code. A thread owns V neighbouring columns of one channel and walks down the rows, so that
// the 3x3 stencils find three rows of the mask in registers. What lies to the left and right comes from the thread
// beside it: in NCHW that is the next lane, in channels_last, where a lane is a channel, the next warp.
//
// Everything of an upsampled call that can stay at the resolution of x does: a thread owns V columns of x and 2V of y.
#pragma once

#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"
#include "dispatch.h"
#include "spn_sums.h"

namespace pixnorm::spn {

// ---- how threads lie over pixels ----

struct Shape {
  int n, c, h, w;  // of x

  PIXNORM_HOST_DEVICE int pixels() const { return h * w; }
  int64_t numel() const { return int64_t{n} * c * h * w; }
};

// A strip is `rows` rows of x, as wide as `positions` threads side by side, V columns each: lanes of a warp in NCHW,
// warps in channels_last. Where a row is wider than that, windows overlap: of the positions, `halo` at either end do
// the work of their neighbours once more, to know what their inner neighbours need, and `own` of them own their
// columns.
struct Plan {
  int positions, groups;  // a block works on `groups` strips at once
  int own, halo, windows;
  int rows, strips_down;
  int strips;                   // of one channel: n x strips_down x windows
  int channels;                 // of one block
  int threads, blocks, splits;  // the grid is (blocks of channels, splits of their strips)

  // At most so many blocks in all, each with as many rounds as the others or one less.
  void split(int most_blocks) {
    const int rounds = ceil_div(strips, groups), most = std::clamp(ceil_div(most_blocks, blocks), 1, rounds);
    splits = ceil_div(rounds, ceil_div(rounds, most));
  }
};

// A block is one warp or more, up to 4 in NCHW. In channels_last it is 8, or 16 where a row has work for them; of
// double, which takes twice the registers and shared memory, never more than 8.
template <class T, bool kChannelsLast>
constexpr int kMostWarps = !kChannelsLast              ? 4
                           : std::is_same_v<T, double> ? 8
                                                       : 16;
template <class T, bool kChannelsLast>
constexpr int kMostThreads = kMostWarps<T, kChannelsLast> * kWarp;
// Blocks that a multiprocessor shall hold at least: 16 warps, so at most 128 registers. (double goes without.)
template <class T, bool kChannelsLast>
constexpr int kBlocksAtOnce = std::is_same_v<T, double> ? 1 : 16 / kMostWarps<T, kChannelsLast>;

template <class T, int kColumns, bool kChannelsLast>
Plan make_plan(const Shape& s) {
  constexpr int kTargetBlocks = kChannelsLast ? 1 << 9 : 1 << 11;
  Plan plan{};
  const int most = kChannelsLast ? kMostWarps<T, true> : kWarp;
  const int vectors = ceil_div(s.w, kColumns);
  plan.positions = 1;
  while (plan.positions < std::min(vectors, most)) plan.positions *= 2;
  plan.halo = vectors <= most ? 0 : ceil_div(2, kColumns);  // dγ beside an owned column needs the mask beside that
  plan.windows = ceil_div(vectors, most - 2 * plan.halo);
  plan.own = ceil_div(vectors, plan.windows);

  plan.channels = kChannelsLast ? kWarp : 1;
  plan.blocks = ceil_div(s.c, plan.channels);
  const int64_t threads_of_a_row = int64_t{s.n} * s.c * plan.windows * plan.positions;
  // The rows at the ends of a strip are worked on twice, so as few strips as fill any GPU; but where strips are long,
  // as many as fill it several times, so that the last ones do not leave most of it idle.
  const auto too_few = [&] {
    return threads_of_a_row * ceil_div(s.h, plan.rows) < (plan.rows > 32 ? 1 << 18 : 1 << 16);
  };
  plan.rows = s.h;
  while (plan.rows > 8 && too_few()) plan.rows = ceil_div(plan.rows, 2);
  plan.strips_down = ceil_div(s.h, plan.rows);
  plan.strips = s.n * plan.strips_down * plan.windows;

  const int most_groups = (kChannelsLast ? 8 : kMostThreads<T, false>) / plan.positions;
  plan.groups = kChannelsLast ? 1 : kWarp / plan.positions;
  while (plan.groups * 2 <= most_groups && plan.groups < plan.strips) plan.groups *= 2;
  plan.threads = plan.groups * plan.positions * (kChannelsLast ? kWarp : 1);
  plan.split(kTargetBlocks);
  return plan;
}

// Where a thread is, within its block and then within a strip.
template <int kColumns, bool kChannelsLast>
struct Place {
  int c;  // its channel, and whether there is such a one
  bool channel;
  int lane_channel;  // number of its channel within the block
  int position, group;

  // Of the strip:
  int n, row;        // image; first row
  int column;        // first column
  bool inside;       // are its columns (all or none) in the image
  bool owns;         // and does it own them
  bool first, last;  // is its first column that of the image, its last column that of the image

  __device__ Place(const Shape& s, const Plan& plan) {
    const int thread = threadIdx.x;
    const int across = kChannelsLast ? thread / kWarp : thread;
    lane_channel = kChannelsLast ? thread % kWarp : 0;
    c = blockIdx.x * plan.channels + lane_channel;
    channel = c < s.c;
    position = across % plan.positions;
    group = across / plan.positions;
  }

  __device__ void enter(int strip, const Shape& s, const Plan& plan) {
    const int window = strip % plan.windows, rest = strip / plan.windows;
    n = rest / plan.strips_down;
    row = rest % plan.strips_down * plan.rows;
    const int place = position - plan.halo;
    const int vector = window * plan.own + place;
    column = vector * kColumns;
    inside = channel && strip < plan.strips && vector >= 0 && column < s.w;
    owns = inside && place >= 0 && place < plan.own;
    first = column == 0;
    last = column + kColumns == s.w;
  }

  // Of the image's or plane's first pixel, in a tensor `scale` times as high and wide as x.
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

// `stride` is that between neighbouring pixels in channels_last.
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

// The mask as a number v with m = kScale v + kShift; taps act on v, and kArgument is the factor by which q must be
// scaled. v is m itself, from one exponential and one reciprocal; for bfloat16 it is tanh(q / 2), one instruction. (Its
// error of 2^-11 would show in float16, where rounding leaves a saturated mask at 1.)
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

// A parameter tensor: in x's dtype, or in float.
template <class T>
struct Parameter {
  const void* data;
  bool wide;

  __device__ __forceinline__ acc_t<T> operator[](int i) const {
    return wide ? static_cast<acc_t<T>>(static_cast<const acc_t<T>*>(data)[i])
                : static_cast<acc_t<T>>(static_cast<const T*>(data)[i]);
  }
};

template <class T>
struct Gradient {
  void* data;
  bool wide;

  __device__ __forceinline__ void set(int i, acc_t<T> value) const {
    if (wide) {
      static_cast<acc_t<T>*>(data)[i] = value;
    } else {
      static_cast<T*>(data)[i] = static_cast<T>(value);
    }
  }
};

#include "activation_functions.h"

// What both directions know of a call.
template <class T>
struct Call {
  using A = acc_t<T>;
  Shape shape;
  Plan plan;
  bool activated;
  A slope;
  A eps;
  const T *x, *p;
  Parameter<T> mask_weight, mask_bias;
  Parameter<T> taps[4];  // gamma, gamma_inv, beta, beta_inv, each (C, 9)
};

// Statistics of a channel.
template <class T>
struct Channel {
  using A = acc_t<T>;
  A mean, rstd, mask_mean, mask_rstd, scale, shift;  // v = value(scale (p - mask_mean) + shift)

  __device__ void set(const Call<T>& call, int c, A mean_, A var, A mask_mean_, A mask_var) {
    mean = mean_;
    mask_mean = mask_mean_;
    rstd = 1 / sqrt(var + call.eps);
    mask_rstd = 1 / sqrt(mask_var + call.eps);
    scale = Mask<T>::kArgument * call.mask_weight[c] * mask_rstd;
    shift = Mask<T>::kArgument * call.mask_bias[c];
  }

  __device__ __forceinline__ A mask(A p) const { return Mask<T>::value(fma(scale, p - mask_mean, shift)); }
};

// Numbers of each channel in shared memory. For gamma (0; all of them times `gamma_factor`) and beta (1):
// - the taps as they act on the mask's v;
// - what the taps inside the image add whatever the mask is, for outputs at the first (1) and last (2) row and column,
//   both (3) or neither (0);
// - with upsampling, the taps that fall on the same pixel of x, merged: for the output's row and column within its
//   2x2 block, the rows and columns of a 2x2 kernel.
template <class T, int U, bool kChannelsLast>
class Table {
 public:
  using A = acc_t<T>;
  static constexpr int kChannels = kChannelsLast ? kWarp : 1;
  static constexpr int kBorder = 2 * kTaps, kMerged = kBorder + 2 * 4 * 4, kEntries = kMerged + (U == 2 ? 2 * 16 : 0);
  static constexpr int kRaw = 4 * kTaps * kChannels, kNumbers = kEntries * kChannels + kRaw;

  __device__ Table(A* memory, int lane_channel) : raw_(memory + kEntries * kChannels), at_(memory + lane_channel) {}

  // By all threads of a block; the numbers are there after its next barrier.
  __device__ void fill(const Call<T>& call, int lane_channel, A gamma_factor) {
    const int first = blockIdx.x * kChannels;
    for (int i = threadIdx.x; i < kRaw; i += blockDim.x) {
      const int kernel = i / (kTaps * kChannels), j = i % (kTaps * kChannels);
      raw_[i] = first + j / kTaps < call.shape.c ? call.taps[kernel][first * kTaps + j] : A(0);
    }
    __syncthreads();
    const int worker = kChannelsLast ? threadIdx.x / kWarp : threadIdx.x;
    const int workers = kChannelsLast ? blockDim.x / kWarp : blockDim.x;
    for (int entry = worker; entry < kEntries; entry += workers) {
      const int of = entry < kBorder ? entry / kTaps : (entry - kBorder) / 16 % 2, within = (entry - kBorder) % 16;
      const A* const tap = raw_ + (2 * of * kChannels + lane_channel) * kTaps;
      const A* const tap_inv = tap + kChannels * kTaps;
      A value = 0;
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

// ---- what a thread does for a row ----

// The numbers that the threads to the left and right have at their near ends; 0 at the ends of the strip.
template <class A, int K, bool kChannelsLast>
class Neighbours {
 public:
  static constexpr int numbers(int threads) { return kChannelsLast ? 2 * 2 * K * threads : 0; }

  __device__ Neighbours(A* memory, int position, int positions)
      : memory_(memory), position_(position), positions_(positions) {}

  // All threads of the block (channels_last) or warp (NCHW) take part.
  template <int kCount>
  __device__ __forceinline__ void exchange(const A (&first)[kCount], const A (&last)[kCount], A (&left)[kCount],
                                           A (&right)[kCount]) {
    static_assert(kCount <= K);
    const bool has_left = position_ > 0, has_right = position_ < positions_ - 1;
    if constexpr (kChannelsLast) {
      // Two halves in turn: a thread that is ahead writes where nobody reads.
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

// gamma and beta of a row of x: kOf of the two, in U rows of U V columns, from three rows of the mask with a column
// more on either side. The taps are in registers, or where these are needed for other things, in the table.
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
