// The functions of api.hpp and of its neighbours for Python: the fields of each struct by keyword, pointers and the
// stream as integers, 0 for none, and the index of the device. Compiled as lorafuse._cuda, which needs no driver until it
// launches, and as lorafuse._emu, whose pointers are the host's.
//
// std::invalid_argument becomes ValueError, std::runtime_error RuntimeError. Launches release the interpreter's lock.
#include <pybind11/pybind11.h>

#include <concepts>
#include <iterator>

#include <lorafuse/api_backward.hpp>
#include <lorafuse/api_decode.hpp>
#include <lorafuse/api_device.hpp>
#include <lorafuse/api_forward.hpp>
#include <lorafuse/api_gated.hpp>
#include <lorafuse/api_gathered.hpp>
#include <lorafuse/api_probes.hpp>
#include <lorafuse/api_reduce.hpp>
#include <lorafuse/api_siblings.hpp>
#include <lorafuse/api_split.hpp>

#include "bindings_launches.hpp"
#ifdef LORAFUSE_EMULATED
#include "bindings_emulator.hpp"
#endif

// JSON, written by build.py
extern const char* const lorafuse_build_info;

namespace {

namespace py = pybind11;
using namespace lorafuse;
using Pointer = uintptr_t;

// A field of a struct: its keyword, whether a call must pass it, and how a Python value is stored in it.
struct Field {
  const char* name;
  bool required;
  void (*store)(void* p, PyObject* value);
};
template <class P>
struct Fields;

template <std::integral T>
void convert(PyObject* value, T& place) {
  const long long number = PyLong_AsLongLong(value);
  place = static_cast<T>(number);
  if (!PyErr_Occurred() && static_cast<long long>(place) != number) {
    PyErr_SetString(PyExc_OverflowError, (std::to_string(number) + " does not fit the field").c_str());
  }
}
void convert(PyObject* value, bool& place) { place = PyObject_IsTrue(value) == 1; }
void convert(PyObject* value, float& place) { place = static_cast<float>(PyFloat_AsDouble(value)); }
template <class T>
  requires std::is_enum_v<T>
void convert(PyObject* value, T& place) {
  place = T{static_cast<int>(PyLong_AsLong(value))};
}
template <class T>
void convert(PyObject* value, T*& place) {
  place = static_cast<T*>(PyLong_AsVoidPtr(value));
  if (recorded != nullptr && place != nullptr) recorded->add_pointer(&place);
}
// The entries of a tuple, `most` of them or fewer.
template <class Store>
void convert_tuple(PyObject* value, Py_ssize_t most, const char* rule, Store&& store) {
  const Py_ssize_t size = PyTuple_Check(value) ? PyTuple_GET_SIZE(value) : -1;
  if (size < 0 || size > most) PyErr_SetString(PyExc_TypeError, rule);
  for (Py_ssize_t i = 0; i < size && !PyErr_Occurred(); ++i) store(PyTuple_GET_ITEM(value, i), i);
}
void convert(PyObject* value, Tiling& place) {
  int* const fields[] = {&place.block_n, &place.stages, &place.cluster, &place.group_m, &place.sms, &place.block_m};
  convert_tuple(value, std::ssize(fields), "a tiling is a tuple of block_n, stages, cluster, group_m, sms and block_m",
                [&](PyObject* one, Py_ssize_t i) { convert(one, *fields[i]); });
}
// A dict of the fields, or None.
void convert(PyObject* value, Round& place);
template <class T>
void convert(PyObject* value, Each<T>& place) {
  convert_tuple(value, std::ssize(place), "layers of one x are a tuple of one entry each, of 4 layers at most",
                [&](PyObject* one, Py_ssize_t i) { convert(one, place[static_cast<size_t>(i)]); });
}

template <class>
struct MemberOf;
template <class P, class T>
struct MemberOf<T P::*> {
  using Struct = P;
};
template <auto kMember>
void store(void* p, PyObject* value) {
  convert(value, static_cast<typename MemberOf<decltype(kMember)>::Struct*>(p)->*kMember);
}

#include "bindings_fields.hpp"

// The fields' names as Python's own strings of them, which the names in a call are too.
template <class P>
PyObject* const* keywords() {
  static PyObject* names[std::size(Fields<P>::fields)];
  if (names[0] == nullptr) {
    for (size_t i = 0; i < std::size(names); ++i) names[i] = PyUnicode_InternFromString(Fields<P>::fields[i].name);
  }
  return names;
}

// The field of a keyword; calls pass them in about the order of the struct, so the search starts behind the last one.
template <class P>
size_t find(PyObject* keyword, size_t from) {
  constexpr size_t kCount = std::size(Fields<P>::fields);
  PyObject* const* names = keywords<P>();
  for (size_t i = 0; i < kCount; ++i) {
    if (const size_t at = (from + i) % kCount; names[at] == keyword) return at;
  }
  for (size_t i = 0; i < kCount; ++i) {
    if (PyUnicode_Compare(names[i], keyword) == 0) return i;
  }
  return kCount;
}

// Fills p. Raises TypeError for a keyword that is no field, a value of another type, and a required field that is missing.
template <class P>
void read(P& p, const py::handle& arguments, Place* launch = nullptr) {
  static PyObject* const stream_name = PyUnicode_InternFromString("stream");
  static PyObject* const device_name = PyUnicode_InternFromString("device");
  constexpr auto& fields = Fields<P>::fields;
  uint64_t found = 0;
  size_t next = 0;
  PyObject *keyword, *value;
  for (Py_ssize_t at = 0; PyDict_Next(arguments.ptr(), &at, &keyword, &value);) {
    if (launch != nullptr && keyword == stream_name) {
      convert(value, launch->stream);
    } else if (launch != nullptr && keyword == device_name) {
      convert(value, launch->device);
    } else {
      const size_t i = find<P>(keyword, next);
      if (i == std::size(fields)) throw py::type_error("unknown keyword " + std::string(py::repr(keyword)));
      fields[i].store(&p, value);
      found |= uint64_t{1} << i;
      next = i + 1;
    }
    if (PyErr_Occurred()) {
      py::raise_from(PyExc_TypeError, ("keyword " + std::string(py::repr(keyword))).c_str());
      throw py::error_already_set();
    }
  }
  static_assert(std::size(fields) <= 64);
  for (size_t i = 0; i < std::size(fields); ++i) {
    if (fields[i].required && !(found >> i & 1)) throw py::type_error(std::string("missing keyword ") + fields[i].name);
  }
}
void convert(PyObject* value, Round& place) {
  if (value == Py_None) return;
  if (!PyDict_Check(value)) {
    PyErr_SetString(PyExc_TypeError, "an adapter to round is a dict of the fields of Round, or None");
    return;
  }
  read(place, value);
}

template <auto kFunction>
struct Bound;
template <class P, void (*kFunction)(const P&, void*)>
struct Bound<kFunction> {
  static void call(const py::kwargs& arguments) {
    P p{};
    Place place;
    if (recorded != nullptr) recorded->forget_pointers();
    read(p, arguments, &place);
    if (recorded != nullptr) recorded->add_launch(p, &launch);
    py::gil_scoped_release release;
    const Current current(place.device);
    kFunction(p, place.stream);
  }
  static void launch(const void* p, void* stream) { kFunction(*static_cast<const P*>(p), stream); }
};
template <class P, int64_t (*kFunction)(const P&)>
struct Bound<kFunction> {
  static int64_t call(const py::kwargs& arguments) {
    P p{};
    read(p, arguments);
    return kFunction(p);
  }
};

py::object build_info() { return py::module_::import("json").attr("loads")(lorafuse_build_info); }

}  // namespace

