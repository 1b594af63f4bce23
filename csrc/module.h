#pragma once

// Shared by the extension modules. They use Python's limited API, and the kernels LibTorch's Stable ABI, so that one
// build serves every version of both. pybind11 is not an option: it has no limited API, and the pybind11.h of
// torch 2.11 does not compile with the Stable ABI.

#include <Python.h>

#include <exception>
#include <initializer_list>
#include <string>
#include <utility>

namespace pixnorm {

inline PyObject* to_python(const std::string& text) {
  return PyUnicode_FromStringAndSize(text.data(), static_cast<Py_ssize_t>(text.size()));
}

// A dict of strings; on failure nullptr, with Python's error set.
inline PyObject* to_python(std::initializer_list<std::pair<const char*, std::string>> entries) {
  PyObject* dict = PyDict_New();
  for (const auto& [key, text] : entries) {
    PyObject* value = dict == nullptr ? nullptr : to_python(text);
    const bool failed = value == nullptr || PyDict_SetItemString(dict, key, value) != 0;
    Py_XDECREF(value);
    if (failed) Py_CLEAR(dict);
  }
  return dict;
}

// Calls function() and turns C++ exceptions into Python's RuntimeError.
template <typename F>
PyObject* or_runtime_error(F function) {
  try {
    return function();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

}  // namespace pixnorm
