// TD targets and Bellman losses (METHOD.md sections 2 to 4): one pass over the tokens, a trajectory at a time.
//
// The sums of a trajectory are taken in double, in the order of its actions; trajectories are shared out to the threads
// and their losses added in order, so no result depends on the number of threads.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "ops.h"

namespace reval {
namespace {

using at::Tensor;

// Where each trajectory's actions are, padded [B, T] or packed [N] with cu_seqlens, masked or not.
class Layout {
 public:
  Layout(const Tensor& like, const OptionalTensor& mask, const OptionalTensor& cu_seqlens) {
    const int64_t tokens = like.numel();
    if (cu_seqlens) {
      Tensor each = cu_seqlens->to(at::kLong).contiguous();
      bounds_.assign(each.const_data_ptr<int64_t>(), each.const_data_ptr<int64_t>() + each.numel());
      bool rising = bounds_.front() == 0 && bounds_.back() == tokens;
      for (size_t b = 1; b < bounds_.size(); ++b) rising = rising && bounds_[b - 1] <= bounds_[b];
      TORCH_CHECK_VALUE(
          rising, "cu_seqlens must start at 0, never fall and end at N = ", tokens, ", got ",
          at::IntArrayRef(bounds_));
    } else {
      for (int64_t b = 0; b <= like.size(0); ++b) bounds_.push_back(b * like.size(1));
    }
    if (mask) mask_ = mask->contiguous();
  }

  int64_t size() const { return static_cast<int64_t>(bounds_.size()) - 1; }

  // Runs f(trajectory, the places of its actions in order).
  template <typename Function>
  void for_each(const Function& f) const {
    const bool* taken = mask_.defined() ? mask_.const_data_ptr<bool>() : nullptr;
    const int64_t grain = std::max<int64_t>(1, 4096 * size() / std::max<int64_t>(1, bounds_.back()));
    at::parallel_for(0, size(), grain, [&](int64_t begin, int64_t end) {
      std::vector<int64_t> places;
      for (int64_t b = begin; b < end; ++b) {
        places.clear();
        for (int64_t i = bounds_[b]; i < bounds_[b + 1]; ++i) {
          if (!taken || taken[i]) places.push_back(i);
        }
        f(b, places);
      }
    });
  }

 private:
  std::vector<int64_t> bounds_;
  Tensor mask_;
};

// A tensor's numbers as float64, in the layout's order. Rounded to `as`'s dtype first, like the policy's.
class Numbers {
 public:
  Numbers(const Tensor& x, const Tensor& as) : x_(x.to(as.scalar_type()).contiguous()) {
    if (x_.scalar_type() == at::kFloat) {
      floats_ = x_.const_data_ptr<float>();
    } else {
      doubles_ = x_.const_data_ptr<double>();
    }
  }
  double operator[](int64_t i) const { return floats_ ? floats_[i] : doubles_[i]; }

 private:
  Tensor x_;
  const float* floats_ = nullptr;
  const double* doubles_ = nullptr;
};

// A new tensor of zeros that is written in float64.
class Output {
 public:
  Output(at::IntArrayRef shape, const Tensor& like) : tensor(at::zeros(shape, like.options())) {
    if (tensor.scalar_type() == at::kFloat) {
      floats_ = tensor.mutable_data_ptr<float>();
    } else {
      doubles_ = tensor.mutable_data_ptr<double>();
    }
  }
  void set(int64_t i, double value) const {
    if (floats_) {
      floats_[i] = static_cast<float>(value);
    } else {
      doubles_[i] = value;
    }
  }
  Tensor tensor;

 private:
  float* floats_ = nullptr;
  double* doubles_ = nullptr;
};

using Places = std::vector<int64_t>;

// What the three levels read and write of one trajectory.
struct Loss {
  const Numbers &q, &v, &log_prob;
  const std::vector<Numbers>& reference;  // q, v, log_prob per token, or the returns alone
  const Output &dq, &dv, &dlog;
  double scale;
  bool semi_gradient;

  // Policy minus reference before anything else: exactly 0 where they agree.
  double delta_q(int64_t i) const { return q[i] - reference[0][i]; }
  double delta_v(int64_t i) const { return v[i] - reference[1][i]; }
  double delta_log(int64_t i) const { return log_prob[i] - reference[2][i]; }

  double residual(int64_t b, const Places& at, double outcome) const {
    double sum = 0;
    if (reference.size() == 1) {
      for (int64_t i : at) sum += log_prob[i];
      return v[at.front()] + sum - reference[0][b] - outcome;
    }
    for (int64_t i : at) sum += delta_log(i);
    return delta_v(at.front()) + sum - outcome;
  }

  double trajectory(const Places& at, double residual) const {
    dv.set(at.front(), scale * residual);
    for (int64_t i : at) dlog.set(i, scale * residual);
    return residual * residual;
  }

  double token(const Places& at, double outcome) const {
    double loss = 0;
    for (size_t h = 0; h < at.size(); ++h) {
      const bool last = h + 1 == at.size();
      const double error = delta_q(at[h]) - (last ? outcome : delta_v(at[h + 1]));
      dq.set(at[h], scale * error);
      if (!semi_gradient && !last) dv.set(at[h + 1], -scale * error);
      loss += error * error;
    }
    return loss;
  }

