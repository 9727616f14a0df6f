// Where threads wait for each other: the block's barrier, and the rendezvous of a warp's lanes.
#pragma once

#include <cstring>

#include "emulated_errors.h"

namespace emulator {

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

}  // namespace emulator
