"""The gates that topn_gating replaces: they return dense ``(b, n, e, C)`` tensors, which two einsums apply."""

import importlib.metadata
import importlib.util
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .contenders import EPS, THRESHOLD, Contender, Problem, scaled


class DenseGating(Contender):
    """A ``TopNGating`` module; a bfloat16 x fails in the einsum, since dispatch and combine stay float32."""

    dense_tensors = 10

    @classmethod
    def gating(cls) -> type[nn.Module]:
        """Returns the peer's class."""
        raise NotImplementedError

    @classmethod
    def load(cls) -> None:
        cls.gating()

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        shape = problem.shape
        options = {"top_n": shape.k, "threshold_train": THRESHOLD, "capacity_factor_train": problem.capacity_factor}
        self.module = self.gating()(shape.d, shape.e, EPS, **options).to(problem.x.dtype)
        self.module.to_gates.weight = problem.weight

    def gate(self) -> Sequence[Tensor]:
        return self.module(self.problem.x)

    dense = gate

    def full(self, gain: Tensor | None = None) -> Sequence[Tensor]:
        dispatch, combine, *losses = self.module(self.problem.x)
        rows = torch.einsum("bnd,bnec->becd", self.problem.x, dispatch)
        return torch.einsum("becd,bnec->bnd", scaled(rows, gain), combine), *losses


class StMoe(DenseGating):
    """TopNGating of st-moe-pytorch."""

    name = "st-moe-pytorch"
    about = "st_moe_pytorch.TopNGating and its layer's two einsums"
    install = "pip install st-moe-pytorch"

    @classmethod
    def gating(cls) -> type[nn.Module]:
        from st_moe_pytorch.st_moe_pytorch import TopNGating

        return TopNGating


class Zeta(DenseGating):
    """TopNGating of zeta, loaded from its file: ``import zeta`` would load dozens of packages."""

    name = "zetascale"
    about = "zeta.nn.TopNGating and two einsums; several tokens to a slot for k >= 3, so it then differs"
    install = "pip install --no-deps zetascale"

    @classmethod
    def gating(cls) -> type[nn.Module]:
        file = next(f for f in importlib.metadata.files("zetascale") or () if str(f) == "zeta/nn/modules/top_n_gating.py")
        spec = importlib.util.spec_from_file_location("zeta_top_n_gating", file.locate())
        module = importlib.util.module_from_spec(spec)
        with warnings.catch_warnings():  # beartype warns of typing.Tuple
            warnings.simplefilter("ignore")
            spec.loader.exec_module(module)
        return module.TopNGating
