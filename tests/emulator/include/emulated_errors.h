// What is printed when a kernel does something wrong.
#pragma once

#include <dlfcn.h>
#include <signal.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "emulated_fibers.h"

namespace emulator {

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

}  // namespace emulator
