// Barriers and warp primitives.
#pragma once

inline void __syncthreads(SDI_HERE) { emulator::barrier("__syncthreads", false, at); }
inline int __syncthreads_count(int predicate, SDI_HERE) {
  return emulator::barrier("__syncthreads", predicate != 0, at);
}
inline int __syncthreads_or(int predicate, SDI_HERE) {
  return emulator::barrier("__syncthreads", predicate != 0, at) != 0;
}
inline int __syncthreads_and(int predicate, SDI_HERE) {
  return emulator::barrier("__syncthreads", predicate == 0, at) == 0;
}

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) { emulator::leave(); }  // lets the block's other threads go on

// The lanes that run together: here, as hardware may have it, never more than the caller.
inline unsigned __activemask() { return 1u << emulator::lane_id(); }

inline void __syncwarp(unsigned mask = 0xffffffffu, SDI_HERE) {
  emulator::collective<int>("__syncwarp", mask, at, 0, [](const auto&) {});
}

namespace emulator {

template <class T>
struct is_shuffled : std::is_arithmetic<T> {};  // cuda_fp16.h and cuda_bf16.h add theirs

template <class T>
struct Shuffled {
  T value;
  int source;  // lane
};

template <class T>
T poison() {
  T value;
  std::memset(static_cast<void*>(&value), kPoison, sizeof value);
  return value;
}

// A source outside the mask gives what hardware leaves undefined.
template <class T>
T shuffle(const char* primitive, unsigned mask, const T& value, int source, int width,
          Location at) {
  static_assert(is_shuffled<T>::value && sizeof(T) <= 8, "a type that shuffles take");
  if (width < 1 || width > kWarp || (width & (width - 1))) {
    fail(at, "%s: width has to be a power of two up to 32, not %d", primitive, width);
  }
  const Shuffled<T> in{value, source};
  return collective<T>(primitive, mask, at, in, [](const auto& lanes) {
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!lanes.has(lane)) continue;
      const int from = lanes.in(lane).source;
      lanes.out(lane) = lanes.has(from) ? lanes.in(from).value : poison<T>();
    }
  });
}

inline int segment_end(int lane, int width) { return lane | (width - 1); }
inline int segment_start(int lane, int width) { return lane & ~(width - 1); }

// T(all lanes' values in lane order), the same for all lanes
template <class Out, class In, class Fold>
Out fold(const char* primitive, unsigned mask, Location at, const In& in, Fold fold_two) {
  return collective<Out>(primitive, mask, at, in, [fold_two](const auto& lanes) {
    Out sum{};
    bool is_first = true;
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!lanes.has(lane)) continue;
      sum = is_first ? static_cast<Out>(lanes.in(lane)) : fold_two(sum, lanes.in(lane));
      is_first = false;
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      if (lanes.has(lane)) lanes.out(lane) = sum;
    }
  });
}

inline unsigned ballot(const char* primitive, unsigned mask, bool predicate, Location at) {
  return fold<unsigned>(primitive, mask, at, predicate ? 1u << lane_id() : 0u,
                        [](unsigned a, unsigned b) { return a | b; });
}

}  // namespace emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, SDI_HERE) {
  const int lane = emulator::lane_id();
  const int from = emulator::segment_start(lane, width) + (source & (width - 1));
  return emulator::shuffle("__shfl_sync", mask, value, from, width, at);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SDI_HERE) {
  const int lane = emulator::lane_id(), from = lane - static_cast<int>(delta);
  const int source = from < emulator::segment_start(lane, width) ? lane : from;
  return emulator::shuffle("__shfl_up_sync", mask, value, source, width, at);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SDI_HERE) {
  const int lane = emulator::lane_id(), from = lane + static_cast<int>(delta);
  const int source = from > emulator::segment_end(lane, width) ? lane : from;
  return emulator::shuffle("__shfl_down_sync", mask, value, source, width, at);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, SDI_HERE) {
  const int lane = emulator::lane_id(), from = lane ^ lane_mask;
  const int source = from < 0 || from > emulator::segment_end(lane, width) ? lane : from;
  return emulator::shuffle("__shfl_xor_sync", mask, value, source, width, at);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, SDI_HERE) {
  return emulator::ballot("__ballot_sync", mask, predicate != 0, at);
}
inline int __any_sync(unsigned mask, int predicate, SDI_HERE) {
  return emulator::ballot("__any_sync", mask, predicate != 0, at) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SDI_HERE) {
  return emulator::ballot("__all_sync", mask, predicate == 0, at) == 0;
}

template <class T>
unsigned __match_any_sync(unsigned mask, T value, SDI_HERE) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "as on the GPU");
  return emulator::collective<unsigned>("__match_any_sync", mask, at, value, [](const auto& lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      if (!lanes.has(lane)) continue;
      for (int other = 0; other < 32; ++other) {
        if (lanes.has(other) && !std::memcmp(&lanes.in(lane), &lanes.in(other), sizeof(T))) {
          lanes.out(lane) |= 1u << other;
        }
      }
    }
  });
}
template <class T>
unsigned __match_all_sync(unsigned mask, T value, int* predicate, SDI_HERE) {
  *predicate = __match_any_sync(mask, value, at) == mask;
  return *predicate ? mask : 0u;
}

#define SDI_REDUCE(name, T, expression)                                            \
  inline T __reduce_##name##_sync(unsigned mask, T value, SDI_HERE) {              \
    return emulator::fold<T>("__reduce_" #name "_sync", mask, at, value,           \
                             [](T a, T b) { return static_cast<T>(expression); }); \
  }
SDI_REDUCE(add, unsigned, a + b)
SDI_REDUCE(add, int, static_cast<unsigned>(a) + static_cast<unsigned>(b))
SDI_REDUCE(min, unsigned, a < b ? a : b)
SDI_REDUCE(min, int, a < b ? a : b)
SDI_REDUCE(max, unsigned, a < b ? b : a)
SDI_REDUCE(max, int, a < b ? b : a)
SDI_REDUCE(and, unsigned, a& b)
SDI_REDUCE(or, unsigned, a | b)
SDI_REDUCE(xor, unsigned, a ^ b)
#undef SDI_REDUCE
