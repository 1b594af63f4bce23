// Runs the threads of a grid as fibers, one at a time; barriers and warp instructions; CUDA's runtime for the host.

#include <cuda_runtime.h>
#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_emulation {
namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kSharedDefault = 48 << 10, kSharedMost = 227 << 10;

constexpr const char* kNames[] = {"",
                                  "__syncwarp",
                                  "__shfl_sync",
                                  "__shfl_up_sync",
                                  "__shfl_down_sync",
                                  "__shfl_xor_sync",
                                  "__ballot_sync",
                                  "__any_sync",
                                  "__all_sync",
                                  "__syncthreads",
                                  "__syncthreads_or",
                                  "__syncthreads_and",
                                  "__syncthreads_count",
                                  "cluster.sync"};

std::string format(const char* text, va_list arguments) {
  char buffer[512];
  std::vsnprintf(buffer, sizeof(buffer), text, arguments);
  return buffer;
}

std::string format(const char* text, ...) __attribute__((format(printf, 1, 2)));
std::string format(const char* text, ...) {
  va_list arguments;
  va_start(arguments, text);
  const std::string result = format(text, arguments);
  va_end(arguments);
  return result;
}

std::string to_string(const uint3& index) { return format("(%u, %u, %u)", index.x, index.y, index.z); }

// --- the order of threads and blocks

uint64_t random_state = 0;

unsigned random_below(size_t count) {  // splitmix64
  uint64_t z = random_state += 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return static_cast<unsigned>(((z >> 32) * count) >> 32);
}

// --- shared memory

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kCanary = 0;  // the sanitizer checks each access, and is told where the memory ends
#else
constexpr size_t kCanary = 256;
#endif
constexpr unsigned char kCanaryByte = 0xa5;

class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes) : bytes_(bytes), data_(new unsigned char[bytes + kCanary]) {
    std::memset(data_.get(), 0xff, bytes);
    std::memset(data_.get() + bytes, kCanaryByte, kCanary);
  }

  unsigned char* data() const { return data_.get(); }
  size_t size() const { return bytes_; }
  bool overrun() const {
    const unsigned char* end = data_.get() + bytes_;
    return std::any_of(end, end + kCanary, [](unsigned char byte) { return byte != kCanaryByte; });
  }

  // The block has ended: later reads are invalid.
  void close() {
    std::memset(data_.get(), 0xff, bytes_);
#ifdef __SANITIZE_ADDRESS__
    __asan_poison_memory_region(data_.get(), bytes_);
#endif
  }

 private:
  size_t bytes_;
  std::unique_ptr<unsigned char[]> data_;
};

// --- threads, blocks, the running cluster

struct Block;

struct Thread {
  Fiber* fiber;
  Block* block;
  uint3 index;
  unsigned rank;  // in the block
  bool exited = false;

  // Where it waits, and its operands; `value` is also its result.
  Op op = Op::kNone;
  unsigned mask = 0, source = 0;
  uint64_t value = 0;
  Site site{};
};

struct Block {
  uint3 index;
  unsigned rank;  // in the cluster
  Thread* threads;
  SharedMemory shared;
  unsigned waiting = 0, exited = 0;
};

std::vector<std::unique_ptr<Fiber>> fibers;  // kept from launch to launch
Fiber host;
std::vector<Thread> threads;  // of the cluster, block by block
std::vector<Block> blocks;
std::vector<Thread*> ready;  // the runnable ones
unsigned block_size = 0, cluster_waiting = 0;
Thread* running = nullptr;
const std::function<void()>* kernel_call = nullptr;
std::exception_ptr failure;

std::string position(const Thread& thread) {
  return "block " + to_string(thread.block->index) + ", thread " + to_string(thread.index);
}

// Switches to a runnable thread; to the host if there is none, or after an error.
void run_another(bool for_good = false) {
  Thread* const self = running;
  if (failure || ready.empty()) {
    self->fiber->switch_to(host, for_good);
    return;
  }
  const unsigned drawn = random_below(ready.size());
  running = ready[drawn];
  ready[drawn] = ready.back();
  ready.pop_back();
  threadIdx = running->index;
  blockIdx = running->block->index;
  if (running != self) self->fiber->switch_to(*running->fiber, for_good);
}

