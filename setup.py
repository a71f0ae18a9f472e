"""Builds topn_gating._C. Needs torch in the environment: pip install --no-build-isolation .

TOPN_GATING_NAMESPACE is the operators' namespace, if not topn_gating. `python setup.py hub` lays out a repository for the
Kernels Hub, which needs one of its own.

TOPN_GATING_CUDA=auto (the default) builds the CUDA kernels where torch has CUDA and nvcc is found; 1 builds them or fails,
for a torch without CUDA too; 0 leaves them out. TORCH_CUDA_ARCH_LIST chooses their architectures.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import ClassVar

from setuptools import Command, setup

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    raise SystemExit(
        "topn_gating is built against the torch that it will run with: install torch>=2.10 first, "
        "then run `pip install --no-build-isolation .`"
    ) from error

import pybind11

ROOT = Path(__file__).parent
# Versions of torch's stable ABI that the extension needs: torch 2.10, or 2.13 for the current CUDA stream. Before torch 2.13,
# the stream comes from libtorch_cuda.
STABLE_ABI, STABLE_ABI_OF_STREAM = "0x020a000000000000", "0x020d000000000000"
STREAM_IN_ABI = torch.__version__ >= (2, 13)


NAMESPACE = os.environ.get("TOPN_GATING_NAMESPACE") or "topn_gating"
if not re.fullmatch(r"[A-Za-z_]\w*", NAMESPACE):
    raise SystemExit(f"TOPN_GATING_NAMESPACE must be an identifier, got {NAMESPACE!r}.")


class Hub(Command):
    """``setup.py hub``: build/hub, a repository as the Kernels Hub and the package kernels want it, with this build alone."""

    description = "lay out a repository for the Kernels Hub"
    user_options: ClassVar = []

    def initialize_options(self):
        pass

    def finalize_options(self):
        pass

    def run(self):
        if NAMESPACE == "topn_gating":
            raise SystemExit("setup.py hub needs TOPN_GATING_NAMESPACE, a namespace that no other build has.")
        shutil.rmtree("build/hub", ignore_errors=True)
        build = self.reinitialize_command("build", build_base="build/hub/objects", build_lib="build/hub/lib")
        build.ensure_finalized()
        build.run()
        major, minor = torch.__version__.split(".")[:2]
        backend = f"cu{torch.version.cuda.replace('.', '')}" if nvcc and torch.version.cuda else "cpu"
        folder = Path("build/hub/build", f"torch{major}{minor}-cxx11-{backend}-{os.uname().machine}-linux")
        shutil.copytree("build/hub/lib/topn_gating", folder)
        code = (ROOT / "topn_gating/_ops.py").read_text().split("\n", 1)[1].replace("topn_gating", NAMESPACE)
        (folder / "_ops.py").write_text(f'"""The namespace of the operators of this build."""\n{code}')
        about = {"id": NAMESPACE, "name": "topn-gating", "version": 1, "license": "MIT", "python-depends": []}
        about["backend"] = {"type": "cuda" if nvcc else "cpu"}
        (folder / "metadata.json").write_text(json.dumps(about, indent=2) + "\n")


def find_nvcc() -> str | None:
    """Returns the path of nvcc, searched for where torch searches; None if there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=f"{home}/bin")
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def cuda_compiler() -> str | None:
    """Returns the nvcc to build with, or None for a build without CUDA."""
    wanted = os.environ.get("TOPN_GATING_CUDA") or "auto"
    if wanted not in ("auto", "1", "0"):
        raise SystemExit(f"TOPN_GATING_CUDA must be auto, 1 or 0, got {wanted!r}.")
    if wanted == "0" or (wanted == "auto" and torch.version.cuda is None):
        return None
    nvcc = find_nvcc()
    if wanted == "1" and nvcc is None:
        toolkit = f"the CUDA {torch.version.cuda} toolkit" if torch.version.cuda else "a CUDA toolkit"
        raise SystemExit(f"TOPN_GATING_CUDA=1 needs nvcc: install {toolkit}, and put nvcc on the PATH or set CUDA_HOME.")
    if wanted == "1" and torch.version.cuda is None and not STREAM_IN_ABI:
        raise SystemExit("TOPN_GATING_CUDA=1 with a torch without CUDA needs torch 2.13 or later.")
    return nvcc


