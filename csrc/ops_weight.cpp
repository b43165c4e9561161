// Packed weights that are known by a number. Each argument of a call from Python costs about 0.2 us, so an operator that
// takes one number for the eight things that say what a weight is costs a microsecond less.
#include "numbers.h"
#include "ops.h"

namespace cpullm {
namespace {

constexpr const char* kCreate = "cpullm::weight_create";
constexpr const char* kLinear = "cpullm::linear";  // the texts of its errors

// The tensors and not their addresses: whoever resizes one or moves it to shared memory is seen by the next call.
struct Held {
  Tensor codes, scales;
  OptionalTensor zeros;
  int64_t n, k, group;
};

auto& weights = *new Numbered<Held>;

int64_t weight_create(const Tensor& codes, const Tensor& scales, const OptionalTensor& zeros, int64_t n, int64_t k,
                      int64_t group_size) {
  check_weight(kCreate, codes, scales, zeros, n, k, group_size);
  return weights.keep(std::make_shared<const Held>(Held{codes, scales, zeros, n, k, group_size}));
}

void weight_free(int64_t weight) { weights.free(weight); }

Tensor weight_linear(const Tensor& x, int64_t weight, const OptionalTensor& bias, const OptionalTensor& perm,
                     int64_t compute) {
  const std::shared_ptr<const Held> h = weights.find(weight);
  STD_TORCH_CHECK(h, "cpullm::weight_linear: there is no weight ", weight);
  return linear_of(kLinear, x, check_weight(kLinear, h->codes, h->scales, h->zeros, h->n, h->k, h->group), bias, perm,
                   compute);
}

}  // namespace
}  // namespace cpullm

STABLE_TORCH_LIBRARY_FRAGMENT(cpullm, m) {
  // The number of a packed weight, whose tensors it keeps until weight_free; arguments as of linear.
  m.def("weight_create(Tensor codes, Tensor scales, Tensor? zeros, int n, int k, int group_size) -> int");
  m.def("weight_free(int weight) -> ()");
  m.def("weight_linear(Tensor x, int weight, Tensor? bias=None, Tensor? perm=None, int compute=0) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cpullm, CPU, m) {
  m.impl("weight_create", TORCH_BOX(&cpullm::weight_create));
  m.impl("weight_linear", TORCH_BOX(&cpullm::weight_linear));
}

STABLE_TORCH_LIBRARY_IMPL(cpullm, CompositeExplicitAutograd, m) {
  m.impl("weight_free", TORCH_BOX(&cpullm::weight_free));
}
