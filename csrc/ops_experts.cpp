// The operator of a mixture of experts.
#include "experts.h"
#include "kernels/half.h"
#include "ops.h"

#include <vector>

namespace cpullm {
namespace {

constexpr const char* kExperts = "cpullm::experts";
constexpr int64_t kMostExperts = 1 << 20, kMostWidth = 1 << 24;  // products of sizes stay far from overflow
constexpr int64_t kRows = 4096;  // pairs of a token and an expert at a time: bounds the memory

thread_local Buffer workspace;  // of the thread that calls the operator
thread_local std::vector<int64_t> indices;
thread_local std::vector<float> scales;

// index [tokens, top_k] -> indices; every one is an expert.
void check_index(const Tensor& index, int64_t tokens, int64_t experts) {
  const bool wide = index.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(index.is_cpu() && index.dim() == 2 && index.size(0) == tokens && index.size(1) > 0 &&
                      (wide || index.scalar_type() == ScalarType::Int),
                  kExperts, ": index must be an int64 or int32 CPU tensor [", tokens, ", top_k], got ",
                  shape_of(index));
  const Tensor flat = index.is_contiguous() ? index : torch::stable::contiguous(index);
  const void* p = flat.const_data_ptr();
  const int64_t top_k = index.size(1);
  STD_TORCH_CHECK(top_k <= kMostExperts, kExperts, ": index chooses ", top_k, " experts per token, at most ",
                  kMostExperts, " are supported");
  indices.resize(size_t(index.numel()));
  for (int64_t i = 0; i < index.numel(); ++i) {
    const int64_t e = wide ? static_cast<const int64_t*>(p)[i] : int64_t(static_cast<const int32_t*>(p)[i]);
    STD_TORCH_CHECK(e >= 0 && e < experts, kExperts, ": index[", i / top_k, ", ", i % top_k, "] = ", e,
                    " is outside [0, ", experts, ")");
    indices[size_t(i)] = e;
  }
}

// weights, of index's shape -> scales.
void check_weights(const Tensor& weights, const Tensor& index) {
  STD_TORCH_CHECK(weights.is_cpu() && shape_of(weights) == shape_of(index), kExperts,
                  ": weights must be a CPU tensor of index's shape ", shape_of(index), ", got ", shape_of(weights));
  const Float type = float_type(weights, kExperts, "weights");
  const Tensor flat = weights.is_contiguous() ? weights : torch::stable::contiguous(weights);
  scales.resize(size_t(weights.numel()));
  for (int64_t i = 0; i < weights.numel(); ++i) scales[size_t(i)] = load_float(flat.const_data_ptr(), i, type);
}

Tensor experts(const Tensor& x, const Tensor& index, const Tensor& weights, const Tensor& gate_up_codes,
               const Tensor& gate_up_scales, const OptionalTensor& gate_up_zeros, const Tensor& down_codes,
               const Tensor& down_scales, const OptionalTensor& down_zeros, int64_t count, int64_t hidden,
               int64_t intermediate, int64_t gate_up_group, int64_t down_group, std::string act, int64_t compute) {
  STD_TORCH_CHECK(x.defined() && x.is_cpu() && x.dim() == 2 && x.size(1) == hidden, kExperts,
                  ": x must be a CPU tensor [tokens, hidden = ", hidden, "], got ", shape_of(x));
  STD_TORCH_CHECK(hidden > 0 && hidden <= kMostWidth, kExperts, ": hidden must lie in [1, ", kMostWidth, "], got ",
                  hidden);
  STD_TORCH_CHECK(count > 0 && count <= kMostExperts, kExperts, ": experts must lie in [1, ", kMostExperts, "], got ",
                  count);
  STD_TORCH_CHECK(intermediate > 0 && intermediate <= kMostWidth, kExperts, ": intermediate must lie in [1, ",
                  kMostWidth, "], got ", intermediate);
  STD_TORCH_CHECK(compute >= int64_t(Compute::int8) && compute <= int64_t(Compute::bf16), kExperts,
                  ": compute must be 0 (int8), 1 (fp32) or 2 (bf16), got ", compute);
  const int64_t tokens = x.size(0);
  Experts e;
  e.count = count;
  e.hidden = hidden;
  e.intermediate = intermediate;
  e.act = act_of(kExperts, act);
  e.compute = Compute(compute);
  e.gate_up = check_weight("cpullm::experts: gate_up", gate_up_codes, gate_up_scales, gate_up_zeros,
                           count * round_up(2 * intermediate, kPanel), hidden, gate_up_group);
  e.down = check_weight("cpullm::experts: down", down_codes, down_scales, down_zeros, count * round_up(hidden, kPanel),
                        intermediate, down_group);
  ExpertsCall c{};
  c.type = float_type(x, kExperts, "x");
  check_index(index, tokens, count);
  check_weights(weights, index);
  c.top_k = index.size(1);
  const Tensor source = x.is_contiguous() ? x : torch::stable::contiguous(x);
  c.x_stride = hidden;
  const int64_t sizes[] = {tokens, hidden};
  Tensor y = empty_cpu(sizes, 2, x.scalar_type());
  const Kernels& table = kernels();
  const int64_t threads = team_size(), step = std::max<int64_t>(kRows / c.top_k, 1);
  for (int64_t first = 0; first < tokens; first += step) {
    c.tokens = std::min(step, tokens - first);
    c.x = element_of(source.const_data_ptr(), first * hidden, c.type);
    c.y = const_cast<void*>(element_of(y.mutable_data_ptr(), first * hidden, c.type));
    c.index = indices.data() + first * c.top_k;
    c.weights = scales.data() + first * c.top_k;
    ExpertsRun run(e, c, table, threads);
    run.place(workspace.get<char>(run.bytes()));
    Barrier barrier;
    Slices* const slices = fresh_slices(threads);
    run_team(threads, [&](const Member& member) { run.run(member, barrier, slices); });
  }
  return y;
}

}  // namespace
}  // namespace cpullm

STABLE_TORCH_LIBRARY_FRAGMENT(cpullm, m) {
  // y[t] = sum over s of weights[t, s] * down_e (act(gate_e x[t]) * (up_e x[t])), e = index[t, s]. x [tokens, hidden];
  // index int64 | int32, weights float [tokens, top_k]. gate_up [experts, 2 intermediate, hidden] (gate above up) and
  // down [experts, hidden, intermediate] are packed one expert after the other, each to whole panels: codes uint8
  // [experts * panels, k'/4, 64 | 128] and so on, as in `linear`. Returns [tokens, hidden], x's type.
  m.def(
      "experts(Tensor x, Tensor index, Tensor weights, Tensor gate_up_codes, Tensor gate_up_scales, "
      "Tensor? gate_up_zeros, Tensor down_codes, Tensor down_scales, Tensor? down_zeros, int experts, "
      "int hidden, int intermediate, int gate_up_group, int down_group, str act, int compute) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cpullm, CPU, m) { m.impl("experts", TORCH_BOX(&cpullm::experts)); }
