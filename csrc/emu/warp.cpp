// What the lanes of a warp do together.
#include <cstring>

#include "engine.hpp"
#include "numbers.hpp"

namespace lorafuse::emu {

void rendezvous(const char* operation, void* slot, const std::function<void(const std::array<void*, 32>&)>& complete) {
  maybe_yield();
  Thread& thread = *current;
  Rendezvous& meeting = thread.warp->rendezvous;
  if (meeting.arrived == 0) meeting.operation = operation;
  if (std::strcmp(meeting.operation, operation) != 0) {
    fail("the lanes of a warp have diverged: ", operation, " while others are at ", meeting.operation);
  }
  meeting.slots[thread.lane] = slot;
  meeting.arrived |= 1u << thread.lane;
  const uint64_t generation = meeting.generation;
  if (meeting.arrived == UINT32_MAX) {
    complete(meeting.slots);
    meeting.arrived = 0;
    ++meeting.generation;
    engine->wake(meeting.waiting);
  } else {
    while (meeting.generation == generation) wait_in(meeting.waiting, {Waiting::kWarp, 0, 0, operation});
  }
}

// Of the warp's operations only this one orders memory.
void warp_sync() {
  rendezvous("warp_sync", current, [](const std::array<void*, 32>& lanes) {
    Thread& first = *static_cast<Thread*>(lanes[0]);
    Clock together = first.clock;
    for (void* lane : lanes) together.join(static_cast<Thread*>(lane)->clock);
    together.raise(first.warp->agent, first.warp->time);
    for (void* lane : lanes) static_cast<Thread*>(lane)->clock = together;
    tick(first);
  });
}

bool elect_one() { return current->lane == engine->elected_lane; }

uint64_t shuffle(uint64_t value, uint32_t lane, bool exclusive_or) {
  struct Slot {
    uint64_t value;
    uint32_t from;
    uint64_t result;
  } slot{value, exclusive_or ? current->lane ^ lane : lane & 31, 0};
  if (slot.from > 31) fail("shuffle from lane ", slot.from);
  rendezvous(exclusive_or ? "shuffle_xor" : "shuffle", &slot, [](const std::array<void*, 32>& slots) {
    for (void* lane : slots) {
      Slot& mine = *static_cast<Slot*>(lane);
      mine.result = static_cast<Slot*>(slots[mine.from])->value;
    }
  });
  return slot.result;
}

namespace {

struct MatrixRow {
  Thread* thread;
  uint8_t* row;
  uint32_t values[4];
};

uint8_t* check_row(const void* row, const char* operation) {
  const uint32_t address = shared_address(row);
  const Block& block = *current->block;
  if (address % 16 != 0 || address < block.begin || address + 16 > block.end) {
    fail(operation, " of a row at shared address ", hex(address), ", which is not on a 16-byte boundary or not in ",
         hex(block.begin), " to ", hex(block.end));
  }
  return block.window + address;
}

uint32_t address_in(const Thread& thread, const uint8_t* p) {
  return static_cast<uint32_t>(p - thread.block->window);
}

}  // namespace

void stmatrix(void* row, const uint32_t (&values)[4]) {
  MatrixRow slot{current, check_row(row, "stmatrix"), {values[0], values[1], values[2], values[3]}};
  rendezvous("stmatrix", &slot, [](const std::array<void*, 32>& slots) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      for (int r = 0; r < 8; ++r) {
        const MatrixRow& place = *static_cast<MatrixRow*>(slots[static_cast<size_t>(matrix * 8 + r)]);
        place.thread->block->shadow->write(*place.thread, address_in(*place.thread, place.row), 16,
                                           access_of(*place.thread));
        for (int c = 0; c < 4; ++c) {
          const MatrixRow& holder = *static_cast<MatrixRow*>(slots[static_cast<size_t>(r * 4 + c)]);
          std::memcpy(place.row + 4 * c, &holder.values[matrix], 4);
        }
      }
    }
  });
}

void ldmatrix(uint32_t (&values)[4], const void* row, bool transposed) {
  MatrixRow slot{current, check_row(row, "ldmatrix"), {}};
  const auto complete = [transposed](const std::array<void*, 32>& slots) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t elements[8][8];
      for (int r = 0; r < 8; ++r) {
        const MatrixRow& place = *static_cast<MatrixRow*>(slots[static_cast<size_t>(matrix * 8 + r)]);
        // one of the four lanes that receive the row, in turn
        Thread& reader = *static_cast<MatrixRow*>(slots[static_cast<size_t>(r * 4 + (r + matrix) % 4)])->thread;
        reader.block->shadow->read(reader, address_in(reader, place.row), 16);
        std::memcpy(elements[r], place.row, 16);
      }
      for (int lane = 0; lane < 32; ++lane) {
        const int r = lane / 4, c = lane % 4 * 2;
        const uint32_t low = transposed ? elements[c][r] : elements[r][c];
        const uint32_t high = transposed ? elements[c + 1][r] : elements[r][c + 1];
        static_cast<MatrixRow*>(slots[static_cast<size_t>(lane)])->values[matrix] = high << 16 | low;
      }
    }
  };
  rendezvous(transposed ? "ldmatrix_transposed" : "ldmatrix", &slot, complete);
  std::memcpy(values, slot.values, sizeof(values));
}

// m16n8k16, PTX ISA: lane l holds
//   of a the rows l / 4 (registers 0 and 2) and l / 4 + 8 (1 and 3), columns 2 (l % 4) and the next (0 and 1) and 8 more
//   (2 and 3);
//   of b the rows 2 (l % 4) and the next (b0) and 8 more (b1) of column l / 4;
//   of d the rows l / 4 (0 and 1) and l / 4 + 8 (2 and 3), columns 2 (l % 4) and the next.
void mma(Element element, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Slot {
    Element element;
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } slot{element, d, a, {b0, b1}};
  rendezvous("mma", &slot, [](const std::array<void*, 32>& slots) {
    float a_values[16][16], b_values[16][8];
    const auto slot_of = [&](int lane) -> Slot& { return *static_cast<Slot*>(slots[static_cast<size_t>(lane)]); };
    for (int lane = 0; lane < 32; ++lane) {
      const Slot& mine = slot_of(lane);
      const auto value = [&](uint32_t bits) { return to_float(mine.element, static_cast<uint16_t>(bits)); };
      const int group = lane / 4, pair = lane % 4 * 2;
      for (int i = 0; i < 4; ++i) {
        float* to = &a_values[group + i % 2 * 8][pair + i / 2 * 8];
        to[0] = value(mine.a[i]);
        to[1] = value(mine.a[i] >> 16);
      }
      for (int i = 0; i < 2; ++i) {
        b_values[pair + i * 8][group] = value(mine.b[i]);
        b_values[pair + i * 8 + 1][group] = value(mine.b[i] >> 16);
      }
    }
    float sums[16][8] = {};
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < 16; ++k) {
        for (int column = 0; column < 8; ++column) sums[row][column] += a_values[row][k] * b_values[k][column];
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) slot_of(lane).d[i] += sums[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
    }
    ++mutable_statistics().mmas;
  });
}

}  // namespace lorafuse::emu
