// What every launcher returns. Torch-free; safe to include anywhere.
#pragma once

namespace sdi {

enum Status : int {
  kOk = 0,
  kBadArgument = 1,  // an index or a size that would leave its array
  kOutOfMemory = 2,
  kCudaError = 3,
};

}  // namespace sdi
