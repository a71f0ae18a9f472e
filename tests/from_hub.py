"""Checks a repository of the Kernels Hub, which the package kernels loads from a folder, beside the package of this checkout.

python tests/from_hub.py FOLDER
"""

import sys
from pathlib import Path

import torch
from installed import step
from kernels import get_local_kernel

import topn_gating


def main():
    hub = get_local_kernel(Path(sys.argv[1]).resolve(), backend="cpu")
    assert hub is not topn_gating
    assert Path(hub.__file__).is_relative_to(Path(sys.argv[1]).resolve())
    namespace = hub._ops.add_op_namespace_prefix("").removesuffix("::")
    assert namespace not in ("", "topn_gating")
    ours, theirs = torch.ops.topn_gating.gate.default, getattr(torch.ops, namespace).gate.default
    assert ours is not theirs
    for dropless in (False, True):
        torch.manual_seed(0)
        layer, x = topn_gating.MoE(16, 4, dropless=dropless), torch.randn(2, 9, 16)
        other = hub.MoE(16, 4, dropless=dropless)
        other.load_state_dict(layer.state_dict())
        expected = step(layer, x)
        torch.testing.assert_close(step(other, x), expected, rtol=0, atol=0)
        torch.testing.assert_close(step(torch.compile(other, backend="aot_eager", fullgraph=True), x), expected)
    print(f"{hub.__file__}: works in the namespace {namespace}")


if __name__ == "__main__":
    main()
