// api_siblings.hpp: checks, and from sizes and pointers to launches of siblings_kernel.
#include <lorafuse/api_siblings.hpp>

#include "group_launch.hpp"
#include "linear_launch_sm90.cuh"
#include "siblings_sm90.cuh"

namespace lorafuse {
namespace {

using namespace sm90;

// A launch as it is put together: base products, then outputs with their low-rank ones.
template <class T, int BLOCK_N, Major kMajor>
class Product {
 public:
  Product(int64_t M, const Tiling& tiling, uint32_t* workspace) : M_(M), tiling_(tiling) {
    check_tiling(tiling, Plan::Plan::kStageBytes, Plan::bytes(tiling.stages));
    require(tiling.block_m == BLOCK_M, "block_m of ", tiling.block_m, "; dense tiles have ", BLOCK_M, " rows");
    p_.stages = tiling.stages;
    p_.cluster = tiling.cluster;
    p_.workspace = workspace;
  }

  void add_base(int i, const void* a, int64_t stride_a, const void* b, int64_t stride_b, int64_t N, int64_t K) {
    maps_.base[i] = maps(a, stride_a, b, stride_b, N, K);
    p_.k_blocks[i] = blocks_of(K);
  }
  // Output i of the sum of `terms` base products; R 0: without a low-rank product.
  void add_output(int i, int terms, const void* bias, void* y, int64_t stride_y, int64_t N, const void* xa,
                  int64_t stride_xa, const void* b, int64_t stride_b, int64_t R) {
    maps_.y[i] = matrix_map<T>(y, M_, N, stride_y, kWarpgroupRows);
    if (R > 0) maps_.low[i] = maps(xa, stride_xa, b, stride_b, N, R);
    p_.terms = terms;
    p_.rank_blocks[i] = blocks_of(R);
    p_.ends_short[i] = last_rank_steps(R) == 1;
    p_.whole_blocks[i] = p_.rank_blocks[i] - (p_.ends_short[i] ? 1 : 0);
    for (int term = i; term < i + terms; ++term) p_.whole_blocks[i] += p_.k_blocks[term];
    p_.N[i] = static_cast<int>(N);
    p_.bias[i] = bias;
    columns_ += ceil_div<int64_t>(N, BLOCK_N);
    require(columns_ < int64_t{1} << 31, columns_, " columns of tiles are more than 2^31 - 1");
    p_.tiles.ends[i] = static_cast<int>(columns_);
  }
  // A low-rank product of output 0 with a mask of its own.
  void add_masked(const void* xa, int64_t stride_xa, const void* b, int64_t stride_b, int64_t N, int64_t R,
                  const int64_t* seed, uint32_t drop_below) {
    maps_.masked[p_.masks] = maps(xa, stride_xa, b, stride_b, N, R);
    p_.mask_blocks[p_.masks] = blocks_of(R);
    p_.seeds[p_.masks] = seed;
    p_.drop_below[p_.masks++] = drop_below;
  }
  void run(bool overlap_previous, Stream stream) {
    const int cluster = tiling_.cluster;
    const int rows = static_cast<int>(ceil_div<int64_t>(M_, BLOCK_M * cluster));
    require(rows * columns_ < int64_t{1} << 30, rows * columns_, " tiles are more than 2^30");
    p_.tiles.order = {rows, static_cast<int>(columns_), std::max(1, tiling_.group_m / cluster)};
    p_.overlap_previous = overlap_previous;
    LaunchConfig config{clusters_launched(tiling_, rows * columns_) * cluster, kThreads};
    config.shared_bytes = Plan::bytes(tiling_.stages);
    config.cluster = cluster;
    config.overlap_previous = overlap_previous;
    if constexpr (kMajor == Major::MN) {
      if (p_.masks > 0) return launch(siblings_kernel<T, BLOCK_N, kMajor, true>, config, stream, maps_, p_);
    }
    launch(siblings_kernel<T, BLOCK_N, kMajor, false>, config, stream, maps_, p_);
  }

 private:
  using Plan = TicketPlan<BLOCK_M, BLOCK_N>;

  static int blocks_of(int64_t K) { return static_cast<int>(ceil_div<int64_t>(K, BLOCK_K)); }
  ProductMaps maps(const void* a, int64_t stride_a, const void* b, int64_t stride_b, int64_t N, int64_t K) const {
    return {matrix_map<T>(a, M_, K, stride_a, BLOCK_M),
            operand_b_map<T, kMajor, BLOCK_N>(b, N, K, stride_b, tiling_.cluster)};
  }

