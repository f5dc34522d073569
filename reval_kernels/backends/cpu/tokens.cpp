#include "tokens.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace reval {
namespace {

template <typename T>
void take_actions(const at::Tensor& actions, Tokens& tokens) {
  at::Tensor flat = actions.contiguous();
  const T* from = flat.const_data_ptr<T>();
  tokens.actions.reserve(tokens.index.size());
  for (int64_t i : tokens.index) tokens.actions.push_back(from[i]);
}

}  // namespace

Tokens::Tokens(
    const at::Tensor& actions, const OptionalTensor& mask, double temperature, const OptionalTensor& temperatures,
    std::optional<double> softcap_or_none)
    : all(actions.numel()), softcap(static_cast<float>(softcap_or_none.value_or(0.0))) {
  at::Tensor flat = mask ? mask->contiguous() : at::Tensor();
  const bool* taken = mask ? flat.const_data_ptr<bool>() : nullptr;
  index.reserve(all);
  for (int64_t i = 0; i < all; ++i) {
    if (!taken || taken[i]) index.push_back(i);
  }
  if (actions.scalar_type() == at::kInt) {
    take_actions<int32_t>(actions, *this);
  } else {
    take_actions<int64_t>(actions, *this);
  }
  // For an infinite temperature the inverse is not 0 but the smallest float: a logit of -inf times 0 would be NaN.
  constexpr float least = std::numeric_limits<float>::denorm_min();
  if (temperatures) {
    at::Tensor each = temperatures->to(at::kFloat).contiguous();
    for (int64_t i : index) inv_temperature.push_back(std::max(1.0f / each.const_data_ptr<float>()[i], least));
  }
  if (inv_temperature.empty()) inv_temperature.push_back(std::max(static_cast<float>(1.0 / temperature), least));
}

std::vector<int64_t> row_offsets(const at::Tensor& x, const std::vector<int64_t>& index) {
  std::vector<int64_t> offsets;
  offsets.reserve(index.size());
  for (int64_t i : index) {
    int64_t offset = 0;
    for (int64_t d = x.dim() - 2; d >= 0; --d) {
      offset += i % x.size(d) * x.stride(d);
      i /= x.size(d);
    }
    offsets.push_back(offset);
  }
  return offsets;
}

DType dtype_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return kFloat;
    case at::kBFloat16: return kBFloat16;
    case at::kHalf: return kHalf;
    default: TORCH_INTERNAL_ASSERT(false, "the cpu kernels take float32, bfloat16 and float16");
  }
}

void Sums::add(const Partial& part, float inv_temperature) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  if (part.maximum == kLowest && maximum == kLowest) {
    others += 1.0 + part.others;
    return;
  }
  if (part.maximum == kLowest || maximum == kLowest) {  // one of the two has weight 0, but its sum may be NaN
    const bool nan = std::isnan(part.others) || std::isnan(others);
    if (maximum == kLowest) *this = {part.maximum, part.others, part.spread};
    if (nan) others = std::numeric_limits<double>::quiet_NaN();
    return;
  }
  const bool ahead = part.maximum > maximum;
  const double difference = ahead ? static_cast<double>(maximum * inv_temperature) - part.maximum * inv_temperature
                                  : static_cast<double>(part.maximum * inv_temperature) - maximum * inv_temperature;
  const double scale = part.maximum == maximum ? 1.0 : std::exp(difference);
  const double shift = scale > 0 && difference > -infinity ? difference : 0.0;
  if (ahead) {
    spread = part.spread + scale * (spread + shift * (1.0 + others));
    others = part.others + scale * (1.0 + others);
    maximum = part.maximum;
  } else {
    spread += scale * (part.spread + shift * (1.0 + part.others));
    others += scale * (1.0 + part.others);
  }
}

Row Sums::finish(Transform transform, float action_logit, bool with_entropy) const {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  // As in row_values: row_max is 0 for a row with only -inf, and for a row with +inf.
  const bool infinite = (maximum == kLowest && others < -0.5) || maximum == infinity;
  const float row_max = infinite ? 0.0f : maximum * transform.inv_temperature;
  const auto log_sum = infinite ? (maximum > 0 ? infinity : -infinity) : static_cast<float>(std::log1p(others));
  float derivative;
  const float capped = kernels().rows.capped(action_logit, transform, &derivative);
  const float q = capped * transform.inv_temperature;
  const float log_prob = kernels().rows.shifted(capped, transform.inv_temperature, row_max) - log_sum;
  const double entropy = infinite ? log_sum : std::log1p(others) - spread / (1.0 + others);
  return {q, row_max + log_sum, log_prob, with_entropy ? static_cast<float>(entropy) : 0.0f, row_max, log_sum};
}

RowGradient shared_gradient(Cotangents d, float row_max, float log_sum, float entropy) {
  return {row_max, log_sum, entropy, d.dv - d.dlog_prob, d.dentropy};
}

float action_gradient(Cotangents d, const RowGradient& row, float action_logit, Transform transform) {
  float derivative;
  const float capped = kernels().rows.capped(action_logit, transform, &derivative);
  const float log_p = kernels().rows.shifted(capped, transform.inv_temperature, row.row_max) - row.log_sum;
  const float p = std::exp(log_p);
  // log_prob has the derivative 1 - p at the action. It comes from expm1, so a confident state keeps its gradient.
  // The product dv * p is a separate term, so an unlikely action keeps its gradient.
  float gradient = d.dq + d.dv * p - d.dlog_prob * std::expm1(log_p);
  if (d.dentropy != 0 && p > 0) gradient -= d.dentropy * p * (log_p + row.entropy);
  return gradient * derivative;
}

}  // namespace reval
