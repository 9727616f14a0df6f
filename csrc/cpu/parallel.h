// Memory and chunking shared by the CPU launchers.
#pragma once

#include <cstdint>
#include <cstdlib>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "../math/scalar.h"

namespace sdi {
namespace SDI_ISA {

// 64-byte aligned memory, freed with the object; ok() says whether it was had.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n)
      : data_(static_cast<T*>(std::aligned_alloc(64, (n * sizeof(T) + 127) / 64 * 64))) {}
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  bool ok() const { return data_ != nullptr; }
  T* get() const { return data_; }

 private:
  T* data_;
};

inline int at_least_one(int n_threads) { return n_threads < 1 ? 1 : n_threads; }

inline int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace SDI_ISA
}  // namespace sdi
