// The kernels of one level, and their table. Included once by each level_*.cpp.
#define TOPN_NAMESPACE topn_gating::cpu::TOPN_LEVEL
#define TOPN_STRING_(x) #x
#define TOPN_STRING(x) TOPN_STRING_(x)
#define TOPN_TABLE_(level) level##_kernels
#define TOPN_TABLE(level) TOPN_TABLE_(level)

#include "cpu/gate.cpp"
#include "cpu/gate_backward.cpp"
#include "cpu/assign.cpp"
#include "cpu/dense.cpp"
#include "cpu/dispatch.cpp"
#include "cpu/combine.cpp"
#include "cpu/linear.cpp"

namespace topn_gating::cpu {

const Kernels TOPN_TABLE(TOPN_LEVEL) = {
    TOPN_STRING(TOPN_LEVEL),
    TOPN_LEVEL::gate,
    TOPN_LEVEL::gate_backward,
    TOPN_LEVEL::assign,
    TOPN_LEVEL::assign_backward,
    TOPN_LEVEL::dense,
    TOPN_LEVEL::dense_backward,
    TOPN_LEVEL::dispatch,
    TOPN_LEVEL::dispatch_backward,
    TOPN_LEVEL::combine,
    TOPN_LEVEL::combine_backward,
    TOPN_LEVEL::linear,
    TOPN_LEVEL::linear_backward,
};

}  // namespace topn_gating::cpu
