// Runs CUDA kernels on one CPU thread: blocks one after another, the threads of a block as fibers.
//
// A fiber runs until it waits: at __syncthreads for all live threads of its block, at a warp
// primitive for the lanes that its mask names. Whoever comes last does the exchange for all. What
// real hardware leaves undefined is an error here: a deadlock, a lane of the mask that has exited,
// lanes that meet in different primitives. An error prints what every thread waits for to stderr
// and makes the launch fail with cudaErrorLaunchFailure.
//
// SDI_EMULATE_ORDER=reverse in the environment runs threads and blocks from the last to the first:
// results that differ show a missing barrier.
#pragma once

#include <link.h>
#include <sys/mman.h>

#include <cstring>
#include <memory>
#include <mutex>
#include <tuple>
#include <vector>

#include "emulated_waiting.h"

// Static shared memory is thread-local, since that can be found at run time, in order to poison it
// (g++ ignores a section attribute in templates). The address sanitizer wants plain variables, with
// its red zones between them.
#if defined(__SANITIZE_ADDRESS__)
#define SDI_EMULATED_SHARED static
#else
#define SDI_EMULATED_SHARED static thread_local
#endif

namespace emulator {

inline bool is_reversed() {
  const char* order = std::getenv("SDI_EMULATE_ORDER");
  return order && std::strcmp(order, "reverse") == 0;
}

inline void prepare_shared(size_t bytes) {
  const size_t room = (kSharedMost + kPage - 1) / kPage * kPage;
  if (!machine.shared_end) {
    void* memory =
        mmap(nullptr, room + 2 * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    machine.shared_end = static_cast<char*>(memory) + kPage + room;
    mprotect(memory, kPage, PROT_NONE);
    mprotect(machine.shared_end, kPage, PROT_NONE);
  }
  machine.shared_bytes = (bytes + 15) / 16 * 16;
  machine.shared = machine.shared_end - machine.shared_bytes;  // 16-byte aligned, no better
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(machine.shared_end - room, room);
  ASAN_UNPOISON_MEMORY_REGION(machine.shared, bytes);
#endif
}

inline thread_local char thread_local_marker;

// This program's or library's thread-local memory, which holds the static shared memory. While kernels
// run, nothing else reads it: what it held before comes back with the destructor.
class StaticShared {
 public:
#if defined(__SANITIZE_ADDRESS__)
  StaticShared() {}
#else
  StaticShared() {
    dl_iterate_phdr(&find, this);
    before_.assign(begin_, begin_ + size_);
  }
  ~StaticShared() {
    if (size_) std::memcpy(begin_, before_.data(), size_);
  }
#endif
  StaticShared(const StaticShared&) = delete;
  void poison() {
    if (size_) std::memset(begin_, kPoison, size_);
  }

 private:
  static int find(dl_phdr_info* info, size_t, void* self) {
    StaticShared& s = *static_cast<StaticShared*>(self);
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      char* const begin = static_cast<char*>(info->dlpi_tls_data);
      const size_t size = info->dlpi_phdr[i].p_memsz;
      const size_t offset = static_cast<size_t>(&thread_local_marker - begin);
      if (info->dlpi_phdr[i].p_type != PT_TLS || !begin || offset >= size) continue;
      s.begin_ = begin;
      s.size_ = size;
      return 1;
    }
    return 0;
  }

  char* begin_ = nullptr;
  size_t size_ = 0;
  std::vector<char> before_;
};

void set_indices(int thread);  // cuda_runtime.h
void set_dims(int64_t blocks, int64_t block, int threads);

// False after an error.
inline bool run_block() {
  const bool reversed = is_reversed();
  const int n = machine.n_threads;
  machine.n_live = n;
  machine.n_at_barrier = 0;
  machine.n_true = 0;
  for (Warp& warp : machine.warps) warp = Warp{};
  for (int i = 0; i < n; ++i) {
    machine.fibers[i]->state = State::kReady;
    warp_of(*machine.fibers[i]).live |= bit_of(*machine.fibers[i]);
  }
  while (machine.n_live > 0) {
    bool has_moved = false;
    for (int i = 0; i < n; ++i) {
      Fiber& fiber = *machine.fibers[reversed ? n - 1 - i : i];
      if (fiber.state != State::kReady) continue;
      has_moved = true;
      machine.current = &fiber;
      set_indices(fiber.thread);
      switch_context(machine.scheduler, fiber.context, true);
      if (machine.has_failed) return false;
    }
    if (!has_moved) {
      report("deadlock: no thread can go on");
      return false;
    }
  }
  return true;
}

enum : int { kSuccess = 0, kInvalidValue = 1, kInvalidConfiguration = 9, kLaunchFailure = 719 };

inline int run_grid(int64_t blocks, int threads, size_t shared) {
  const auto limit = machine.shared_limits.find(machine.kernel);
  const size_t most = limit == machine.shared_limits.end() ? kSharedDefault : limit->second;
  if (blocks < 1 || blocks > 2147483647 || threads < 1 || threads > kMaxThreads) {
    return kInvalidConfiguration;
  }
  if (shared > most) return kInvalidValue;
  while (static_cast<int>(machine.fibers.size()) < threads) {
    machine.fibers.push_back(std::make_unique<Fiber>());
    machine.fibers.back()->thread = static_cast<int>(machine.fibers.size()) - 1;
    start_fiber(*machine.fibers.back());
  }
  machine.n_threads = threads;
  machine.has_failed = false;
  prepare_shared(shared);
  const FaultHandler handler;
  StaticShared static_shared;
  for (int64_t i = 0; i < blocks; ++i) {
    machine.block = is_reversed() ? blocks - 1 - i : i;
    static_shared.poison();
    std::memset(machine.shared, kPoison, shared);
    set_dims(blocks, machine.block, threads);
    if (run_block()) continue;
    for (auto& fiber : machine.fibers) start_fiber(*fiber);  // drop what their stacks hold
    return kLaunchFailure;
  }
  return kSuccess;
}

// Runs the kernel to its end; cudaGetLastError tells whether that worked.
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), int64_t blocks, int threads, size_t shared,
            const void* /*stream*/, const Args&... args) {
  struct Call {
    void (*kernel)(Params...);
    std::tuple<std::decay_t<Params>...> params;
  };
  const std::lock_guard<std::mutex> lock(machine.one_launch);
  const Call call{kernel, {args...}};
  machine.kernel = reinterpret_cast<const void*>(kernel);
  machine.call = &call;
  machine.invoke = [](const void* memory) {
    const Call& c = *static_cast<const Call*>(memory);
    std::apply(c.kernel, c.params);
  };
  const int error = run_grid(blocks, threads, shared);
  if (error != kSuccess) machine.last_error = error;
}

}  // namespace emulator
