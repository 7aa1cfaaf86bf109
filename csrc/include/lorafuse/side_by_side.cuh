// The tiles of several outputs of the same rows, in one order: arithmetic that a host can run.
#pragma once

#include <lorafuse/api_siblings.hpp>
#include <lorafuse/schedule.cuh>

namespace lorafuse {

// A tile of one output: its row of tiles, and its column among those of the output.
struct OutputTile {
  int output, row, column;
};

// The columns of tiles of all outputs, one output's after the other's, in one order: there is one last wave, and the
// tiles that run at one time share rows of x whatever their outputs. `ends[i]`: the columns up to those of output i.
struct SideBySide {
  TileOrder order;
  int ends[kMostSiblings];

  LF_HOST_DEVICE constexpr OutputTile at(int index) const {
    const Tile tile = order.at(index);
    int output = 0;
    while (tile.column >= ends[output]) ++output;
    return {output, tile.row, tile.column - (output > 0 ? ends[output - 1] : 0)};
  }
};

}  // namespace lorafuse
