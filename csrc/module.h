#pragma once

// What the extension modules share. They are in Python's limited API as their kernels are in LibTorch's Stable ABI: one
// build serves every version of both. (pybind11 has no limited API, and torch 2.11's refuses to stand beside the Stable
// ABI.)

#include <Python.h>

#include <exception>
#include <initializer_list>
#include <string>
#include <utility>

namespace pixnorm {

inline PyObject* to_python(const std::string& text) {
  return PyUnicode_FromStringAndSize(text.data(), static_cast<Py_ssize_t>(text.size()));
}

// A dict of strings; nullptr, and Python's error is set, where there is no memory.
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

// Calls `function()`; what it throws becomes Python's RuntimeError.
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
