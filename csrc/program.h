// Programs that operators name by a handle: decoder layers, heads and embeddings.
#pragma once

#include "head.h"
#include "layer.h"
#include "ops.h"

#include <memory>
#include <variant>
#include <vector>

namespace cpullm {

// What a program is made of; keeps the memory alive that it points to.
struct Source {
  std::vector<Tensor> tensors;
  std::vector<int64_t> ints;
  std::vector<double> floats;
};

// Where a tensor's memory is: a storage that is resized or moved to shared memory has another. Not seen: another shape
// or other strides inside of the same storage.
struct Place {
  const void* data;
  int64_t bytes;  // of the storage

  bool is_of(const Tensor& t) const { return storage_bytes(t) == bytes && t.const_data_ptr() == data; }
};

// Rows of a packed table.
struct EmbeddingProgram {
  Weight table;
  ScalarType type;  // of the rows
};

struct Program {
  using Any = std::variant<LayerProgram, HeadProgram, EmbeddingProgram>;

  Any what;
  Any (*read)(const Source&);
  Source from;
  std::vector<Place> places;  // of the tensors, when their addresses were read

  // Whether the addresses are still those of the tensors.
  bool in_place() const {
    for (size_t i = 0; i < places.size(); ++i)
      if (!places[i].is_of(from.tensors[i])) return false;
    return true;
  }

  // The program as a T; an error that names `op` where it is of another kind.
  template <class T>
  const T& as(const char* op, int64_t handle, const char* kind) const {
    const T* found = std::get_if<T>(&what);
    STD_TORCH_CHECK(found, op, ": program ", handle, " is no ", kind);
    return *found;
  }
};

// The program with this handle, read again where its memory has moved; where there is none, an error that names `op`.
std::shared_ptr<const Program> find_program(const char* op, int64_t handle);

}  // namespace cpullm
