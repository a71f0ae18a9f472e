// The kernels of one level. Included once by each level_*.cpp.
#define TOPN_NAMESPACE topn_gating::cpu::TOPN_LEVEL

#include "cpu/gate.cpp"
#include "cpu/gate_backward.cpp"
#include "cpu/assign.cpp"
#include "cpu/dense.cpp"
#include "cpu/dispatch.cpp"
#include "cpu/combine.cpp"
#include "cpu/linear.cpp"
