// All kernels of one level: see level.h.
#pragma once

#include "cpu/assign-inl.h"
#include "cpu/combine-inl.h"
#include "cpu/dense-inl.h"
#include "cpu/dispatch-inl.h"
#include "cpu/gate-inl.h"
#include "cpu/gate_backward-inl.h"
#include "cpu/grouped_linear-inl.h"
#include "cpu/linear-inl.h"
