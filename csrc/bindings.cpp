// The module pixnorm._C. Importing it registers the kernels of csrc/cpu; the schemas must have been defined.

#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include "cpu/isa.h"

namespace {

namespace py = pybind11;

#if defined(__clang__)
constexpr const char* kCompiler = __VERSION__;  // "Clang 17.0.6 ..."
#elif defined(__GNUC__)
constexpr const char* kCompiler = "GCC " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

const char* cpu_capability() { return pixnorm::isa_name(pixnorm::cpu_isa()); }

py::dict build_info() {
  using py::literals::operator""_a;
  return py::dict("compiler"_a = kCompiler, "torch"_a = TORCH_VERSION, "cpu"_a = cpu_capability());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info, "What this extension was built with, and the vector instructions that it uses here");
  m.def("cpu_capability", &cpu_capability, "'avx512', 'avx2' or 'baseline': the vector instructions used on this CPU");
}
