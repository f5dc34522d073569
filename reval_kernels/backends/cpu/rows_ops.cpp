// token_values and its gradient: the row kernels, called for all unmasked tokens.
//
// A row is cut into segments of fixed length, and the threads share out the pairs (token, segment). So a few long rows
// keep every core busy, and no result depends on the number of threads.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <atomic>

#include "ops.h"
#include "tokens.h"

namespace reval {
namespace {

constexpr int64_t kSegment = 1 << 15;
// A gradient of this size or more is written past the cache, because it would not stay in the cache until it is read.
constexpr int64_t kStreamingBytes = 8 << 20;

struct Segments {
  int64_t vocabulary, per_row;
  explicit Segments(int64_t v) : vocabulary(v), per_row((v + kSegment - 1) / kSegment) {}
  int64_t begin(int64_t s) const { return s * kSegment; }
  int64_t length(int64_t s) const { return std::min(kSegment, vocabulary - s * kSegment); }
  // The least number of (token, segment) items for one thread.
  int64_t grain() const { return std::max<int64_t>(1, kSegment / std::min(kSegment, vocabulary)); }
};

// Calls f(begin, end) for ranges of at least `grain` items. A thread takes the next range when it has finished one. So
// a core that is busy with other work does not delay the other threads for long.
template <typename Function>
void in_turns(int64_t items, int64_t grain, const Function& f) {
  const int64_t threads = at::get_num_threads(), some = std::max(grain, items / (16 * threads));
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min(threads, (items + some - 1) / some), 1, [&](int64_t, int64_t) {
    for (int64_t i = next.fetch_add(some); i < items; i = next.fetch_add(some)) f(i, std::min(items, i + some));
  });
}

const char* at_entry(const at::Tensor& x, int64_t entry) {
  return static_cast<const char*>(x.const_data_ptr()) + entry * x.element_size();
}

}  // namespace

std::vector<at::Tensor> token_values(
    const at::Tensor& logits, const at::Tensor& actions, const OptionalTensor& mask, double temperature,
    const OptionalTensor& temperatures, std::optional<double> softcap, bool with_entropy) {
  const Tokens tokens(actions, mask, temperature, temperatures, softcap);
  const Segments segments(logits.size(-1));
  const DType type = dtype_of(logits);
  const auto offsets = row_offsets(logits, tokens.index);
  std::vector<Partial> parts(tokens.size() * segments.per_row);
  in_turns(static_cast<int64_t>(parts.size()), segments.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      int64_t i = item / segments.per_row, s = item % segments.per_row;
      kernels().rows.partial(
          type, at_entry(logits, offsets[i] + segments.begin(s)), segments.length(s), tokens.transform(i),
          with_entropy, &parts[item]);
    }
  });
  TokenOutputs out(actions.sizes());
  for (int64_t i = 0; i < tokens.size(); ++i) {
    const Transform transform = tokens.transform(i);
    Sums sums;
    for (int64_t s = 0; s < segments.per_row; ++s) sums.add(parts[i * segments.per_row + s], transform.inv_temperature);
    float logit = load_scalar(type, at_entry(logits, offsets[i]), tokens.actions[i]);
    out.set(tokens.index[i], sums.finish(transform, logit, with_entropy));
  }
  return out.tensors;
}

void token_values_backward(
    const at::Tensor& logits, const at::Tensor& actions, const OptionalTensor& mask, double temperature,
    const OptionalTensor& temperatures, std::optional<double> softcap, at::TensorList statistics,
    at::TensorList cotangents, const at::Tensor& out) {
  const Tokens tokens(actions, mask, temperature, temperatures, softcap);
  const Segments segments(logits.size(-1));
  const DType type = dtype_of(logits);
  const TokenInputs inputs(statistics, cotangents);
  std::vector<int64_t> every(tokens.all), unmasked(tokens.all, -1);
  for (int64_t i = 0; i < tokens.all; ++i) every[i] = i;
  for (int64_t i = 0; i < tokens.size(); ++i) unmasked[tokens.index[i]] = i;
  const auto from = row_offsets(logits, every), to = row_offsets(out, every);
  char* written = static_cast<char*>(out.mutable_data_ptr());
  const int64_t size = out.element_size();
  const bool streaming = static_cast<int64_t>(out.nbytes()) >= kStreamingBytes && written != logits.const_data_ptr();
  in_turns(tokens.all * segments.per_row, segments.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      int64_t token = item / segments.per_row, s = item % segments.per_row, i = unmasked[token];
      int64_t first = segments.begin(s), length = segments.length(s);
      char* target = written + (to[token] + first) * size;
      if (i < 0) {
        std::memset(target, 0, length * size);
        continue;
      }
      const Cotangents d = inputs.cotangents(token);
      const RowGradient row = inputs.gradient(token);
      const int64_t own = tokens.actions[i] - first;
      const bool owned = own >= 0 && own < length;
      const char* source = at_entry(logits, from[token] + first);
      // read before `gradient` runs, which overwrites the logit if out is logits
      const float logit = owned ? load_scalar(type, source, own) : 0.0f;
      kernels().rows.gradient(type, source, length, tokens.transform(i), row, target, streaming);
      if (owned) store_scalar(type, target, own, action_gradient(d, row, logit, tokens.transform(i)));
    }
  });
}

}  // namespace reval
