// The constants of all CPU kernels: sizes of micro-kernels, blocks and regimes. ../README.md shows their loops.
//
// "Chosen by" names the command that measures the choice; what was tried is in docs/notebook/log.md. After a change,
// compare with the commit before:
//   python benchmarks/op_versions.py HEAD . --only-versions --shape 135m      (and --shape 1b)
// and, for the size of a micro-kernel, check that its sums still fit into registers:
//   python benchmarks/tile_code.py --isa AVX512                               (and --isa AVX2)
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

// ------------------------------------------------------------------------------------------------------- regimes
// In tokens. Chosen by op_versions.py --tokens 2 4 8 16 64 256: where two neighbouring regimes are equally fast.

// Tokens of a pass from which weights are prefetched by instructions. With fewer there is little arithmetic to overlap,
// and hardware prefetching suffices.
constexpr int64_t kPrefetchTokens = 5;
// Tokens of an expert from which the loop over experts is the outer one.
constexpr int64_t kExpertMajorTokens = 16;
// Tokens of an expert from which activations are transposed. Changes the order of their sums, see
// expert_mlp/cpu/op.cpp.
constexpr int64_t kTransposedTokens = 64;

// ------------------------------------------------------------------------------------------ blocks of phase 1 (up)
// Chosen by op_versions.py --shape 1b --tokens 4 8 16 64 (D = 2048) and --shape 135m (D = 576).

// MC in bytes of weights: this block and the next one, which is prefetched, are half of a 1 MB L2.
constexpr int64_t kUpBlockBytes = 1 << 18;
// Bounds of MC in neurons.
constexpr int64_t kMinUpBlockNeurons = 12, kMaxUpBlockNeurons = 128;
// Minimum blocks of a pass, so that no thread waits long for the last one.
constexpr int64_t kMinUpBlocks = 16;
// KC: columns of x and of the weights at a time; 8 KB a row.
constexpr int64_t kMaxUpColumns = 2048;
// Slices of KC columns; bounds the prefetch state, and D to 65,536.
constexpr int kMaxUpSlices = 32;
// NC: tokens of an expert at a time; 256 KB of x beside a block of weights.
constexpr int64_t kUpTokens = 32;
// Tokens of an expert up to which whole rows are read, without blocks of KC columns.
constexpr int64_t kWholeRowTokens = 8;
// Rows that one micro-kernel may prefetch.
constexpr int kMaxPrefetchRows = 24;
// Expert-major: threads take parts of the neurons. An expert's rows of a part stay in L3 while blocks of its tokens
// reuse them, hence at least 8 parts (1b: 5.6 MB each), and 4 a thread, so that none waits long for the last one.
constexpr int64_t kMinParts = 8, kPartsPerThread = 4;
// Transposed: NC, tokens of a block of x^T (64 with AVX-512, else 16).
constexpr int64_t kTransposedBlockTokens = kTransposedVecs * kLanes;
// Their number is a multiple of this; the rest of an expert's tokens is not transposed.
constexpr int64_t kTransposedMultiple = 16;

// ---------------------------------------------------------------------------------------- blocks of phase 2 (down)
// Chosen by op_versions.py --tokens 1 8 64, and the panels' width by benchmarks/weight_layout.py.

// MC: maximum columns of a panel of W_down (PANEL_WIDTHS in expert_mlp/weight_layout.py).
constexpr int64_t kPanelColumns = 96;
// KC: neurons of a block; 96 KB of a panel stay in L2 while all tokens use them.
constexpr int64_t kDownBlockNeurons = 256;

// ---------------------------------------------------------------------------------------------------------- others
// Tokens of a pass over the weights: bounds the scratch memory.
constexpr int64_t kPassTokens = 1024;
// Tokens from which tomoe::route uses threads. Not tuned.
constexpr int64_t kRouteThreadTokens = 64;
// Rows of W_down that tomoe::mask_values projects at a time for many tokens: 108 KB at D = 576, 384 KB at 2,048, to
// stay in L2. Not tuned.
constexpr int64_t kValueMaskRows = 48;

}  // namespace tomoe