def cuda_version(nvcc: str) -> str:
    """Returns the toolkit's version, whose major number must be that of torch."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"release (\d+\.\d+)", said)[1]
    if torch.version.cuda and torch.version.cuda.split(".")[0] != version.split(".")[0]:
        raise SystemExit(
            f"{nvcc} is of CUDA {version}, this torch of CUDA {torch.version.cuda}: set CUDA_HOME to a toolkit that fits, "
            "or TOPN_GATING_CUDA=0 to build without CUDA."
        )
    return version


def add_cuda(extension, nvcc: str) -> None:
    """Adds the CUDA kernels to the extension."""
    version = cuda_version(nvcc)
    # nvcc can be a script that starts another nvcc, whose dry run prints its folder. torch without CUDA sets no CUDA_HOME.
    said = subprocess.run([nvcc, "--dryrun", "any.cu"], capture_output=True, text=True).stderr
    cpp_extension.CUDA_HOME = str(Path(re.search(r"_HERE_=(.+)", said)[1]).parent)
    default = "8.0;9.0;10.0+PTX" if [int(n) for n in version.split(".")] >= [12, 8] else "8.0;9.0+PTX"
    os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or default
    architectures = re.findall(r",code=(\w+)", " ".join(cpp_extension._get_cuda_arch_flags()))
    architectures.sort(key=lambda name: (len(name), name))  # sm_80 sm_90 sm_100 compute_100

    extension.sources += ["csrc/torch/cuda_backend.cpp", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cuda/*.cu"))]
    told = {"TOPN_CUDA_VERSION": version, "TOPN_CUDA_ARCHITECTURES": " ".join(architectures)}
    extension.define_macros += [(name, f'"{value}"') for name, value in told.items()]
    extension.include_dirs += cpp_extension.include_paths("cuda", torch_include_dirs=False)
    extension.library_dirs += cpp_extension.library_paths("cuda", torch_include_dirs=False)
    # The CUDA runtime is linked statically and its symbols are hidden: torch's is a shared library, or absent.
    extension.libraries += ["cudart_static", "dl", "pthread", "rt"]
    extension.extra_link_args += ["-Wl,--exclude-libs,libcudart_static.a"]
    if not STREAM_IN_ABI:
        extension.libraries += ["torch_cuda"]


def extension(nvcc: str | None):
    """Returns the extension, with CUDA if nvcc is given."""
    # level_*.cpp include the kernels.
    kernels = ["level.cpp", "level_baseline.cpp", "level_avx2.cpp", "level_avx512.cpp", "workspace.cpp"]
    glue = ["schema.cpp", "cpu_backend.cpp", "module.cpp"]
    flags = ["-std=c++17", *([] if "-O" in os.environ.get("CFLAGS", "") else ["-O3"])]
    result = cpp_extension.CppExtension(
        "topn_gating._C",
        [f"csrc/cpu/{name}" for name in kernels] + [f"csrc/torch/{name}" for name in glue],
        include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
        define_macros=[
            ("TORCH_TARGET_VERSION", STABLE_ABI_OF_STREAM if nvcc and STREAM_IN_ABI else STABLE_ABI),
            ("TOPN_BUILD_TORCH", f'"{torch.__version__}"'),
            ("TOPN_NAMESPACE", NAMESPACE),
        ],
        extra_compile_args={
            "cxx": [*flags, "-fvisibility=hidden", "-ffp-contract=fast", "-Wall", "-Wno-psabi"],
            "nvcc": ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xcompiler", "-fvisibility=hidden"],
        },
    )
    if nvcc is None:
        result.sources += ["csrc/torch/no_cuda_backend.cpp"]
    else:
        add_cuda(result, nvcc)
    return result


nvcc = cuda_compiler()
setup(
    ext_modules=[extension(nvcc)],
    cmdclass={"build_ext": cpp_extension.BuildExtension, "hub": Hub},
    options={"build": {"build_base": "build/cuda" if nvcc else "build/cpu"}},  # so that each build keeps its object files
)
