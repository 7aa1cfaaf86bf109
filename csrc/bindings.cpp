// The functions of api.hpp for Python: pointers and the stream as integers, 0 for none, everything by keyword. Compiled
// as lorafuse._cuda, which needs no driver until it launches, and as lorafuse._emu, whose pointers are the host's.
//
// std::invalid_argument becomes ValueError, std::runtime_error RuntimeError. Launches release the interpreter's lock.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <tuple>

#include <lorafuse/api.hpp>

#ifdef LORAFUSE_EMULATED
#include "emu/emulator.hpp"
#endif

// JSON, written by build.py
extern const char* const lorafuse_build_info;

namespace {

namespace py = pybind11;
using lorafuse::Tiling;
using lorafuse::Type;
using py::arg;
using Pointer = uintptr_t;
using Release = py::call_guard<py::gil_scoped_release>;
// block_n, stages, cluster, group_m, sms
using TilingValues = std::array<int, 5>;
// in_type, transposed, rows, columns, in, stride_in, scale, out, stride_out; None: no adapter
using RoundValues = std::tuple<int, bool, int64_t, int64_t, Pointer, int64_t, float, Pointer, int64_t>;

template <class T = void>
T* at(Pointer address) {
  return reinterpret_cast<T*>(address);
}
lorafuse::Round round_of(int type, const std::optional<RoundValues>& values) {
  if (!values) return {};
  const auto& [in_type, transposed, rows, columns, in, stride_in, scale, out, stride_out] = *values;
  return {Type{in_type}, Type{type}, transposed, rows, columns, at(in), stride_in, scale, at(out), stride_out};
}
Tiling tiling_of(const TilingValues& t) { return {t[0], t[1], t[2], t[3], t[4]}; }

void linear_forward(int type, int64_t M, int64_t N, int64_t K, int64_t R, Pointer x, int64_t stride_x, Pointer w,
                    int64_t stride_w, Pointer bias, Pointer a, int64_t stride_a, Pointer xa, int64_t stride_xa,
                    Pointer b, int64_t stride_b, Pointer y, int64_t stride_y, Pointer workspace, bool overlap_previous,
                    const TilingValues& tiling, Pointer stream) {
  lorafuse::linear_forward({Type{type}, M, N, K, R, at(x), stride_x, at(w), stride_w, at(bias), at(a), stride_a, at(xa),
                            stride_xa, at(b), stride_b, at(y), stride_y, at<uint32_t>(workspace), overlap_previous,
                            tiling_of(tiling)},
                           at(stream));
}

void linear_dx(int type, int64_t M, int64_t N, int64_t K, int64_t R, Pointer dy, int64_t stride_dy, Pointer w,
               int64_t stride_w, Pointer dyb, int64_t stride_dyb, Pointer a, int64_t stride_a, Pointer dx,
               int64_t stride_dx, Pointer seed, uint32_t drop_below, bool overlap_previous, const TilingValues& tiling,
               int sum_blocks, Pointer x, int64_t stride_x, Pointer da, int da_type, Pointer xa, int64_t stride_xa,
               Pointer db, int db_type, float scale, Pointer stream) {
  lorafuse::linear_dx({Type{type}, M, N, K, R, at(dy), stride_dy, at(w), stride_w, at(dyb), stride_dyb, at(a), stride_a,
                       at(dx), stride_dx, at<int64_t>(seed), drop_below, overlap_previous, tiling_of(tiling),
                       sum_blocks, at(x), stride_x, at(da), Type{da_type}, at(xa), stride_xa, at(db), Type{db_type},
                       scale},
                      at(stream));
}

void grouped_linear(int type, int64_t rows, int64_t groups, int64_t N, int64_t K, int64_t R, bool transposed,
                    Pointer ends, Pointer x, int64_t stride_x, Pointer w, Pointer bias, Pointer xa, int64_t stride_xa,
                    Pointer b, int64_t stride_b, Pointer y, int64_t stride_y, bool overlap_previous,
                    const TilingValues& tiling, Pointer stream) {
  lorafuse::grouped_linear({Type{type}, rows, groups, N, K, R, transposed, at<int64_t>(ends), at(x), stride_x, at(w),
                            at(bias), at(xa), stride_xa, at(b), stride_b, at(y), stride_y, overlap_previous,
                            tiling_of(tiling)},
                           at(stream));
}

void round_adapter(int type, const RoundValues& rounded, Pointer stream) {
  lorafuse::round_adapter(round_of(type, rounded), at(stream));
}

void project_x(int type, int a_type, int64_t M, int64_t K, int64_t R, Pointer x, int64_t stride_x, Pointer a,
               int64_t stride_a, Pointer xa, int64_t stride_xa, Pointer seed, uint32_t drop_below,
               const std::optional<RoundValues>& rounded, Pointer stream) {
  lorafuse::project_x({Type{type}, Type{a_type}, M, K, R, at(x), stride_x, at(a), stride_a, at(xa), stride_xa,
                       at<int64_t>(seed), drop_below, round_of(type, rounded)},
                      at(stream));
}

lorafuse::ReduceDy reduce_dy_of(int type, int b_type, int64_t M, int64_t N, int64_t R, Pointer dy, int64_t stride_dy,
                                Pointer b, int64_t stride_b, Pointer xa, int64_t stride_xa, float scale, Pointer dyb,
                                int64_t stride_dyb, Pointer db, Pointer dbias, Pointer workspace, int sms) {
  return {Type{type}, Type{b_type}, M,         N,     R,       at(dy),     stride_dy, at(b),     stride_b,
          at(xa),     stride_xa,    scale,     at(dyb), stride_dyb, at(db), at(dbias), at(workspace), sms,         {}};
}
int64_t reduce_dy_workspace(int type, int b_type, int64_t M, int64_t N, int64_t R, bool dyb, bool db, bool dbias,
                            int sms) {
  // only whether a result is wanted matters here
  return lorafuse::reduce_dy_workspace(
      reduce_dy_of(type, b_type, M, N, R, 0, N, 0, R, 0, R, 1.0f, dyb, R, db, dbias, 0, sms));
}
void reduce_dy(int type, int b_type, int64_t M, int64_t N, int64_t R, Pointer dy, int64_t stride_dy, Pointer b,
               int64_t stride_b, Pointer xa, int64_t stride_xa, float scale, Pointer dyb, int64_t stride_dyb,
               Pointer db, Pointer dbias, Pointer workspace, int sms, const std::optional<RoundValues>& rounded,
               Pointer stream) {
  lorafuse::ReduceDy p = reduce_dy_of(type, b_type, M, N, R, dy, stride_dy, b, stride_b, xa, stride_xa, scale, dyb,
                                      stride_dyb, db, dbias, workspace, sms);
  p.rounded = round_of(type, rounded);
  lorafuse::reduce_dy(p, at(stream));
}

lorafuse::ReduceX reduce_x_of(int type, int a_type, int64_t M, int64_t K, int64_t R, Pointer x, int64_t stride_x,
                              Pointer dyb, int64_t stride_dyb, Pointer da, Pointer seed, uint32_t drop_below,
                              Pointer workspace, int sms) {
  return {Type{type}, Type{a_type}, M,  K, R, at(x), stride_x, at(dyb), stride_dyb, at(da), at<int64_t>(seed),
          drop_below, at(workspace), sms};
}
int64_t reduce_x_workspace(int type, int a_type, int64_t M, int64_t K, int64_t R, int sms) {
  return lorafuse::reduce_x_workspace(reduce_x_of(type, a_type, M, K, R, 0, K, 0, R, 1, 0, 0, 0, sms));
}
void reduce_x(int type, int a_type, int64_t M, int64_t K, int64_t R, Pointer x, int64_t stride_x, Pointer dyb,
              int64_t stride_dyb, Pointer da, Pointer seed, uint32_t drop_below, Pointer workspace, int sms,
              Pointer stream) {
  lorafuse::reduce_x(reduce_x_of(type, a_type, M, K, R, x, stride_x, dyb, stride_dyb, da, seed, drop_below, workspace,
                                 sms),
                     at(stream));
}

py::object build_info() { return py::module_::import("json").attr("loads")(lorafuse_build_info); }

#ifdef LORAFUSE_EMULATED
void configure(uint64_t seed, int resident, bool checks, int multiprocessors, int shared_memory,
               const std::string& planted) {
  lorafuse::emu::Config config;
  config.seed = seed;
  config.resident = resident;
  config.checks = checks;
  config.multiprocessors = multiprocessors;
  config.shared_memory = shared_memory;
  config.planted = planted;
  lorafuse::emu::configure(config);
}

py::dict statistics() {
  const lorafuse::emu::Statistics& s = lorafuse::emu::statistics();
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

void declare_memory(Pointer begin, size_t bytes, const std::string& name, bool unwritten) {
  lorafuse::emu::declare_memory(at(begin), bytes, name, unwritten);
}
size_t unwritten_words(Pointer begin, size_t bytes) { return lorafuse::emu::unwritten_words(at(begin), bytes); }

void bind_emulator(py::module_& m) {
  py::register_exception<lorafuse::emu::Error>(m, "EmulationError", PyExc_RuntimeError);
  const lorafuse::emu::Config standard;
  m.def("configure", &configure, "How the next launches run; emulator.hpp says what each setting means.", py::kw_only(),
        arg("seed") = standard.seed, arg("resident") = standard.resident, arg("checks") = standard.checks,
        arg("multiprocessors") = standard.multiprocessors, arg("shared_memory") = standard.shared_memory,
        arg("planted") = standard.planted);
  m.def("statistics", &statistics, "What the last launch did.");
  m.def("declare_memory", &declare_memory, py::kw_only(), arg("begin"), arg("bytes"), arg("name"),
        arg("unwritten") = false);
  m.def("unwritten_words", &unwritten_words, py::kw_only(), arg("begin"), arg("bytes"));
  m.def("forget_memory", &lorafuse::emu::forget_memory);
}
#endif

}  // namespace

PYBIND11_MODULE(LORAFUSE_MODULE, m) {
  m.doc() = "The kernels of csrc/include/lorafuse/api.hpp";
  m.def("build_info", &build_info, "{compiler, architectures, sources}: what this module was built with and from.");
  m.def("forward_workspace", &lorafuse::forward_workspace, py::kw_only(), arg("M"));
  m.def("linear_forward", &linear_forward, Release(), py::kw_only(), arg("type"), arg("M"), arg("N"), arg("K"),
        arg("R"), arg("x"), arg("stride_x"), arg("w"), arg("stride_w"), arg("bias") = 0, arg("a") = 0, arg("stride_a") = 0,
        arg("xa") = 0, arg("stride_xa") = 0, arg("b") = 0, arg("stride_b") = 0, arg("y"), arg("stride_y"),
        arg("workspace") = 0, arg("overlap_previous") = false, arg("tiling"), arg("stream") = 0);
  m.def("linear_dx", &linear_dx, Release(), py::kw_only(), arg("type"), arg("M"), arg("N"), arg("K"), arg("R"),
        arg("dy"), arg("stride_dy"), arg("w"), arg("stride_w"), arg("dyb") = 0, arg("stride_dyb") = 0, arg("a") = 0,
        arg("stride_a") = 0, arg("dx"), arg("stride_dx"), arg("seed") = 0, arg("drop_below") = 0,
        arg("overlap_previous") = false, arg("tiling"), arg("sum_blocks") = 0, arg("x") = 0, arg("stride_x") = 0,
        arg("da") = 0, arg("da_type") = 2, arg("xa") = 0, arg("stride_xa") = 0, arg("db") = 0, arg("db_type") = 2,
        arg("scale") = 1.0f, arg("stream") = 0);
  m.def("grouped_linear", &grouped_linear, Release(), py::kw_only(), arg("type"), arg("rows"), arg("groups"), arg("N"),
        arg("K"), arg("R"), arg("transposed") = false, arg("ends"), arg("x"), arg("stride_x"), arg("w"),
        arg("bias") = 0, arg("xa") = 0, arg("stride_xa") = 0, arg("b") = 0, arg("stride_b") = 0, arg("y"),
        arg("stride_y"), arg("overlap_previous") = false, arg("tiling"), arg("stream") = 0);
  m.def("round_adapter", &round_adapter, Release(), py::kw_only(), arg("type"), arg("rounded"), arg("stream") = 0);
  m.def("project_x", &project_x, Release(), py::kw_only(), arg("type"), arg("a_type"), arg("M"), arg("K"), arg("R"),
        arg("x"), arg("stride_x"), arg("a"), arg("stride_a"), arg("xa"), arg("stride_xa"), arg("seed") = 0,
        arg("drop_below") = 0, arg("rounded") = py::none(), arg("stream") = 0);
  m.def("reduce_dy_workspace", &reduce_dy_workspace, py::kw_only(), arg("type"), arg("b_type"), arg("M"), arg("N"),
        arg("R"), arg("dyb"), arg("db"), arg("dbias"), arg("sms") = 0);
  m.def("reduce_dy", &reduce_dy, Release(), py::kw_only(), arg("type"), arg("b_type"), arg("M"), arg("N"), arg("R"),
        arg("dy"), arg("stride_dy"), arg("b") = 0, arg("stride_b") = 0, arg("xa") = 0, arg("stride_xa") = 0,
        arg("scale") = 1.0f, arg("dyb") = 0, arg("stride_dyb") = 0, arg("db") = 0, arg("dbias") = 0, arg("workspace"),
        arg("sms") = 0, arg("rounded") = py::none(), arg("stream") = 0);
  m.def("reduce_x_workspace", &reduce_x_workspace, py::kw_only(), arg("type"), arg("a_type"), arg("M"), arg("K"),
        arg("R"), arg("sms") = 0);
  m.def("reduce_x", &reduce_x, Release(), py::kw_only(), arg("type"), arg("a_type"), arg("M"), arg("K"), arg("R"),
        arg("x"), arg("stride_x"), arg("dyb"), arg("stride_dyb"), arg("da"), arg("seed") = 0, arg("drop_below") = 0,
        arg("workspace"), arg("sms") = 0, arg("stream") = 0);
#ifdef LORAFUSE_EMULATED
  bind_emulator(m);
#endif
}
