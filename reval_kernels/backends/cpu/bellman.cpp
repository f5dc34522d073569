// TD targets and Bellman losses (docs/method.md sections 2 to 4): one pass over the tokens, a trajectory at a time.
//
// backends/bellman.py computes the same in PyTorch. This file exists because it is faster than 20 lines of PyTorch for
// padded tokens: 7 to 9 times at 8 x 64 tokens, 5 to 30 times at 64 x 1,024 (docs/log.md, 2026-11-27).
//
// The sums of a trajectory are taken in double, in the order of its actions. The threads share out the trajectories,
// and the losses are added in the order of the trajectories. So no result depends on the number of threads.
//
// A new option of the loss changes no other C++ file. In this file it changes the schema at the end, one signature and
// the arithmetic.
//
// Letters: b a trajectory, h an action of a trajectory, i the flat index of a token.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

#include "tokens.h"

namespace reval {
namespace {

using at::Tensor;

// The flat indices of a trajectory's actions, in order.
class Places {
 public:
  Places(int64_t begin, int64_t end) : begin_(begin), size_(end - begin) {}
  explicit Places(const std::vector<int64_t>& some) : some_(some.data()), size_(static_cast<int64_t>(some.size())) {}
  int64_t size() const { return size_; }
  int64_t operator[](int64_t h) const { return some_ ? some_[h] : begin_ + h; }

 private:
  const int64_t* some_ = nullptr;
  int64_t begin_ = 0, size_;
};

// Reads the numbers of a contiguous copy of x as double. The numbers are first rounded to T, the dtype of `as`, which
// holds numbers of the policy.
template <typename T>
class Numbers {
 public:
  Numbers(const Tensor& x, const Tensor& as) : x_(x.to(as.scalar_type()).contiguous()) {}
  double operator[](int64_t i) const { return data_[i]; }

 private:
  Tensor x_;
  const T* data_ = x_.template const_data_ptr<T>();
};

// A new tensor, not initialised. set() takes a double and rounds it to T, the dtype of `like`.
template <typename T>
class Output {
 public:
  Output(at::IntArrayRef shape, const Tensor& like) : tensor(at::empty(shape, like.options())) {}
  void set(int64_t i, double value) const { data_[i] = static_cast<T>(value); }
  void clear(int64_t begin, int64_t end) const { std::fill(data_ + begin, data_ + end, T{}); }
  Tensor tensor;

 private:
  T* data_ = tensor.template mutable_data_ptr<T>();
};

// The trajectories of padded tokens [B, T], or of packed tokens [N] with cu_seqlens, with or without a mask.
class Layout {
 public:
  Layout(const Tensor& like, const OptionalTensor& mask, const OptionalTensor& cu_seqlens) {
    if (cu_seqlens) {  // library.py has checked that cu_seqlens rises from 0 to N
      Tensor each = cu_seqlens->to(at::kLong).contiguous();
      bounds_.assign(each.const_data_ptr<int64_t>(), each.const_data_ptr<int64_t>() + each.numel());
    } else {
      for (int64_t b = 0; b <= like.size(0); ++b) bounds_.push_back(b * like.size(1));
    }
    if (mask) mask_ = mask->contiguous();
  }

  int64_t size() const { return static_cast<int64_t>(bounds_.size()) - 1; }

  // Calls f(b, places of the actions of b) for every trajectory b. The outputs of b are set to zero before.
  template <typename T, typename Function>
  void for_each(const std::vector<const Output<T>*>& outputs, const Function& f) const {
    const bool* taken = mask_.defined() ? mask_.const_data_ptr<bool>() : nullptr;
    const int64_t grain = std::max<int64_t>(1, kTokens * size() / std::max<int64_t>(1, bounds_.back()));
    at::parallel_for(0, size(), grain, [&](int64_t first, int64_t last) {
      std::vector<int64_t> some;
      for (int64_t b = first; b < last; ++b) {
        const int64_t begin = bounds_[b], end = bounds_[b + 1];
        for (const Output<T>* out : outputs) out->clear(begin, end);
        if (!taken) {
          f(b, Places(begin, end));
          continue;
        }
        some.clear();
        for (int64_t i = begin; i < end; ++i) {
          if (taken[i]) some.push_back(i);
        }
        f(b, Places(some));
      }
    });
  }

