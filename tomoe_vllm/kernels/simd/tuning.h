// The constants of all CPU kernels: sizes of micro-kernels, blocks and regimes. README.md shows the loops they belong to.
//
// "Chosen by" names the command that measures the choice. After a change, compare with the commit before:
//   python benchmarks/op_versions.py HEAD . --shape 135m      (and --shape 1b)
// and, for the size of a micro-kernel, see that its sums still fit into registers:
//   python benchmarks/tile_code.py --isa AVX512               (and --isa AVX2)
// Measured on two cores of an AMD Zen 3 (AVX2, 512 KB of L2 a core) and of a Zen 4 (AVX-512, 1 MB).
#pragma once
#include <cstdint>

namespace tomoe {

// Floats in a vector. Portable vectors may have as many as those of AVX-512, so that its tiles can be tested anywhere.
#ifndef TOMOE_LANES
#ifdef __AVX512F__
#define TOMOE_LANES 16
#else
#define TOMOE_LANES 8
#endif
#endif
constexpr int kLanes = TOMOE_LANES;

// --------------------------------------------------------------------------- micro-kernels: MR x NR sums in registers
// Chosen by benchmarks/tile_code.py: the largest that leave registers for their operands, of 32 (AVX-512) or 16 (AVX2).
#if TOMOE_LANES == 16
constexpr int kDotRows = 6, kDotTokens = 4;  // dot_tile, MR rows of weights x NR tokens: 24 sums, 4 + 1 operands
constexpr int kDecodeRows = 12;              // dot_tile of one token, MR x 1
constexpr int kTransposedVecs = 4;           // transposed_tile, NR vectors of tokens (kTransposedRows x 4 = 24 sums)
constexpr int kDownVecs = 4;                 // down_tile, MR vectors of columns (kDownTokens x 4 = 24 sums)
#else
constexpr int kDotRows = 4, kDotTokens = 3;  // 12 sums, 3 + 1 operands
constexpr int kDecodeRows = 8;
constexpr int kTransposedVecs = 2;  // kTransposedRows x 2 = 12 sums
constexpr int kDownVecs = 2;        // kDownTokens x 2 = 12 sums
#endif
constexpr int kTransposedRows = 6;  // transposed_tile, MR rows of weights
constexpr int kDownTokens = 6;      // down_tile, NR tokens

// ------------------------------------------------------------------------------------------------------- the regimes
// Chosen by op_versions.py --tokens 2 4 8 16 64 256: the sizes where two neighbouring regimes are equally fast.
constexpr int64_t kPrefetchTokens = 5;      // tokens of a pass from which weights are prefetched by instructions; with
                                            // fewer there is next to no arithmetic, and hardware prefetching suffices
constexpr int64_t kExpertMajorTokens = 16;  // tokens of an expert from which the loop over experts is the outer one
constexpr int64_t kTransposedTokens = 64;   // tokens of an expert from which their activations are transposed; changes
                                            // the order of sums, see op.cpp

// -------------------------------------------------------------------------------------------- blocks of phase 1 (up)
// Chosen by op_versions.py --shape 1b --tokens 4 8 16 64 (D = 2048) and --shape 135m (D = 576).
constexpr int64_t kUpBlockBytes = 1 << 18;  // MC: bytes of weights of a block; it and the next, prefetched, one are half
                                            // of a 1 MB L2
constexpr int64_t kMinUpBlockNeurons = 12, kMaxUpBlockNeurons = 128;  // bounds of MC in neurons
constexpr int64_t kMinUpBlocks = 16;   // blocks of a pass at least, so that no thread waits long for the last one
constexpr int64_t kMaxUpColumns = 2048;  // KC: columns of x and of the weights at a time, 8 KB a row
constexpr int kMaxUpSlices = 32;         // slices of KC columns: bounds the prefetch state, and D to 65,536
constexpr int64_t kUpTokens = 32;        // NC: tokens of an expert at a time, 256 KB of x beside a block of weights
constexpr int64_t kWholeRowTokens = 8;   // up to so many tokens of an expert rows are read whole, without KC blocks
constexpr int kMaxPrefetchRows = 24;     // rows that one micro-kernel may prefetch

// Expert-major: the neurons are cut into parts, which threads take. An expert's rows of a part stay in L3 while blocks
// of its tokens reuse them, hence 8 parts at least (1b: 5.6 MB each); 4 a thread, so that none waits long for the last.
constexpr int64_t kMinParts = 8, kPartsPerThread = 4;

// Transposed: NC, tokens of a block of x^T (AVX-512: 64; AVX2: 16), and what their number must be a multiple of.
constexpr int64_t kTransposedBlockTokens = kTransposedVecs * kLanes;
constexpr int64_t kTransposedMultiple = 16;

// ------------------------------------------------------------------------------------------ blocks of phase 2 (down)
// Chosen by op_versions.py --tokens 1 8 64, and the panels' width by benchmarks/weight_layout.py.
constexpr int64_t kPanelColumns = 96;     // MC: columns of W_down in a panel at most (weight_layout.PANEL_WIDTHS)
constexpr int64_t kDownBlockNeurons = 256;  // KC: neurons of a block, 96 KB of a panel in L2 while all tokens use it

// -------------------------------------------------------------------------------------------------------------- others
constexpr int64_t kPassTokens = 1024;  // tokens of a pass over the weights: bounds the scratch memory
constexpr int64_t kRouteThreadTokens = 64;  // tokens from which tomoe::route uses threads
constexpr int64_t kValueMaskRows = 48;  // rows of W_down that tomoe::mask_values projects at a time where tokens are many
                                        // (16 KB to 400 KB); chosen by tomoe bench --only decode, prefill

}  // namespace tomoe
