// Threads of the OpenMP runtime that torch runs on. Its entry points are declared, not linked: they resolve in the
// runtime that torch has loaded, since a second one would have threads of its own, which spin against torch's. Nothing
// is compiled with -fopenmp, so that any compiler's module runs on any of GNU's, LLVM's and Intel's runtimes.

#pragma once

#include <cstdint>

extern "C" {
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);
int omp_get_thread_num();
int omp_get_num_threads();
}

namespace lorafuse {

// body(part) for every part below `parts`, part i by thread i modulo their number; at once where one thread does it
template <class Body>
void parallel(int threads, int64_t parts, const Body& body) {
  if (threads < 2 || parts < 2) {
    for (int64_t part = 0; part < parts; ++part) body(part);
    return;
  }
  struct Job {
    const Body& body;
    int64_t parts;
  } job{body, parts};
  GOMP_parallel(
      [](void* data) {
        const Job& mine = *static_cast<const Job*>(data);
        for (int64_t part = omp_get_thread_num(); part < mine.parts; part += omp_get_num_threads()) mine.body(part);
      },
      &job, unsigned(threads < parts ? threads : parts), 0);
}

}  // namespace lorafuse
