// Host: from a number or a type that is known when a kernel is launched to the constant that it was compiled for.
#pragma once

#include <type_traits>

#include <lorafuse/api.hpp>
#include <lorafuse/common.cuh>

namespace lorafuse {

// Calls f with the number in `options` that equals `value`, as a constant.
template <int... options, class F>
void choose(int value, const char* name, F&& f) {
  const bool found = ((value == options && (f(std::integral_constant<int, options>{}), true)) || ...);
  require(found, name, " of ", value, " has no kernel");
}

// Calls f with a value of the element type of x.
template <class F>
void choose_type(Type type, F&& f) {
  require(type == Type::BF16 || type == Type::FP16, "type ", static_cast<int>(type), " of x is neither BF16 nor FP16");
  if (type == Type::BF16) {
    f(BF16{});
  } else {
    f(FP16{});
  }
}

}  // namespace lorafuse
