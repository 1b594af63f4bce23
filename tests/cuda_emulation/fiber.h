// A stack to run a function on, and the switch between stacks.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if !defined(__x86_64__) || defined(CUDA_EMULATION_UCONTEXT)
#undef CUDA_EMULATION_UCONTEXT
#define CUDA_EMULATION_UCONTEXT 1
#include <ucontext.h>
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_emulation {

#ifndef CUDA_EMULATION_UCONTEXT
// Saves the callee-saved registers on the current stack, and restores those of the other one.
extern "C" void cuda_emulation_switch(void** keep, void* load);
asm(R"(
.text
.p2align 4
.type cuda_emulation_switch, @function
cuda_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_emulation_switch, . - cuda_emulation_switch
)");
#endif

class Fiber {
 public:
  Fiber() = default;  // the program's own stack, saved here on the first switch
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // With its own stack. Stacks of neighbouring numbers start in different cache sets.
  explicit Fiber(size_t number) {
    const size_t page = sysconf(_SC_PAGESIZE);
    bytes_ = kStack + page;
    memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory_ == MAP_FAILED || mprotect(memory_, page, PROT_NONE) != 0) throw std::bad_alloc();
    stack_ = static_cast<char*>(memory_) + page;
    size_ = kStack - number * 320 % 4096;
  }

  ~Fiber() {
    if (memory_) munmap(memory_, bytes_);
  }

  // The next switch to this fiber calls `run`, which must not return.
  void start(void (*run)()) {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(stack_, size_);  // of an aborted run
#endif
#ifdef CUDA_EMULATION_UCONTEXT
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = size_;
    context_.uc_link = nullptr;
    makecontext(&context_, run, 0);
#else
    void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack_) + size_) & ~uintptr_t{15});
    *--top = nullptr;                       // where run would return to
    *--top = reinterpret_cast<void*>(run);  // where the switch returns to
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    top_ = top;
#endif
  }

  // Runs `to` until something switches back to this one. `for_good`: nothing will.
  void switch_to(Fiber& to, bool for_good = false) {
#ifdef __SANITIZE_ADDRESS__
    came_from() = this;
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack_, to.stack_, to.size_);
#else
    (void)for_good;
#endif
#ifdef CUDA_EMULATION_UCONTEXT
    swapcontext(&context_, &to.context_);
#else
    cuda_emulation_switch(&top_, to.top_);
#endif
    arrived();
  }

  // To be called first in `run`, and after each switch.
  void arrived() {
#ifdef __SANITIZE_ADDRESS__
    const void* stack;
    size_t size;
    __sanitizer_finish_switch_fiber(fake_stack_, &stack, &size);
    came_from()->stack_ = const_cast<void*>(stack);  // not known yet for the program's own stack
    came_from()->size_ = size;
#endif
  }

 private:
  static constexpr size_t kStack = 128 << 10;

#ifdef __SANITIZE_ADDRESS__
  static Fiber*& came_from() {
    static Fiber* fiber;
    return fiber;
  }
  void* fake_stack_ = nullptr;
#endif
#ifdef CUDA_EMULATION_UCONTEXT
  ucontext_t context_;
#else
  void* top_ = nullptr;
#endif
  void* memory_ = nullptr;
  size_t bytes_ = 0;
  void* stack_ = nullptr;
  size_t size_ = 0;
};

}  // namespace cuda_emulation
