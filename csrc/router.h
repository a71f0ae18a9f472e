// The contract of the router's kernels, once for every backend: what each kernel reads, what it writes, and what that means
// (docs/spec.md). Nothing here depends on torch, Python or a device.
//
// All tensors are contiguous, unless strides are given. Shapes use these letters:
//
//   g  groups: all leading dimensions, flattened
//   n  tokens of a group
//   e  experts
//   k  ranks: the experts that each token chooses (top_n), best first
//   C  capacity: the slots of each expert in each group
//   R  rows of all experts in the dropless layout
//   d  features of a token
//
// The rows of the experts have one of two layouts (docs/spec.md, step 8). In the capacity layout each expert has C rows in each
// group: (g, e, C). In the dropless layout all tokens are one group (g = 1), and each expert has as many rows as pairs, rounded up
// to a multiple of `align`, one expert behind the other: (R). There `offsets` (e) holds the end of each expert's rows. In both, a
// slot counts an expert's rows from 0, and the rows from the last expert's end to R belong to no expert.
//
// A pair is a token and a rank: an element of a tensor (g, n, k). The compute type of a tensor is the type in which its values
// are computed: float for F32, BF16 and F16, double for F64.
#pragma once

#include <cstdint>

namespace topn_gating {

enum class DType { F32, F64, BF16, F16 };

constexpr int64_t element_bytes(DType dtype) { return dtype == DType::F64 ? 8 : dtype == DType::F32 ? 4 : 2; }

struct RoutingSizes {
  int64_t groups;   // g
  int64_t tokens;   // n
  int64_t experts;  // e
  int64_t top_n;    // k
};

// How gates are computed from scores.
enum class Score { Softmax, Sigmoid, SqrtSoftplus };
// The score of an expert group: the sum of the two largest selection scores of its experts, or the largest.
enum class GroupScore { Top2, Max };

struct GateOptions {
  double eps;              // lower bound of sums that divide: of a token's weights, and of its gates where they are no softmax
  double noise_mult;       // factor of the Gumbel noise
  bool soft;               // whether weights come from the soft top-n, computed in double: it magnifies rounding errors tenfold
  Score score;             // how gates are computed; the soft top-n takes Score::Softmax alone
  int64_t expert_groups;   // number of equal groups that neighbouring experts form, at least 1
  int64_t top_groups;      // number of expert groups that are open to a token
  GroupScore group_score;  // what decides which expert groups are open
  bool normalize;          // whether a token's weights are divided by their sum
  double scale;            // factor of the weights
  bool all_ranks;          // whether `counts` has the choices of all ranks; false: of rank 0
};

// What `gate` and its gradient have in common.
struct GateInputs : RoutingSizes, GateOptions {
  DType dtype;                       // type of the logits
  const void* logits = nullptr;      // (g, n, e)
  const void* noise = nullptr;       // (g, n, e) uniform in [0, 1), of the compute type; null: no noise
  const bool* token_mask = nullptr;  // (g, n) true where the token is valid; null: all are
};

// docs/spec.md, steps 3 to 6, 10 and 11: noise, gates, stable top-n, weights, both losses, and statistics of the logits.
struct Gate : GateInputs {
  const float* select_bias = nullptr;  // (e) added to the gates for the selection alone; null: 0
  const int32_t* given = nullptr;      // (g, n, k) experts in place of the selection; null: none. Out of range: no expert
  bool losses = false;                 // whether importance, counts and both losses are wanted; if not, they are written as zeros
  void* weight = nullptr;              // (g, n, k) weights of the chosen experts, of the compute type; 0 where there is no expert
  int32_t* expert = nullptr;           // (g, n, k) indices of the chosen experts; -1 where there is no expert
  void* importance = nullptr;          // (g, e) mean over valid tokens of the gates, divided by their sum, of the compute type
  int32_t* counts = nullptr;           // (g, e) number of the counted ranks of valid tokens that chose this expert
  void* balance_loss = nullptr;        // () of the compute type
  void* router_z_loss = nullptr;       // () of the compute type
  void* statistics = nullptr;          // (3) of the compute type, over valid tokens: mean entropy of the gates, largest magnitude
                                       // and root mean square of the logits; null: not wanted
  void* workspace = nullptr;           // workspace_bytes(*this) bytes, aligned to 16
};

// Returns whether experts are selected by their gates, with a bias or by expert groups: otherwise by their scores, which rounding
// does not make equal.
constexpr bool selects_by_gates(const Gate& a) { return a.select_bias != nullptr || a.expert_groups > 1; }

// Gradient of the loss with respect to the logits. A null gradient is zero.
struct GateBackward : GateInputs {
  const void* grad_weight = nullptr;         // (g, n, k) of the compute type, or null
  const void* grad_importance = nullptr;     // (g, e) of the compute type, or null
  const void* grad_balance_loss = nullptr;   // () of the compute type, or null
  const void* grad_router_z_loss = nullptr;  // () of the compute type, or null
  const int32_t* expert = nullptr;           // (g, n, k) as `gate` wrote it; out of range: no expert
  const int32_t* counts = nullptr;           // (g, e) as `gate` wrote it
  void* grad_logits = nullptr;               // (g, n, e) of type dtype
  void* workspace = nullptr;                 // workspace_bytes(*this) bytes, aligned to 16
};

// Which pairs of ranks above 0 are routed: with probability weight / threshold, above the threshold, all, or none.
enum class Policy { Random, Threshold, All, None };

// Returns R, which depends on no value: the most rows that the pairs can take, and a multiple of `align`.
constexpr int64_t dropless_rows(int64_t pairs, int64_t experts, int64_t align) {
  return (pairs + (experts + 1) * (align - 1)) / align * align;
}

struct AssignOptions {
  int64_t capacity;  // C; 0 in the dropless layout
  int64_t rows;      // rows of a group: e · C, or R
  int64_t align;     // divisor of each expert's number of rows in the dropless layout
  Policy policy;
  double eps;  // lower bound of the thresholds that divide the weights under Policy::Random
};

// Values of `slot` for pairs that hold no slot.
constexpr int32_t kBelowThreshold = -1;  // pairs that are not routed
constexpr int32_t kOverCapacity = -2;    // routed pairs for which the expert has no slot left

// docs/spec.md, steps 7 and 8: which pairs are routed, and which slots they get.
struct Assign : RoutingSizes, AssignOptions {
  bool is_double = false;            // whether weight, draws, threshold and kept are double; float if not
  const void* weight = nullptr;      // (g, n, k)
  const int32_t* expert = nullptr;   // (g, n, k) a pair whose index is out of range is not routed
  const void* draws = nullptr;       // (g, n, k) uniform in [0, 1); null unless Policy::Random
  const void* threshold = nullptr;   // (k); null unless Policy::Random or Policy::Threshold
  const bool* token_mask = nullptr;  // (g, n) true where the token is valid; null: all are
  const void* keys = nullptr;        // (g, n, k) of the weights' type: where an expert has too few slots, its pairs with the
                                     // largest keys hold them; null: its first pairs. Null in the dropless layout
  void* kept = nullptr;              // (g, n, k) the weight of each pair that holds a slot, 0 for others
  int32_t* slot = nullptr;           // (g, n, k) the slot that each pair holds, or kBelowThreshold or kOverCapacity
  int32_t* source = nullptr;         // (g, e, C) or (R) token * top_n + rank of the group's pair that holds the row; -1: free
  int32_t* demand = nullptr;         // (g, e) number of routed pairs, those over capacity included
  int32_t* offsets = nullptr;        // (e) end of each expert's rows; null: the capacity layout
  void* workspace = nullptr;         // workspace_bytes(*this) bytes, aligned to 16

