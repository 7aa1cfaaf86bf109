# ruff: noqa: E501  (a table of source lines)
"""Bugs of the CUDA kernels, which the emulator must report or show in a result: a table, and how they enter a build.

The kernels hold no trace of it. `weave` writes a copy of csrc/kernels that has every row's text twice, as it is and as
the bug has it, behind a name that `_emu.configure(planted=...)` switches on: one build of the emulator runs the kernels
and every bug (`tests/native_build.py`).
"""

import re
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

__all__ = ["BUGS", "names", "weave"]


class Bug(NamedTuple):
    """`text`: statements, or one expression, that `file` of csrc/kernels holds once, apart from whitespace; `instead`:
    what the bug has there. Rows of one name are one bug, rows of one text are alternatives. `seen_by`: the launch that
    shows it, of test_emu_planted.py or test_emu_skinny.py.
    """

    name: str
    file: str
    seen_by: str
    text: str
    instead: str


_PIPELINE, _EPILOGUE = "pipeline_sm90.cuh", "epilogue_sm90.cuh"
_LINEAR, _SUMS = "linear_sm90.cuh", "adapter_grads_sm90.cuh"
_TILES, _TICKETS, _BACKWARD = "xa_tiles_sm90.cuh", "tickets_sm90.cuh", "one_launch_sm90.cuh"
_ITEMS = "xa_items_sm90.cuh"
_SPLIT, _SIBLINGS, _GATHERED = "split_sm90.cuh", "siblings_sm90.cuh", "gathered_sm90.cuh"
_GROUPED, _SKINNY, _PROJECT, _REDUCE = "grouped_sm90.cuh", "skinny_sm80.cuh", "project_sm80.cuh", "reduce_sm80.cuh"
_REDUCE_EACH = "reduce_each_sm80.cu"
_DECODE, _GATED, _ACTIVATED = "decode_sm80.cuh", "gated_sm90.cuh", "gated_epilogue_sm90.cuh"
_NESTED = (
    "ptx::multiply_rounded(nested, ptx::load_global(p.nested_absmax + block / 256)) + ptx::load_global(p.nested_offset)"
)
_CONSUMED = "ptx::wgmma_wait<0>(); pipeline.release_previous(lane);"
_STORED = "ptx::fence_proxy_async_shared(); consumer_sync(consumer);"
_FLAG = "ptx::wait_at_least(flag, kPublishers); ptx::fence_proxy_async();"
_MULTIPLY = "multiply<T, N, kMajorB, kSteps>(d, pipeline.a() + part.row * kBoxRowBytes, pipeline.b() + part.column * kBoxRowBytes, {});"
_STARTED = "ptx::warp_sync(); ptx::cluster_sync(); return ptx::shuffle(static_cast<int>(threadIdx.x) / 32, 0);"
_DRAWN = "static_cast<int>(ptx::fetch_add_relaxed(p.workspace, 1))"
_TAKEN = "ptx::warp_sync(); if (lane == 0) ptx::mbarrier_arrive_cluster(empty(), 0);"
_OVERLAPS = "if (overlaps) { ptx::wait_for_previous_launch(); ptx::fence_proxy_async(); }"
_GROUP_B = "load_group_b<kMajorB>(pipeline, map_b, block * BLOCK_K, tile.column * BLOCK_N, {});"
_RANKS = "ragged_ranks_sm80.cuh"
_NARROW = "S::Narrow::copy(stage + S::Wide::kBytes, static_cast<const T*>(of.right), of.stride_right, begin + step * S::BLOCK_M, {}, rank, of.R);"
_ADD_RANKS = "add_parts<S::kParts, S::BLOCK_M, RANKS>(sums, wide, part, part_row);"
_ADD_PARTS = "add_parts<S::kParts, BLOCK_M, RANKS>(sums, left, part, part_row);"
_GATE_STORED = "store_boxes(gate, boxes, kBoxes, row, column);"
_BOTH_STORED = (
    "ptx::fence_proxy_async_shared(); consumer_sync(consumer); if (thread == 0) { if (keep_up) store_boxes(up, ups, kBoxes, row, column); "
    f"{_GATE_STORED} // h will lie where up does, which has been read then\n ptx::tma_store_wait_read<1>(); }}"
)
_H_STORED = (
    "consumer_sync(consumer); activate_boxes<T>(activation, boxes, ups, kBoxes * kBoxBytes, thread); "
    "ptx::fence_proxy_async_shared(); consumer_sync(consumer); if (thread == 0) store_boxes(h, ups, kBoxes, row, column);"
)
_GRADIENTS = (
    "ptx::fence_proxy_async_shared(); // what was stored before has been read, and its stage is free\n "
    "if (thread == 0) ptx::tma_store_wait_read<0>(); consumer_sync(consumer); if (n > 0) pipeline.release_previous(lane);"
)
_LAST_GRADIENTS = (
    "if (thread == 0) ptx::tma_store_wait_read<0>(); consumer_sync(consumer); pipeline.release_previous(lane);"
)
_LOAD_GATES = "load_blocks(BLOCK_N / kBoxElements, 2 * Plan::kTileABytes, load_gates, [](int) {});"
_MASKED = (
    "finish_blocks(pipeline, lane); "
    "drop<kBoxElements>(low, p.seeds[mask], p.drop_below[mask], row, column + n, p.N[0], thread);"
)
_MASKED_DH = "finish_blocks(pipeline, lane); drop<BLOCK_N>(d, p.seed, p.drop_below, row, column, p.N, thread);"
_FIRST, _LAST = "p.shares.owner(j * p.row_blocks)", "p.shares.owner(last)"

