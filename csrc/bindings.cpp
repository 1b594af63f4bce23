// The module pixnorm._C. Importing it registers the kernels of csrc/cpu; Python must have defined the schemas before.

#include <torch/headeronly/version.h>

#include "cpu/isa.h"
#include "module.h"

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = __VERSION__;  // "Clang 17.0.6 ..."
#elif defined(__GNUC__)
constexpr const char* kCompiler = "GCC " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

PyObject* cpu_capability(PyObject*, PyObject*) {
  return pixnorm::or_runtime_error([] { return pixnorm::to_python(pixnorm::isa_name(pixnorm::cpu_isa())); });
}

PyObject* build_info(PyObject*, PyObject*) {
  return pixnorm::or_runtime_error([] {
    return pixnorm::to_python(
        {{"compiler", kCompiler}, {"torch", TORCH_VERSION}, {"cpu", pixnorm::isa_name(pixnorm::cpu_isa())}});
  });
}

PyMethodDef functions[] = {
    {"build_info", build_info, METH_NOARGS,
     "What this extension was built with, and the vector instructions that it uses here"},
    {"cpu_capability", cpu_capability, METH_NOARGS,
     "'avx512', 'avx2' or 'baseline': the vector instructions used on this CPU"},
    {},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "pixnorm._C", nullptr, -1, functions};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