void end_block(Block& block) {
  if (block.shared.overrun()) {
    fail("the block has written behind its %zu bytes of shared memory", block.shared.size());
  }
  block.shared.close();
}

void run_thread() {
  Thread& self = *running;
  self.fiber->arrived();
  try {
    (*kernel_call)();
    self.exited = true;
    if (++self.block->exited == block_size) end_block(*self.block);
  } catch (...) {
    failure = std::current_exception();
  }
  run_another(/*for_good=*/true);
  std::abort();
}

// For a deadlock: which threads wait where.
std::string deadlock() {
  std::map<std::string, std::pair<size_t, const Thread*>> groups;
  for (const Thread& thread : threads) {
    std::string what = "exited";
    if (!thread.exited) {
      what = format("in %s", kNames[static_cast<int>(thread.op)]);
      if (thread.op < Op::kSyncthreads) what += format(" of mask %08x", thread.mask);
      what += format(" at %s:%d", thread.site.file, thread.site.line);
    }
    auto& [count, first] = groups[what];
    if (count++ == 0) first = &thread;
  }
  std::string text = "threads wait for each other in vain:";
  for (const auto& [what, who] : groups) {
    text += format("\n  %zu %s, the first of them %s", who.first, what.c_str(), position(*who.second).c_str());
  }
  return text;
}

void run_cluster(const std::vector<uint3>& indices, size_t shared_bytes) {
  const size_t total = block_size * indices.size();
  while (fibers.size() < total) fibers.push_back(std::make_unique<Fiber>(fibers.size()));
  threads.clear();
  threads.reserve(total);
  blocks.clear();
  blocks.reserve(indices.size());
  ready.clear();
  cluster_waiting = 0;
  failure = nullptr;
  for (const uint3& index : indices) {
    blocks.push_back(
        {index, static_cast<unsigned>(blocks.size()), threads.data() + threads.size(), SharedMemory(shared_bytes)});
    for (unsigned rank = 0; rank < block_size; ++rank) {
      const uint3 thread{rank % blockDim.x, rank / blockDim.x % blockDim.y, rank / (blockDim.x * blockDim.y)};
      Fiber* const fiber = fibers[threads.size()].get();
      fiber->start(run_thread);
      threads.push_back({fiber, &blocks.back(), thread, rank});
      ready.push_back(&threads.back());
    }
  }
  Thread starter{&host, &blocks[0], {}, 0};
  running = &starter;
  run_another();
  running = nullptr;
  if (failure) std::rethrow_exception(failure);
  const bool done = std::all_of(threads.begin(), threads.end(), [](const Thread& thread) { return thread.exited; });
  if (!done) throw std::runtime_error(deadlock());
}

// --- waiting

void wait(Op op, unsigned mask, uint64_t value, unsigned source, Site site) {
  Thread& self = *running;
  self.op = op, self.mask = mask, self.value = value, self.source = source, self.site = site;
}

void release(Thread& thread, uint64_t result) {
  thread.op = Op::kNone;
  thread.value = result;
  ready.push_back(&thread);
}

Thread* warp_of(const Thread& thread) { return thread.block->threads + thread.rank / kWarp * kWarp; }

// Whether all lanes of the mask have arrived, at the same instruction.
bool warp_is_here(Op op, unsigned mask) {
  const Thread* const warp = warp_of(*running);
  for (unsigned rest = mask; rest != 0; rest &= rest - 1) {
    const Thread& other = warp[__builtin_ctz(rest)];
    if (other.exited)
      fail("%s of mask %08x, of which lane %d has exited", kNames[static_cast<int>(op)], mask, __builtin_ctz(rest));
    if (other.op != op || other.mask != mask) return false;
  }
  return true;
}

