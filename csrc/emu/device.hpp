// What the emulator's wrappers (include/lorafuse/ptx) call. Kernels see this file and nothing else of the emulator.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "swizzle.hpp"

namespace lorafuse::emu {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

Index thread_index();
Index block_index();
Index block_dimensions();
Index grid_dimensions();
uint8_t* dynamic_shared();

extern bool any_planted;
bool is_planted(const char* name);
inline bool planted(const char* name) { return any_planted && is_planted(name); }

// barriers.cpp
uint32_t shared_address(const void* p);
void mbarrier_init(uint64_t* barrier, uint32_t arrivals);
void mbarrier_init_fence();
void mbarrier_arrive(uint64_t* barrier, uint32_t bytes);
void mbarrier_arrive_cluster(uint64_t* barrier, uint32_t rank);
void mbarrier_wait(uint64_t* barrier, uint32_t parity, bool cluster_scope);
void named_barrier_sync(int barrier, int threads);
void block_sync();
void cluster_sync();
uint32_t cluster_rank();

// warp.cpp
void warp_sync();
bool elect_one();
uint64_t shuffle(uint64_t value, uint32_t lane, bool exclusive_or);
void stmatrix(void* row, const uint32_t (&values)[4]);
void ldmatrix(uint32_t (&values)[4], const void* row, bool transposed);
// The element types of the products.
enum class Element { kBF16, kFP16 };
void mma(Element element, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

// global.cpp
void global_read(const void* p, size_t bytes, size_t alignment);
void global_write(void* p, size_t bytes, size_t alignment);
void shared_read(const void* p, size_t bytes, size_t alignment);
void shared_write(void* p, size_t bytes, size_t alignment);
void store_async(uint32_t* word, uint32_t rank, uint32_t value, uint64_t* barrier);
enum class Order { kRelaxed, kRelease, kAcquireRelease };
uint32_t fetch_add(uint32_t* counter, uint32_t value, Order order);
void store_relaxed(uint32_t* counter, uint32_t value);
void wait_at_least(const uint32_t* counter, uint32_t value);
void wait_for_previous_launch();

// copies.cpp
void copy_async(void* shared, const void* global, int bytes);
void copy_async_commit();
void copy_async_wait(int pending);
void copy_async_arrive(uint64_t* barrier);

// tma.cpp
// A tensor map as the emulator keeps it, in the 128 bytes of the driver's.
struct alignas(64) TensorMap {
  static constexpr uint32_t kMagic = 0x6d615454;
  uint32_t magic;
  int32_t dimensions;
  const uint8_t* base;
  int64_t sizes[3];
  int64_t strides[2];
  int32_t box[3];
  Swizzle swizzle;
  uint8_t unused[128 - 16 - 8 * 5 - 4 * 4];
};
void tma_load(void* shared, const TensorMap& map, int x, int y, int z, uint64_t* barrier, uint32_t blocks);
void tma_load(void* shared, const TensorMap& map, int x, int y, int z, uint64_t* barrier);
void tma_store(const TensorMap& map, const void* shared, int x, int y);
void tma_store_commit();
void tma_store_wait(int pending, bool read);
void fence_proxy_async(bool shared_only);

// wgmma.cpp
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending);
// One of the four registers that hold a thread's part of a: a plain word on the device, here a class, which sees every
// access of ordinary code.
class OperandRegister {
 public:
  OperandRegister() = default;
  ~OperandRegister() noexcept(false);
  OperandRegister(const OperandRegister& other) { *this = other; }
  OperandRegister& operator=(const OperandRegister& other) { return *this = static_cast<uint32_t>(other); }
  OperandRegister& operator=(uint32_t bits);
  operator uint32_t() const;
  // By the thread's product of this number, counted from 0.
  uint32_t read_by(uint64_t product);

 private:
  void check_idle(const char* what) const;

  uint32_t bits_ = 0;
  // The thread's fences before the last write, and the products up to the last that reads it.
  uint64_t fences_ = 0, products_ = 0;
  bool written_ = false;
};
void wgmma(Element element, int columns, bool a_is_mn_major, bool b_is_mn_major, float* d, uint64_t a, uint64_t b,
           bool accumulate);
void wgmma(Element element, int columns, bool b_is_mn_major, float* d, OperandRegister (&a)[4], uint64_t b,
           bool accumulate);

// emulator.cpp
void run_launch(int grid, int threads, int shared_bytes, int cluster, bool overlap_previous,
                std::function<void()> kernel);
int multiprocessors();
int shared_memory_limit();

}  // namespace lorafuse::emu