PYBIND11_MODULE(LORAFUSE_MODULE, m) {
  m.doc() = "The kernels of csrc/include/lorafuse/api.hpp, whose structs say what the keywords are.";
  m.def("build_info", &build_info, "{compiler, architectures, kernels, sources}: what this module was built with, and of.");
  // called, since a module that lacks units can leave a call open but no address
  m.def("xa_in_tiles_workspace", [](int64_t M) { return xa_in_tiles_workspace(M); }, py::kw_only(), py::arg("M"));
  m.def("linear", &Bound<linear>::call);
  m.def(
      "fused_backward_workspace", [](int64_t M, int64_t N, int64_t K) { return fused_backward_workspace(M, N, K); },
      py::kw_only(), py::arg("M"), py::arg("N"), py::arg("K"));
  m.def("fused_backward_partials", &Bound<fused_backward_partials>::call);
  m.def("fused_backward", &Bound<fused_backward>::call);
  m.def("fused_forward_workspace", [](int64_t M) { return fused_forward_workspace(M); }, py::kw_only(), py::arg("M"));
  m.def("fused_forward", &Bound<fused_forward>::call);
  m.def("split_linear", &Bound<split_linear>::call);
  m.def("siblings_forward", &Bound<siblings_forward>::call);
  m.def("siblings_dx", &Bound<siblings_dx>::call);
  m.def("gated_forward_partials", &Bound<gated_forward_partials>::call);
  m.def("gated_forward", &Bound<gated_forward>::call);
  m.def("gated_backward", &Bound<gated_backward>::call);
  m.def("grouped_linear", &Bound<grouped_linear>::call);
  m.def("gathered_linear", &Bound<gathered_linear>::call);
  m.def("ragged_ranks_workspace", &Bound<ragged_ranks_workspace>::call);
  m.def("ragged_ranks", &Bound<ragged_ranks>::call);
  m.def("round_adapter", &Bound<round_adapter>::call);
  m.def("project_x", &Bound<project_x>::call);
  m.def("reduce_dy_workspace", &Bound<reduce_dy_workspace>::call);
  m.def("reduce_dy", &Bound<reduce_dy>::call);
  m.def("reduce_each_workspace", &Bound<reduce_each_workspace>::call);
  m.def("reduce_each", &Bound<reduce_each>::call);
  m.def("reduce_x_workspace", &Bound<reduce_x_workspace>::call);
  m.def("reduce_x", &Bound<reduce_x>::call);
  m.def("decode_codebook", &Bound<decode_codebook>::call);
  m.def("decode_fp8", &Bound<decode_fp8>::call);
  m.def("swap_device", &swap_device, py::arg("device"));
  m.def("probe_columns", &Bound<probe_columns>::call);
  m.def("probe_flags", &Bound<probe_flags>::call);
  bind_launches(m);
#ifdef LORAFUSE_EMULATED
  lorafuse::bind_emulator(m);
#endif
}
