// Matrices in the memory of CPU tensors, and torch's products of them. These are called through the C functions of torch's
// ahead-of-time compiler, without the dispatcher, so that any thread may call them.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "cpu/kernels.h"
#include "cpu/pages.h"
#include "tensors.h"

namespace topn_gating::binding {

// A matrix in the memory of a tensor, which outlives it. Strides are in elements.
struct Matrix {
  char* data;
  ScalarType type;
  int64_t element_bytes, rows, columns, row_stride, column_stride;

  Matrix row_range(int64_t begin, int64_t end) const {
    Matrix m = *this;
    m.data += begin * row_stride * element_bytes;
    m.rows = end - begin;
    return m;
  }
  Matrix transposed() const { return {data, type, element_bytes, columns, rows, column_stride, row_stride}; }

  Tensor tensor() const {
    const int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(data, 2, sizes, strides, 0, shim_code(type),
                                                              aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
  }
};

// Writes a · b to `out`, or with `add` adds it.
inline void multiply(const Matrix& out, const Matrix& a, const Matrix& b, bool add) {
  const Tensor o = out.tensor(), left = a.tensor(), right = b.tensor();
  TORCH_ERROR_CODE_CHECK(add ? aoti_torch_cpu_addmm_out(o.get(), o.get(), left.get(), right.get(), 1, 1)
                             : aoti_torch_cpu_mm_out(o.get(), left.get(), right.get()));
}

inline void copy(const Matrix& to, const Matrix& from) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(to.tensor().get(), from.tensor().get(), 0));
}

inline char* memory_of(const Tensor& t) { return static_cast<char*>(const_cast<void*>(t.const_data_ptr())); }

// Returns whether a matrix product reads a matrix with these strides without a copy: one stride is 1 and no elements overlap.
inline bool has_product_layout(int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) {
  return (column_stride == 1 && row_stride >= columns) || (row_stride == 1 && column_stride >= rows);
}

// Returns whether torch's products of this type are as fast as the kernels here. Of half types on a processor without
// instructions for them, torch computes products number by number, up to a hundred times slower than float32's.
inline bool has_fast_products(ScalarType type) {
  const auto supported = [](const char* name) {
    StableIValue stack[1] = {0};
    if (torch_call_dispatcher(name, "", stack, TORCH_ABI_VERSION) != AOTI_TORCH_SUCCESS) return false;
    return torch::stable::detail::to<bool>(stack[0]);
  };
  static const bool bfloat16 = supported("mkldnn::_is_mkldnn_bf16_supported");
  static const bool float16 = supported("mkldnn::_is_mkldnn_fp16_supported");
  return type == ScalarType::BFloat16 ? bfloat16 : type == ScalarType::Half ? float16 : !cpu::has_wider_vectors_than_mkl();
}

constexpr int64_t kHugePageBytes = int64_t(4) << 20;  // outputs of at least so many bytes are on huge pages

// Allocates an output.
inline Tensor empty_output(const Tensor& like, const Shape& shape, const Shape& strides, ScalarType type, int64_t element_bytes) {
  const Tensor t = empty_strided(like, shape, strides, type);
  const int64_t bytes = product(shape, 0, shape.size()) * element_bytes;
  if (bytes >= kHugePageBytes) cpu::advise_huge_pages(t.mutable_data_ptr(), bytes);
  return t;
}

}  // namespace topn_gating::binding
