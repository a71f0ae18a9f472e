// The contract of the router's kernels: what each reads, what it writes, and what it means (SPEC's steps), once for every
// backend. Nothing here knows torch, Python or a device.
//
// All tensors are contiguous unless strides are given. Leading dimensions are flattened into `groups`. Shapes below use
// g groups, n tokens, e experts, k ranks (top_n), C slots (capacity), d features. "Real" is float for F32, BF16 and F16
// data, double for F64.
#pragma once

#include <cstdint>

namespace topn_gating {

enum class DType { F32, F64, BF16, F16 };

constexpr int64_t element_bytes(DType dtype) { return dtype == DType::F64 ? 8 : dtype == DType::F32 ? 4 : 2; }

enum class Policy { Random, Threshold, All, None };

// Values of `slot` for pairs that hold none.
constexpr int32_t kBelowThreshold = -1;
constexpr int32_t kOverCapacity = -2;

// SPEC steps 3 to 6 and 10: noise, softmax, stable top-n, weights, and the sums that the two losses need.
struct Gate {
  DType dtype;
  int64_t groups, tokens, experts, top_n;
  double eps, noise_mult;
  bool soft;    // weights from the soft top-n, computed in double: its exponent multiplies a gate's rounding by ten
  bool losses;  // false: importance, top_count and both losses are written as zeros
  const void* logits;         // (g, n, e)
  const void* noise;          // (g, n, e) Real, uniform in [0, 1), or null
  const bool* token_mask;   // (g, n), true where the token is real, or null
  void* weight;               // (g, n, k) Real
  int32_t* expert;            // (g, n, k)
  void* importance;           // (g, e) Real: mean over real tokens of the gates
  int32_t* top_count;         // (g, e): real tokens whose rank-0 expert this is
  void* balance_loss;         // () Real
  void* router_z_loss;        // () Real
  void* workspace;            // workspace_bytes(*this) of them, 16-byte aligned
};

// Gradient of Gate's weight, importance and losses with respect to the logits. A null gradient is zero.
struct GateBackward {
  DType dtype;
  int64_t groups, tokens, experts, top_n;
  double eps, noise_mult;
  bool soft;
  const void* grad_weight;         // (g, n, k) Real
  const void* grad_importance;     // (g, e) Real
  const void* grad_balance_loss;   // () Real
  const void* grad_router_z_loss;  // () Real
  const void* logits;
  const void* noise;
  const bool* token_mask;
  const int32_t* expert;     // (g, n, k); out of range: read as 0
  const int32_t* top_count;  // (g, e)
  void* grad_logits;         // (g, n, e), the dtype of the logits
  void* workspace;           // workspace_bytes(*this) of them, 16-byte aligned
};

// SPEC steps 7 and 8: threshold masking and capacity assignment.
struct Assign {
  bool is_double;  // Real of weight, draws and threshold
  int64_t groups, tokens, experts, top_n, capacity;
  Policy policy;
  double eps;
  const void* weight;        // (g, n, k)
  const int32_t* expert;     // (g, n, k); out of range: not routed
  const void* draws;         // (g, n, k), null unless Random
  const void* threshold;     // (k), null unless Random or Threshold
  const bool* token_mask;  // (g, n) or null
  void* kept;                // (g, n, k): weight, 0 where no slot is held
  int32_t* slot;             // (g, n, k)
  int32_t* source;           // (g, e, C): n * top_n + rank of the pair that holds the slot, -1 where empty
  int32_t* demand;           // (g, e): routed pairs before the capacity drop
  void* workspace;           // workspace_bytes(*this) of them, 16-byte aligned
};

struct AssignBackward {
  bool is_double;
  int64_t pairs;        // g * n * k
  const void* grad_kept;
  const int32_t* slot;
  void* grad_weight;
};

// Who holds which slot: what `dense`, `dispatch` and `combine` read. A pair holds a slot where `slot` and `source` agree
// and both are in range, so that indices made up by a caller can neither leave the tensors nor make two threads meet.
struct Assignment {
  int64_t groups, tokens, experts, top_n, capacity;
  const int32_t* expert;  // (g, n, k)
  const int32_t* slot;    // (g, n, k)
  const int32_t* source;  // (g, e, C)
};

// SPEC step 9. Each element of the two outputs is written once.
struct Dense {
  DType dtype;  // of the outputs; weight is Real of it
  Assignment assignment;  // without source: a row belongs to one token
  const void* weight;     // (g, n, k)
  void* dispatch;         // (g, n, e, C)
  void* combine;          // (g, n, e, C)
};

struct DenseBackward {
  DType dtype;
  Assignment assignment;
  const void* grad_dispatch;  // (g, n, e, C) by strides, or null
  const void* grad_combine;   // (g, n, e, C) by strides, or null
  int64_t dispatch_strides[4];
  int64_t combine_strides[4];
  void* grad_weight;  // (g, n, k) Real
};

// Rows of tokens to rows of expert buffers; empty slots are zero.
struct Dispatch {
  DType dtype;
  Assignment assignment;
  int64_t dim;
  const void* x;  // (g, n, d)
  void* y;        // (g, e, C, d)
};

struct DispatchBackward {
  DType dtype;
  Assignment assignment;
  int64_t dim;
  const void* grad_y;  // (g, e, C, d)
  const void* x;       // (g, n, d); null: no gradient of the weight is wanted
  void* grad_x;        // (g, n, d)
  void* grad_weight;   // (g, n, k) Real, null with x
};

// Rows of expert buffers back to rows of tokens, weighted and summed in rank order.
struct Combine {
  DType dtype;
  Assignment assignment;
  int64_t dim;
  const void* y;       // (g, e, C, d)
  const void* weight;  // (g, n, k) Real
  void* out;           // (g, n, d)
};

struct CombineBackward {
  DType dtype;
  Assignment assignment;
  int64_t dim;
  const void* grad_out;  // (g, n, d)
  const void* y;
  const void* weight;
  void* grad_y;       // (g, e, C, d); empty slots get zero
  void* grad_weight;  // (g, n, k) Real
};

// SPEC step 2, on the CPU alone: elsewhere torch's own products serve. Computed in Real, each result rounded once.
struct Linear {
  DType dtype;
  int64_t tokens, dim, experts;  // tokens: of all groups
  const void* x;                 // (g, n, d)
  const void* weight;            // (e, d)
  void* logits;                  // (g, n, e)
};

struct LinearBackward {
  DType dtype;
  int64_t tokens, dim, experts;
  const void* grad_logits;  // (g, n, e)
  const void* x;            // (g, n, d)
  const void* weight;       // (e, d)
  void* grad_x;             // (g, n, d); null: not wanted
  void* grad_weight;        // (e, d); null: not wanted
  void* workspace;          // workspace_bytes(*this) of them, 16-byte aligned
};

// The kernels of every backend, then those of the CPU alone: X(argument struct, name in messages).
#define TOPN_GATING_KERNELS(X)                 \
  X(Gate, "gate")                              \
  X(GateBackward, "gate_backward")             \
  X(Assign, "assign")                          \
  X(AssignBackward, "assign_backward")         \
  X(Dense, "dense")                            \
  X(DenseBackward, "dense_backward")           \
  X(Dispatch, "dispatch")                      \
  X(DispatchBackward, "dispatch_backward")     \
  X(Combine, "combine")                        \
  X(CombineBackward, "combine_backward")
#define TOPN_GATING_CPU_KERNELS(X) \
  X(Linear, "linear")              \
  X(LinearBackward, "linear_backward")

#define TOPN_GATING_NAME(Args, name) \
  constexpr const char* kernel_name(const Args&) { return name; }
TOPN_GATING_KERNELS(TOPN_GATING_NAME)
TOPN_GATING_CPU_KERNELS(TOPN_GATING_NAME)
#undef TOPN_GATING_NAME

}  // namespace topn_gating