 private:
  static constexpr int64_t kTokens = 1 << 14;  // the least number of tokens for one thread
  std::vector<int64_t> bounds_;
  Tensor mask_;
};

// Calls f with a number of the C++ type for x: double for float64, float otherwise.
template <typename Function>
auto in_dtype_of(const Tensor& x, const Function& f) {
  return x.scalar_type() == at::kDouble ? f(double{}) : f(float{});
}

// The integers of `Level` in contract.py.
enum Level { kTrajectory = 0, kToken = 1, kSubtrajectory = 2 };

// The numbers of a tensor that may be missing.
template <typename T>
std::optional<Numbers<T>> numbers(const OptionalTensor& x, const Tensor& as) {
  return x ? std::optional<Numbers<T>>(std::in_place, *x, as) : std::nullopt;
}

// The loss of one trajectory. residual() returns its residual. trajectory(), token() and subtrajectory() return the sum
// of squares of their level and write dq, dv and dlog. scale is 2 / normalizer.
template <typename T>
struct Loss {
  const Numbers<T>&q, &v, &log_prob;
  const std::optional<Numbers<T>>&q_ref, &v_ref, &log_prob_ref;  // one number per token
  const std::optional<Numbers<T>>& returns;                      // one per trajectory, if q_ref is missing
  const Output<T>&dq, &dv, &dlog;
  double scale;
  bool semi_gradient;

  // The reference is subtracted first: each difference is exactly 0 where policy and reference agree.
  double delta_q(int64_t i) const { return q[i] - (*q_ref)[i]; }
  double delta_v(int64_t i) const { return v[i] - (*v_ref)[i]; }
  double delta_log(int64_t i) const { return log_prob[i] - (*log_prob_ref)[i]; }

  double residual(int64_t b, const Places& at, double outcome) const {
    double sum = 0;
    if (returns) {
      for (int64_t h = 0; h < at.size(); ++h) sum += log_prob[at[h]];
      // The policy's return is rounded to T as the reference's was: equal policies have the residual 0.
      return static_cast<T>(v[at[0]] + sum) - (*returns)[b] - outcome;
    }
    for (int64_t h = 0; h < at.size(); ++h) sum += delta_log(at[h]);
    return delta_v(at[0]) + sum - outcome;
  }

  double trajectory(const Places& at, double residual) const {
    dv.set(at[0], scale * residual);
    for (int64_t h = 0; h < at.size(); ++h) dlog.set(at[h], scale * residual);
    return residual * residual;
  }

