// A part of bindings.cpp: launches that are recorded when they are made, and made again with other addresses.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <lorafuse/api_device.hpp>
#include <stdexcept>
#include <type_traits>
#include <vector>

namespace lorafuse {

namespace py = pybind11;

// Where a launch goes: the stream, and the index of its device; -1: the one that is current.
struct Place {
  void* stream = nullptr;
  int device = -1;
};

// The device of a launch is current as long as this lives.
class Current {
 public:
  explicit Current(int device) : former_(device < 0 ? -1 : swap_device(device)), device_(device) {}
  ~Current() {
    // it was current a moment ago
    if (former_ != -1 && former_ != device_) swap_device(former_);
  }
  Current(const Current&) = delete;

 private:
  int former_, device_;
};

// Launches in order: what each is given, and which of that are pointers, but for null. They are recorded by the thread
// that starts to, in which they run too; once all pointers have places, any number of threads may run them again.
class Launches {
 public:
  Launches() = default;
  Launches(const Launches&) = delete;
  ~Launches() { stop(); }

  void start();
  void stop();

  // Of the launch whose arguments are read now; what was read before, and launched nothing, is forgotten first.
  void add_pointer(void* place) { pending_.push_back(static_cast<std::byte*>(place)); }
  void forget_pointers() { pending_.clear(); }
  template <class P>
  void add_launch(const P& p, void (*function)(const void* p, void* stream)) {
    static_assert(std::is_trivially_copyable_v<P> && alignof(P) <= alignof(std::max_align_t));
    const auto* begin = reinterpret_cast<const std::byte*>(&p);
    Launch one{function, std::vector<std::byte>(begin, begin + sizeof p), {}};
    for (std::byte* place : pending_) one.pointers.push_back({static_cast<size_t>(place - begin), kNone, 0});
    pending_.clear();
    largest_ = std::max(largest_, sizeof p);
    launches_.push_back(std::move(one));
  }

  size_t count() const { return launches_.size(); }
  // The pointers of a launch, as it was recorded.
  std::vector<uintptr_t> pointers(size_t launch) const {
    std::vector<uintptr_t> found;
    for (const Pointer& one : launches_.at(launch).pointers) {
      uintptr_t address;
      std::memcpy(&address, launches_[launch].p.data() + one.offset, sizeof address);
      found.push_back(address);
    }
    return found;
  }
  // Pointer number `index` of a launch will be `bytes` after address `slot` of those that `run` gets.
  void place(size_t launch, size_t index, int slot, int64_t bytes) {
    Pointer& one = launches_.at(launch).pointers.at(index);
    one.slot = slot;
    one.bytes = bytes;
  }
  // Makes launches first … last - 1. Raises ValueError for a pointer without a place or an address.
  void run(size_t first, size_t last, const std::vector<uintptr_t>& addresses, uintptr_t stream, int device) const {
    py::gil_scoped_release release;
    const Current current(device);
    std::vector<std::max_align_t> p(largest_ / sizeof(std::max_align_t) + 1);
    for (size_t i = first; i < last; ++i) {
      const Launch& one = launches_.at(i);
      std::memcpy(p.data(), one.p.data(), one.p.size());
      for (const Pointer& pointer : one.pointers) {
        if (pointer.slot < 0 || static_cast<size_t>(pointer.slot) >= addresses.size()) {
          throw std::invalid_argument("a recorded launch has a pointer without an address");
        }
        const uintptr_t address = addresses[static_cast<size_t>(pointer.slot)] + static_cast<uintptr_t>(pointer.bytes);
        std::memcpy(reinterpret_cast<std::byte*>(p.data()) + pointer.offset, &address, sizeof address);
      }
      one.function(p.data(), reinterpret_cast<void*>(stream));
    }
  }

 private:
  static constexpr int kNone = -1;
  struct Pointer {
    size_t offset;  // in p
    int slot;
    int64_t bytes;
  };
  struct Launch {
    void (*function)(const void* p, void* stream);
    std::vector<std::byte> p;
    std::vector<Pointer> pointers;
  };
  std::vector<Launch> launches_;
  std::vector<std::byte*> pending_;
  size_t largest_ = 0;
};

// What this thread records into, if it does.
inline thread_local Launches* recorded = nullptr;

inline void Launches::start() {
  if (recorded != nullptr) throw std::runtime_error("this thread records launches already");
  recorded = this;
}
inline void Launches::stop() {
  if (recorded == this) recorded = nullptr;
}

inline void bind_launches(py::module_& m) {
  // a process can load both modules
  py::class_<Launches>(m, "Launches", py::module_local(),
                       "Launches that are recorded from start to stop, and run again with other addresses.")
      .def(py::init<>())
      .def("start", &Launches::start)
      .def("stop", &Launches::stop)
      .def("__len__", &Launches::count)
      .def("pointers", &Launches::pointers, py::arg("launch"))
      .def("place", &Launches::place, py::arg("launch"), py::arg("index"), py::arg("slot"), py::arg("bytes"))
      .def("run", &Launches::run, py::arg("first"), py::arg("last"), py::arg("addresses"), py::arg("stream"),
           py::arg("device"));
}

}  // namespace lorafuse
