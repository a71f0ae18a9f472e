// The importable module: importing it registers the operators (schema.cpp, cpu_backend.cpp, and cuda_backend.cpp or
// no_cuda_backend.cpp); its one function describes the build.
#include <pybind11/pybind11.h>

#include "cpu/kernels.h"

#if defined(__clang__)
#define TOPN_COMPILER "clang " __clang_version__
#else
#define TOPN_COMPILER "gcc " __VERSION__
#endif

namespace py = pybind11;

static py::dict build_info() {
  py::dict info;
  info["compiler"] = TOPN_COMPILER;
  info["torch"] = TOPN_BUILD_TORCH;  // the version that was built against; any later one runs it
  info["cpu_level"] = topn_gating::cpu::level();
#ifdef TOPN_CUDA_VERSION
  info["cuda"] = TOPN_CUDA_VERSION;
  info["cuda_architectures"] = py::str(TOPN_CUDA_ARCHITECTURES).attr("split")();
#else
  info["cuda"] = py::none();
  info["cuda_architectures"] = py::list();
#endif
  return info;
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled part of topn_gating.";
  m.def("build_info", &build_info, "How the extension was built and what it chose to run.");
}
