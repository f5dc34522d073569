// TD targets and Bellman losses (METHOD.md sections 2 to 4): one pass over the tokens, a trajectory at a time.
//
// The sums of a trajectory are taken in double, in the order of its actions; trajectories are shared out to the threads
// and their losses added in order, so no result depends on the number of threads.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "ops.h"

namespace reval {
namespace {

using at::Tensor;

// Where a trajectory's actions are, in order.
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

// A tensor's numbers as float64, in the layout's order. Rounded to `as`'s dtype T first, like the policy's.
template <typename T>
class Numbers {
 public:
  Numbers(const Tensor& x, const Tensor& as) : x_(x.to(as.scalar_type()).contiguous()) {}
  double operator[](int64_t i) const { return data_[i]; }

 private:
  Tensor x_;
  const T* data_ = x_.template const_data_ptr<T>();
};

// A new tensor, uninitialised, that is written in float64.
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

// Padded [B, T] or packed [N] with cu_seqlens, masked or not.
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

  // Runs f(trajectory, the places of its actions) after zeroing the trajectory's part of the outputs.
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
  static constexpr int64_t kTokens = 1 << 14;  // that are worth a thread
  std::vector<int64_t> bounds_;
  Tensor mask_;
};

// Runs f with a number of x's dtype.
template <typename Function>
auto in_dtype_of(const Tensor& x, const Function& f) {
  return x.scalar_type() == at::kDouble ? f(double{}) : f(float{});
}

// What the three levels read and write of one trajectory.
template <typename T>
struct Loss {
  const Numbers<T>&q, &v, &log_prob;
  const std::vector<Numbers<T>>& reference;  // q, v, log_prob per token, or the returns alone
  const Output<T>&dq, &dv, &dlog;
  double scale;
  bool semi_gradient;

  // Policy minus reference before anything else: exactly 0 where they agree.
  double delta_q(int64_t i) const { return q[i] - reference[0][i]; }
  double delta_v(int64_t i) const { return v[i] - reference[1][i]; }
  double delta_log(int64_t i) const { return log_prob[i] - reference[2][i]; }

  double residual(int64_t b, const Places& at, double outcome) const {
    double sum = 0;
    if (reference.size() == 1) {
      for (int64_t h = 0; h < at.size(); ++h) sum += log_prob[at[h]];
      return v[at[0]] + sum - reference[0][b] - outcome;
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

template <typename T>
std::vector<Numbers<T>> numbers(at::TensorList tensors, const Tensor& as) {
  std::vector<Numbers<T>> out;
  for (const auto& x : tensors) out.emplace_back(x, as);
  return out;
}

}  // namespace

std::vector<Tensor> td_targets(
    const Tensor& q, const Tensor& v, at::TensorList reference, const Tensor& rewards, const OptionalTensor& mask,
    const OptionalTensor& cu_seqlens, double beta, double gamma) {
  const Layout layout(q, mask, cu_seqlens);
  return in_dtype_of(q, [&](auto number) -> std::vector<Tensor> {
    using T = decltype(number);
    const Numbers<T> own_q(q, q), own_v(v, q), ref_q(reference[0], q), ref_v(reference[1], q), reward(rewards, q);
    const Output<T> target(q.sizes(), q), error(q.sizes(), q), endogenous(q.sizes(), q);
    layout.for_each<T>({&target, &error, &endogenous}, [&](int64_t b, const Places& at) {
      for (int64_t h = 0; h < at.size(); ++h) {
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
    const Tensor& q, const Tensor& v, const Tensor& log_prob, at::TensorList reference, const Tensor& rewards,
    const OptionalTensor& mask, const OptionalTensor& cu_seqlens, double beta, c10::string_view level,
    bool semi_gradient, double normalizer) {
  const Layout layout(q, mask, cu_seqlens);
  return in_dtype_of(q, [&](auto number) -> std::vector<Tensor> {
    using T = decltype(number);
    const Numbers<T> own_q(q, q), own_v(v, q), own_log(log_prob, q), reward(rewards, q);
    const auto anchor = numbers<T>(reference, q);
    const Output<T> dq(q.sizes(), q), dv(q.sizes(), q), dlog(q.sizes(), q), residual({layout.size()}, q), loss({}, q);
    const Loss<T> of{own_q, own_v, own_log, anchor, dq, dv, dlog, 2 / normalizer, semi_gradient};
    std::vector<double> losses(layout.size());
    layout.for_each<T>({&dq, &dv, &dlog}, [&](int64_t b, const Places& at) {
      residual.set(b, 0.0);
      if (at.size() == 0) return;
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
  });
}

std::vector<Tensor> bellman_loss_backward(
    const Tensor& d_loss, const Tensor& d_residual, at::TensorList unit, const OptionalTensor& mask,
    const OptionalTensor& cu_seqlens) {
  const Tensor& like = unit[0];
  const Layout layout(like, mask, cu_seqlens);
  return in_dtype_of(like, [&](auto number) -> std::vector<Tensor> {
    using T = decltype(number);
    const auto at_one = numbers<T>(unit, like);
    const Numbers<T> of_loss(d_loss, like), of_residual(d_residual, like);
    const Output<T> dq(like.sizes(), like), dv(like.sizes(), like), dlog(like.sizes(), like);
    layout.for_each<T>({&dq, &dv, &dlog}, [&](int64_t b, const Places& at) {
      for (int64_t h = 0; h < at.size(); ++h) {
        const int64_t i = at[h];
        dq.set(i, of_loss[0] * at_one[0][i]);
        dv.set(i, of_loss[0] * at_one[1][i] + (h == 0 ? of_residual[b] : 0.0));
        dlog.set(i, of_loss[0] * at_one[2][i] + of_residual[b]);
      }
    });
    return {dq.tensor, dv.tensor, dlog.tensor};
  });
}

}  // namespace reval
