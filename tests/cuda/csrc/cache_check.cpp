// The host side of launches (csrc/include/lorafuse/ptx/launch.cuh, tensor_maps.cuh) on the driver of fake_driver/: what
// is kept of tensor maps and of kernels' limits of shared memory. Prints a line a check, `name: mismatches`; exits 1
// where any is not 0.
#include <cstdio>
#include <thread>
#include <vector>

#include <lorafuse/tensor_maps.cuh>

namespace {

using namespace lorafuse;

int total = 0;

void report(const char* name, int mismatches) {
  std::printf("%s: %d\n", name, mismatches);
  total += mismatches;
}

void kernel_of_one(int) {}
void kernel_of_other(int) {}

bool launches(void (*kernel)(int), int shared_bytes) {
  try {
    launch(kernel, LaunchConfig{1, 32, shared_bytes}, nullptr, 0);
    return true;
  } catch (const std::runtime_error&) {
    return false;
  }
}

// What a test changes of a map, one after the other.
struct Sizes {
  int64_t base = 1 << 12, columns = 256, rows = 40, stride = 512;
  int box_rows = 64, device = 0;
};
const uint8_t* address(const Sizes& s) { return reinterpret_cast<const uint8_t*>(static_cast<uintptr_t>(s.base)); }

template <class T>
int differs(const Sizes& s) {
  set_device(s.device);
  const ptx::TensorMap map = tensor_map<T, 2>(address(s), {s.columns, s.rows}, {s.stride}, {64, s.box_rows});
  const int type = std::is_same_v<T, BF16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const bool same = map.device == s.device && map.type == type && map.base == address(s) && map.sizes[0] == s.columns &&
                    map.sizes[1] == s.rows && map.strides[0] == s.stride && map.box[0] == 64 && map.box[1] == s.box_rows && map.dimensions == 2;
  return !same;
}

void check_maps() {
  std::vector<Sizes> all(7);
  all[1].base += 1 << 12;
  all[2].columns += 64;
  all[3].rows += 1;
  all[4].stride += 16;
  all[5].box_rows = 128;
  all[6].device = 1;
  int bad = 0;
  for (int round = 0; round < 3; ++round) {
    for (const Sizes& s : all) bad += differs<BF16>(s) + differs<FP16>(s);
  }
  report("maps: each is its own", bad);
  report("maps: each is encoded once", fake::encoded != 2 * static_cast<int>(all.size()));
  set_device(0);
  // the third dimension is apart, though its numbers may be those of another map
  const ptx::TensorMap deep = tensor_map<BF16, 3>(address({}), {256, 40, 3}, {512, 512 * 40}, {64, 64, 1});
  report("maps: three dimensions", deep.dimensions != 3 || deep.sizes[2] != 3 || deep.strides[1] != 512 * 40);
}

void check_refused() {
  int bad = 0;
  const int before = fake::encoded;
  for (int round = 0; round < 2; ++round) {
    try {
      (void)tensor_map<BF16, 2>(address({}) + 8, {256, 40}, {512}, {64, 64});
      ++bad;
    } catch (const std::invalid_argument&) {
    }
  }
  report("maps: what TMA cannot read is refused every time", bad + (fake::encoded != before));
}

void check_bound() {
  Cache<int, 2> cache(3);
  int made = 0, bad = 0;
  const auto get = [&](uint64_t key) { return cache.get({key, ~key}, [&] { return ++made, static_cast<int>(key); }); };
  for (uint64_t key = 0; key < 3; ++key) bad += get(key) != static_cast<int>(key);
  for (uint64_t key = 0; key < 3; ++key) bad += get(key) != static_cast<int>(key);
  bad += made != 3;
  // the fourth empties it: all three are made again, and the fourth with them
  bad += get(7) != 7 || made != 4 || get(0) != 0 || made != 5 || get(7) != 7 || made != 5;
  report("cache: bounded", bad);
  try {
    cache.get({9, 9}, []() -> int { throw std::runtime_error("no"); });
    ++bad;
  } catch (const std::runtime_error&) {
  }
  report("cache: an error is not kept", bad + (cache.get({9, 9}, [] { return 4; }) != 4));
}

void check_limits() {
  int bad = 0;
  const auto set = [&](int device, void (*kernel)(int), int bytes, int driver_calls) {
    set_device(device);
    const int before = fake::set_attributes;
    bad += !launches(kernel, bytes) || fake::set_attributes - before != driver_calls;
  };
  set(0, kernel_of_one, 48 * 1024, 0);
  set(0, kernel_of_one, 100 * 1024, 1);
  set(0, kernel_of_one, 100 * 1024, 0);
  set(0, kernel_of_other, 100 * 1024, 1);
  set(1, kernel_of_one, 100 * 1024, 1);
  set(1, kernel_of_one, 100 * 1024, 0);
  // fewer bytes must not lower the limit of those with more
  set(0, kernel_of_one, 200 * 1024, 1);
  set(0, kernel_of_one, 100 * 1024, 0);
  set(0, kernel_of_one, 200 * 1024, 0);
  set(1, kernel_of_one, 200 * 1024, 1);
  report("limits: once for each kernel and device", bad + fake::refused_launches);
  set_device(0);
  const bool refused = !launches(kernel_of_other, fake::kMostShared + 1) && !launches(kernel_of_other, fake::kMostShared + 1);
  report("limits: what the driver refuses is not kept", !refused || !launches(kernel_of_other, fake::kMostShared));
}

void check_threads() {
  std::vector<std::thread> threads;
  std::vector<int> bad(8);
  const int before = fake::refused_launches;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([t, &bad] {
      for (int i = 0; i < 3000; ++i) {
        Sizes s;
        s.base += (1 << 12) * ((i * 7 + t) % 500);
        s.device = (i + t) % 2;
        bad[static_cast<size_t>(t)] += differs<BF16>(s) + !launches(kernel_of_one, (100 + i % 100) * 1024);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  int sum = fake::refused_launches - before;
  for (const int count : bad) sum += count;
  report("threads: two devices, maps and limits", sum);
}

}  // namespace

int main() {
  check_maps();
  check_refused();
  check_bound();
  check_limits();
  check_threads();
  return total == 0 ? 0 : 1;
}
