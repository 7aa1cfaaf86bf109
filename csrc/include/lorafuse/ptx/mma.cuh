// What sm_80 and later have: asynchronous copies of 16 bytes, ldmatrix, and the matrix product of one warp.
#pragma once

#include <lorafuse/ptx/barrier.cuh>

namespace lorafuse::ptx {

// 16 bytes to shared memory, both addresses aligned to 16: the first `bytes` (0 … 16) of them from global memory, zeros
// behind; what is not copied is not read.
LF_DEVICE void copy_async(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}
LF_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most kPending of this thread's groups are not complete; a barrier must follow for other threads to read.
template <int kPending>
LF_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8 and receives of matrix i
// the elements 2 (l % 4) and the next of row l / 4 (of the transposed matrix with `ldmatrix_transposed`).
LF_DEVICE void ldmatrix(uint32_t (&values)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(values[0]), "=r"(values[1]), "=r"(values[2]), "=r"(values[3])
               : "r"(shared_address(row))
               : "memory");
}
LF_DEVICE void ldmatrix_transposed(uint32_t (&values)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(values[0]), "=r"(values[1]), "=r"(values[2]), "=r"(values[3])
               : "r"(shared_address(row))
               : "memory");
}

// d[16, 8] += a[16, 16] b[16, 8] of a warp, fp32 accumulators; fragments as the PTX manual draws them for m16n8k16.
template <class T>
LF_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
#define LF_MMA(TYPE, NAME)                                                                                            \
  template <>                                                                                                         \
  LF_DEVICE void mma<TYPE>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {                         \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                                               \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                               \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                     \
  }
LF_MMA(BF16, "bf16")
LF_MMA(FP16, "f16")
#undef LF_MMA

}  // namespace lorafuse::ptx
