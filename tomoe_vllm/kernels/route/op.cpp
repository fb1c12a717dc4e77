// tomoe::route and tomoe::route_recorded on CPUs: argmax over the experts of x W^T, float32; of equal logits the first.
//
// Sums have the same order for any number of tokens. One op instead of a matmul and an argmax. Hidden states of 16 bits
// are widened one token at a time.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <vector>

#include "../simd/dot_tile.h"
#include "../simd/tensors.h"

namespace tomoe {
namespace {

// Row ``token`` of ``x`` [T, depth] as float32: in place, or in ``buffer`` [depth].
const float* float_row(const Tensor& x, ScalarType type, int64_t token, int64_t depth, float* buffer) {
  const auto widen = [&](const auto* row) {
    for (int64_t k = 0; k < depth; ++k) buffer[k] = static_cast<float>(row[k]);
    return static_cast<const float*>(buffer);
  };
  if (type == ScalarType::BFloat16) return widen(data_of<const torch::headeronly::BFloat16>(x) + token * depth);
  if (type == ScalarType::Half) return widen(data_of<const torch::headeronly::Half>(x) + token * depth);
  return data_of<const float>(x) + token * depth;
}

// [T] int64; also written to ``record`` as bytes unless that is null.
Tensor route_tokens(const Tensor& hidden_states, const Tensor& router_weight, uint8_t* record) {
  const ScalarType type = hidden_states.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "tomoe::route on CPU takes float32, bfloat16 or float16 hidden_states");
  STD_TORCH_CHECK(router_weight.scalar_type() == ScalarType::Float && router_weight.is_contiguous(),
                  "tomoe::route on CPU takes a contiguous float32 router_weight");
  const Tensor x = as_contiguous(hidden_states);
  const int64_t tokens = x.size(0), depth = x.size(1), experts = router_weight.size(0);
  const Tensor ids = empty({tokens}, aoti_torch_dtype_int64());
  auto* out = data_of<int64_t>(ids);
  const auto* router = data_of<const float>(router_weight);
  const int threads = static_cast<int>(torch::stable::get_num_threads());
#pragma omp parallel num_threads(threads) if (tokens >= kRouteThreadTokens)
  {
    std::vector<float> buffer(type == ScalarType::Float ? 0 : depth);
#pragma omp for
    for (int64_t t = 0; t < tokens; ++t) {
      const float* token = float_row(x, type, t, depth, buffer.data());
      float best = -INFINITY;
      int64_t winner = 0;
      for (int64_t e = 0; e < experts; e += kDecodeRows) {
        const int count = static_cast<int>(std::min<int64_t>(kDecodeRows, experts - e));
        const float* w[kDecodeRows];
        float logits[kDecodeRows];
        float* targets[kDecodeRows];
        for (int r = 0; r < count; ++r) w[r] = router + (e + r) * depth, targets[r] = logits + r;
        dot_tile_of(1, count)({w, &token, 0, depth, nullptr, 0, targets, 1, true});
        for (int r = 0; r < count; ++r)
          if (logits[r] > best) best = logits[r], winner = e + r;
      }
      out[t] = winner;
      if (record) record[t] = static_cast<uint8_t>(winner);
    }
  }
  return ids;
}

Tensor route(Tensor hidden_states, Tensor router_weight) { return route_tokens(hidden_states, router_weight, nullptr); }

Tensor route_recorded(Tensor hidden_states, Tensor router_weight, Tensor record) {
  STD_TORCH_CHECK(
      record.scalar_type() == ScalarType::Byte && record.is_contiguous() && record.dim() == 1 &&
          record.size(0) >= hidden_states.size(0) && router_weight.size(0) <= 255,
      "tomoe::route_recorded takes a contiguous uint8 record of at least one byte per token, and up to 255 experts");
  return route_tokens(hidden_states, router_weight, data_of<uint8_t>(record));
}

}  // namespace
}  // namespace tomoe

STABLE_TORCH_LIBRARY_IMPL(tomoe, CPU, m) {
  m.impl("route", TORCH_BOX(&tomoe::route));
  m.impl("route_recorded", TORCH_BOX(&tomoe::route_recorded));
}
