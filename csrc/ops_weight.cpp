// Packed weights that are known by a number. Each argument of a call from Python costs about 0.2 us, so an operator that
// takes one number for the eight things that say what a weight is costs a microsecond less.
#include <mutex>
#include <unordered_map>

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

std::mutex held_mutex;
// Never destroyed: tensors must not be freed after torch is gone.
auto& held = *new std::unordered_map<int64_t, std::shared_ptr<const Held>>;
int64_t next_weight = first_number();

int64_t weight_create(const Tensor& codes, const Tensor& scales, const OptionalTensor& zeros, int64_t n, int64_t k,
                      int64_t group_size) {
  check_weight(kCreate, codes, scales, zeros, n, k, group_size);
  auto weight = std::make_shared<const Held>(Held{codes, scales, zeros, n, k, group_size});
  std::lock_guard lock(held_mutex);
  held.emplace(next_weight, std::move(weight));
  return next_weight++;
}

void weight_free(int64_t weight) {
  std::shared_ptr<const Held> last;  // its memory is freed after the lock
  std::lock_guard lock(held_mutex);
  const auto it = held.find(weight);
  if (it == held.end()) return;
  last = std::move(it->second);
  held.erase(it);
}

Tensor weight_linear(const Tensor& x, int64_t weight, const OptionalTensor& bias, const OptionalTensor& perm,
                     int64_t compute) {
  std::shared_ptr<const Held> h;
  {
    std::lock_guard lock(held_mutex);
    const auto it = held.find(weight);
    if (it != held.end()) h = it->second;
  }
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
