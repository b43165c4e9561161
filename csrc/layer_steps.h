// Layers that run one after the other, in groups. Part of ops_layer.cpp.
#pragma once

#include "program.h"

namespace cpullm {
namespace {

constexpr const char* kForward = "cpullm::layer_forward";

// Layers that run one after the other: each its call, in groups that read one input.
struct Steps {
  std::vector<std::shared_ptr<const Program>> programs;  // kept alive while they run
  std::vector<Layer> layers;
  std::vector<LayerGroup> groups;

  // Cuts the layers into groups of these sizes. bypass: see LayerGroup. summed: of each group, as Summed has it; empty:
  // nothing.
  void group(const std::vector<int64_t>& sizes, int64_t bypass, const std::vector<int64_t>& summed) {
    STD_TORCH_CHECK(summed.empty() || summed.size() == sizes.size(), kForward,
                    ": summed must be none or one for each of ", sizes.size(), " groups, got ", summed.size());
    STD_TORCH_CHECK(bypass >= kAllMembers && bypass <= kMostMembers, kForward, ": bypass must lie in [-1, ",
                    kMostMembers, "], got ", bypass);
    int64_t first = 0;
    const auto cut = [&](int64_t size) {
      STD_TORCH_CHECK(size >= 1 && size <= kMostMembers && first + size <= int64_t(layers.size()), kForward,
                      ": groups must hold 1 to ", kMostMembers, " layers each, ", layers.size(), " in all, got ", size);
      const LayerProgram& p = *layers[size_t(first)].program;
      for (int64_t i = first; i < first + size; ++i) {
        const LayerProgram& other = *layers[size_t(i)].program;
        STD_TORCH_CHECK(other.hidden == p.hidden && other.compute == p.compute && other.parallel == p.parallel,
                        kForward,
                        ": layers of a group must have one hidden size, one compute and one kind of residual");
      }
      STD_TORCH_CHECK(size == 1 || !p.parallel || bypass == 0, kForward,
                      ": layers whose MLP reads no attention have no bypass, got ", bypass);
      const int64_t what = summed.empty() ? 0 : summed[groups.size()];
      STD_TORCH_CHECK(what >= 0 && what <= 4, kForward, ": summed must lie in [0, 4], got ", what);
      const bool spread = is_spread(Summed(what));
      STD_TORCH_CHECK(what == 0 || spread || size == 1, kForward,
                      ": layers that are cut among ranks are in no groups, unless these are spread");
      STD_TORCH_CHECK(!spread || bypass == 0, kForward, ": groups that are spread over ranks have no bypass, got ",
                      bypass);
      groups.push_back({&layers[size_t(first)], size, bypass, Summed(what)});
      first += size;
    };
    for (const int64_t size : sizes) cut(size);
    STD_TORCH_CHECK(first == int64_t(layers.size()), kForward, ": groups must hold all ", layers.size(),
                    " layers, got ", first);
  }
};

}  // namespace
}  // namespace cpullm
