"""Builds topn_gating._C. Needs torch in the environment: pip install --no-build-isolation ."""

from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    raise SystemExit(
        "topn_gating is built against the torch that it will run with: install torch>=2.10 first, "
        "then run `pip install --no-build-isolation .`"
    ) from error

import pybind11

ROOT = Path(__file__).parent
# The floor of the stable ABI that the extension is built for: torch 2.10.
STABLE_ABI = "0x020a000000000000"


def sources() -> list[str]:
    """The translation units: level_*.cpp include the kernels, one level of the instruction set each."""
    kernels = ["level.cpp", "level_baseline.cpp", "level_avx2.cpp", "workspace.cpp"]
    glue = ["schema.cpp", "cpu.cpp", "module.cpp"]
    return [f"csrc/cpu/{name}" for name in kernels] + [f"csrc/torch/{name}" for name in glue]


setup(
    ext_modules=[
        CppExtension(
            "topn_gating._C",
            sources(),
            include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
            define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI), ("TOPN_BUILD_TORCH", f'"{torch.__version__}"')],
            extra_compile_args=["-std=c++17", "-O3", "-fvisibility=hidden", "-ffp-contract=fast", "-Wall", "-Wno-psabi"],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
