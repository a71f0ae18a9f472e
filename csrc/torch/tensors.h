// Converts torch's tensors to the kernels' pointers, with the checks that keep memory safe and no others. What a user can get
// wrong is checked in Python, before anything runs.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#include "router.h"

namespace topn_gating::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

inline Shape shape_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return Shape(sizes.begin(), sizes.end());
}

inline DType dtype_of(const char* name, ScalarType type) {
  switch (type) {
    case ScalarType::Float: return DType::F32;
    case ScalarType::Double: return DType::F64;
    case ScalarType::BFloat16: return DType::BF16;
    case ScalarType::Half: return DType::F16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16, got ",
                      torch::headeronly::toString(type));
  }
}

// Returns the type in which values of `type` are computed.
inline ScalarType compute_type(ScalarType type) { return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

// Returns `shape` with its last `count` sizes replaced by `sizes`.
inline Shape replace_last(const Shape& shape, size_t count, std::initializer_list<int64_t> sizes) {
  Shape result(shape.begin(), shape.end() - count);
  result.insert(result.end(), sizes);
  return result;
}

// Returns the product of the sizes of dimensions begin to end - 1.
inline int64_t product(const Shape& shape, size_t begin, size_t end) {
  int64_t result = 1;
  for (size_t i = begin; i < end; ++i) result *= shape[i];
  return result;
}

// Returns a number as the C shim takes it: the code of a type.
template <class T>
int32_t shim_code(T value) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(value));
}

// Allocates a tensor on the device of `like`. Calls the C shim directly, because torch::stable::new_empty goes through the
// dispatcher, which takes longer than a small kernel.
inline Tensor empty_strided(const Tensor& like, const Shape& shape, const Shape& strides, ScalarType type) {
  const auto device = like.device();
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(shape.size()), shape.data(), strides.data(), shim_code(type),
                                                  shim_code(device.type()), device.index(), &handle));
  return Tensor(handle);
}

// Allocates a contiguous tensor on the device of `like`.
inline Tensor empty(const Tensor& like, const Shape& shape, ScalarType type) {
  Shape strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0; stride *= std::max<int64_t>(shape[i], 1)) strides[i] = stride;
  return empty_strided(like, shape, strides, type);
}

// Allocates the workspace of a kernel, if it needs one. The caller keeps it alive until the kernel is launched.
template <class Backend, class Args>
std::optional<Tensor> reserve_workspace(const Backend& backend, const Args& a, const Tensor& like) {
  const int64_t bytes = backend.workspace_bytes(a);
  if (bytes == 0) return std::nullopt;
  return empty(like, {bytes}, ScalarType::Byte);
}

