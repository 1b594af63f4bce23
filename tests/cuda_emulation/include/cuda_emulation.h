// CUDA's device language on the CPU: the interface of emulator.cpp to the emulated headers, kernels and host code.
//
// A thread is a fiber. It runs until it must wait for others, at a barrier or a warp instruction; the next one is drawn
// from a seed. Blocks run one after the other, in an order drawn from the same seed; those of a cluster together.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <functional>

namespace cuda_emulation {

// The source location of a wait, for messages.
struct Site {
  const char* file;
  int line;

  static Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  bool operator==(const Site& other) const {
    return line == other.line && (file == other.file || std::strcmp(file, other.file) == 0);
  }
};

// What a thread can wait for.
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

// Each lane of the mask provides a value and gets that of lane `source`.
uint64_t exchange(Op op, unsigned mask, uint64_t value, unsigned source, Site site);
// Waits for the lanes of the mask; returns the mask of those with true.
unsigned vote(Op op, unsigned mask, bool predicate, Site site);
// Waits for the block or cluster; returns the number of threads with true.
unsigned barrier(Op op, bool predicate, Site site);
// Yields to other threads.
void preempt();
// The lane.
unsigned lane();

// The block's dynamic shared memory, of the launch's size, initially all 0xff (NaN).
void* shared_memory();
// The same address in the shared memory of another block of the cluster.
void* map_shared_rank(const void* address, unsigned rank);
unsigned cluster_rank();
unsigned cluster_size();

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Misaligned access, on which a GPU faults and x86 does not.
inline void check_alignment(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) fail("an access of %zu bytes is not aligned to them", bytes);
}

// Runs a grid. Errors of the host are returned, as in CUDA; errors of the kernel are thrown.
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& call);
cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value);

// The approximate instructions of PTX, with errors as large as the manual allows.
float tanh_approx(float x);
float ex2_approx(float x);
float rcp_approx(float x);

}  // namespace cuda_emulation
