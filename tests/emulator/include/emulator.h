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

#include <dlfcn.h>
#include <link.h>
#include <signal.h>
#include <sys/mman.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
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

// Static shared memory is thread-local, since that can be found at run time, in order to poison it
// (g++ ignores a section attribute in templates). The address sanitizer wants plain variables, with
// its red zones between them.
#if defined(__SANITIZE_ADDRESS__)
#define SDI_EMULATED_SHARED static
#else
#define SDI_EMULATED_SHARED static thread_local
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

// --- errors ---------------------------------------------------------------------------------------

inline std::string text_of(const Location& at) {
  const char* slash = std::strrchr(at.file, '/');
  return std::string(slash ? slash + 1 : at.file) + ":" + std::to_string(at.line) + " in " +
         at.function;
}

inline std::string kernel_name() {
  Dl_info info;
  char line[1024] = "";
  if (dladdr(machine.kernel, &info) && info.dli_fname) {
    const size_t offset =
        static_cast<const char*>(machine.kernel) - static_cast<const char*>(info.dli_fbase);
    char command[4096];
    std::snprintf(command, sizeof command, "addr2line -f -C -e '%s' 0x%zx 2>/dev/null",
                  info.dli_fname, offset);
    if (FILE* pipe = popen(command, "r")) {
      if (!std::fgets(line, sizeof line, pipe)) line[0] = 0;
      pclose(pipe);
    }
  }
  std::string name(line);
  while (!name.empty() && name.back() == '\n') name.pop_back();
  return name.empty() || name[0] == '?' ? "(unknown)" : name;
}

// Says what went wrong and where all threads are; the launch fails.
inline void report(const std::string& problem) {
  machine.has_failed = true;
  std::string text = "emulator: " + problem + "\n  kernel " + kernel_name() + ", block " +
                     std::to_string(machine.block) + " of " + std::to_string(machine.n_threads) +
                     " threads\n";
  std::vector<std::pair<std::string, std::pair<int, int>>> groups;  // text, count, first thread
  for (int i = 0; i < machine.n_threads; ++i) {
    const Fiber& fiber = *machine.fibers[i];
    std::string what;
    if (fiber.state == State::kExited) {
      what = "exited";
    } else if (fiber.state == State::kReady) {
      what = "running";
    } else {
      what = std::string("waiting at ") + fiber.primitive;
      if (fiber.state == State::kWarp) {
        char mask[32];
        std::snprintf(mask, sizeof mask, ", mask 0x%08x", fiber.mask);
        what += mask;
      }
      what += ", " + text_of(fiber.at);
    }
    size_t g = 0;
    while (g < groups.size() && groups[g].first != what) ++g;
    if (g == groups.size()) groups.push_back({what, {0, i}});
    ++groups[g].second.first;
  }
  for (const auto& group : groups) {
    text += "  " + std::to_string(group.second.first) + " threads " + group.first +
            " (first: thread " + std::to_string(group.second.second) + ")\n";
  }
  std::fputs(text.c_str(), stderr);
}

// On a fiber: never returns, so that nothing may be held in a string here.
[[noreturn]] __attribute__((format(printf, 2, 3))) inline void fail(const Location& at,
                                                                    const char* format, ...) {
  char problem[512];
  va_list values;
  va_start(values, format);
  std::vsnprintf(problem, sizeof problem, format, values);
  va_end(values);
  report("thread " + std::to_string(machine.current->thread) + ": " + problem + ", " + text_of(at));
  for (;;) leave();
}

#if !defined(__SANITIZE_ADDRESS__)
inline struct sigaction action_before;

// Names the thread; then the instruction faults again, for whoever handled faults before.
inline void on_fault(int signal, siginfo_t* info, void*) {
  sigaction(signal, &action_before, nullptr);
  char problem[64];
  std::snprintf(problem, sizeof problem, "memory fault at %p", info->si_addr);
  report("thread " + std::to_string(machine.current->thread) + ": " + problem);
}

// While kernels run.
struct FaultHandler {
  FaultHandler() {
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &action_before);
  }
  ~FaultHandler() { sigaction(SIGSEGV, &action_before, nullptr); }
};
#else
struct FaultHandler {
  ~FaultHandler() {}
};
#endif

// --- waiting --------------------------------------------------------------------------------------

