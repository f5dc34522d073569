// Registers the kernels with torch's dispatcher as torch.ops.reval_kernels_cpu.
#include "ops.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cstring>

#include "memory.h"

namespace reval {

TokenOutputs::TokenOutputs(at::IntArrayRef shape) {
  for (int i = 0; i < 6; ++i) tensors.push_back(at::zeros(shape, at::kFloat));
}

void TokenOutputs::set(int64_t token, const Row& row) {
  const float values[] = {row.q, row.v, row.log_prob, row.entropy, row.row_max, row.log_sum};
  for (int i = 0; i < 6; ++i) tensors[i].mutable_data_ptr<float>()[token] = values[i];
}

TokenInputs::TokenInputs(at::TensorList statistics, at::TensorList cotangents) {
  for (const auto& x : statistics) tensors.push_back(x.to(at::kFloat).contiguous());
  for (const auto& x : cotangents) tensors.push_back(x.to(at::kFloat).contiguous());
}

void store_scalar(DType type, void* row, int64_t index, float value) {
  if (type == kFloat) {
    static_cast<float*>(row)[index] = value;
  } else if (type == kBFloat16) {
    static_cast<at::BFloat16*>(row)[index] = value;
  } else {
    static_cast<at::Half*>(row)[index] = value;
  }
}

namespace {

std::string isa() { return kernels().name; }

at::Tensor mapped(void (*function)(const float*, int64_t, float*), const at::Tensor& x) {
  at::Tensor in = x.contiguous(), out = at::empty_like(in);
  function(in.const_data_ptr<float>(), in.numel(), out.mutable_data_ptr<float>());
  return out;
}

at::Tensor exp(const at::Tensor& x) { return mapped(kernels().rows.exp, x); }
at::Tensor tanh(const at::Tensor& x) { return mapped(kernels().rows.tanh, x); }

at::Tensor gradient_like(const at::Tensor& x) { return empty_gradient(x.sizes(), x.scalar_type()); }

}  // namespace
}  // namespace reval

#define HEAD "Tensor hidden, Tensor weight, Tensor? bias, Tensor actions, "
#define TRANSFORM "Tensor? mask, float temperature, Tensor? temperatures, float? softcap"

TORCH_LIBRARY(reval_kernels_cpu, m) {
  m.def("isa() -> str", &reval::isa);
  m.def("exp(Tensor x) -> Tensor", &reval::exp);
  m.def("tanh(Tensor x) -> Tensor", &reval::tanh);
  m.def("gradient_like(Tensor x) -> Tensor", &reval::gradient_like);
  m.def(
      "token_values(Tensor logits, Tensor actions, " TRANSFORM ", bool with_entropy) -> Tensor[]",
      &reval::token_values);
  m.def(
      "token_values_backward(Tensor logits, Tensor actions, " TRANSFORM
      ", Tensor[] statistics, Tensor[] cotangents, Tensor(a!) out) -> ()",
      &reval::token_values_backward);
  m.def(
      "linear_token_values(" HEAD TRANSFORM ", bool with_entropy) -> Tensor[]",
      &reval::linear_token_values);
  // The returned d_weight is the first tensor of `kept`. This is allowed because only the opaque ops of library.py
  // call this op.
  m.def(
      "linear_token_values_backward(" HEAD TRANSFORM
      ", Tensor[] statistics, Tensor[] cotangents, bool needs_hidden, bool needs_weight, bool needs_bias, "
      "Tensor(a!)[] kept) -> Tensor[]",
      &reval::linear_token_values_backward);
  m.def("linear_keeping(" HEAD TRANSFORM ") -> Tensor[]", &reval::linear_keeping);
  m.def("linear_expected(" HEAD TRANSFORM ") -> Tensor[]", &reval::linear_expected);
}
