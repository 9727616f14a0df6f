// The emulator's state, and the fibers that its threads are: stacks of their own on one CPU thread.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__x86_64__) && !defined(SDI_EMULATE_UCONTEXT)
#define SDI_EMULATE_ASSEMBLY
#else
#include <ucontext.h>
#endif

namespace emulator {

constexpr int kWarp = 32, kMaxThreads = 1024;
constexpr size_t kStack = 256 * 1024, kPage = 4096;
constexpr size_t kSharedDefault = 48 * 1024, kSharedMost = 227 * 1024;  // of one block, sm_90
constexpr int kPoison = 0xFF;  // bytes: NaN as float or double, -1 as integer

// Where a primitive was called.
struct Location {
  const char* file;
  int line;
  const char* function;
  static Location here(const char* file = __builtin_FILE(), int line = __builtin_LINE(),
                       const char* function = __builtin_FUNCTION()) {
    return {file, line, function};
  }
};

// A primitive's last parameter.
#define SDI_HERE emulator::Location at = emulator::Location::here()

enum class State { kReady, kBarrier, kWarp, kExited };

// A stack and where it was left.
struct Context {
#if defined(SDI_EMULATE_ASSEMBLY)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  const void* bottom = nullptr;
  size_t size = 0;
};

struct Fiber {
  Context context;
  char* stack = nullptr;
  int thread = 0;
  State state = State::kExited;
  // while it waits:
  const char* primitive = "";
  Location at{};
  unsigned mask = 0;           // of a warp primitive
  const void* kind = nullptr;  // of a warp primitive: its types
  const void* in = nullptr;    // of a warp primitive: what this lane gives
  void* out = nullptr;         // of a warp primitive: where this lane wants its result
};

struct Warp {
  unsigned live = 0, waiting = 0;  // lanes; those that wait in a warp primitive
};

struct Machine {
  std::mutex one_launch;
  std::vector<std::unique_ptr<Fiber>> fibers;
  Context scheduler;
  Fiber* current = nullptr;
  int n_threads = 0, n_live = 0, n_at_barrier = 0;
  Warp warps[kMaxThreads / kWarp];
  uint64_t n_true = 0, last_true = 0;  // __syncthreads_count and the like
  void (*invoke)(const void*) = nullptr;
  const void* call = nullptr;
  const void* kernel = nullptr;
  int64_t block = 0;
  bool has_failed = false;
  char* shared = nullptr;      // dynamic shared memory; ends where it may not be touched
  char* shared_end = nullptr;  // of the region
  size_t shared_bytes = 0;
  std::unordered_map<const void*, size_t> shared_limits;
  int last_error = 0;
};

inline Machine machine;

// --- switching stacks -----------------------------------------------------------------------------

#if defined(SDI_EMULATE_ASSEMBLY)
__attribute__((naked, noinline, noipa)) inline void switch_stack(void** /*save*/, void* /*load*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n popq %rcx\n jmp "
      "*%rcx");
}
#endif

inline void switch_context(Context& from, Context& to, bool to_fiber) {
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, to.bottom, to.size);
#endif
#if defined(SDI_EMULATE_ASSEMBLY)
  switch_stack(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(fake, &bottom, &size);
  if (!to_fiber) {  // back on a fiber: whence it came is the scheduler's stack
    machine.scheduler.bottom = bottom;
    machine.scheduler.size = size;
  }
#endif
  (void)to_fiber;
}

inline void leave() { switch_context(machine.current->context, machine.scheduler, false); }

void thread_exits();

inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler.bottom, &machine.scheduler.size);
#endif
  for (;;) {  // one turn a block
    machine.invoke(machine.call);
    thread_exits();
    leave();
  }
}

inline void start_fiber(Fiber& fiber) {
  if (!fiber.stack) {
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      std::fprintf(stderr, "emulator: no memory for a stack\n");
      std::abort();
    }
    mprotect(memory, kPage, PROT_NONE);  // an overflow faults
    fiber.stack = static_cast<char*>(memory);
  }
  fiber.context.bottom = fiber.stack + kPage;
  fiber.context.size = kStack - kPage;
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(fiber.stack + kPage, kStack - kPage);
#endif
#if defined(SDI_EMULATE_ASSEMBLY)
  void** top = reinterpret_cast<void**>(fiber.stack + kStack);
  *--top = nullptr;  // fiber_main's return address: it never returns
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.context.stack_pointer = top;
#else
  getcontext(&fiber.context.context);
  fiber.context.context.uc_stack.ss_sp = fiber.stack + kPage;
  fiber.context.context.uc_stack.ss_size = kStack - kPage;
  fiber.context.context.uc_link = nullptr;
  makecontext(&fiber.context.context, fiber_main, 0);
#endif
}

}  // namespace emulator
