// Replaces CUDA's header of this name: thread-block clusters and their shared memory.
#pragma once

#include <cuda_runtime.h>

namespace cooperative_groups {

class cluster_group {
 public:
  void sync(cuda_emulation::Site site = cuda_emulation::Site::here()) const {
    cuda_emulation::barrier(cuda_emulation::Op::kClusterSync, false, site);
  }
  unsigned block_rank() const { return cuda_emulation::cluster_rank(); }
  unsigned num_blocks() const { return cuda_emulation::cluster_size(); }

  template <class T>
  T* map_shared_rank(T* address, int rank) const {
    return static_cast<T*>(cuda_emulation::map_shared_rank(address, rank));
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
