// What most kernels include, parsed once for all of their files (csrc/build.py).
#pragma once

#include <algorithm>
#include <type_traits>

#include <lorafuse/api.hpp>
#include <lorafuse/layout.cuh>
#include <lorafuse/philox.cuh>
#include <lorafuse/ptx/cluster.cuh>
#include <lorafuse/ptx/convert.cuh>
#include <lorafuse/ptx/memory.cuh>
#include <lorafuse/ptx/mma.cuh>
#include <lorafuse/ptx/wgmma.cuh>
#include <lorafuse/schedule.cuh>
#include <lorafuse/tensor_maps.cuh>
