// tomoe::mask_values on CPUs, float32: the value mask of each token (eq. 5), applied to the attention output.
//
//   logits = W_up GELU(LayerNorm(W_down x + b));  out = attention * (top-K of logits, the same for every head)
//
// One op instead of about ten. All sums have the same order for any number of tokens or threads.
#include <utility>
#include <vector>

#include "../simd/dot_tile.h"
#include "../simd/tensors.h"

namespace tomoe {
namespace {

constexpr float kNormEps = 1e-5f;  // torch.nn.functional.layer_norm's

// ``out[t * stride + r] = w[r] . x[t]`` for rows [begin, end) and up to kDotTokens tokens. Prefetches the rows of the
// next micro-kernel.
void project(const float* w, int64_t depth, int64_t begin, int64_t end, const float* const* x, int tokens, float* out,
             int64_t stride) {
  for (int64_t r = begin; r < end; r += kDotRows) {
    const int rows = static_cast<int>(std::min<int64_t>(kDotRows, end - r));
    const int num_prefetch = static_cast<int>(std::min<int64_t>(kDotRows, end - r - rows));
    const float *row[kDotRows], *prefetch[kDotRows];
    float* target[kDotRows];
    for (int j = 0; j < rows; ++j) row[j] = w + (r + j) * depth, target[j] = out + r + j;
    for (int j = 0; j < num_prefetch; ++j) prefetch[j] = row[0] + (rows + j) * depth;
    dot_tile_of(tokens, rows)({row, x, 0, depth, prefetch, num_prefetch, target, stride, true});
  }
}

void normalize_and_activate(float* x, int64_t size, const float* bias, const float* scale, const float* shift) {
  double sum = 0, squares = 0;
  for (int64_t i = 0; i < size; ++i) x[i] += bias[i], sum += x[i];
  const float mean = static_cast<float>(sum / size);
  for (int64_t i = 0; i < size; ++i) squares += static_cast<double>(x[i] - mean) * (x[i] - mean);
  const float inverse = 1.0f / std::sqrt(static_cast<float>(squares / size) + kNormEps);
  for (int64_t i = 0; i < size; ++i) x[i] = activate<Activation::kGelu>((x[i] - mean) * inverse * scale[i] + shift[i]);
}

// Mirrors the selection of torch.topk (ATen/native/TopKImpl.h, sorted=False), so that ties are resolved as in top_mask.
void select(const float* logits, int64_t size, int64_t width, std::vector<std::pair<float, int64_t>>& queue,
            float* mask) {
  const bool keeps_most = 2 * width > size;
  const int64_t few = keeps_most ? size - width : width;
  std::fill_n(mask, size, keeps_most ? 1.0f : 0.0f);
  if (few == 0) return;
  for (int64_t i = 0; i < size; ++i) queue[i] = {logits[i], i};
  const auto pick = [&](auto before) {
    if (few * 64 <= size) std::partial_sort(queue.begin(), queue.begin() + few, queue.end(), before);
    else std::nth_element(queue.begin(), queue.begin() + few - 1, queue.end(), before);
  };
  using Entry = std::pair<float, int64_t>;
  if (keeps_most)
    pick([](const Entry& a, const Entry& b) {
      return (!std::isnan(a.first) && std::isnan(b.first)) || a.first < b.first;
    });
  else
    pick([](const Entry& a, const Entry& b) {
      return (std::isnan(a.first) && !std::isnan(b.first)) || a.first > b.first;
    });
  for (int64_t i = 0; i < few; ++i) mask[queue[i].second] = keeps_most ? 0.0f : 1.0f;
}

Tensor mask_values(Tensor attention, Tensor hidden_states, Tensor down_weight, Tensor down_bias, Tensor norm_weight,
                   Tensor norm_bias, Tensor up_weight, int64_t width) {
  for (const Tensor* tensor :
       {&attention, &hidden_states, &down_weight, &down_bias, &norm_weight, &norm_bias, &up_weight})
    STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Float, "tomoe::mask_values on CPU takes float32");
  STD_TORCH_CHECK(down_weight.is_contiguous() && up_weight.is_contiguous(),
                  "tomoe::mask_values takes contiguous weights");
  const Tensor x = as_contiguous(hidden_states), values = as_contiguous(attention);
  const Tensor out = empty({values.size(0), values.size(1)}, aoti_torch_dtype_float32());
  const int64_t tokens = x.size(0), depth = x.size(1), rank = down_weight.size(0), head = up_weight.size(0);
  const int64_t heads = values.size(1) / head;
  const auto floats = [](const Tensor& tensor) { return data_of<const float>(tensor); };
  const float *x_rows = floats(x), *value_rows = floats(values);
  auto* out_rows = data_of<float>(out);
  std::vector<float> embeddings(tokens * rank);
  const int threads = static_cast<int>(torch::stable::get_num_threads());
  const int64_t tiles = (tokens + kDotTokens - 1) / kDotTokens;
  // Few tokens: an equal share of W_down's rows for each thread, in whole tiles. Many: a block that stays in L2.
  const int64_t share = (rank + threads - 1) / threads, rows_at_once = tiles >= 4 * threads ? kValueMaskRows : share;
  const int64_t chunk = (rows_at_once + kDotRows - 1) / kDotRows * kDotRows, chunks = (rank + chunk - 1) / chunk;
  const auto token_pointers = [&](const float* rows, int64_t stride, int64_t tile, const float** pointers) {
    const int count = static_cast<int>(std::min<int64_t>(kDotTokens, tokens - tile * kDotTokens));
    for (int j = 0; j < count; ++j) pointers[j] = rows + (tile * kDotTokens + j) * stride;
    return count;
  };
#pragma omp parallel num_threads(threads)
  {
    std::vector<std::pair<float, int64_t>> queue(head);
    std::vector<float> logits(kDotTokens * head), mask(head);
    const float* pointers[kDotTokens];
#pragma omp for schedule(static)
    for (int64_t work = 0; work < tiles * chunks; ++work) {
      const int64_t tile = work / chunks, begin = work % chunks * chunk;
      const int count = token_pointers(x_rows, depth, tile, pointers);
      project(floats(down_weight), depth, begin, std::min(begin + chunk, rank), pointers, count,
              embeddings.data() + tile * kDotTokens * rank, rank);
    }
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int count = token_pointers(embeddings.data(), rank, tile, pointers);
      for (int j = 0; j < count; ++j)
        normalize_and_activate(embeddings.data() + (tile * kDotTokens + j) * rank, rank, floats(down_bias),
                               floats(norm_weight), floats(norm_bias));
      project(floats(up_weight), rank, 0, head, pointers, count, logits.data(), head);
      for (int j = 0; j < count; ++j) {
        select(logits.data() + j * head, head, width, queue, mask.data());
        const int64_t row = (tile * kDotTokens + j) * heads * head;
        for (int64_t h = 0; h < heads; ++h)
          for (int64_t i = 0; i < head; ++i) out_rows[row + h * head + i] = value_rows[row + h * head + i] * mask[i];
      }
    }
  }
  return out;
}

}  // namespace
}  // namespace tomoe

STABLE_TORCH_LIBRARY_IMPL(tomoe, CPU, m) { m.impl("mask_values", TORCH_BOX(&tomoe::mask_values)); }
