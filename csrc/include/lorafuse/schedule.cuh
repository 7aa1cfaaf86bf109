// In which order tiles are handed out: arithmetic that a host can run and tests enumerate.
//
// A program is a cluster of blocks that lives as long as the launch and draws tiles. Rows of tiles are counted in
// clusters: with two blocks, row 0 is row blocks 0 and 1.
#pragma once

#include <lorafuse/common.cuh>

namespace lorafuse {

struct Tile {
  int row, column;
};

// Rows are walked in groups of `group`, column after column, rows fastest: the tiles that run at one time then share
// few rows of x and few columns of w, and what one of them read is in L2 for the others.
struct TileOrder {
  int rows, columns, group;

  LF_HOST_DEVICE constexpr int tiles() const { return rows * columns; }
  LF_HOST_DEVICE constexpr Tile at(int index) const {
    const int first = index / (group * columns) * group;
    const int height = rows - first < group ? rows - first : group;
    const int within = index % (group * columns);
    return {first + within % height, within / height};
  }
};

// The same tiles, those of column 0 before all others. Where tiles are handed out in this order, one that waits for its
// row's tile of column 0 waits for a block that runs and does not wait itself.
struct ColumnZeroFirst {
  TileOrder order;

  LF_HOST_DEVICE constexpr Tile at(int index) const {
    if (index < order.rows) return {index, 0};
    const Tile tile = TileOrder{order.rows, order.columns - 1, order.group}.at(index - order.rows);
    return {tile.row, tile.column + 1};
  }
};

// Where work is handed out by number, each program draws until its number is that of no work: whether it has drawn the
// last of all.
LF_HOST_DEVICE constexpr bool is_last_number(int64_t number, int64_t works, int programs) {
  return number + 1 == works + programs;
}

// What a backward launch hands out, by number: rows of dyb, tiles of dx, and columns of da and db over a chunk of rows.
struct Work {
  enum Kind { kRows, kTile, kColumns } kind;
  int row, column;  // a row block, of kTile a tile; of kColumns a chunk, and which of its items
};

// Rows in chunks of `chunk` row blocks, one after the other. Of a chunk the tiles, in groups of rows, before those of a
// group its rows of dyb; then its `items` columns, whose sums read those. So whatever waits has a later number than what
// it waits for, and a row of dyb, which takes a third of a tile's time, comes a tile's time before it is read.
struct BackwardOrder {
  TileOrder tiles;
  int chunk, items;

  LF_HOST_DEVICE constexpr int chunks() const { return ceil_div(tiles.rows, chunk); }
  LF_HOST_DEVICE constexpr int count() const { return tiles.rows * (tiles.columns + 1) + chunks() * items; }
  // Row blocks of chunk c.
  LF_HOST_DEVICE constexpr int height(int c) const {
    return tiles.rows - c * chunk < chunk ? tiles.rows - c * chunk : chunk;
  }
  LF_HOST_DEVICE constexpr Work at(int index) const {
    const int columns = tiles.columns + 1, of_chunk = chunk * columns + items;
    const int c = index / of_chunk, within = index % of_chunk, rows = height(c);
    if (within >= rows * columns) return {Work::kColumns, c, within - rows * columns};
    // dyb as a column of tiles before the others
    const Tile tile = TileOrder{rows, columns, tiles.group}.at(within);
    if (tile.column == 0) return {Work::kRows, c * chunk + tile.row, 0};
    return {Work::kTile, c * chunk + tile.row, tile.column - 1};
  }
};

struct RaggedTile {
  int group;
  int row, row_end;  // first row, and the end of its group's rows
  int column;        // in tiles
};

// Walks the tiles of ragged groups (group after group, in a group column after column, row blocks fastest), whose ends
// are only known on the device. A walk goes forward only: it keeps where it is and reads each end once.
struct RaggedWalk {
  int groups, columns, block_m;
  int group = -1;
  int begin = 0, end = 0;       // rows of `group`
  int64_t first = 0, last = 0;  // its tiles

  LF_HOST_DEVICE constexpr RaggedWalk(int groups, int columns, int block_m)
      : groups(groups), columns(columns), block_m(block_m) {}

  // Moves to tile `index`, whose number is not below those asked for before. False when there are no more.
  // `load(g)` is the end of group g.
  template <class Load>
  LF_HOST_DEVICE constexpr bool seek(int64_t index, Load load, RaggedTile& tile) {
    while (index >= last) {
      if (++group >= groups) return false;
      begin = end;
      end = load(group);
      first = last;
      last += static_cast<int64_t>(end > begin ? ceil_div(end - begin, block_m) : 0) * columns;
    }
    const int row_blocks = ceil_div(end - begin, block_m);
    const int within = static_cast<int>(index - first);
    tile = {group, begin + within % row_blocks * block_m, end, within / row_blocks};
    return true;
  }
};

}  // namespace lorafuse