  int64_t M_, columns_ = 0;
  Tiling tiling_;
  SiblingsMaps maps_{};
  SiblingsArguments p_{};
};

template <Major kMajor, class Launch, class F>
void choose_product(const Launch& p, F&& run) {
  choose_type(p.type, [&]<class T>(T) {
    choose<128, 256>(p.tiling.block_n, "block_n", [&](auto block_n) {
      Product<T, block_n, kMajor> product(p.M, p.tiling, p.workspace);
      run(product);
    });
  });
}

void check_count(int count) {
  require(count >= 1 && count <= kMostSiblings, count, " layers in one launch; there are 1 to ", kMostSiblings);
}

}  // namespace

void siblings_forward(const SiblingsForward& p, void* stream) {
  check_count(p.count);
  check_size("M", p.M);
  check_features("K", p.K);
  check_matrix("x", p.x, p.K, p.stride_x);
  check_address("workspace", p.workspace, 4);
  RoundEach rounded{};
  for (int i = 0; i < p.count; ++i) {
    check_features("N", p.N[i]);
    check_size("R", p.R[i]);
    check_matrix("w", p.w[i], p.K, p.stride_w[i]);
    check_matrix("y", p.y[i], p.N[i], p.stride_y[i]);
    if (p.bias[i] != nullptr) check_address("bias", p.bias[i], 4);
    if (p.R[i] == 0) continue;
    check_matrix("xa", p.xa[i], p.R[i], p.stride_xa[i]);
    check_matrix("b", p.b[i], p.R[i], p.stride_b[i]);
    rounded.each[i] = p.rounded[i];
  }
  if (p.M == 0) return;
  const auto to = static_cast<Stream>(stream);
  const bool overlap = round_each(rounded, p.type, to);
  choose_product<Major::K>(p, [&](auto& product) {
    for (int i = 0; i < p.count; ++i) {
      product.add_base(i, p.x, p.stride_x, p.w[i], p.stride_w[i], p.N[i], p.K);
      product.add_output(i, 1, p.bias[i], p.y[i], p.stride_y[i], p.N[i], p.xa[i], p.stride_xa[i], p.b[i],
                         p.stride_b[i], p.R[i]);
    }
    product.run(overlap, to);
  });
}

void siblings_dx(const SiblingsDx& p, void* stream) {
  check_count(p.count);
  check_size("M", p.M);
  check_features("K", p.K);
  for (int i = 0; i < p.count; ++i) {
    check_features("N", p.N[i]);
    check_matrix("dy", p.dy[i], p.N[i], p.stride_dy[i]);
    check_matrix("w", p.w[i], p.K, p.stride_w[i]);
  }
  check_matrix("dx", p.dx, p.K, p.stride_dx);
  check_address("workspace", p.workspace, 4);
  require(p.lows >= 0 && p.lows <= p.count, p.lows, " low-rank products of ", p.count, " layers");
  RoundEach rounded{};
  // that without a mask
  int plain = -1;
  for (int j = 0; j < p.lows; ++j) {
    check_size("R", p.R[j]);
    require(p.R[j] >= 1, "R of ", p.R[j], " is not a rank");
    check_matrix("dyb", p.dyb[j], p.R[j], p.stride_dyb[j]);
    check_matrix("a", p.a[j], p.K, p.stride_a[j]);
    rounded.each[j] = p.rounded[j];
    if (p.seed[j] != nullptr) continue;
    require(plain < 0, "low-rank products ", plain, " and ", j, " have no mask; they are one");
    plain = j;
  }
  if (p.M == 0) return;
  const auto to = static_cast<Stream>(stream);
  const bool overlap = round_each(rounded, p.type, to);
  choose_product<Major::MN>(p, [&](auto& product) {
    for (int i = 0; i < p.count; ++i) {
      product.add_base(i, p.dy[i], p.stride_dy[i], p.w[i], p.stride_w[i], p.K, p.N[i]);
    }
    for (int j = 0; j < p.lows; ++j) {
      if (j == plain) continue;
      product.add_masked(p.dyb[j], p.stride_dyb[j], p.a[j], p.stride_a[j], p.K, p.R[j], p.seed[j], p.drop_below[j]);
    }
    const int j = std::max(plain, 0);
    product.add_output(0, p.count, nullptr, p.dx, p.stride_dx, p.K, p.dyb[j], p.stride_dyb[j], p.a[j], p.stride_a[j],
                       plain < 0 ? 0 : p.R[j]);
    product.run(overlap, to);
  });
}

}  // namespace lorafuse
