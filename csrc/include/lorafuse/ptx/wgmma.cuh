// The matrix product of a warpgroup (sm_90a): d[64, N] (+)= a[64, 16] b[16, N], operands in shared memory.
//
// Descriptors are those of layout.cuh. Thread t of the warpgroup holds of d the elements of fragment_row and
// fragment_column (layout.cuh). The registers of d must not be touched between the product and the wait.
#pragma once

#include <lorafuse/ptx/barrier.cuh>

namespace lorafuse::ptx {

// Before the first product after d's registers were written by ordinary code.
LF_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
LF_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most kPending committed groups are not complete.
template <int kPending>
LF_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// How an operand lies in shared memory: its reduction index contiguous (K), or that of its rows or columns in d (MN).
enum class Major { K, MN };

// Adds to d when `accumulate` is not 0, overwrites it otherwise. With a in MN there are N of 128 and 256 alone.
template <class T, int N, Major kMajorB, Major kMajorA = Major::K>
LF_DEVICE void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate);

#define LF_D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define LF_WGMMA(TYPE, NAME, N, MAJOR, TRANSPOSED, MAJOR_A, TRANSPOSED_A, REGISTERS, A, B, PREDICATE, ...)                                        \
  template <>                                                                                                         \
  LF_DEVICE void wgmma<TYPE, N, MAJOR, MAJOR_A>(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {          \
    asm volatile("{.reg .pred p;\n setp.ne.b32 p, " PREDICATE ", 0;\n wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME   \
                 " {" REGISTERS "}, " A ", " B ", p, 1, 1, " TRANSPOSED_A ", " TRANSPOSED ";}"                            \
                 : __VA_ARGS__                                                                                        \
                 : "l"(a), "l"(b), "r"(accumulate));                                                                  \
  }
#define LF_REGISTERS_16 \
  "%0, %1, %2, %3, %4, %5, %6, %7"
#define LF_WGMMA_16(TYPE, NAME, MAJOR, TRANSPOSED, MAJOR_A, TRANSPOSED_A) \
  LF_WGMMA(TYPE, NAME, 16, MAJOR, TRANSPOSED, MAJOR_A, TRANSPOSED_A, LF_REGISTERS_16, "%8", "%9", "%10", \
           LF_D8(0))
#define LF_REGISTERS_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define LF_WGMMA_32(TYPE, NAME, MAJOR, TRANSPOSED, MAJOR_A, TRANSPOSED_A) \
  LF_WGMMA(TYPE, NAME, 32, MAJOR, TRANSPOSED, MAJOR_A, TRANSPOSED_A, LF_REGISTERS_32, "%16", "%17", "%18", \
           LF_D8(0), LF_D8(8))
#define LF_REGISTERS_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LF_WGMMA_64(TYPE, NAME, MAJOR, TRANSPOSED, MAJOR_A, TRANSPOSED_A) \
  LF_WGMMA(TYPE, NAME, 64, MAJOR, TRANSPOSED, MAJOR_A, TRANSPOSED_A, LF_REGISTERS_64, "%32", "%33", "%34", \
           LF_D8(0), LF_D8(8), LF_D8(16), LF_D8(24))
#define LF_REGISTERS_128 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LF_WGMMA_128(TYPE, NAME, MAJOR, TRANSPOSED, MAJOR_A, TRANSPOSED_A) \
  LF_WGMMA(TYPE, NAME, 128, MAJOR, TRANSPOSED, MAJOR_A, TRANSPOSED_A, LF_REGISTERS_128, "%64", "%65", "%66", \
           LF_D8(0), LF_D8(8), LF_D8(16), LF_D8(24), LF_D8(32), LF_D8(40), LF_D8(48), LF_D8(56))
#define LF_REGISTERS_256 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define LF_WGMMA_256(TYPE, NAME, MAJOR, TRANSPOSED, MAJOR_A, TRANSPOSED_A) \
  LF_WGMMA(TYPE, NAME, 256, MAJOR, TRANSPOSED, MAJOR_A, TRANSPOSED_A, LF_REGISTERS_256, "%128", "%129", "%130", \
           LF_D8(0), LF_D8(8), LF_D8(16), LF_D8(24), LF_D8(32), LF_D8(40), LF_D8(48), LF_D8(56), LF_D8(64), LF_D8(72), LF_D8(80), LF_D8(88), LF_D8(96), LF_D8(104), LF_D8(112), LF_D8(120))
#define LF_WGMMA_ALL(N)                                            \
  LF_WGMMA_##N(BF16, "bf16", Major::K, "0", Major::K, "0")        \
  LF_WGMMA_##N(BF16, "bf16", Major::MN, "1", Major::K, "0")       \
  LF_WGMMA_##N(FP16, "f16", Major::K, "0", Major::K, "0")         \
  LF_WGMMA_##N(FP16, "f16", Major::MN, "1", Major::K, "0")
#define LF_WGMMA_BOTH_MN(N)                                        \
  LF_WGMMA_##N(BF16, "bf16", Major::MN, "1", Major::MN, "1")      \
  LF_WGMMA_##N(FP16, "f16", Major::MN, "1", Major::MN, "1")
LF_WGMMA_ALL(16)
LF_WGMMA_ALL(32)
LF_WGMMA_ALL(64)
LF_WGMMA_ALL(128)
LF_WGMMA_ALL(256)
LF_WGMMA_BOTH_MN(128)
LF_WGMMA_BOTH_MN(256)
#undef LF_WGMMA_BOTH_MN
#undef LF_WGMMA_ALL
#undef LF_WGMMA
#undef LF_D8
#undef LF_WGMMA_16
#undef LF_REGISTERS_16
#undef LF_WGMMA_32
#undef LF_REGISTERS_32
#undef LF_WGMMA_64
#undef LF_REGISTERS_64
#undef LF_WGMMA_128
#undef LF_REGISTERS_128
#undef LF_WGMMA_256
#undef LF_REGISTERS_256

}  // namespace lorafuse::ptx
