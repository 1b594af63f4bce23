// CUDA's device language on the CPU: what the emulated headers, the kernels and the host code see of emulator.cpp.
//
// A thread is a fiber. It runs until it has to wait for others, at a barrier or a warp instruction; which one runs next
// is drawn from a seed. Blocks run one after the other, in an order drawn from it too; those of a cluster together.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <functional>

namespace cuda_emulation {

// Where the code stands that waits, for the messages.
struct Site {
  const char* file;
  int line;

  static Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  bool operator==(const Site& other) const {
    return line == other.line && (file == other.file || std::strcmp(file, other.file) == 0);
  }
};

// What a thread can wait in.
enum class Op {
  kNone,
  kSyncwarp,
  kShfl,
  kShflUp,
  kShflDown,
  kShflXor,
  kBallot,
  kAny,
  kAll,
  kSyncthreads,
  kSyncthreadsOr,
  kSyncthreadsAnd,
  kSyncthreadsCount,
  kClusterSync
};

// Each lane of the mask gives a value and gets that of the lane `source`.
uint64_t exchange(Op op, unsigned mask, uint64_t value, unsigned source, Site site);
// Waits for the lanes of the mask; which ones gave true.
unsigned vote(Op op, unsigned mask, bool predicate, Site site);
// Waits for the block, or for the cluster; how many threads gave true.
unsigned barrier(Op op, bool predicate, Site site);
// Lets others run first.
void preempt();
// The position in the warp.
unsigned lane();

// The block's dynamic shared memory: as many bytes as the launch asked for, all of them 0xff (NaN) at first.
void* shared_memory();
// The same place in the shared memory of another block of the cluster.
void* map_shared_rank(const void* address, unsigned rank);
unsigned cluster_rank();
unsigned cluster_size();

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// What the hardware faults on and x86 does not.
inline void check_alignment(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) fail("an access of %zu bytes is not aligned to them", bytes);
}

// Runs a grid. Misuse by the host is returned as an error, as CUDA does; misuse by the kernel is thrown.
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& call);
cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value);

// The approximate instructions of PTX: the exact result, off by as much as the manual allows.
float tanh_approx(float x);
float ex2_approx(float x);
float rcp_approx(float x);

}  // namespace cuda_emulation
