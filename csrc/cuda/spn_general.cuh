// SPN's kernels for what those of spn.cu and spn_backward.cu have not: 1x1 and 5x5 taps, and one mask for all channels.
// See spn_general.cu.
#pragma once

#include "cuda/spn_backward_sums.cuh"

namespace pixnorm::spn {

template <class T>
struct GeneralCall : BackwardCall<T> {
  using A = acc_t<T>;
  bool channels_last;
  int rows;        // of a strip; an item of work is a column of a strip
  unsigned items;  // of a channel of a sample; unsigned, as a thread counts on beyond the last
  int channels;    // of a block
  int blocks;      // of channels
  T* y;
  T* d_beta;     // dy, as far as the activation lets it through; like y
  A* dm;         // like x: dq, or with one mask each channel's share of the gradient of its v
  A* dq;         // with one mask, (N, H, W)
  A* mask_sums;  // Σ dq and Σ dq p̂ of each part: [C][N][splits][2], or with one mask [N][splits][2]
};

// Forward, from statistics that are in call.used.
template <class T>
void launch_general_forward(GeneralCall<T> call, bool channels_last, int64_t upsample, cudaStream_t stream);

// All of backward but the matrix products, into the same tensors as launch_backward. `like`: a tensor of the device.
template <class T>
void launch_general_backward(GeneralCall<T> call, bool channels_last, int64_t upsample,
                             const torch::stable::Tensor& like, cudaStream_t stream);

// Adds the samples' shares of the means.
template <class T>
void launch_add_means(const BackwardCall<T>& call, cudaStream_t stream);

}  // namespace pixnorm::spn