# fmt: off
BUGS = tuple(Bug(*row) for row in (
    # the ring of stages
    ("unaligned_shared", _PIPELINE, "two_kernel", "-ptx::shared_address(shared) % 1024", "0"),
    ("stages_overlap", _PIPELINE, "two_kernel", "base + stage * Plan::kStageBytes", "base + (stage == stages - 1 ? 0 : stage) * Plan::kStageBytes"),
    ("empty_count", _PIPELINE, "two_kernel", "8 * cluster", "4 * cluster"),
    ("no_init_fence", _PIPELINE, "two_kernel", "ptx::mbarrier_init_fence();", ""),
    ("parity_stuck", _PIPELINE, "two_kernel", "parity ^= 1;", ""),
    ("no_empty_wait", _PIPELINE, "two_kernel", "ptx::mbarrier_wait_cluster(empty(), parity ^ 1);", ""),
    ("short_expect", _PIPELINE, "two_kernel", "ptx::mbarrier_arrive_expect(full(), bytes);", "ptx::mbarrier_arrive_expect(full(), bytes - 1024);"),
    ("no_full_wait", _PIPELINE, "two_kernel", "ptx::mbarrier_wait(pipeline.full(), pipeline.parity);", ""),
    ("no_wgmma_fence", _PIPELINE, "two_kernel", "ptx::wgmma_fence();", ""),
    ("no_commit", _PIPELINE, "two_kernel", "ptx::wgmma_commit();", ""),
    ("early_release", _PIPELINE, "two_kernel", "ptx::wgmma_wait<1>(); if (in_flight) pipeline.release_previous(lane); pipeline.advance();", "pipeline.advance(); pipeline.release_previous(lane);"),
    ("early_release", _PIPELINE, "two_kernel", _CONSUMED, "ptx::wgmma_wait<0>();"),
    ("no_final_wait", _PIPELINE, "two_kernel", _CONSUMED, "pipeline.release_previous(lane);"),
    ("stale_accumulator", _PIPELINE, "two_kernel", _MULTIPLY.format("accumulate"), _MULTIPLY.format("true")),
    # the store of a tile
    ("no_wait_read", _EPILOGUE, "two_kernel", "if (thread == 0) ptx::tma_store_wait_read<0>();", ""),
    ("wrong_swizzle", _EPILOGUE, "two_kernel", "box_offset(box_row, n % kBoxElements + lane / 16 * 8)", "box_offset(box_row, n % kBoxElements + lane / 16 * 8) ^ 16"),
    ("no_store_fence", _EPILOGUE, "two_kernel", _STORED, "consumer_sync(consumer);"),
    ("no_store_sync", _EPILOGUE, "two_kernel", _STORED, "ptx::fence_proxy_async_shared();"),
    ("no_store_wait", _LINEAR, "two_kernel", "if (thread == 0) ptx::tma_store_wait<0>();", ""),
    # the linear kernel
    ("no_init_sync", _PIPELINE, "two_kernel", _STARTED, _STARTED.replace("ptx::cluster_sync();", "")),
    ("no_exit_sync", _LINEAR, "two_kernel", "end_block();", ""),
    ("no_launch_wait", _LINEAR, "two_kernel", _OVERLAPS, "if (overlaps) ptx::fence_proxy_async();"),
    # its tiles by ticket, one for both blocks of a cluster
    ("ticket_not_reset", _LINEAR, "two_kernel", "ptx::store_relaxed(p.workspace, 0);", ""),
    ("ticket_reset_early", _LINEAR, "two_kernel", "is_last_number(next, tiles, programs)", "next == tiles"),
    ("ticket_of_every_warp", _LINEAR, "two_kernel", "warp == 0 && ptx::elect_one()", "ptx::elect_one()"),
    ("ticket_of_every_block", _LINEAR, "two_kernel", f"rank == 0 ? {_DRAWN} : 0", _DRAWN),
    ("ticket_read_before_written", _TICKETS, "two_kernel", "ptx::mbarrier_wait(full(), parity);", ""),
    ("ticket_not_expected", _TICKETS, "two_kernel", "ptx::mbarrier_arrive_expect(full(), sizeof(uint32_t));", "ptx::mbarrier_arrive(full());"),
    ("ticket_to_one_block", _TICKETS, "two_kernel", "block < cluster", "block < 1"),
    ("ticket_freed_by_one_block", _TICKETS, "two_kernel, one cluster at a time", "warps * cluster + cluster - 1", "warps + cluster - 1"),
    ("ticket_freed_before_the_other_producer", _TICKETS, "two_kernel, one cluster at a time", "warps * cluster + cluster - 1", "warps * cluster"),
    ("ticket_freed_in_its_own_block", _TICKETS, "two_kernel", _TAKEN, _TAKEN.replace("arrive_cluster(empty(), 0)", "arrive(empty())")),
    ("ticket_freed_before_read", _TICKETS, "xa_in_tiles, one block at a time", _TAKEN, _TAKEN.replace("ptx::warp_sync();", "")),
    ("ticket_over_the_one_before", _TICKETS, "xa_in_tiles, one block at a time", "if (rank == 0) ptx::mbarrier_wait_cluster(empty(), parity ^ 1);", ""),
    # xa in the launch of y: flags
    ("early_flag_read", _ITEMS, "xa_in_tiles", _FLAG, "ptx::fence_proxy_async();"),
    ("half_flag", _ITEMS, "xa_in_tiles", _FLAG, "ptx::wait_at_least(flag, 1); ptx::fence_proxy_async();"),
    ("no_proxy_fence", _ITEMS, "xa_in_tiles", _FLAG, "ptx::wait_at_least(flag, kPublishers);"),
    ("no_flag_reset", _ITEMS, "xa_in_tiles", "before + 1 == static_cast<uint32_t>(p.order.columns)", "false"),
    ("no_publish_sync", _ITEMS, "xa_in_tiles", "consumer_sync(consumer);", ""),
    ("relaxed_flag", _ITEMS, "xa_in_tiles", "ptx::add_release(flag, 1);", "ptx::add_relaxed(flag, 1);"),
    ("flag_never_set", _ITEMS, "xa_in_tiles", "ptx::add_release(flag, 1);", ""),
    # two K-blocks of an item in a stage
    ("item_half_expected", _ITEMS, "fused_forward", "pipeline.acquire(Item::kBytes);", "pipeline.acquire(Item::kBytes / 2);"),
    ("item_blocks_overlap", _ITEMS, "fused_forward", "pipeline.a() + i * Plan::kTileABytes", "pipeline.a()"),
    ("item_a_in_x", _ITEMS, "fused_forward", "pipeline.a() + kBlocks * Plan::kTileABytes + i * kABytes", "pipeline.a() + Plan::kTileABytes + i * kABytes"),
    ("item_same_block_twice", _ITEMS, "fused_forward", "(block + i) * BLOCK_K", "block * BLOCK_K"),
    ("item_second_block_first", _ITEMS, "fused_forward", "block + i > 0", "block > 0"),
    ("item_released_early", _ITEMS, "fused_forward", "end_stage(pipeline, lane, block > 0);", "ptx::wgmma_commit(); pipeline.advance(); pipeline.release_previous(lane);"),
    # xa in the tiles of the first columns, which are handed out by ticket
    ("tile_ticket_no_reset", _TILES, "xa_in_tiles", "ptx::store_relaxed(p.workspace, 0);", ""),
    ("tile_column_last", _TILES, "xa_in_tiles, one block at a time", _DRAWN, f"[&](int ticket) {{ return ticket < tiles ? tiles - 1 - ticket : ticket; }}({_DRAWN})"),
    ("tile_a_not_announced", _TILES, "xa_in_tiles", "pipeline.acquire(Plan::kStageBytes + (tile.column == 0 ? More::kABytes : 0));", "pipeline.acquire(Plan::kStageBytes);"),
    ("tile_a_of_one_stage", _TILES, "xa_in_tiles", "pipeline.base + More::a(p.stages) + pipeline.stage * More::kABytes", "pipeline.base + More::a(p.stages)"),
    ("tile_xa_read_in_flight", _TILES, "xa_in_tiles", "finish_blocks(pipeline, lane); publish_xa<T, kRanks>(xa, p, tile.row, consumer, thread);", "publish_xa<T, kRanks>(xa, p, tile.row, consumer, thread); finish_blocks(pipeline, lane);"),
    ("tile_no_xa_wait", _TILES, "xa_in_tiles", "wait_for_xa(p, tile.row);", ""),
    ("tile_no_store_wait", _TILES, "xa_in_tiles", "if (thread == 0) ptx::tma_store_wait<0>();", ""),
    # K divided by a cluster
    ("split_a_not_awaited", _SPLIT, "split_k", "ptx::mbarrier_init(pipeline.full() + s, 2);", "ptx::mbarrier_init(pipeline.full() + s, 1);"),
    ("split_no_init_sync", _SPLIT, "split_k", "// the barriers are there, and so are the other blocks ptx::warp_sync(); ptx::cluster_sync();", "ptx::warp_sync();"),
    ("split_no_empty_wait", _SPLIT, "split_k", "ptx::mbarrier_wait(pipeline.empty(), pipeline.parity ^ 1);", ""),
    ("split_released_early", _SPLIT, "split_k", "ptx::wgmma_wait<1>();", ""),
    ("split_released_to_rank_0", _SPLIT, "split_k", "ptx::mbarrier_arrive(pipeline.empty() - pipeline.stage + previous);", "ptx::mbarrier_arrive_cluster(pipeline.empty() - pipeline.stage + previous, 0);"),
    ("split_no_proxy_fence", _SPLIT, "split_k", "ptx::fence_proxy_async_shared(); ptx::warp_sync(); if (lane == 0) ptx::mbarrier_arrive(pipeline.full());", "ptx::warp_sync(); if (lane == 0) ptx::mbarrier_arrive(pipeline.full());"),
    ("split_a_published_early", _SPLIT, "split_k", "ptx::fence_proxy_async_shared(); ptx::warp_sync(); if (lane == 0) ptx::mbarrier_arrive(pipeline.full());", "ptx::fence_proxy_async_shared(); if (lane == 0) ptx::mbarrier_arrive(pipeline.full());"),
    ("split_parts_over_the_ring", _SPLIT, "split_k", "// the ring is read by nobody now consumers_sync();", ""),
    ("split_parts_read_early", _SPLIT, "split_k", "// for the parts of all blocks, and until nobody reads this one's; each role on its own, which has its own registers ptx::warp_sync(); ptx::cluster_sync(); ptx::cluster_sync();", "ptx::warp_sync(); ptx::cluster_sync();"),
    ("split_parts_read_early", _SPLIT, "split_k", "// the parts of all blocks are there ptx::warp_sync(); ptx::cluster_sync();", "ptx::warp_sync(); consumers_sync();"),
    ("split_ends_while_read", _SPLIT, "split_k", "// for the parts of all blocks, and until nobody reads this one's; each role on its own, which has its own registers ptx::warp_sync(); ptx::cluster_sync(); ptx::cluster_sync();", "ptx::warp_sync(); ptx::cluster_sync();"),
    ("split_ends_while_read", _SPLIT, "split_k", "// no block ends while others read its parts ptx::warp_sync(); ptx::cluster_sync();", "ptx::warp_sync();"),
    ("split_xa_not_whole", _SPLIT, "split_k", "// xa of these rows is whole consumers_sync();", ""),
    ("split_no_launch_wait", _SPLIT, "split_k", "ptx::wait_for_previous_launch();", ""),
    ("split_own_part_only", _SPLIT, "split_k", "ptx::load_cluster(parts + r * Parts::kPitch + c + j, block)", "ptx::load_cluster(parts + r * Parts::kPitch + c + j, rank)"),
    # layers of one x in one launch: what a tile looks up, and what it waits for
    ("sibling_w_of_the_first", _SIBLINGS, "siblings", "load_blocks(maps.base[term], p.k_blocks[term]);", "load_blocks(maps.base[0], p.k_blocks[term]);"),
    ("sibling_blocks_of_the_first", _SIBLINGS, "siblings", "load_blocks(maps.base[term], p.k_blocks[term]);", "load_blocks(maps.base[term], p.k_blocks[0]);"),
    ("sibling_last_term_left_out", _SIBLINGS, "siblings", "tile.output + p.terms", "tile.output + (p.terms > 1 ? p.terms - 1 : 1)"),
    ("sibling_xa_of_the_first", _SIBLINGS, "siblings", "maps.low[tile.output]", "maps.low[0]"),
    ("sibling_ranks_of_the_first", _SIBLINGS, "siblings", "p.rank_blocks[tile.output]", "p.rank_blocks[0]"),
    ("sibling_consumes_as_the_first", _SIBLINGS, "siblings", "p.whole_blocks[tile.output]", "p.whole_blocks[0]"),
    ("sibling_ends_as_the_first", _SIBLINGS, "siblings", "p.ends_short[tile.output]", "p.ends_short[0]"),
    ("sibling_bias_of_the_first", _SIBLINGS, "siblings", "p.bias[tile.output]", "p.bias[0]"),
    ("sibling_y_of_the_first", _SIBLINGS, "siblings", "&maps.y[tile.output]", "&maps.y[0]"),
    ("sibling_rows_of_its_neighbour", _SIBLINGS, "siblings", "(tile.row * p.cluster + rank) * BLOCK_M", "tile.row * p.cluster * BLOCK_M"),
    ("sibling_no_launch_wait", _SIBLINGS, "siblings", _OVERLAPS, "if (overlaps) ptx::fence_proxy_async();"),
    ("sibling_first_tile_alone_waits", _SIBLINGS, "siblings", _OVERLAPS, _OVERLAPS.replace("overlaps", "index == 0 && overlaps")),
    ("sibling_tickets_not_there", _SIBLINGS, "siblings", "tickets.initialize();", ""),
    ("sibling_tickets_over_the_ring", _SIBLINGS, "siblings", "TicketPlan<BLOCK_M, BLOCK_N>::tickets(p.stages)", "0"),
    ("sibling_ticket_not_reset", _SIBLINGS, "siblings", "ptx::store_relaxed(p.workspace, 0);", ""),
    ("sibling_ticket_reset_early", _SIBLINGS, "siblings", "is_last_number(next, tiles, programs)", "next == tiles"),
    ("sibling_ticket_of_every_warp", _SIBLINGS, "siblings", "warp == 0 && ptx::elect_one()", "ptx::elect_one()"),
    ("sibling_ticket_of_every_block", _SIBLINGS, "siblings", f"rank == 0 ? {_DRAWN} : 0", _DRAWN),
    ("sibling_no_exit_sync", _SIBLINGS, "siblings", "end_block();", ""),
    ("sibling_no_store_wait", _SIBLINGS, "siblings", "if (thread == 0) ptx::tma_store_wait<0>();", ""),
    ("sibling_rounds_the_first", "round_each_sm80.cu", "siblings", "round_chunk<T>(p.each[which], block * kThreads + static_cast<int64_t>(threadIdx.x));", "round_chunk<T>(p.each[0], block * kThreads + static_cast<int64_t>(threadIdx.x));"),
    ("sibling_reduces_dy_of_the_first", _REDUCE_EACH, "siblings", "reduce_block<T, BLOCK_M, BLOCK_N, RANKS>(p.each[layer], block, shared);", "reduce_block<T, BLOCK_M, BLOCK_N, RANKS>(p.each[0], block, shared);"),
    ("sibling_sums_of_the_first", _REDUCE_EACH, "siblings", "sum_block<T>(p.each[layer], block);", "sum_block<T>(p.each[0], block);"),
    ("sibling_block_of_the_grid", _REDUCE_EACH, "siblings", "sum_block<T>(p.each[layer], block);", "sum_block<T>(p.each[layer], blockIdx.x);"),
    ("sibling_partial_sums_overlap", _REDUCE_EACH, "siblings", "workspace = static_cast<uint8_t*>(workspace) + round_up<int64_t>(p.plans[i].bytes(), 16);", ""),
    ("sibling_dyb_over_its_neighbour", _REDUCE, "siblings", "store_result<T>(p.rows_out, m * p.stride_rows_out + r, p.scale * sum, false);", "store_result<T>(p.rows_out, i, p.scale * sum, false);"),
    # and with masks of their own
    ("masked_seed_of_the_first", _SIBLINGS, "siblings with masks", _MASKED, _MASKED.replace("seeds[mask]", "seeds[0]")),
    ("masked_other_columns", _SIBLINGS, "siblings with masks", _MASKED, _MASKED.replace("column + n", "column")),
    ("masked_unfinished", _SIBLINGS, "siblings with masks", _MASKED, _MASKED.replace("finish_blocks(pipeline, lane);", "pipeline.release_previous(lane);")),
    ("masked_over_the_rest", _SIBLINGS, "siblings with masks", "d[n / 2 + i] += low[i];", "d[n / 2 + i] = low[i];"),
    ("masked_a_of_the_first_columns", _SIBLINGS, "siblings with masks", "ptx::tma_load(pipeline.b(), &maps.masked[mask].b, column + n, block * BLOCK_K, pipeline.full());", "ptx::tma_load(pipeline.b(), &maps.masked[mask].b, column, block * BLOCK_K, pipeline.full());"),
    ("masked_no_launch_wait", _SIBLINGS, "siblings with masks", "// dyb is the first operand, and a wait_for_adapters();", ""),
    # gate and up with their activation: what a tile reads and waits for
    ("gated_rounds_the_first", "round_each_sm80.cu", "gated", "round_chunk<T>(p.each[which], block * kThreads + static_cast<int64_t>(threadIdx.x));", "round_chunk<T>(p.each[0], block * kThreads + static_cast<int64_t>(threadIdx.x));"),
    ("gated_w_of_gate", _GATED, "gated", "ptx::tma_load_multicast(place, &maps[half], reduction, column, pipeline.full(), kBoth);", "ptx::tma_load_multicast(place, &maps[0], reduction, column, pipeline.full(), kBoth);"),
    ("gated_ranks_of_gate", _GATED, "gated", "load_halves(pipeline, b, k - first0, k - first1, column, rank);", "load_halves(pipeline, b, k, k, column, rank);"),
    ("gated_no_launch_wait", _GATED, "gated", _OVERLAPS, "if (overlaps) ptx::fence_proxy_async();"),
    ("gated_first_tile_alone_waits", _GATED, "gated", _OVERLAPS, _OVERLAPS.replace("overlaps", "index == 0 && overlaps")),
    ("gated_up_is_gate", _GATED, "gated", "&maps.read[1]", "&maps.read[0]"),
    ("gated_reads_of_the_first", _GATED, "gated", "ptx::tma_load(pipeline.a(), &maps.read[0], column + n, row, pipeline.full());", "ptx::tma_load(pipeline.a(), &maps.read[0], column, row, pipeline.full());"),
    ("gated_bytes_of_one", _GATED, "gated", "pipeline.acquire(2 * Plan::kTileABytes);", "pipeline.acquire(Plan::kTileABytes);"),
    ("gated_bias_of_its_neighbour", _GATED, "gated", "column + fragment_column(thread, i) - half * (N_TILE / 2)", "column + fragment_column(thread, i)"),
    ("gated_rows_of_its_neighbour", _GATED, "gated", "(tile.row * p.cluster + rank) * BLOCK_M", "tile.row * p.cluster * BLOCK_M"),
    ("gated_tickets_not_there", _GATED, "gated", "tickets.initialize();", ""),
    ("gated_tickets_over_the_ring", _GATED, "gated", "TicketPlan<BLOCK_M, BLOCK_N>::tickets(p.stages)", "0"),
    ("gated_ticket_not_reset", _GATED, "gated", "ptx::store_relaxed(p.workspace, 0);", ""),
    ("gated_ticket_reset_early", _GATED, "gated", "is_last_number(next, tiles, programs)", "next == tiles"),
    ("gated_ticket_of_every_warp", _GATED, "gated", "warp == 0 && ptx::elect_one()", "ptx::elect_one()"),
    ("gated_ticket_of_every_block", _GATED, "gated", f"rank == 0 ? {_DRAWN} : 0", _DRAWN),
    ("gated_no_exit_sync", _GATED, "gated", "end_block();", ""),
    ("gated_no_store_wait", _GATED, "gated", "if (thread == 0) ptx::tma_store_wait<0>();", ""),
    ("gated_ha_not_awaited", _GATED, "gated with ha", "ptx::mbarrier_wait(pipeline.full(), pipeline.parity);", ""),
    ("gated_ha_in_flight", _GATED, "gated with ha", "ptx::wgmma_wait<0>();", ""),
    ("gated_ha_stage_not_freed", _GATED, "gated with ha", "pipeline.release_previous(thread % 32);", ""),
    ("gated_ha_bytes_of_a_box", _GATED, "gated with ha", "pipeline.acquire(kColumns / kBoxElements * box_bytes);", "pipeline.acquire(box_bytes);"),
    ("gated_ha_over_the_first_tile", _GATED, "gated with ha", "static_cast<int64_t>(tile.column) * p.M * p.down_ranks", "0"),
    # and with a mask on h
    ("gated_mask_no_launch_wait", _GATED, "gated with a mask", _OVERLAPS, "if (overlaps) ptx::fence_proxy_async();"),
    ("gated_mask_unfinished", _GATED, "gated with a mask", _MASKED_DH, _MASKED_DH.replace("finish_blocks(pipeline, lane);", "pipeline.release_previous(lane);")),
    ("gated_mask_other_columns", _GATED, "gated with a mask", _MASKED_DH, _MASKED_DH.replace("column", "0")),
    ("gated_mask_over_the_ranks", _GATED, "gated with a mask", "multiply_block<T, BLOCK_N, kMajorB, kStepsOfBlock>(d, pipeline, part, lane, block > 0, true);", "multiply_block<T, BLOCK_N, kMajorB, kStepsOfBlock>(d, pipeline, part, lane, block > 0, block > 0);"),
    ("gated_mask_over_nothing", _GATED, "gated with a mask", "!kMasked || p.whole_blocks > 0", "true"),
    ("gated_over_the_tile_before", _ACTIVATED, "gated", "// the boxes may still be read for the tile before if (thread == 0) ptx::tma_store_wait_read<0>();", ""),
    ("gated_boxes_half_written", _ACTIVATED, "gated", _BOTH_STORED, _BOTH_STORED.replace("consumer_sync(consumer);", "")),
    ("gated_no_proxy_fence", _ACTIVATED, "gated", _BOTH_STORED, _BOTH_STORED.replace("ptx::fence_proxy_async_shared();", "")),
    ("gated_h_over_up", _ACTIVATED, "gated", _BOTH_STORED, _BOTH_STORED.replace("ptx::tma_store_wait_read<1>();", "")),
    ("gated_gate_first", _ACTIVATED, "gated", _BOTH_STORED, _BOTH_STORED.replace(_GATE_STORED, "").replace("if (keep_up)", _GATE_STORED + " if (keep_up)")),
    ("gated_h_before_the_wait", _ACTIVATED, "gated", _H_STORED, _H_STORED.replace("consumer_sync(consumer); activate", "activate")),
    ("gated_h_not_whole", _ACTIVATED, "gated", _H_STORED, _H_STORED.replace("consumer_sync(consumer); if", "if")),
    ("gated_h_no_proxy_fence", _ACTIVATED, "gated", _H_STORED, _H_STORED.replace("ptx::fence_proxy_async_shared();", "")),
    ("gated_dh_not_whole", _ACTIVATED, "gated", "write_boxes<T, BLOCK_N>(d, hs, thread); consumer_sync(consumer);", "write_boxes<T, BLOCK_N>(d, hs, thread);"),
    ("gated_reads_not_awaited", _ACTIVATED, "gated", "ptx::mbarrier_wait(pipeline.full(), pipeline.parity);", ""),
    ("gated_gradients_no_proxy_fence", _ACTIVATED, "gated", _GRADIENTS, _GRADIENTS.replace("ptx::fence_proxy_async_shared();", "")),
    ("gated_gradients_not_whole", _ACTIVATED, "gated", _GRADIENTS, _GRADIENTS.replace("consumer_sync(consumer);", "")),
    ("gated_stage_freed_unread", _ACTIVATED, "gated", _GRADIENTS, _GRADIENTS.replace("ptx::tma_store_wait_read<0>();", "{}")),
    ("gated_stage_not_freed", _ACTIVATED, "gated", _GRADIENTS, _GRADIENTS.replace("if (n > 0) pipeline.release_previous(lane);", "")),
    ("gated_last_stage_freed_unread", _ACTIVATED, "gated", _LAST_GRADIENTS, "consumer_sync(consumer); pipeline.release_previous(lane);"),
    ("gated_last_stage_freed_early", _ACTIVATED, "gated", _LAST_GRADIENTS, "if (thread == 0) ptx::tma_store_wait_read<0>(); pipeline.release_previous(lane);"),
    # da and db in the launch of dx
    ("sum_no_launch_wait", _LINEAR, "concurrent_backward", _OVERLAPS, "if (overlaps) ptx::fence_proxy_async();"),
    ("sum_no_read_sync", _LINEAR, "concurrent_backward, one block at a time", "// what consumer 1 has summed was read, where its first tile goes out consumers_sync();", ""),
    ("sum_no_wait_read", _SUMS, "concurrent_backward, four stages", "// the sums of the item before have been read consumers_sync();", ""),
    ("sum_no_wait_read", _SUMS, "concurrent_backward, four stages", "// consumer 1 may write consumers_sync();", ""),
    ("sum_no_sync", _SUMS, "concurrent_backward", "consumers_sync(); return;", "return;"),
    ("sum_no_sync", _SUMS, "concurrent_backward", "// consumer 1 has written consumers_sync();", ""),
    # everything of a backward in one launch
    ("backward_adapters_not_awaited", _BACKWARD, "fused_backward", "if (!rounded) wait_for(p, rounded_word(p.work), p.slices[0] + p.slices[1]);", ""),
    ("backward_adapters_half_awaited", _BACKWARD, "fused_backward", "if (!rounded) wait_for(p, rounded_word(p.work), p.slices[0] + p.slices[1]);", "if (!rounded) wait_for(p, rounded_word(p.work), 1);"),
    ("backward_slice_published_early", _BACKWARD, "fused_backward", "ptx::warp_sync(); if (lane == 0) ptx::add_release(p.workspace + rounded_word(p.work), 1);", "if (lane == 0) ptx::add_release(p.workspace + rounded_word(p.work), 1);"),
    ("backward_slice_relaxed", _BACKWARD, "fused_backward", "ptx::warp_sync(); if (lane == 0) ptx::add_release(p.workspace + rounded_word(p.work), 1);", "ptx::warp_sync(); if (lane == 0) ptx::add_relaxed(p.workspace + rounded_word(p.work), 1);"),
    ("backward_slice_of_every_lane", _BACKWARD, "fused_backward", "ptx::shuffle(ticket, 0)", "ticket"),
    ("backward_no_proxy_fence", _BACKWARD, "fused_backward", "ptx::wait_at_least(p.workspace + word, static_cast<uint32_t>(value)); ptx::fence_proxy_async();", "ptx::wait_at_least(p.workspace + word, static_cast<uint32_t>(value));"),
    ("backward_rows_not_awaited", _BACKWARD, "fused_backward", "wait_for(p, kFlags + kWordsOfFlag * work.row, kPublishers);", ""),
    ("backward_rows_half_awaited", _BACKWARD, "fused_backward", "wait_for(p, kFlags + kWordsOfFlag * work.row, kPublishers);", "wait_for(p, kFlags + kWordsOfFlag * work.row, 1);"),
    ("backward_chunk_not_awaited", _BACKWARD, "fused_backward", "if (item.sum == 1) { wait_for(p, chunk_word(p.work, work.row), static_cast<int>(kPublishers) * p.work.height(work.row)); }", ""),
    ("backward_chunk_half_awaited", _BACKWARD, "fused_backward", "if (item.sum == 1) { wait_for(p, chunk_word(p.work, work.row), static_cast<int>(kPublishers) * p.work.height(work.row)); }", "if (item.sum == 1) { wait_for(p, chunk_word(p.work, work.row), p.work.height(work.row)); }"),
    ("backward_chunk_relaxed", _BACKWARD, "fused_backward", "ptx::add_release(p.workspace + chunk_word(p.work, work.row / p.work.chunk), 1);", "ptx::add_relaxed(p.workspace + chunk_word(p.work, work.row / p.work.chunk), 1);"),
    ("backward_no_read_sync", _BACKWARD, "fused_backward", "// what consumer 1 has summed was read, where its next tile goes out; and partial sums are written consumers_sync();", ""),
    ("backward_partial_no_broadcast", _BACKWARD, "fused_backward", "if (thread == 0) { ptx::store_shared(mailbox, ptx::fetch_add_acquire_release(p.workspace + item_word(p.work, item), 1)); } consumer_sync(0);", "if (thread == 0) { ptx::store_shared(mailbox, ptx::fetch_add_acquire_release(p.workspace + item_word(p.work, item), 1)); }"),
    ("backward_partial_relaxed", _BACKWARD, "fused_backward", "if (thread == 0) { ptx::store_shared(mailbox, ptx::fetch_add_acquire_release(p.workspace + item_word(p.work, item), 1)); } consumer_sync(0);", "if (thread == 0) { ptx::store_shared(mailbox, ptx::fetch_add_relaxed(p.workspace + item_word(p.work, item), 1)); } consumer_sync(0);"),
    ("backward_partial_left_out", _BACKWARD, "fused_backward", "chunk > 0 ? total[i].values[j] : 0.0f", "0.0f"),
    ("backward_first_arrives_as_last", _BACKWARD, "fused_backward", "ptx::load_shared<uint32_t>(mailbox) + 1 != static_cast<uint32_t>(chunks)", "ptx::load_shared<uint32_t>(mailbox) != 0"),
    ("backward_left_early", _BACKWARD, "fused_backward", "before + 1 != kLeaversOfBlock * gridDim.x", "before + 2 != kLeaversOfBlock * gridDim.x"),
    ("backward_workspace_not_zeroed", _BACKWARD, "fused_backward", "ptx::store_relaxed(p.workspace + i, 0);", ""),
    ("backward_no_store_wait", _BACKWARD, "fused_backward", "leave(p); ptx::tma_store_wait<0>();", "leave(p);"),
    ("backward_sum_over_a_tile", _SUMS, "fused_backward", "if (thread == 0) ptx::tma_store_wait_read<0>();", ""),
    ("one_launch_no_launch_wait", _BACKWARD, "fused_backward", "ptx::wait_for_previous_launch();", ""),
    # the same in forward
    ("forward_rows_awaited_too_late", _BACKWARD, "fused_forward", "wait_for(p, kFlags + kWordsOfFlag * work.row, kPublishers);", ""),
    ("forward_adapters_awaited_too_late", _BACKWARD, "fused_forward", "if (!rounded) wait_for(p, rounded_word(p.work), p.slices[0] + p.slices[1]);", ""),
    ("forward_workspace_not_zeroed", _BACKWARD, "fused_forward", "ptx::store_relaxed(p.workspace + i, 0);", ""),
    ("forward_ticket_of_every_lane", _BACKWARD, "fused_forward", "ptx::shuffle(ticket, 0)", "ticket"),
    ("forward_without_bias", _BACKWARD, "fused_forward", "!kBackward && p.bias != nullptr", "false"),
    # ragged rows
    ("group_ticket_not_reset", _GROUPED, "grouped", "ptx::store_relaxed(p.tickets, 0);", ""),
    ("group_ticket_reset_early", _GROUPED, "grouped", "is_last_number(next, walk.last, gridDim.x)", "next == walk.last"),
    ("wrong_group", _GROUPED, "grouped", _GROUP_B.format("tile.group"), _GROUP_B.format("0")),
    ("group_overrun", _GROUPED, "grouped", "row + kWarpgroupRows <= tile.row_end || tile.row_end == p.rows", "true"),
    # ragged rows that lie anywhere, copied by threads; tiles by ticket
    ("gathered_no_full_wait", _GATHERED, "gathered", "ptx::mbarrier_wait(pipeline.full(), pipeline.parity);", ""),
    ("gathered_no_proxy_fence", _GATHERED, "gathered", "if constexpr (kGathered) ptx::fence_proxy_async_shared();", ""),
    ("gathered_no_empty_wait", _GATHERED, "gathered", "ptx::mbarrier_wait_cluster(pipeline.empty(), pipeline.parity ^ 1);", ""),
    ("gathered_thread_arrives_itself", _GATHERED, "gathered", "ptx::copy_async_arrive(pipeline.full());", "ptx::mbarrier_arrive(pipeline.full());"),
    ("gathered_half_of_the_copies_awaited", _GATHERED, "gathered", "kGathered ? 1 + kCopiers : 1", "kGathered ? 1 + kCopiers / 2 : 1"),
    ("gathered_tickets_of_consumers_alone", _GATHERED, "gathered", "kGathered ? 12 : 8", "8"),
    ("gathered_ticket_not_reset", _GATHERED, "gathered", "ptx::store_relaxed(p.tickets, 0);", ""),
    ("gathered_ticket_reset_early", _GATHERED, "gathered", "is_last_number(ticket, walk.last, gridDim.x)", "ticket == walk.last"),
    ("gathered_not_swizzled", _GATHERED, "gathered", "box_offset(thread / 8, piece)", "static_cast<uint32_t>(thread / 8 * kBoxRowBytes + piece * 2)"),
    ("gathered_columns_behind_the_last", _GATHERED, "gathered", "left <= 0 ? 0 : left < 8 ? left * 2 : 16", "16"),
    ("gathered_row_of_another_token", _GATHERED, "gathered", "static_cast<int>(ptx::load_global(p.order + row)) / p.choices", "static_cast<int>(ptx::load_global(p.order + row)) / (p.choices + 1)"),
    ("gathered_group_overrun", _GATHERED, "gathered", "row + kWarpgroupRows <= tile.row_end || tile.row_end == p.rows", "true"),
    ("gathered_up_of_gate", _GATHERED, "gathered_gated", "n / kHalf * N", "0"),
    ("gathered_boxes_still_read", _GATHERED, "gathered_gated", "if (thread == 0) ptx::tma_store_wait_read<0>();", ""),
    ("gathered_gate_before_it_is_there", _GATHERED, "gathered_gated", "// gate and up are there consumer_sync(consumer);", ""),
    ("gathered_h_over_up", _GATHERED, "gathered_gated", "// and have been read, before h takes the place of up consumer_sync(consumer);", ""),
    ("gathered_h_before_it_is_there", _GATHERED, "gathered_gated", "// h is there consumer_sync(consumer);", ""),
    ("gathered_h_overrun", _GATHERED, "gathered_gated", "m >= row_end || n >= N", "n >= N"),
    ("gathered_gates_half_announced", _GATHERED, "gathered_gradients", _LOAD_GATES, _LOAD_GATES.replace("2 * ", "")),
    ("gathered_gates_over_copies", _GATHERED, "gathered_gradients", "// over what threads have copied: ordinary writes, before those of the async proxy\n ptx::fence_proxy_async_shared();", ""),
    ("gathered_up_for_gate", _GATHERED, "gathered_gradients", "&maps.read[1]", "&maps.read[0]"),
    ("gathered_row_not_scaled", _GATHERED, "gathered_gradients", "row + r < row_end ? ptx::load_global(scale + row + r) : 0.0f", "1.0f"),
    ("gathered_product_of_other_rows", _GATHERED, "gathered_gradients", "thread % 8 == r / 16", "thread % 8 == 0"),
    ("gathered_product_of_one_thread", _GATHERED, "gathered_gradients", "part += ptx::shuffle_xor(part, mask);", ""),
    ("gathered_product_overrun", _GATHERED, "gathered_gradients", "thread % 8 < 4 && mine < row_end", "thread % 8 < 4"),
    ("gathered_dh_not_whole", _ACTIVATED, "gathered_gradients", "write_boxes<T, BLOCK_N>(d, hs, thread); consumer_sync(consumer);", "write_boxes<T, BLOCK_N>(d, hs, thread);"),
    ("gathered_gates_not_awaited", _ACTIVATED, "gathered_gradients", "ptx::mbarrier_wait(pipeline.full(), pipeline.parity);", ""),
    ("gathered_gradients_no_proxy_fence", _ACTIVATED, "gathered_gradients", _GRADIENTS, _GRADIENTS.replace("ptx::fence_proxy_async_shared();", "")),
    ("gathered_gradients_not_whole", _ACTIVATED, "gathered_gradients", _GRADIENTS, _GRADIENTS.replace("consumer_sync(consumer);", "")),
    ("gathered_gradients_freed_unread", _ACTIVATED, "gathered_gradients", _LAST_GRADIENTS, "if (thread == 0) ptx::tma_store_wait_read<0>(); pipeline.release_previous(lane);"),
    ("gathered_no_store_wait", _GATHERED, "gathered", "if (thread == 0) ptx::tma_store_wait<0>();", ""),
    # their products with the rank, in one read
    ("ranks_copy_not_awaited", _RANKS, "ragged_ranks", "ptx::copy_async_wait<0>();", ""),
    ("ranks_stage_refilled_early", _RANKS, "ragged_ranks", "ptx::block_sync(); fetch(step + 1);", "fetch(step + 1); ptx::block_sync();"),
    ("ranks_parts_over_rows_that_are_read", _RANKS, "ragged_ranks", "ptx::block_sync(); " + _ADD_RANKS, _ADD_RANKS),
    ("ranks_source_of_the_step_before", _RANKS, "ragged_ranks", "next = source(step + 1);", ""),
    ("ranks_rows_of_lane_0", _RANKS, "ragged_ranks", "ptx::shuffle(next, i)", "ptx::shuffle(next, 0)"),
    ("ranks_row_of_another_token", _RANKS, "ragged_ranks", "static_cast<int>(ptx::load_global(p.order + row)) / p.choices", "static_cast<int>(ptx::load_global(p.order + row)) / (p.choices + 1)"),
    ("ranks_group_overrun", _RANKS, "ragged_ranks", "part > 0 || m >= end || c >= of.R", "part > 0 || m >= of.M || c >= of.R"),
    ("ranks_rows_of_the_next_group", _RANKS, "ragged_ranks", _NARROW.format("end"), _NARROW.format("of.M")),
    ("ranks_b_of_the_first_group", _RANKS, "ragged_ranks", "static_cast<const T*>(of.b) + group * of.C * of.stride_b", "static_cast<const T*>(of.b)"),
    ("ranks_columns_behind_the_last", _RANKS, "ragged_ranks", "left <= 0 ? 0 : left < 8 ? static_cast<int>(left) * 2 : kChunkBytes", "kChunkBytes"),
    # the memory-bound passes
    ("project copy not awaited", _PROJECT, "project_x", "ptx::copy_async_wait<S::kStages - 2>();", ""),
    ("project stage refilled before the barrier", _PROJECT, "project_x", "ptx::block_sync(); fetch(step + S::kStages - 1);", "fetch(step + S::kStages - 1); ptx::block_sync();"),
    ("reduce copy not awaited", _REDUCE, "reduce_dy", "ptx::copy_async_wait<S::kStages - 2>();", ""),
    ("reduce no barrier before reuse", _REDUCE, "reduce_dy", "ptx::block_sync(); fetch(item + S::kStages - 1);", "fetch(item + S::kStages - 1);"),
    ("reduce b read before it is there", _REDUCE, "reduce_dy", "// all of b is there ptx::block_sync();", ""),
    ("reduce parts over a tile that is read", _REDUCE, "reduce_dy", "ptx::block_sync(); " + _ADD_PARTS, _ADD_PARTS),
    ("reduce last share not added", _REDUCE, "reduce_dy", f"{_LAST} - {_FIRST} + 1", f"{_LAST} - {_FIRST} + ({_LAST} == {_FIRST})"),
    ("reduce chunk not added", _REDUCE, "reduce_dy in chunks", "if (!p.is_first) sum += ptx::load_global(carried + i);", ""),
    ("reduce chunk not carried on", _REDUCE, "reduce_dy in chunks", "if (!p.is_last) ptx::store_global(carried + i, sum);", ""),
    ("skinny mask of the tile's first row", _SKINNY, "project_x, reduce_x", "(row + r) * columns + column", "row * columns + column"),
    ("skinny parts added before they are there", _SKINNY, "project_x, reduce_x", "ptx::block_sync();", ""),
    # quantized weights
    ("decode codes read before they are there", _DECODE, "decode_codebook", "ptx::block_sync();", ""),
    ("decode low half of a byte first", _DECODE, "decode_codebook", "i % 2 ? 0 : 4", "i % 2 ? 4 : 0"),
    ("decode scale of a thread's own chunk", _DECODE, "decode_codebook", "ptx::shuffle(scale, owner)", "scale"),
    ("decode pieces stay with their threads", _DECODE, "decode_codebook", "exchange(pieces, lane);", ""),
    ("decode chunk behind the last one read", _DECODE, "decode_codebook", "base + lane < p.extent.chunks", "true"),
    ("decode chunk behind the last one written", _DECODE, "decode_codebook", "base + owner < p.extent.chunks", "true"),
    ("decode last values left out", _DECODE, "decode_codebook", "p.extent.chunks * Codec::kValues + thread", "p.extent.count"),
    ("decode nested scale of the first blocks", _DECODE, "decode_codebook", _NESTED, "ptx::multiply_rounded(nested, ptx::load_global(p.nested_absmax)) + ptx::load_global(p.nested_offset)"),
    ("decode nested product not rounded", _DECODE, "decode_codebook, fp32", _NESTED, "static_cast<float>(static_cast<double>(nested) * ptx::load_global(p.nested_absmax + block / 256) + ptx::load_global(p.nested_offset))"),
    ("decode library's rounding left out", _DECODE, "decode_codebook", "p.rounded != Type::FP32", "false"),
    ("decode fp8 NaN as a number", _DECODE, "decode_fp8", "magnitude == 0x7f", "false"),
    ("decode fp8 scale not rounded", _DECODE, "decode_fp8", "rounded_to(p.rounded_scale, scale)", "scale"),
    ("decode fp8 blocks counted through all matrices", _DECODE, "decode_fp8", "row - group * p.rows.divisor", "row"),
    ("decode fp8 scale of the first matrix", _DECODE, "decode_fp8", "group * p.scale_rows + block_row", "block_row"),
    ("decode fp8 scale of a row's first block", _DECODE, "decode_fp8", "p.block_chunks.quotient(column)", "0"),
))
# fmt: on


