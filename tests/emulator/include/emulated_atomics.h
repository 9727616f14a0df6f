// Atomics: one thread runs at a time, so that plain reads and writes do. All return the old value.
#pragma once

namespace emulator {

template <class T, class Change>
T exchange(T* p, Location at, Change change) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) fail(at, "atomic at a misaligned address");
  const T old = *p;
  *p = change(old);
  return old;
}

}  // namespace emulator

#define SDI_ATOMIC(name, T, expression)                                                      \
  inline T name(T* p, T value, SDI_HERE) {                                                   \
    return emulator::exchange(p, at, [value](T old) { return static_cast<T>(expression); }); \
  }                                                                                          \
  inline T name##_block(T* p, T value, SDI_HERE) { return name(p, value, at); }

#define SDI_ATOMIC_INTEGERS(name, expression) \
  SDI_ATOMIC(name, int, expression)           \
  SDI_ATOMIC(name, unsigned, expression)      \
  SDI_ATOMIC(name, unsigned long long, expression)

#define SDI_ATOMIC_SUM(T) SDI_ATOMIC(atomicAdd, T, old + value)
SDI_ATOMIC_SUM(unsigned)
SDI_ATOMIC_SUM(unsigned long long)
SDI_ATOMIC_SUM(float)
SDI_ATOMIC_SUM(double)
SDI_ATOMIC(atomicAdd, int, static_cast<unsigned>(old) + static_cast<unsigned>(value))
SDI_ATOMIC(atomicSub, int, static_cast<unsigned>(old) - static_cast<unsigned>(value))
SDI_ATOMIC(atomicSub, unsigned, old - value)
SDI_ATOMIC_INTEGERS(atomicMin, old < value ? old : value)
SDI_ATOMIC_INTEGERS(atomicMax, old < value ? value : old)
SDI_ATOMIC(atomicMin, long long, old < value ? old : value)
SDI_ATOMIC(atomicMax, long long, old < value ? value : old)
SDI_ATOMIC_INTEGERS(atomicAnd, old& value)
SDI_ATOMIC_INTEGERS(atomicOr, old | value)
SDI_ATOMIC_INTEGERS(atomicXor, old ^ value)
SDI_ATOMIC_INTEGERS(atomicExch, (void(old), value))
SDI_ATOMIC(atomicExch, float, (void(old), value))
SDI_ATOMIC(atomicInc, unsigned, old >= value ? 0 : old + 1)
SDI_ATOMIC(atomicDec, unsigned, old == 0 || old > value ? value : old - 1)
#undef SDI_ATOMIC_INTEGERS
#undef SDI_ATOMIC_SUM
#undef SDI_ATOMIC

// sm_90: vectors of floats, in global memory
inline float2 atomicAdd(float2* p, float2 value, SDI_HERE) {
  return emulator::exchange(
      p, at, [value](float2 old) { return make_float2(old.x + value.x, old.y + value.y); });
}
inline float4 atomicAdd(float4* p, float4 value, SDI_HERE) {
  return emulator::exchange(p, at, [value](float4 old) {
    return make_float4(old.x + value.x, old.y + value.y, old.z + value.z, old.w + value.w);
  });
}

#define SDI_ATOMIC_CAS(T)                                                                  \
  inline T atomicCAS(T* p, T compare, T value, SDI_HERE) {                                 \
    return emulator::exchange(p, at, [=](T old) { return old == compare ? value : old; }); \
  }
SDI_ATOMIC_CAS(int)
SDI_ATOMIC_CAS(unsigned)
SDI_ATOMIC_CAS(unsigned short)
SDI_ATOMIC_CAS(unsigned long long)
#undef SDI_ATOMIC_CAS