inline void release_barrier() {
  for (int i = 0; i < machine.n_threads; ++i) {
    Fiber& fiber = *machine.fibers[i];
    if (fiber.state == State::kBarrier) fiber.state = State::kReady;
  }
  machine.n_at_barrier = 0;
  machine.last_true = machine.n_true;
  machine.n_true = 0;
}

// Waits for all live threads of the block; returns how many came with `is_true`.
inline int barrier(const char* primitive, bool is_true, Location at) {
  Fiber& self = *machine.current;
  machine.n_true += is_true;
  self.primitive = primitive;
  self.at = at;
  self.state = State::kBarrier;
  if (++machine.n_at_barrier == machine.n_live) {
    release_barrier();
  } else {
    leave();
  }
  return static_cast<int>(machine.last_true);
}

inline Warp& warp_of(const Fiber& fiber) { return machine.warps[fiber.thread / kWarp]; }
inline unsigned bit_of(const Fiber& fiber) { return 1u << (fiber.thread % kWarp); }
inline Fiber& lane_of(const Fiber& fiber, int lane) {
  return *machine.fibers[fiber.thread / kWarp * kWarp + lane];
}

inline void thread_exits() {
  Fiber& self = *machine.current;
  self.state = State::kExited;
  --machine.n_live;
  warp_of(self).live &= ~bit_of(self);
  for (unsigned rest = warp_of(self).waiting; rest; rest &= rest - 1) {
    const Fiber& other = lane_of(self, __builtin_ctz(rest));
    if (other.mask & bit_of(self)) {
      fail(other.at, "exits, but a lane of its warp waits for it in %s", other.primitive);
    }
  }
  if (machine.n_at_barrier > 0 && machine.n_at_barrier == machine.n_live) release_barrier();
}

// One primitive's view of the lanes that take part in it.
template <class In, class Out>
struct Lanes {
  Fiber* of[kWarp];
  bool has(int lane) const { return of[lane] != nullptr; }
  const In& in(int lane) const { return *static_cast<const In*>(of[lane]->in); }
  Out& out(int lane) const { return *static_cast<Out*>(of[lane]->out); }
};

template <class In, class Out>
inline constexpr char kind_of = 0;

// The lanes of self's mask, all of which wait; false if some do not wait for self yet.
inline bool gather_lanes(const Fiber& self, Fiber** of) {
  for (unsigned rest = self.mask; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    Fiber& other = lane_of(self, lane);
    if (!(other.mask & bit_of(self))) return false;
    if (other.mask != self.mask || other.kind != self.kind ||
        std::strcmp(other.primitive, self.primitive) != 0) {
      fail(self.at, "%s: lane %d waits in another primitive, or with another mask or type",
           self.primitive, lane);
    }
    of[lane] = &other;
  }
  return true;
}

// False if some lanes of the mask do not wait for self yet.
template <class In, class Out, class Exchange>
bool exchange_all(const Fiber& self, Exchange& exchange) {
  Lanes<In, Out> lanes{};
  if (!gather_lanes(self, lanes.of)) return false;
  exchange(static_cast<const Lanes<In, Out>&>(lanes));
  warp_of(self).waiting &= ~self.mask;
  for (Fiber* lane : lanes.of) {
    if (lane) lane->state = State::kReady;
  }
  return true;
}

// All lanes of `mask` meet; the last one to come runs exchange(lanes), which sets every out.
template <class Out, class In, class Exchange>
Out collective(const char* primitive, unsigned mask, Location at, const In& given,
               Exchange exchange) {
  Fiber& self = *machine.current;
  In in = given;
  Out out{};
  self.primitive = primitive;
  self.at = at;
  self.mask = mask;
  self.kind = &kind_of<In, Out>;
  self.in = &in;
  self.out = &out;
  self.state = State::kWarp;
  if (!(mask & bit_of(self))) fail(at, "%s: the mask lacks the calling lane", primitive);
  Warp& warp = warp_of(self);
  if (mask & ~warp.live) {
    fail(at, "%s: lane %d of the mask has exited or does not exist", primitive,
         __builtin_ctz(mask & ~warp.live));
  }
  warp.waiting |= bit_of(self);
  if ((mask & ~warp.waiting) != 0 || !exchange_all<In, Out>(self, exchange)) leave();
  return out;
}

inline int lane_id() { return machine.current->thread % kWarp; }

// --- launching ------------------------------------------------------------------------------------

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