void check_mask(Op op, unsigned mask) {
  const unsigned lanes = std::min(kWarp, block_size - running->rank / kWarp * kWarp);
  const char* const name = kNames[static_cast<int>(op)];
  if (!(mask >> lane() & 1)) fail("%s of mask %08x, which is without the lane that calls", name, mask);
  if (lanes < kWarp && mask >> lanes) fail("%s of mask %08x in a warp of %u lanes", name, mask, lanes);
}

// Releases `threads`, which have all arrived, if at the same barrier; returns the sum of their values.
void release_barrier(Thread* threads, size_t count) {
  uint64_t sum = 0;
  for (size_t i = 0; i < count; ++i) {
    const Thread& other = threads[i];
    if (other.op != running->op || !(other.site == running->site)) {
      fail("in %s at %s:%d, but %s in %s at %s:%d", kNames[static_cast<int>(running->op)], running->site.file,
           running->site.line, position(other).c_str(), kNames[static_cast<int>(other.op)], other.site.file,
           other.site.line);
    }
    sum += other.value;
  }
  for (size_t i = 0; i < count; ++i) release(threads[i], sum);
}

std::string name_of(const void* kernel) {
  Dl_info info;
  if (!dladdr(kernel, &info) || info.dli_saddr != kernel) return "a kernel";  // internal symbols have no names
  int status = 0;
  const std::unique_ptr<char, decltype(&std::free)> name(abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status),
                                                         &std::free);
  return status == 0 ? name.get() : info.dli_sname;
}

std::map<const void*, size_t> shared_limits;
cudaError_t last_error = cudaSuccess;

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaError_t check(const cudaLaunchConfig_t& config, const void* kernel, dim3& cluster) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const auto count = [](const dim3& d) { return static_cast<uint64_t>(d.x) * d.y * d.z; };
  if (count(grid) == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 || count(block) == 0 ||
      count(block) > 1024 || block.z > 64) {
    return cudaErrorInvalidConfiguration;
  }
  const auto limit = shared_limits.find(kernel);
  if (config.dynamicSmemBytes > (limit == shared_limits.end() ? kSharedDefault : limit->second)) {
    return cudaErrorInvalidValue;
  }
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id != cudaLaunchAttributeClusterDimension) return cudaErrorNotSupported;
    const auto& size = config.attrs[i].val.clusterDim;
    cluster = {size.x, size.y, size.z};
    if (count(cluster) == 0 || count(cluster) > 8 || grid.x % size.x || grid.y % size.y || grid.z % size.z) {
      return cudaErrorInvalidClusterSize;
    }
  }
  return cudaSuccess;
}

}  // namespace

void fail(const char* text, ...) {
  va_list arguments;
  va_start(arguments, text);
  const std::string message = format(text, arguments);
  va_end(arguments);
  throw std::runtime_error(position(*running) + ": " + message);
}

unsigned lane() { return running->rank % kWarp; }

uint64_t exchange(Op op, unsigned mask, uint64_t value, unsigned source, Site site) {
  check_mask(op, mask);
  if (!(mask >> source & 1)) {
    fail("%s of mask %08x reads from lane %u at %s:%d", kNames[static_cast<int>(op)], mask, source, site.file,
         site.line);
  }
  wait(op, mask, value, source, site);
  if (warp_is_here(op, mask)) {
    Thread* const warp = warp_of(*running);
    std::array<uint64_t, kWarp> values{};
    for (unsigned rest = mask; rest != 0; rest &= rest - 1)
      values[__builtin_ctz(rest)] = warp[__builtin_ctz(rest)].value;
    for (unsigned rest = mask; rest != 0; rest &= rest - 1) {
      Thread& other = warp[__builtin_ctz(rest)];
      release(other, values[other.source]);
    }
  }
  run_another();
  return running->value;
}

