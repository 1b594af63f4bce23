// The module pixnorm._cuda. Importing it registers the kernels of csrc/cuda; the schemas must have been defined.

#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include <string>

namespace {

namespace py = pybind11;

py::dict build_info() {
  using py::literals::operator""_a;
  const std::string cuda = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  return py::dict("CUDA"_a = cuda, "torch"_a = TORCH_VERSION, "architectures"_a = PIXNORM_CUDA_ARCHITECTURES);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.def("build_info", &build_info, "What this extension was built with, and for which GPUs");
}
