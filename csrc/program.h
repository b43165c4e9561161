// Programs that operators name by a handle: decoder layers, and heads.
#pragma once

#include "head.h"
#include "layer.h"
#include "ops.h"

#include <memory>
#include <variant>
#include <vector>

namespace cpullm {

struct Program {
  std::variant<LayerProgram, HeadProgram> what;
  std::vector<Tensor> tensors;  // keeps the memory alive that the program points to

  // The program as a T; an error that names `op` where it is of another kind.
  template <class T>
  const T& as(const char* op, int64_t handle, const char* kind) const {
    const T* found = std::get_if<T>(&what);
    STD_TORCH_CHECK(found, op, ": program ", handle, " is no ", kind);
    return *found;
  }
};

// The program with this handle; where there is none, an error that names `op`.
std::shared_ptr<const Program> find_program(const char* op, int64_t handle);

}  // namespace cpullm