  double token(const Places& at, double outcome) const {
    double loss = 0;
    for (int64_t h = 0; h < at.size(); ++h) {
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
    for (int64_t h = at.size(); h-- > 0;) {
      to_go += delta_log(at[h]);
      terms[h] = delta_v(at[h]) + to_go;
    }
    for (int64_t h = 0; h < at.size(); ++h) {
      dv.set(at[h], scale * terms[h]);
      dlog.set(at[h], up_to += scale * terms[h]);
      loss += terms[h] * terms[h];
    }
    return loss;
  }
};

std::vector<Tensor> td_targets(
    const Tensor& q, const Tensor& v, const Tensor& q_ref, const Tensor& v_ref, const Tensor& rewards,
    const OptionalTensor& mask, const OptionalTensor& cu_seqlens, double beta, double gamma) {
  const Layout layout(q, mask, cu_seqlens);
  return in_dtype_of(q, [&](auto number) -> std::vector<Tensor> {
    using T = decltype(number);
    const Numbers<T> own_q(q, q), own_v(v, q), ref_q(q_ref, q), ref_v(v_ref, q), reward(rewards, q);
    const Output<T> target(q.sizes(), q), error(q.sizes(), q), endogenous(q.sizes(), q);
    layout.for_each<T>({&target, &error, &endogenous}, [&](int64_t b, const Places& at) {
      for (int64_t h = 0; h < at.size(); ++h) {
        const int64_t i = at[h];
        const bool last = h + 1 == at.size();
        const double next = last ? 0.0 : own_v[at[h + 1]], ref_next = last ? 0.0 : ref_v[at[h + 1]];
        const double outcome = last ? reward[b] / beta : 0.0, own = ref_q[i] - gamma * ref_next;
        endogenous.set(i, own);
        target.set(i, own + outcome + gamma * next);
        // subtract the reference first: each difference is exactly 0 where policy and reference agree
        error.set(i, (own_q[i] - ref_q[i]) - gamma * (next - ref_next) - outcome);
      }
    });
    return {target.tensor, error.tensor, endogenous.tensor};
  });
}

std::vector<Tensor> td_targets_backward(
    const Tensor& d_target, const Tensor& d_error, const OptionalTensor& mask, const OptionalTensor& cu_seqlens,
    double gamma) {
  const Layout layout(d_error, mask, cu_seqlens);
  return in_dtype_of(d_error, [&](auto number) -> std::vector<Tensor> {
    using T = decltype(number);
    const Numbers<T> to_target(d_target, d_error), to_error(d_error, d_error);
    const Output<T> dq(d_error.sizes(), d_error), dv(d_error.sizes(), d_error);
    layout.for_each<T>({&dq, &dv}, [&](int64_t, const Places& at) {
      for (int64_t h = 0; h < at.size(); ++h) {
        dq.set(at[h], to_error[at[h]]);
        if (h > 0) dv.set(at[h], gamma * (to_target[at[h - 1]] - to_error[at[h - 1]]));
      }
    });
    return {dq.tensor, dv.tensor};
  });
}

std::vector<Tensor> bellman_loss(
    const Tensor& q, const Tensor& v, const Tensor& log_prob, const OptionalTensor& q_ref, const OptionalTensor& v_ref,
    const OptionalTensor& log_prob_ref, const OptionalTensor& returns, const Tensor& rewards,
    const OptionalTensor& mask, const OptionalTensor& cu_seqlens, double beta, int64_t level, bool semi_gradient,
    const OptionalTensor& normalizer) {
  TORCH_INTERNAL_ASSERT(level >= kTrajectory && level <= kSubtrajectory, "unknown level ", level);
  const Layout layout(q, mask, cu_seqlens);
  const double divisor = normalizer ? normalizer->item<double>() : std::max<double>(1, layout.size());
  return in_dtype_of(q, [&](auto number) -> std::vector<Tensor> {
    using T = decltype(number);
    const Numbers<T> own_q(q, q), own_v(v, q), own_log(log_prob, q), reward(rewards, q);
    const auto ref_q = numbers<T>(q_ref, q), ref_v = numbers<T>(v_ref, q), ref_log = numbers<T>(log_prob_ref, q),
               ref_returns = numbers<T>(returns, q);
    const Output<T> dq(q.sizes(), q), dv(q.sizes(), q), dlog(q.sizes(), q), residual({layout.size()}, q), loss({}, q);
    const Loss<T> of{
        own_q, own_v, own_log, ref_q, ref_v, ref_log, ref_returns, dq, dv, dlog, 2 / divisor, semi_gradient};
    std::vector<double> losses(layout.size());
    layout.for_each<T>({&dq, &dv, &dlog}, [&](int64_t b, const Places& at) {
      residual.set(b, 0.0);
      if (at.size() == 0) return;
      const double outcome = reward[b] / beta, whole = of.residual(b, at, outcome);
      residual.set(b, whole);
      losses[b] = level == kTrajectory ? of.trajectory(at, whole)
                  : level == kToken    ? of.token(at, outcome)
                                       : of.subtrajectory(at, outcome);
    });
    double total = 0;
    for (double x : losses) total += x;
    loss.set(0, total / divisor);
    return {loss.tensor, residual.tensor, dq.tensor, dv.tensor, dlog.tensor};
  });
}

std::vector<Tensor> bellman_loss_backward(
    const Tensor& d_loss, const OptionalTensor& d_residual, const Tensor& unit_q, const Tensor& unit_v,
    const Tensor& unit_log_prob, const OptionalTensor& mask, const OptionalTensor& cu_seqlens) {
  const Tensor& like = unit_q;
  const Layout layout(like, mask, cu_seqlens);
  return in_dtype_of(like, [&](auto number) -> std::vector<Tensor> {
    using T = decltype(number);
    const Numbers<T> one_q(unit_q, like), one_v(unit_v, like), one_log(unit_log_prob, like);
    const Numbers<T> of_loss(d_loss, like);
    const auto of_residual = numbers<T>(d_residual, like);
    const Output<T> dq(like.sizes(), like), dv(like.sizes(), like), dlog(like.sizes(), like);
    layout.for_each<T>({&dq, &dv, &dlog}, [&](int64_t b, const Places& at) {
      const double residual = of_residual ? (*of_residual)[b] : 0.0;
      for (int64_t h = 0; h < at.size(); ++h) {
        const int64_t i = at[h];
        dq.set(i, of_loss[0] * one_q[i]);
        dv.set(i, of_loss[0] * one_v[i] + (h == 0 ? residual : 0.0));
        dlog.set(i, of_loss[0] * one_log[i] + residual);
      }
    });
    return {dq.tensor, dv.tensor, dlog.tensor};
  });
}

}  // namespace
}  // namespace reval

#define LAYOUT "Tensor? mask, Tensor? cu_seqlens"

TORCH_LIBRARY_FRAGMENT(reval_kernels_cpu, m) {
  m.def(
      "td_targets(Tensor q, Tensor v, Tensor q_ref, Tensor v_ref, Tensor rewards, " LAYOUT
      ", float beta, float gamma) -> Tensor[]",
      &reval::td_targets);
  m.def(
      "td_targets_backward(Tensor d_target, Tensor d_error, " LAYOUT ", float gamma) -> Tensor[]",
      &reval::td_targets_backward);
  m.def(
      "bellman_loss(Tensor q, Tensor v, Tensor log_prob, Tensor? q_ref, Tensor? v_ref, Tensor? log_prob_ref, "
      "Tensor? returns, Tensor rewards, " LAYOUT
      ", float beta, int level, bool semi_gradient, Tensor? normalizer) -> Tensor[]",
      &reval::bellman_loss);
  m.def(
      "bellman_loss_backward(Tensor d_loss, Tensor? d_residual, Tensor unit_q, Tensor unit_v, Tensor unit_log_prob, "
      LAYOUT ") -> Tensor[]",
      &reval::bellman_loss_backward);
}
