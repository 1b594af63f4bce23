// The module pixnorm._cuda. Importing it registers the kernels of csrc/cuda; Python must have defined the schemas
// before.

#include <cuda_runtime_api.h>
#include <torch/headeronly/version.h>

#include <string>

#include "module.h"

namespace {

PyObject* build_info(PyObject*, PyObject*) {
  const std::string cuda = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  return pixnorm::to_python({{"CUDA", cuda}, {"torch", TORCH_VERSION}, {"architectures", PIXNORM_CUDA_ARCHITECTURES}});
}

PyMethodDef functions[] = {
    {"build_info", build_info, METH_NOARGS, "What this extension was built with, and for which GPUs"},
    {},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "pixnorm._cuda", nullptr, -1, functions};

}  // namespace

PyMODINIT_FUNC PyInit__cuda() { return PyModule_Create(&module); }
