// What tests need of the emulator, for Python: settings, statistics and declared memory.
#pragma once

#include <pybind11/pybind11.h>

#include "emu/emulator.hpp"

namespace lorafuse {
namespace emulator_bindings {

namespace py = pybind11;
using Pointer = uintptr_t;

inline void configure(uint64_t seed, int resident, bool checks, int multiprocessors, int shared_memory,
                      bool runs, const std::string& planted) {
  emu::Config config;
  config.seed = seed;
  config.resident = resident;
  config.checks = checks;
  config.multiprocessors = multiprocessors;
  config.shared_memory = shared_memory;
  config.runs = runs;
  config.planted = planted;
  emu::configure(config);
}

inline py::dict statistics() {
  const emu::Statistics& s = emu::statistics();
  py::dict found;
  found["launches"] = s.launches;
  found["steps"] = s.steps;
  found["switches"] = s.switches;
  found["tma_loads"] = s.tma_loads;
  found["tma_stores"] = s.tma_stores;
  found["wgmmas"] = s.wgmmas;
  found["mmas"] = s.mmas;
  found["planted_reached"] = s.planted_reached;
  return found;
}

inline void declare_memory(Pointer begin, size_t bytes, const std::string& name, bool unwritten) {
  emu::declare_memory(reinterpret_cast<void*>(begin), bytes, name, unwritten);
}
inline size_t unwritten_words(Pointer begin, size_t bytes) {
  return emu::unwritten_words(reinterpret_cast<void*>(begin), bytes);
}

inline void bind_emulator(py::module_& m) {
  using py::arg;
  py::register_exception<emu::Error>(m, "EmulationError", PyExc_RuntimeError);
  const emu::Config standard;
  m.def("configure", &configure, "How the next launches run; emulator.hpp says what each setting means.", py::kw_only(),
        arg("seed") = standard.seed, arg("resident") = standard.resident, arg("checks") = standard.checks,
        arg("multiprocessors") = standard.multiprocessors, arg("shared_memory") = standard.shared_memory,
        arg("runs") = standard.runs, arg("planted") = standard.planted);
  m.def("statistics", &statistics, "What the last launch did.");
  m.def("declare_memory", &declare_memory, py::kw_only(), arg("begin"), arg("bytes"), arg("name"),
        arg("unwritten") = false);
  m.def("unwritten_words", &unwritten_words, py::kw_only(), arg("begin"), arg("bytes"));
  m.def("forget_memory", &emu::forget_memory);
}

}  // namespace emulator_bindings

using emulator_bindings::bind_emulator;

}  // namespace lorafuse
