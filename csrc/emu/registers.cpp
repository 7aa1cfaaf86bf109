// The registers of a, where a product reads it from them, and such a product.
#include <exception>

#include "engine.hpp"

namespace lorafuse::emu {

void wgmma(Element element, int columns, bool b_is_mn_major, float* d, OperandRegister (&a)[4], uint64_t b,
           bool accumulate) {
  maybe_yield();
  uint32_t registers[4];
  for (int i = 0; i < 4; ++i) registers[i] = a[i].read_by(current->wgmma.issued);
  issue_product(element, columns, false, b_is_mn_major, d, 0, registers, b, accumulate);
}

// A compiler may give it to another variable.
OperandRegister::~OperandRegister() noexcept(false) {
  if (std::uncaught_exceptions() == 0) check_idle("left");
}

OperandRegister& OperandRegister::operator=(uint32_t bits) {
  check_idle("written");
  bits_ = bits;
  fences_ = current->wgmma.fences;
  written_ = true;
  return *this;
}

OperandRegister::operator uint32_t() const {
  check_idle("read");
  if (checks() && !written_) fail("a register of a is read, which nobody has written");
  return bits_;
}

uint32_t OperandRegister::read_by(uint64_t product) {
  if (checks() && !written_) fail("wgmma reads a register of a, which nobody has written");
  if (checks() && fences_ == current->wgmma.fences) {
    fail("wgmma without a wgmma_fence since a register of a was written");
  }
  products_ = product + 1;
  return bits_;
}

void OperandRegister::check_idle(const char* what) const {
  if (checks() && products_ > current->wgmma.retired) {
    fail("a register of a was ", what, " while a wgmma that reads it has not been waited for");
  }
}

}  // namespace lorafuse::emu