  constexpr bool dropless() const { return offsets != nullptr; }
};

struct AssignBackward {
  bool is_double = false;           // whether both gradients are double; float if not
  int64_t pairs;                    // g * n * k
  const void* grad_kept = nullptr;  // (g, n, k)
  const int32_t* slot = nullptr;    // (g, n, k)
  void* grad_weight = nullptr;      // (g, n, k)
};

// Which pair holds which slot. A pair holds a slot where expert, slot and source agree and are in range, so that indices which
// a caller made up can neither leave the tensors nor make two threads write to one row.
struct Assignment : RoutingSizes {
  int64_t capacity;                  // C; 0 in the dropless layout
  int64_t rows;                      // rows of a group: e · C, or R
  const int32_t* expert = nullptr;   // (g, n, k)
  const int32_t* slot = nullptr;     // (g, n, k)
  const int32_t* source = nullptr;   // (g, e, C) or (R)
  const int32_t* offsets = nullptr;  // (e) end of each expert's rows; null: the capacity layout
};

// docs/spec.md, step 9, in the capacity layout alone. Each element of the two outputs is written once.
struct Dense {
  DType dtype;  // type of both outputs
  Assignment assignment;
  const void* weight = nullptr;  // (g, n, k) of the compute type
  void* dispatch = nullptr;      // (g, n, e, C) 1 where the pair of the token and the expert holds the slot, 0 elsewhere
  void* combine = nullptr;       // (g, n, e, C) the pair's weight there, 0 elsewhere
};

struct DenseBackward {
  DType dtype;  // type of both gradients
  Assignment assignment;
  const void* grad_dispatch = nullptr;  // (g, n, e, C) by strides, or null
  const void* grad_combine = nullptr;   // (g, n, e, C) by strides, or null
  int64_t dispatch_strides[4] = {};     // in elements
  int64_t combine_strides[4] = {};      // in elements
  void* grad_weight = nullptr;          // (g, n, k) of the compute type
};

// Rows of features that move between tokens and the slots of the experts.
struct AssignedRows {
  DType dtype;  // type of the rows
  Assignment assignment;
  int64_t dim;  // d
};

// Copies each token's row to the slots that its pairs hold. Rows of free slots are zero.
struct Dispatch : AssignedRows {
  const void* x = nullptr;  // (g, n, d)
  void* y = nullptr;        // (g, e, C, d) or (R, d)
};

struct DispatchBackward : AssignedRows {
  const void* grad_y = nullptr;  // (g, e, C, d) or (R, d)
  const void* x = nullptr;       // (g, n, d); null where no gradient of the weight is wanted
  void* grad_x = nullptr;        // (g, n, d)
  void* grad_weight = nullptr;   // (g, n, k) of the compute type; null with x
};

// Sums the rows of the slots that each token's pairs hold, each times the pair's weight, in the order of the ranks.
struct Combine : AssignedRows {
  const void* y = nullptr;       // (g, e, C, d) or (R, d)
  const void* weight = nullptr;  // (g, n, k) of the compute type
  void* out = nullptr;           // (g, n, d)
};

struct CombineBackward : AssignedRows {
  const void* grad_out = nullptr;  // (g, n, d)
  const void* y = nullptr;         // (g, e, C, d) or (R, d)
  const void* weight = nullptr;    // (g, n, k) of the compute type
  void* grad_y = nullptr;          // (g, e, C, d) or (R, d) zero where the slot is free
  void* grad_weight = nullptr;     // (g, n, k) of the compute type
};

struct LinearSizes {
  DType dtype;      // type of all tensors
  int64_t tokens;   // g * n
  int64_t dim;      // d
  int64_t experts;  // e
};

// docs/spec.md, step 2, on the CPU alone: elsewhere torch's matrix products serve. Sums are of the compute type; each result is
// rounded once.
struct Linear : LinearSizes {
  const void* x = nullptr;       // (g, n, d)
  const void* weight = nullptr;  // (e, d)
  void* logits = nullptr;        // (g, n, e)
};

struct LinearBackward : LinearSizes {
  const void* grad_logits = nullptr;  // (g, n, e)
  const void* x = nullptr;            // (g, n, d)
  const void* weight = nullptr;       // (e, d)
  void* grad_x = nullptr;             // (g, n, d), or null where it is not wanted
  void* grad_weight = nullptr;        // (e, d), or null where it is not wanted
  void* workspace = nullptr;          // workspace_bytes(*this) bytes, aligned to 16
};

// Products of groups of rows with one matrix each, on the CPU alone. Sums are of the compute type; each result is rounded once.
struct GroupedLinear {
  DType dtype;                     // type of all tensors
  int64_t groups, in, out;         // number of groups, size of a row, size of a result's row
  int64_t most_rows;               // rows of a group at most; groups of more are left out, with their results
  int64_t row_stride;              // elements from a row to the next
  int64_t weight_strides[3] = {};  // elements from a matrix, row and column to the next; one of the last two is 1
  const int32_t* start = nullptr;  // (groups + 1) the first row of each group, and the end of the last
  const void* rows = nullptr;      // (start[groups], in)
  const void* weight = nullptr;    // (groups, in, out)
  const void* bias = nullptr;      // (groups, out), or null
  void* result = nullptr;          // (start[groups], out)
};

// The gradient of these matrices: the sum of left[row] right[row]ᵀ over the rows of each group, on the CPU alone. Sums are of
// the compute type; each result is rounded once.
struct GroupedOuter {
  DType dtype;                        // type of all tensors
  int64_t groups, in, out;            // number of groups, size of a left row, size of a right row
  int64_t left_stride, right_stride;  // elements from a row to the next
  const int32_t* start = nullptr;     // (groups + 1) the first row of each group, and the end of the last
  const void* left = nullptr;         // (start[groups], in)
  const void* right = nullptr;        // (start[groups], out)
  void* result = nullptr;             // (groups, in, out)
};

// The gradient of their biases: the sum of the rows of each group, on the CPU alone, of the compute type and rounded once.
struct GroupedSum {
  DType dtype;                     // type of both tensors
  int64_t groups, columns;         // number of groups, size of a row
  int64_t row_stride;              // elements from a row to the next
  const int32_t* start = nullptr;  // (groups + 1) the first row of each group, and the end of the last
  const void* rows = nullptr;      // (start[groups], columns)
  void* result = nullptr;          // (groups, columns)
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
#define TOPN_GATING_CPU_KERNELS(X)     \
  X(Linear, "linear")                  \
  X(LinearBackward, "linear_backward") \
  X(GroupedLinear, "grouped_linear")   \
  X(GroupedOuter, "grouped_outer")     \
  X(GroupedSum, "grouped_sum")

#define TOPN_GATING_NAME(Args, name) \
  constexpr const char* kernel_name(const Args&) { return name; }
TOPN_GATING_KERNELS(TOPN_GATING_NAME)
TOPN_GATING_CPU_KERNELS(TOPN_GATING_NAME)
#undef TOPN_GATING_NAME

}  // namespace topn_gating