def names(*seen_by: str) -> list[str]:
    """The bugs that these launches show."""
    return sorted({bug.name for bug in BUGS if bug.seen_by in seen_by})


def _both(text: str, bugs: list[Bug]) -> str:
    """`text`, or what the bug that is switched on has instead."""
    is_statement = text.endswith((";", "}"))
    for bug in bugs:
        on = f'LF_PLANTED("{bug.name}")'
        text = (
            f"{{ if ({on}) {{ {bug.instead} }} else {{ {text} }} }}"
            if is_statement
            else f"({on} ? ({bug.instead}) : ({text}))"
        )
    return text


def _place(bug: Bug, source: str) -> tuple[int, int]:
    actual = [m.span() for m in re.finditer(r"\s+".join(map(re.escape, bug.text.split())), source)]
    assert len(actual) == 1, f"planted bug {bug.name!r}: {bug.file} holds its text {len(actual)} times: {bug.text}"
    return actual[0]


def weave(kernels: Path, out: Path, bugs: tuple[Bug, ...] = BUGS) -> None:
    """Write the files of `kernels` to `out` with the bugs in them; a file that would not change keeps its time.

    A text that a file does not hold exactly once, and texts that overlap, are AssertionErrors.
    """
    out.mkdir(parents=True, exist_ok=True)
    sources = {path.name: path.read_text() for path in kernels.iterdir() if path.is_file()}
    for file, rows in groupby(sorted(bugs, key=lambda bug: bug.file), key=lambda bug: bug.file):
        source, places = sources[file], {}
        for bug in rows:
            places.setdefault(_place(bug, source), []).append(bug)
        end = len(source)
        for (first, last), alternatives in sorted(places.items(), reverse=True):
            assert last <= end, f"planted bugs of {file} overlap: {source[first:last]}"
            source = source[:first] + _both(source[first:last], alternatives) + source[last:]
            end = first
        sources[file] = source
    for path in out.iterdir():
        if path.name not in sources:
            path.unlink()
    for name, text in sources.items():
        if not (out / name).exists() or (out / name).read_text() != text:
            (out / name).write_text(text)