unsigned vote(Op op, unsigned mask, bool predicate, Site site) {
  check_mask(op, mask);
  wait(op, mask, predicate, 0, site);
  if (warp_is_here(op, mask)) {
    Thread* const warp = warp_of(*running);
    unsigned ballot = 0;
    for (unsigned i = 0; i < kWarp; ++i) ballot |= (mask >> i & 1 ? warp[i].value : 0) << i;
    for (unsigned rest = mask; rest != 0; rest &= rest - 1) release(warp[__builtin_ctz(rest)], ballot);
  }
  run_another();
  return static_cast<unsigned>(running->value);
}

unsigned barrier(Op op, bool predicate, Site site) {
  wait(op, 0, predicate, 0, site);
  Block& block = *running->block;
  if (op == Op::kClusterSync) {
    if (++cluster_waiting == threads.size()) {
      cluster_waiting = 0;
      release_barrier(threads.data(), threads.size());
    }
  } else if (++block.waiting == block_size) {
    block.waiting = 0;
    release_barrier(block.threads, block_size);
  }
  run_another();
  return static_cast<unsigned>(running->value);
}

void preempt() {
  ready.push_back(running);
  run_another();
}

void* shared_memory() { return running->block->shared.data(); }

void* map_shared_rank(const void* address, unsigned rank) {
  if (rank >= blocks.size()) fail("map_shared_rank: no block %u in a cluster of %zu", rank, blocks.size());
  const SharedMemory &own = running->block->shared, &other = blocks[rank].shared;
  const auto offset = static_cast<const unsigned char*>(address) - own.data();
  if (offset < 0 || static_cast<size_t>(offset) > own.size()) fail("map_shared_rank: not an address of this block");
  if (blocks[rank].exited == block_size) fail("map_shared_rank: block %u of the cluster has ended", rank);
  return other.data() + offset;
}

unsigned cluster_rank() { return running->block->rank; }
unsigned cluster_size() { return static_cast<unsigned>(blocks.size()); }

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& call) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  dim3 cluster;
  const cudaError_t error = check(config, kernel, cluster);
  if (error != cudaSuccess) return remember(error);

  gridDim = config.gridDim;
  blockDim = config.blockDim;
  block_size = blockDim.x * blockDim.y * blockDim.z;
  kernel_call = &call;
  const dim3 clusters(gridDim.x / cluster.x, gridDim.y / cluster.y, gridDim.z / cluster.z);
  std::vector<unsigned> order(clusters.x * clusters.y * clusters.z);
  std::iota(order.begin(), order.end(), 0u);
  try {
    for (; !order.empty(); order.pop_back()) {
      std::swap(order.back(), order[random_below(order.size())]);
      const unsigned i = order.back();
      const dim3 first(i % clusters.x * cluster.x, i / clusters.x % clusters.y * cluster.y,
                       i / (clusters.x * clusters.y) * cluster.z);
      std::vector<uint3> indices;
      for (unsigned z = 0; z < cluster.z; ++z) {
        for (unsigned y = 0; y < cluster.y; ++y) {
          for (unsigned x = 0; x < cluster.x; ++x) indices.push_back({first.x + x, first.y + y, first.z + z});
        }
      }
      run_cluster(indices, config.dynamicSmemBytes);
    }
  } catch (const std::exception& error) {
    throw std::runtime_error("CUDA emulation: " + name_of(kernel) + ": " + error.what());
  }
  return cudaSuccess;
}

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return remember(cudaErrorNotSupported);
  if (value < 0 || static_cast<size_t>(value) > kSharedMost) return remember(cudaErrorInvalidValue);
  shared_limits[kernel] = value;
  return cudaSuccess;
}

}  // namespace cuda_emulation

// --- CUDA's runtime

extern "C" {

void cuda_emulation_set_seed(uint64_t seed) { cuda_emulation::random_state = seed; }

cudaError_t cudaGetLastError() { return std::exchange(cuda_emulation::last_error, cudaSuccess); }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidClusterSize:
      return "invalid cluster size";
    case cudaErrorInvalidValue:
      return "invalid argument";
    default:
      return "operation not supported";
  }
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  return cuda_emulation::set_attribute(kernel, attribute, value);
}

}  // extern "C"
