// The emulated module has no CPU kernels; what it says of itself.
namespace sdi {
const char* cpu_isa() { return "emulated"; }
}  // namespace sdi
