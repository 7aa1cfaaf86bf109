// Enumerates csrc/include/lorafuse/schedule.cuh and the arithmetic beside it: every tile once, by the programs that the design says, for all small
// sizes and for a layer on an H200. Prints a line a check, `name: mismatches`; exits 1 where any is not 0.
#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include <lorafuse/divisor.cuh>
#include <lorafuse/philox.cuh>
#include <lorafuse/schedule.cuh>
#include <lorafuse/side_by_side.cuh>

namespace {

using namespace lorafuse;

int total = 0;

void report(const char* name, int mismatches) {
  std::printf("%s: %d\n", name, mismatches);
  total += mismatches;
}

void check_order() {
  int bad = 0, distance = 0;
  for (int rows = 1; rows <= 9; ++rows) {
    for (int columns = 1; columns <= 7; ++columns) {
      for (int group = 1; group <= 10; ++group) {
        const TileOrder order{rows, columns, group};
        std::vector<int> seen(static_cast<size_t>(order.tiles()));
        for (int i = 0; i < order.tiles(); ++i) {
          const auto [row, column] = order.at(i);
          if (row >= 0 && row < rows && column >= 0 && column < columns) {
            ++seen[static_cast<size_t>(row * columns + column)];
          }
          // rows of a group follow each other before the column changes
          const int within = i % (group * columns);
          const int height = std::min(group, rows - i / (group * columns) * group);
          distance += row / group != i / (group * columns) || column != within / height;
        }
        bad += std::count(seen.begin(), seen.end(), 1) != order.tiles();
      }
    }
  }
  int zero = 0;
  for (int rows = 1; rows <= 9; ++rows) {
    for (int columns = 1; columns <= 7; ++columns) {
      const ColumnZeroFirst order{{rows, columns, 4}};
      std::vector<int> seen(static_cast<size_t>(order.order.tiles()));
      for (int i = 0; i < order.order.tiles(); ++i) {
        const auto [row, column] = order.at(i);
        if (row >= 0 && row < rows && column >= 0 && column < columns) {
          ++seen[static_cast<size_t>(row * columns + column)];
        }
        zero += (i < rows) != (column == 0);
      }
      zero += std::count(seen.begin(), seen.end(), 1) != order.order.tiles();
    }
  }
  report("order: every tile once, column 0 first", zero);
  report("order: every tile once", bad);
  report("order: groups of rows, column by column", distance);
}

// Programs that draw numbers in a random order, each until its number is that of no work: `work(number)` is called for
// each of `works`. Returns how many of them are wrong about whether theirs is the last of all.
template <class F>
int wrong_about_the_last(int works, int programs, uint32_t seed, F work) {
  std::vector<bool> ended(static_cast<size_t>(programs));
  int number = 0, wrong = 0;
  for (int left = programs; left > 0;) {
    seed = seed * 1664525u + 1013904223u;
    const auto p = static_cast<size_t>((seed >> 8) % static_cast<uint32_t>(programs));
    if (ended[p]) continue;
    if (number < works) {
      work(number);
    } else {
      ended[p] = true;
      --left;
    }
    wrong += is_last_number(number++, works, programs) != (left == 0);
  }
  return wrong;
}

void check_side_by_side() {
  int once = 0, order = 0, tickets = 0;
  for (int code = 1; code < 256; ++code) {
    // up to four outputs of 1 to 3 columns each
    const int columns[] = {code % 4, code / 4 % 4, code / 16 % 4, code / 64};
    int outputs = 0, ends[kMostSiblings] = {};
    for (; outputs < kMostSiblings && columns[outputs] > 0; ++outputs) {
      ends[outputs] = columns[outputs] + (outputs > 0 ? ends[outputs - 1] : 0);
    }
    if (outputs == 0) continue;
    const int all = ends[outputs - 1];
    for (int rows = 1; rows <= 5; ++rows) {
      for (int group = 1; group <= 3; ++group) {
        const SideBySide tiles{{rows, all, group}, {ends[0], ends[1], ends[2], ends[3]}};
        std::vector<int> seen(static_cast<size_t>(rows * all));
        for (int i = 0; i < tiles.order.tiles(); ++i) {
          const auto [output, row, column] = tiles.at(i);
          if (output < 0 || output >= outputs || row < 0 || row >= rows || column < 0 || column >= columns[output]) {
            ++once;
            continue;
          }
          const int place = column + (output > 0 ? ends[output - 1] : 0);
          ++seen[static_cast<size_t>(row * all + place)];
          const Tile tile = tiles.order.at(i);
          order += tile.row != row || tile.column != place;
        }
        once += std::count(seen.begin(), seen.end(), 1) != rows * all;
        std::vector<int> drawn(static_cast<size_t>(kMostSiblings * rows * all));
        for (const int programs : {1, 3, 8}) {
          const auto seed = static_cast<uint32_t>(code * 100 + rows * 10 + group);
          tickets += wrong_about_the_last(rows * all, programs, seed, [&](int number) {
            const auto [output, row, column] = tiles.at(number);
            const int place = (output * rows + row) * all + column;
            if (output < outputs && column < columns[output]) ++drawn[static_cast<size_t>(place)];
          });
        }
        // by each launch
        tickets += std::count(drawn.begin(), drawn.end(), 3) != rows * all;
      }
    }
  }
  report("side by side tickets: every tile of every output once under any order of arrival, one last number", tickets);
  report("side by side: every tile of every output once", once);
  report("side by side: in the order of one output", order);
}

// A launch whose programs make their steps in a random order, some of them late or never: each holds what it does and
// what it has drawn next, and may end what it does when all that `needs` names of it has ended. Counts works that did not
// run once, and launches that came to a stop.
template <class Needs>
int stopped(int count, int programs, uint32_t seed, Needs needs) {
  std::vector<int> doing(static_cast<size_t>(programs), -1), next(static_cast<size_t>(programs), -1);
  std::vector<int> ended(static_cast<size_t>(count));
  // at least one program runs
  const int running = 1 + static_cast<int>(seed % static_cast<uint32_t>(programs));
  int drawn = 0, bad = 0;
  for (int idle = 0; idle < 40 * programs;) {
    seed = seed * 1664525u + 1013904223u;
    const auto p = static_cast<size_t>((seed >> 8) % static_cast<uint32_t>(running));
    if (doing[p] == -1) {
      doing[p] = drawn++;
    } else if (next[p] == -1 && doing[p] < count) {
      next[p] = drawn++;
    } else if (doing[p] < count && needs(doing[p], ended)) {
      ++ended[static_cast<size_t>(doing[p])];
      doing[p] = next[p];
      next[p] = -1;
    } else {
      ++idle;
      continue;
    }
    idle = 0;
  }
  for (const int times : ended) bad += times != 1;
  return bad;
}

void check_backward() {
  int once = 0, before = 0, arrival = 0;
  for (int rows = 1; rows <= 7; ++rows) {
    for (int columns = 1; columns <= 4; ++columns) {
      for (int group = 1; group <= 4; ++group) {
        for (int chunk = 1; chunk <= rows; ++chunk) {
          for (const int items : {0, 3}) {
            const BackwardOrder order{{rows, columns, group}, chunk, items};
            std::vector<int> tiles(static_cast<size_t>(rows * columns)), of_row(static_cast<size_t>(rows), -1);
            std::vector<int> sums(static_cast<size_t>(order.chunks() * items));
            for (int i = 0; i < order.count(); ++i) {
              const Work work = order.at(i);
              const auto row = static_cast<size_t>(work.row);
              const int last_row = work.kind == Work::kColumns ? order.chunks() : rows;
              const int last_column = work.kind == Work::kTile ? columns : work.kind == Work::kRows ? 1 : items;
              if (work.row < 0 || work.row >= last_row || work.column < 0 || work.column >= last_column) {
                ++once;
                continue;
              }
              if (work.kind == Work::kRows) {
                once += of_row[row] != -1;
                of_row[row] = i;
              } else if (work.kind == Work::kTile) {
                ++tiles[row * static_cast<size_t>(columns) + static_cast<size_t>(work.column)];
                before += of_row[row] == -1;
              } else {
                ++sums[row * static_cast<size_t>(items) + static_cast<size_t>(work.column)];
                for (int r = 0; r < order.height(work.row); ++r) {
                  before += of_row[row * static_cast<size_t>(chunk) + static_cast<size_t>(r)] == -1;
                }
              }
            }
            once += std::count(tiles.begin(), tiles.end(), 1) != static_cast<int>(tiles.size());
            once += std::count(sums.begin(), sums.end(), 1) != static_cast<int>(sums.size());
            once += std::count(of_row.begin(), of_row.end(), -1) != 0;
            if (once != 0) continue;
            const auto needs = [&](int index, const std::vector<int>& ended) {
              const Work work = order.at(index);
              if (work.kind == Work::kRows) return true;
              if (work.kind == Work::kTile) return ended[static_cast<size_t>(of_row[static_cast<size_t>(work.row)])] > 0;
              for (int r = 0; r < order.height(work.row); ++r) {
                const int of = of_row[static_cast<size_t>(work.row * chunk + r)];
                if (!ended[static_cast<size_t>(of)]) return false;
              }
              return true;
            };
            const auto seed = static_cast<uint32_t>(rows * 1000 + columns * 100 + group * 10 + chunk);
            for (const int programs : {1, 3, 8}) arrival += stopped(order.count(), programs, seed, needs);
          }
        }
      }
    }
  }
  for (int rows = 1; rows <= 9; ++rows) {
    for (int columns = 1; columns <= 5; ++columns) {
      const ColumnZeroFirst order{{rows, columns, 4}};
      const auto needs = [&](int index, const std::vector<int>& ended) {
        const Tile tile = order.at(index);
        return tile.column == 0 || ended[static_cast<size_t>(tile.row)] > 0;
      };
      for (const int programs : {1, 3, 8}) {
        arrival += stopped(rows * columns, programs, static_cast<uint32_t>(rows * 10 + columns), needs);
      }
    }
  }
  report("backward: every tile and item once", once);
  report("backward: whatever waits has a later number", before);
  report("tickets: every tile and item once under any order of arrival", arrival);
}

void check_tickets() {
  int once = 0, last = 0;
  for (int rows = 1; rows <= 9; ++rows) {
    for (int columns = 1; columns <= 7; ++columns) {
      for (int programs = 1; programs <= 20; ++programs) {
        const TileOrder order{rows, columns, 4};
        std::vector<int> seen(static_cast<size_t>(order.tiles()));
        const auto seed = static_cast<uint32_t>(rows * 1000 + columns * 100 + programs);
        last += wrong_about_the_last(order.tiles(), programs, seed, [&](int number) {
          const auto [row, column] = order.at(number);
          if (row < rows && column < columns) ++seen[static_cast<size_t>(row * columns + column)];
        });
        once += std::count(seen.begin(), seen.end(), 1) != order.tiles();
      }
    }
  }
  report("tickets: every tile once under any order of arrival", once);
  report("tickets: one last number", last);
}

// Programs that draw the tiles of ragged groups by ticket, in a random order: `tile(tile)` is called for each. Returns how
// many of them see that they have drawn the last ticket, of which there is one a program behind the tiles.
template <class F>
int drawn_last(const std::vector<int>& ends, int columns, int block_m, int programs, uint32_t seed, F tile) {
  std::vector<RaggedWalk> walks(static_cast<size_t>(programs),
                                RaggedWalk(static_cast<int>(ends.size()), columns, block_m));
  std::vector<bool> ended(static_cast<size_t>(programs));
  int last = 0;
  for (int64_t next = 0, left = programs; left > 0;) {
    seed = seed * 1664525u + 1013904223u;
    const auto p = static_cast<size_t>((seed >> 8) % static_cast<uint32_t>(programs));
    if (ended[p]) continue;
    const int64_t ticket = next++;
    RaggedTile one{};
    if (walks[p].seek(ticket, [&](int g) { return ends[static_cast<size_t>(g)]; }, one)) {
      tile(one);
      continue;
    }
    ended[p] = true;
    --left;
    const bool is_last = is_last_number(ticket, walks[p].last, programs);
    last += is_last;
    if (left == 0) last += !is_last;
  }
  return last;
}

void check_ragged() {
  const std::vector<std::vector<int>> cases = {{},           {0},        {5},           {0, 0, 3},       {4, 0, 4, 9},
                                               {1, 1, 1, 1}, {16, 0, 0}, {7, 0, 23, 1}, {0, 12, 0, 5, 0}};
  int bad = 0, forward = 0, tickets = 0;
  constexpr int kBlock = 4;
  for (const auto& sizes : cases) {
    std::vector<int> ends;
    for (const int size : sizes) ends.push_back((ends.empty() ? 0 : ends.back()) + size);
    const int groups = static_cast<int>(sizes.size()), rows = ends.empty() ? 0 : ends.back();
    for (int columns = 1; columns <= 3; ++columns) {
      for (int programs = 1; programs <= 7; ++programs) {
        std::vector<int> seen(static_cast<size_t>(rows * columns)), drawn = seen;
        const auto count = [&](const RaggedTile& tile, std::vector<int>& of) {
          for (int row = tile.row; row < std::min(tile.row + kBlock, tile.row_end); ++row) {
            ++of[static_cast<size_t>(row * columns + tile.column)];
          }
        };
        const auto seed = static_cast<uint32_t>(rows * 100 + columns * 10 + programs);
        tickets += 1 != drawn_last(ends, columns, kBlock, programs, seed, [&](const auto& t) { count(t, drawn); });
        tickets += std::count(drawn.begin(), drawn.end(), 1) != static_cast<int>(drawn.size());
        for (int p = 0; p < programs; ++p) {
          RaggedWalk walk(groups, columns, kBlock);
          RaggedTile tile{};
          int loads = 0;
          const auto load = [&](int g) { return ++loads, ends[static_cast<size_t>(g)]; };
          for (int64_t i = p; walk.seek(i, load, tile); i += programs) {
            const int begin = tile.group == 0 ? 0 : ends[static_cast<size_t>(tile.group - 1)];
            bad += tile.row_end != ends[static_cast<size_t>(tile.group)] || (tile.row - begin) % kBlock != 0;
            bad += tile.row >= tile.row_end || tile.column < 0 || tile.column >= columns;
            count(tile, seen);
          }
          forward += loads != groups;
        }
        bad += std::count(seen.begin(), seen.end(), 1) != static_cast<int>(seen.size());
      }
    }
  }
  report("ragged: every row of every column once", bad);
  report("ragged: each end read once", forward);
  report("ragged tickets: every row of every column once under any order of arrival, one last ticket", tickets);
}

// Random123 1.14.0, tests/kat_vectors, "philox4x32 10", of the counters that have zeros in their high half.
void check_philox() {
  uint32_t words[4] = {};
  philox_4x32(0, 0, words);
  const uint32_t zero[4] = {0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8};
  report("philox: known answer", !std::equal(words, words + 4, zero));
}

void check_division() {
  constexpr int64_t kEnd = int64_t{1} << 31;
  int bad = 0;
  const auto check = [&](int64_t divisor) {
    const Divisor by = Divisor::of(divisor);
    // about every multiple of few, and about those next to 2^31
    for (const int64_t multiple : {int64_t{0}, divisor, 2 * divisor, 3 * divisor, kEnd / 2 / divisor * divisor,
                                   (kEnd / divisor - 1) * divisor, kEnd / divisor * divisor, kEnd - 1}) {
      for (int64_t n = multiple - 2; n <= multiple + 2; ++n) {
        if (n >= 0 && n < kEnd) bad += by.quotient(static_cast<uint32_t>(n)) != n / divisor;
      }
    }
  };
  for (int64_t divisor = 1; divisor <= 20000; ++divisor) check(divisor);
  for (int bit = 14; bit < 31; ++bit) {
    for (int64_t near = -3; near <= 3; ++near) check((int64_t{1} << bit) + near);
  }
  check(kEnd - 1);
  report("division: every quotient", bad);
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 3) {
    // the words of a seed and a counter, for the test that compares them with lorafuse.philox
    uint32_t words[4] = {};
    philox_4x32(std::stoull(arguments[1]), std::stoull(arguments[2]), words);
    std::printf("%u %u %u %u\n", words[0], words[1], words[2], words[3]);
    return 0;
  }
  check_order();
  check_side_by_side();
  check_backward();
  check_tickets();
  check_ragged();
  check_philox();
  check_division();
  return total == 0 ? 0 : 1;
}
