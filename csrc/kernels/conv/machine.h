// Every tuned number of the convolution, with its unit and where it comes from.
//
// Costs are counted in vector multiply-adds, of which every processor that we know starts as many in a cycle as it
// starts loads (two, or one of 512 bits on Zen 4), and twice as many as stores.
#pragma once

#include <stdint.h>

namespace fastnn {
namespace tuned {

// ---- memory: bytes -----------------------------------------------------------------------------------------------
constexpr int64_t kBandBytes = 256 << 10;       // of a band's copy: half of the smallest L2 (Ice Lake client, 512 KB)
constexpr int64_t kTransformedBytes = 1 << 20;  // of a band's transformed input and sums: Zen 4's L2
constexpr int64_t kLeastTiles = 28;             // of a band of Winograd's: two register tiles for each read of a weight
constexpr int64_t kBlockWeightBytes = 512 << 10;  // of a block's weight that is read again for each row: half of an L2
constexpr int64_t kRingBytes = 16 << 10;        // of conv pixels that wait for their windows: half of the smallest L1
constexpr int64_t kStageBytes = 128 << 10;      // of pooled pixels that wait to be written, many at once: a quarter of L2
constexpr int64_t kMeetingBytes = 2048;         // pixels so far apart share two sets of L1, where 14 don't fit
constexpr int64_t kDeepBandBytes = 1 << 20;     // of a band's copy and sums where the weight is what has to stay near
constexpr int64_t kEvenItems = 4;               // bands a thread, so that none waits long for another

constexpr double kCostPerThread = 12e3;  // vector multiply-adds: below, waking a second thread costs more than it saves

// ---- costs: vector multiply-adds ------------------------------------------------------------------------------------
constexpr double kStoreSum = 8;    // of a tile, to memory: zeroing, an addition, a store, its share of the call (measured: 4 cycles)
constexpr double kPoolSum = 3;     // of a sum in a register: an addition, a maximum, its share of a store
constexpr double kPoolPixel = 3;   // a load, a maximum, and the sum that shows a NaN
constexpr double kWriteOut = 6;    // a pooled vector: store, load again, transpose, store
constexpr double kCopy = 3;        // a vector of the input: load and store
constexpr double kTranspose = 6;   // the same, with its share of a square's shuffles
constexpr double kGather = 2;      // a single element, moved on its own
constexpr double kWinogradIn = 100;  // a tile's vector of channels: 16 loads, 64 additions, 16 stores, counted
constexpr double kWinogradOut = 56;  // a tile's vector of outputs: 16 loads, 24 additions, 4 stores, counted
constexpr double kPackWeight = 6;    // a vector of the weight, transposed
constexpr double kMatrixProduct = 16;  // of a matrix unit: cycles on Sapphire Rapids, in halves of which vectors start
constexpr double kInFlight = 8;      // sums that keep the multipliers busy: latency 4, two a cycle

}  // namespace tuned
}  // namespace fastnn
