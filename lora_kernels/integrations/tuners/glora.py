"""GLoRA (Chavan et al., 2023, arXiv 2306.07967): W and b both scaled and shifted."""

from __future__ import annotations

from typing import Any

from peft.tuners.glora.layer import GloraEmptyPath, GloraLinear, GloraLoraPath
from torch import Tensor

from ...adapters.update import Added, Formed, Shifted
from ...ops.formed_linear import ScaledShifted
from .base import FusedTuner, base_of, linear


class FusedGlora(FusedTuner, GloraLinear):
    """y = x (W + W ⊙ A + B)ᵀ + b + b ⊙ D + E + W C: one product, of a weight that is made at each call

    PEFT multiplies x by W too, takes it off again, and differentiates both.
    """

    per_adapter = "glora_A"
    in_dtype_of_x = False

    def update(self: Any, name: str, x: Tensor) -> Added | Formed | Shifted:
        """What the paths of the config come to; D, E and C act where there is a bias."""
        weight, bias = base_of(self)
        paths = (*_tensors(self.glora_A[name]), *_tensors(self.glora_B[name]))
        update = Formed(ScaledShifted(), (weight, *paths)) if paths else Added(x.new_zeros(()))
        if bias is None:
            return update
        of_c, of_d, of_e = (getattr(self, f"glora_{path}")[name] for path in "CDE")
        shift = bias * of_d().to(bias.dtype) + of_e().to(bias.dtype)
        if type(of_c) is not GloraEmptyPath:
            shift = shift + (weight @ of_c().to(weight.dtype)).squeeze(-1)
        return Shifted(update, shift)


def _tensors(path: Any) -> tuple[Tensor, ...]:
    """A product's factors, or what spreads over W: a column or a number."""
    if type(path) is GloraEmptyPath:
        return ()
    return (path.Xd, path.Xu) if type(path) is GloraLoraPath else (path.X.view(-1, 1),)


TAKEOVERS = {GloraLinear: linear(FusedGlora)}
