// The work of a thread in the kernels of spn_general.cu: its pixels, the masks around them, the taps.
#pragma once

#include "cuda/spn_general.cuh"

namespace pixnorm::spn {

constexpr int floor_div(int a, int b) { return (a >= 0 ? a : a - b + 1) / b; }

// The stencil of K x K taps on x upsampled by U, as of a pixel of x.
template <int K, int U>
struct Stencil {
  static constexpr int kRadius = K / 2, kReach = (kRadius + U - 1) / U, kSide = 2 * kReach + 1, kTaps = K * K;

  // The pixel of x under tap row (or column) k of output a, as an index of the pixels around.
  static constexpr int under(int a, int k) { return kReach + floor_div(a + k - kRadius, U); }
  // The pixel of x whose output a has its own pixel under tap k.
  static constexpr int over(int a, int k) { return kReach - floor_div(a + k - kRadius, U); }
};

// The work of a thread.
template <class T>
struct Worker {
  using A = acc_t<T>;
  const GeneralCall<T>& call;
  int sample, c, lane_channel;
  bool channel;
  int group;             // of the sample
  unsigned first, step;  // its items of work
  int pixel, p_pixel;    // strides
  int64_t base, p_base;  // offsets of the plane in x and p

  __device__ explicit Worker(const GeneralCall<T>& call_) : call(call_) {
    const Shape& s = call.shape;
    const bool last = call.channels_last;
    sample = blockIdx.x / call.blocks;
    lane_channel = last ? threadIdx.x % kWarp : 0;
    c = (blockIdx.x - sample * call.blocks) * call.channels + lane_channel;
    channel = c < s.c;
    group = call.group_of(sample);
    const int thread = last ? threadIdx.x / kWarp : threadIdx.x, threads = last ? blockDim.x / kWarp : blockDim.x;
    first = channel ? blockIdx.y * threads + thread : call.items;
    step = gridDim.y * threads;
    pixel = last ? s.c : 1;
    p_pixel = last ? call.masks : 1;
    const int mask = call.masks == 1 ? 0 : c;
    base = last ? int64_t{sample} * s.c * s.pixels() + c : (int64_t{sample} * s.c + c) * s.pixels();
    p_base =
        last ? int64_t{sample} * call.masks * s.pixels() + mask : (int64_t{sample} * call.masks + mask) * s.pixels();
  }

  __device__ Channel<T> statistics() const {
    Channel<T> result{};
    const int mask = call.masks == 1 ? 0 : c;
    if (channel) {
      result.set(call, call.mask_in_group(group, c), call.used[0][c], call.used[1][c], call.used[2][mask],
                 call.used[3][mask]);
    }
    return result;
  }
  __device__ bool inside(int h, int w) const { return h >= 0 && h < call.shape.h && w >= 0 && w < call.shape.w; }
  __device__ int64_t at(int h, int w) const { return base + int64_t{h * call.shape.w + w} * pixel; }
  __device__ A p(int h, int w) const {
    return static_cast<A>(call.p[p_base + int64_t{h * call.shape.w + w} * p_pixel]);
  }
  // Of a tensor like y, for output (a, b) of a pixel of x.
  template <int U>
  __device__ int64_t at_output(int h, int w, int a, int b) const {
    const Shape& s = call.shape;
    const int64_t pixels = int64_t{U * U} * s.pixels();
    const int64_t plane = call.channels_last ? sample * s.c * pixels + c : (int64_t{sample} * s.c + c) * pixels;
    return plane + (int64_t{U * h + a} * U * s.w + U * w + b) * pixel;
  }
  // The plane's offset in a (C, N, HW) tensor.
  __device__ int64_t plane_by_channel() const { return (int64_t{c} * call.shape.n + sample) * call.shape.pixels(); }
  __device__ int64_t part() const { return (int64_t{c} * call.shape.n + sample) * gridDim.y + blockIdx.y; }
  // Adds up the block's sums, in the shared memory that the taps had.
  template <int kCount>
  __device__ void write(A (&sums)[kCount], A* to) const {
    if (call.channels_last) {
      write_sums<true>(sums, channel, shared_memory<A>(), to);
    } else {
      write_sums<false>(sums, channel, shared_memory<A>(), to);
    }
  }
};

// The masks around a thread's pixel, zero outside the image.
template <class T, int kSide>
struct MasksAround {
  using A = acc_t<T>;
  A at[kSide][kSide] = {};

  // Moves down to row h: its last row of masks.
  __device__ __forceinline__ void enter(const Worker<T>& worker, const Channel<T>& channel, int h, int w) {
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
#pragma unroll
      for (int j = 0; j < kSide; ++j) {
        const int column = w + j - kSide / 2;
        if (i < kSide - 1) {
          at[i][j] = at[i + 1][j];
        } else {
          at[i][j] = worker.inside(h, column) ? channel.mask(worker.p(h, column)) : A(0);
        }
      }
    }
  }
};

// The taps of a block's channels in shared memory: those on the mask's v, the constants that an output adds for each
// tap inside the image, and the sum of these constants.
template <class T, int K>
class Taps {
 public:
  using A = acc_t<T>;
  static constexpr int kTaps = K * K, kEntries = 4 * kTaps + 2;

  // Called by all threads of a block; has a barrier.
  __device__ explicit Taps(const Worker<T>& worker)
      : channels_(worker.call.channels), at_(shared_memory<A>() + worker.lane_channel) {
    const GeneralCall<T>& call = worker.call;
    const bool last = call.channels_last;
    const int thread = last ? threadIdx.x / kWarp : threadIdx.x, threads = last ? blockDim.x / kWarp : blockDim.x;
    for (int entry = thread; worker.channel && entry < 2 * kTaps; entry += threads) {
      const int of = entry / kTaps, i = call.in_group(worker.group, worker.c) * kTaps + entry % kTaps;
      const A tap = call.taps[2 * of][i], tap_inv = call.taps[2 * of + 1][i];
      at_[entry * channels_] = Mask<T>::kScale * (tap - tap_inv);
      at_[(2 * kTaps + entry) * channels_] = Mask<T>::kShift * tap + (1 - Mask<T>::kShift) * tap_inv;
    }
    __syncthreads();
    if (worker.channel && thread < 2) {
      A total = 0;
      for (int k = 0; k < kTaps; ++k) total += constant(thread, k);
      at_[(4 * kTaps + thread) * channels_] = total;
    }
    __syncthreads();
  }

  __device__ __forceinline__ A tap(int of, int k) const { return at_[(of * kTaps + k) * channels_]; }

  // The sum of the constants of an output in that row and column of an image.
  __device__ __forceinline__ A inside(int of, int row, int column, int height, int width) const {
    constexpr int kRadius = K / 2;
    if (row >= kRadius && row < height - kRadius && column >= kRadius && column < width - kRadius) {
      return at_[(4 * kTaps + of) * channels_];
    }
    A total = 0;
    for (int k = 0; k < kTaps; ++k) {
      const int y = row + k / K - kRadius, x = column + k % K - kRadius;
      if (y >= 0 && y < height && x >= 0 && x < width) total += constant(of, k);
    }
    return total;
  }

 private:
  __device__ __forceinline__ A constant(int of, int k) const { return at_[((2 + of) * kTaps + k) * channels_]; }

  int channels_;
  A* at_;
};

}  // namespace pixnorm::spn