  double subtrajectory(const Places& at, double outcome) const {
    std::vector<double> terms(at.size());
    double to_go = -outcome, loss = 0, up_to = 0;
    for (size_t h = at.size(); h-- > 0;) {
      to_go += delta_log(at[h]);
      terms[h] = delta_v(at[h]) + to_go;
    }
    for (size_t h = 0; h < at.size(); ++h) {
      dv.set(at[h], scale * terms[h]);
      dlog.set(at[h], up_to += scale * terms[h]);
      loss += terms[h] * terms[h];
    }
    return loss;
  }
};

std::vector<Numbers> numbers(at::TensorList tensors, const Tensor& as) {
  std::vector<Numbers> out;
  for (const auto& x : tensors) out.emplace_back(x, as);
  return out;
}

}  // namespace

std::vector<Tensor> td_targets(
    const Tensor& q, const Tensor& v, at::TensorList reference, const Tensor& rewards, const OptionalTensor& mask,
    const OptionalTensor& cu_seqlens, double beta, double gamma) {
  const Layout layout(q, mask, cu_seqlens);
  const Numbers own_q(q, q), own_v(v, q), ref_q(reference[0], q), ref_v(reference[1], q), reward(rewards, q);
  const Output target(q.sizes(), q), error(q.sizes(), q), endogenous(q.sizes(), q);
  layout.for_each([&](int64_t b, const Places& at) {
    for (size_t h = 0; h < at.size(); ++h) {
      const int64_t i = at[h];
      const bool last = h + 1 == at.size();
      const double next = last ? 0.0 : own_v[at[h + 1]], ref_next = last ? 0.0 : ref_v[at[h + 1]];
      const double outcome = last ? reward[b] / beta : 0.0, own = ref_q[i] - gamma * ref_next;
      endogenous.set(i, own);
      target.set(i, own + outcome + gamma * next);
      // policy minus reference before anything else: exactly 0 where they agree
      error.set(i, (own_q[i] - ref_q[i]) - gamma * (next - ref_next) - outcome);
    }
  });
  return {target.tensor, error.tensor, endogenous.tensor};
}

std::vector<Tensor> td_targets_backward(
    const Tensor& d_target, const Tensor& d_error, const OptionalTensor& mask, const OptionalTensor& cu_seqlens,
    double gamma) {
  const Layout layout(d_error, mask, cu_seqlens);
  const Numbers to_target(d_target, d_error), to_error(d_error, d_error);
  const Output dq(d_error.sizes(), d_error), dv(d_error.sizes(), d_error);
  layout.for_each([&](int64_t, const Places& at) {
    for (size_t h = 0; h < at.size(); ++h) {
      dq.set(at[h], to_error[at[h]]);
      if (h > 0) dv.set(at[h], gamma * (to_target[at[h - 1]] - to_error[at[h - 1]]));
    }
  });
  return {dq.tensor, dv.tensor};
}

std::vector<Tensor> bellman_loss(
    const Tensor& q, const Tensor& v, const Tensor& log_prob, at::TensorList reference, const Tensor& rewards,
    const OptionalTensor& mask, const OptionalTensor& cu_seqlens, double beta, c10::string_view level,
    bool semi_gradient, double normalizer) {
  const Layout layout(q, mask, cu_seqlens);
  const Numbers own_q(q, q), own_v(v, q), own_log(log_prob, q), reward(rewards, q);
  const auto anchor = numbers(reference, q);
  const Output dq(q.sizes(), q), dv(q.sizes(), q), dlog(q.sizes(), q), residual({layout.size()}, q), loss({}, q);
  const Loss of{own_q, own_v, own_log, anchor, dq, dv, dlog, 2 / normalizer, semi_gradient};
  std::vector<double> losses(layout.size());
  layout.for_each([&](int64_t b, const Places& at) {
    if (at.empty()) return;
    const double outcome = reward[b] / beta, whole = of.residual(b, at, outcome);
    residual.set(b, whole);
    losses[b] = level == "trajectory" ? of.trajectory(at, whole)
                : level == "token"    ? of.token(at, outcome)
                                      : of.subtrajectory(at, outcome);
  });
  double total = 0;
  for (double x : losses) total += x;
  loss.set(0, total / normalizer);
  return {loss.tensor, residual.tensor, dq.tensor, dv.tensor, dlog.tensor};
}

std::vector<Tensor> bellman_loss_backward(
    const Tensor& d_loss, const Tensor& d_residual, at::TensorList unit, const OptionalTensor& mask,
    const OptionalTensor& cu_seqlens) {
  const Tensor& like = unit[0];
  const Layout layout(like, mask, cu_seqlens);
  const auto at_one = numbers(unit, like);
  const Numbers of_loss(d_loss, like), of_residual(d_residual, like);
  const Output dq(like.sizes(), like), dv(like.sizes(), like), dlog(like.sizes(), like);
  layout.for_each([&](int64_t b, const Places& at) {
    for (int64_t i : at) {
      dq.set(i, of_loss[0] * at_one[0][i]);
      dv.set(i, of_loss[0] * at_one[1][i] + (i == at.front() ? of_residual[b] : 0.0));
      dlog.set(i, of_loss[0] * at_one[2][i] + of_residual[b]);
    }
  });
  return {dq.tensor, dv.tensor, dlog.tensor};
}

}  // namespace reval
