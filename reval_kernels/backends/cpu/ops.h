// The functions behind torch.ops.reval_kernels_cpu, and the access to their per-token inputs and outputs. bellman.cpp
// registers its functions itself.
//
// Letters: [...] is the shape of the tokens, M unmasked tokens, V words of the vocabulary, D width.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstring>
#include <optional>
#include <vector>

#include "tokens.h"

namespace reval {

// Six new fp32 tensors [...], filled with zeros: q, v, log_prob, entropy, row_max, log_sum.
struct TokenOutputs {
  std::vector<at::Tensor> tensors;
  explicit TokenOutputs(at::IntArrayRef shape);
  void set(int64_t token, const Row& row);
};

// Seven fp32 tensors [...]. The statistics are row_max, log_sum, entropy; the cotangents dq, dv, dlog_prob, dentropy.
struct TokenInputs {
  std::vector<at::Tensor> tensors;
  TokenInputs(at::TensorList statistics, at::TensorList cotangents);
  float get(int which, int64_t token) const { return tensors[which].const_data_ptr<float>()[token]; }
  Cotangents cotangents(int64_t t) const { return {get(3, t), get(4, t), get(5, t), get(6, t)}; }
  RowGradient gradient(int64_t t) const { return shared_gradient(cotangents(t), get(0, t), get(1, t), get(2, t)); }
};

void store_scalar(DType type, void* row, int64_t index, float value);

std::vector<at::Tensor> token_values(
    const at::Tensor& logits, const at::Tensor& actions, const OptionalTensor& mask, double temperature,
    const OptionalTensor& temperatures, std::optional<double> softcap, bool with_entropy);

void token_values_backward(
    const at::Tensor& logits, const at::Tensor& actions, const OptionalTensor& mask, double temperature,
    const OptionalTensor& temperatures, std::optional<double> softcap, at::TensorList statistics,
    at::TensorList cotangents, const at::Tensor& out);

std::vector<at::Tensor> linear_token_values(
    const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& bias, const at::Tensor& actions,
    const OptionalTensor& mask, double temperature, const OptionalTensor& temperatures, std::optional<double> softcap,
    bool with_entropy);

std::vector<at::Tensor> linear_token_values_backward(
    const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& bias, const at::Tensor& actions,
    const OptionalTensor& mask, double temperature, const OptionalTensor& temperatures, std::optional<double> softcap,
    at::TensorList statistics, at::TensorList cotangents, bool needs_hidden, bool needs_weight, bool needs_bias,
    at::TensorList kept);

// The six value tensors, and the tensors `kept` for the backward pass above (kept.h). The first tensor of `kept` is the
// memory of d_weight.
std::vector<at::Tensor> linear_keeping(
    const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& bias, const at::Tensor& actions,
    const OptionalTensor& mask, double temperature, const OptionalTensor& temperatures, std::optional<double> softcap);

// The six value tensors, and `expected` [M, D] (frozen_head.py): for every unmasked token, the sum over all words
// except the action of p * dz/dlogit * weight[word]. This sum is the part of the hidden state's gradient that does not
// depend on the cotangents.
std::vector<at::Tensor> linear_expected(
    const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& bias, const at::Tensor& actions,
    const OptionalTensor& mask, double temperature, const OptionalTensor& temperatures, std::optional<double> softcap);

}  // namespace reval
