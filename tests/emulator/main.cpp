// The one place that defines what emulator.h declares, and what the tests ask of the emulator by ctypes.
#include "emulator.h"

#include <cxxabi.h>
#include <dlfcn.h>

#if defined(__x86_64__)
asm(R"(
.text
.globl vstar_emulator_switch
.hidden vstar_emulator_switch
.type vstar_emulator_switch, @function
vstar_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size vstar_emulator_switch, .-vstar_emulator_switch
)");
#endif

extern "C" {

void emulator_seed(uint64_t seed) { emulator::seed = seed; }

void emulator_idle(bool idle) { emulator::idle = idle; }

void emulator_count(bool sectors) {
  emulator::counts = {};
  emulator::counting = sectors;
}

// launches, blocks, barriers, warp operations, atomics, sectors, bytes
void emulator_counts(int64_t* out) {
  const emulator::Counts& c = emulator::counts;
  const int64_t values[] = {c.launches, c.blocks, c.barriers, c.warp_operations, c.atomics, c.sectors, c.bytes};
  std::copy(std::begin(values), std::end(values), out);
}

// The names of the kernels that were launched, one on each line.
const char* emulator_kernels() {
  static std::string names;
  names.clear();
  for (const void* kernel : emulator::kernels) {
    Dl_info found;
    if (!dladdr(kernel, &found) || !found.dli_sname) continue;
    char* const name = abi::__cxa_demangle(found.dli_sname, nullptr, nullptr, nullptr);
    names += std::string(name ? name : found.dli_sname) + "\n";
    free(name);
  }
  return names.c_str();
}

// A race on purpose, by which one sees that races are reported.
void emulator_race() {
  int word = 0;
  emulator::launch(+[](int* to) { *to = int(blockIdx.x); }, dim3{2}, 1, 0, &word);
}
}