// Returns a contiguous tensor of the values of `t`. Raises unless it has the device of `like` and the given shape and type.
inline Tensor checked(const char* name, const Tensor& t, const Tensor& like, const Shape& shape, ScalarType type) {
  STD_TORCH_CHECK(t.scalar_type() == type, name, " must be ", torch::headeronly::toString(type), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
  const auto device = t.device(), expected = like.device();
  STD_TORCH_CHECK(device == expected, name, " must be on the device of the other arguments");
  const auto sizes = t.sizes();
  bool same = sizes.size() == shape.size();
  for (size_t i = 0; same && i < shape.size(); ++i) same = sizes[i] == shape[i];
  STD_TORCH_CHECK(same, name, " has a shape that does not fit the other arguments");
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline std::optional<Tensor> checked(const char* name, const std::optional<Tensor>& t, const Tensor& like, const Shape& shape,
                                     ScalarType type) {
  if (!t.has_value()) return std::nullopt;
  return checked(name, *t, like, shape, type);
}

template <class T>
const T* const_data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
const T* const_data(const std::optional<Tensor>& t) {
  return t.has_value() ? const_data<T>(*t) : nullptr;
}
inline const void* const_data(const Tensor& t) { return t.const_data_ptr(); }
inline const void* const_data(const std::optional<Tensor>& t) { return t.has_value() ? t->const_data_ptr() : nullptr; }
template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}
inline void* mutable_data(const Tensor& t) { return t.mutable_data_ptr(); }
inline void* mutable_data(const std::optional<Tensor>& t) { return t.has_value() ? t->mutable_data_ptr() : nullptr; }

constexpr int64_t kIntMax = std::numeric_limits<int32_t>::max();

// Returns the sizes of pairs (…, n, k), a tensor which errors call `name`. In the dropless layout all tokens are one group.
inline RoutingSizes routing_sizes(const char* name, const Tensor& pairs, int64_t experts, bool dropless) {
  const Shape shape = shape_of(pairs);
  STD_TORCH_CHECK(shape.size() >= 2, name, " must have shape (..., tokens, top_n)");
  STD_TORCH_CHECK(experts >= 1 && experts <= kIntMax, "num_gates must be from 1 to 2^31 - 1, got ", experts);
  const int64_t groups = product(shape, 0, shape.size() - 2), tokens = shape[shape.size() - 2];
  const RoutingSizes a{dropless ? 1 : groups, dropless ? groups * tokens : tokens, experts, shape.back()};
  STD_TORCH_CHECK(a.top_n >= 1, "top_n must be at least 1, got 0");
  STD_TORCH_CHECK(a.tokens <= kIntMax / a.top_n, "tokens * top_n must be below 2^31, got ", a.tokens, " * ", a.top_n);
  return a;
}

inline void check_capacity(int64_t capacity) {
  STD_TORCH_CHECK(capacity >= 1 && capacity <= kIntMax, "capacity must be from 1 to 2^31 - 1, got ", capacity);
}

// The checked tensors of an Assignment, which it keeps alive while the kernels read them.
struct CheckedAssignment {
  Assignment arguments;
  Shape tokens, slots;  // shapes (…, n) and (…, e, C) or (R)
  Tensor expert, slot, source;
  std::optional<Tensor> offsets;

  // No `offsets`: the capacity layout.
  CheckedAssignment(const Tensor& expert_in, const Tensor& slot_in, const Tensor& source_in,
                    const std::optional<Tensor>& offsets_in = std::nullopt) {
    const Shape pairs = shape_of(expert_in);
    slots = shape_of(source_in);
    STD_TORCH_CHECK(pairs.size() >= 2, "expert must have shape (..., tokens, top_n)");
    tokens = replace_last(pairs, 1, {});
    if (offsets_in.has_value()) {
      STD_TORCH_CHECK(slots.size() == 1, "source must have shape (rows) beside offsets");
      STD_TORCH_CHECK(offsets_in->dim() == 1, "offsets must have shape (experts)");
      arguments = {routing_sizes("expert", expert_in, offsets_in->size(0), true), 0, slots[0]};
    } else {
      STD_TORCH_CHECK(slots.size() == pairs.size(), "source must have shape (..., experts, capacity), like expert");
      STD_TORCH_CHECK(std::equal(slots.begin(), slots.end() - 2, pairs.begin()),
                      "source must have shape (..., experts, capacity) with the groups of expert");
      const int64_t experts = slots[slots.size() - 2], capacity = slots.back();
      arguments = {routing_sizes("expert", expert_in, experts, false), capacity, experts * capacity};
      check_capacity(capacity);
    }
    expert = checked("expert", expert_in, expert_in, pairs, ScalarType::Int);
    slot = checked("slot", slot_in, expert_in, pairs, ScalarType::Int);
    source = checked("source", source_in, expert_in, slots, ScalarType::Int);
    offsets = checked("offsets", offsets_in, expert_in, {arguments.experts}, ScalarType::Int);
    arguments.expert = const_data<int32_t>(expert);
    arguments.slot = const_data<int32_t>(slot);
    arguments.source = const_data<int32_t>(source);
    arguments.offsets = const_data<int32_t>(offsets);
  }

  Shape pairs() const { return replace_last(tokens, 0, {arguments.top_n}); }
  Shape token_rows(int64_t dim) const { return replace_last(tokens, 0, {dim}); }
  Shape dense() const { return replace_last(tokens, 0, {arguments.experts, arguments.capacity}); }
  Shape slot_rows(int64_t dim) const { return replace_last(slots, 0, {dim}); }
};

// Returns the number of features of rows (…, d), which errors call `name`.
inline int64_t dim_of(const char* name, const Tensor& rows) {
  STD_TORCH_CHECK(rows.dim() >= 1, name, " must have a dimension of features");
  return rows.size(rows.dim() - 1);
}

}  // namespace topn_gating::binding
