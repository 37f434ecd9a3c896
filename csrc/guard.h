// Compares all that a trace of Python code depends on with what it was (fastnn/graph/guard.py). Only identity is
// compared here, in a few nanoseconds. Where an object is another one, Python compares the values.
#pragma once

#include <Python.h>

namespace fastnn {

// The five tuples of a guard, each of them flat:
//   contents   container, tuple of what it holds (of a dict each key and its value), ...   lists, dicts, classes' dicts
//   items      container, key, value, ...                                                  dicts and classes
//   types      object, its type, the type's order of base classes, its own dict or None, ...
//   empty      dict, ...
//   functions  function, its code, its defaults, its keyword defaults, ...
class Guard {
 public:
  // `absent` stands for the value of a key that is not there, `any` for a value that may change, `some_tensor` for one
  // that may be any object of the classes in the tuple `tensors`.
  Guard(PyObject* absent, PyObject* any, PyObject* some_tensor, PyObject* tensors)
      : absent_(absent), any_(any), some_tensor_(some_tensor), tensors_(tensors) {}

  // True, false, or -1 with an exception set where `tuples` are no such tuples.
  int holds(PyObject* tuples) const {
    if (!PyTuple_Check(tuples) || PyTuple_GET_SIZE(tuples) != 5) return refuse();
    PyObject* parts[5];
    for (Py_ssize_t i = 0; i < 5; ++i) {
      parts[i] = PyTuple_GET_ITEM(tuples, i);
      if (!PyTuple_Check(parts[i]) || PyTuple_GET_SIZE(parts[i]) % kStrides[i] != 0) return refuse();
    }
    return types_hold(parts[2]) && are_empty(parts[3]) && contents_hold(parts[0]) && functions_hold(parts[4])
               ? items_hold(parts[1])
               : false;
  }

 private:
  static constexpr Py_ssize_t kStrides[5] = {2, 3, 4, 1, 4};

  static int refuse() {
    PyErr_SetString(PyExc_TypeError, "expected the tuples of a guard");
    return -1;
  }

  static bool types_hold(PyObject* part) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(part); i += 4) {
      PyObject* const object = PyTuple_GET_ITEM(part, i);
      PyTypeObject* const type = Py_TYPE(object);
      PyObject* const dict = PyTuple_GET_ITEM(part, i + 3);
      if (reinterpret_cast<PyObject*>(type) != PyTuple_GET_ITEM(part, i + 1)) return false;
      if (type->tp_mro != PyTuple_GET_ITEM(part, i + 2)) return false;
      if (dict == Py_None) continue;
      PyObject* const own = PyObject_GenericGetDict(object, nullptr);
      Py_XDECREF(own);  // the object holds it
      if (own != dict) {
        PyErr_Clear();
        return false;
      }
    }
    return true;
  }

  // A class's own dict. A reference that the caller gives back.
  static PyObject* dict_of_class(PyObject* object) {
#if PY_VERSION_HEX >= 0x030C0000
    return PyType_GetDict(reinterpret_cast<PyTypeObject*>(object));
#else
    PyObject* const own = reinterpret_cast<PyTypeObject*>(object)->tp_dict;
    Py_XINCREF(own);
    return own;
#endif
  }

  static bool are_empty(PyObject* part) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(part); ++i) {
      PyObject* const dict = PyTuple_GET_ITEM(part, i);
      if (!PyDict_Check(dict) || PyDict_Size(dict) != 0) return false;
    }
    return true;
  }

  bool contents_hold(PyObject* part) const {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(part); i += 2) {
      if (!holds_these(PyTuple_GET_ITEM(part, i), PyTuple_GET_ITEM(part, i + 1))) return false;
    }
    return true;
  }

  bool holds_these(PyObject* container, PyObject* held) const {
    if (!PyTuple_Check(held)) return false;
    const Py_ssize_t count = PyTuple_GET_SIZE(held);
    if (PyType_Check(container)) {
      PyObject* const own = dict_of_class(container);
      const bool holds = own != nullptr && PyDict_Check(own) && holds_these(own, held);
      Py_XDECREF(own);
      return holds;
    }
    if (PyDict_Check(container)) {
      if (2 * PyDict_Size(container) != count) return false;
      Py_ssize_t place = 0, next = 0;
      for (PyObject *key, *value; next < count && PyDict_Next(container, &place, &key, &value); next += 2) {
        PyObject* const expected = PyTuple_GET_ITEM(held, next + 1);
        if (PyTuple_GET_ITEM(held, next) != key || !is_expected(value, expected)) return false;
      }
      return next == count;
    }
    if (!PyList_Check(container) && !PyTuple_Check(container)) return false;
    if (PySequence_Fast_GET_SIZE(container) != count) return false;
    for (Py_ssize_t i = 0; i < count; ++i) {
      if (!is_expected(PySequence_Fast_GET_ITEM(container, i), PyTuple_GET_ITEM(held, i))) return false;
    }
    return true;
  }

  static bool functions_hold(PyObject* part) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(part); i += 4) {
      PyObject* const function = PyTuple_GET_ITEM(part, i);
      if (!PyFunction_Check(function) || PyFunction_GetCode(function) != PyTuple_GET_ITEM(part, i + 1)) return false;
      const auto is = [&](PyObject* value, PyObject* expected) { return (value ? value : Py_None) == expected; };
      if (!is(PyFunction_GetDefaults(function), PyTuple_GET_ITEM(part, i + 2))) return false;
      if (!is(PyFunction_GetKwDefaults(function), PyTuple_GET_ITEM(part, i + 3))) return false;
    }
    return true;
  }

  int items_hold(PyObject* part) const {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(part); i += 3) {
      PyObject* container = PyTuple_GET_ITEM(part, i);
      PyObject* const expected = PyTuple_GET_ITEM(part, i + 2);
      PyObject* value = nullptr;
      if (PyCell_Check(container)) {
        value = PyCell_GET(container);
      } else {
        PyObject* own = nullptr;  // of a class, its dict
        if (PyType_Check(container)) {
          container = own = dict_of_class(container);
        }
        if (container != nullptr && PyDict_Check(container)) {
          value = PyDict_GetItemWithError(container, PyTuple_GET_ITEM(part, i + 1));
        }
        Py_XDECREF(own);
        if (value == nullptr && PyErr_Occurred()) return -1;
      }
      if (!is_expected(value != nullptr ? value : absent_, expected)) return false;
    }
    return true;
  }

  bool is_expected(PyObject* value, PyObject* expected) const {
    if (value == expected || expected == any_) return true;
    if (expected != some_tensor_ || tensors_ == nullptr || !PyTuple_Check(tensors_)) return false;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tensors_); ++i) {
      if (PyTuple_GET_ITEM(tensors_, i) == reinterpret_cast<PyObject*>(Py_TYPE(value))) return true;
    }
    return false;
  }

  PyObject *absent_, *any_, *some_tensor_, *tensors_;
};

}  // namespace fastnn
