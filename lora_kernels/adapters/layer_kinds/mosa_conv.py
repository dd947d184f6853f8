"""loralib's LoRA of a convolution, which MoSA uses."""

from __future__ import annotations

from torch import Tensor

from ..base import Adapter, register
from ..call import Call
from ..site import Site, Start
from ..update import Dense, LowRank


@register("mosa_conv")
class MoSAConv(Adapter):
    """ΔW = (α/r) · B A, its numbers in their order as ``[out, in, k, k]``

    MoSA (Kothari et al., 2022, arXiv 2211.03165) adapts encoders of convolutions with loralib's LoRA
    (Hu et al., 2021, arXiv 2106.09685): A ``[r·k, in·k]`` and B ``[out·k, r·k]`` train, r k² (in + out)
    numbers; which layers, ``target_modules`` says. Row o·k + a and column i·k + b of B A are
    ΔW[o, (a·in + i) // k, (a·in + i) % k, b]: it is no convolution by A followed by one by B, which is what
    PEFT has and ``method="lora"`` is. On a linear (k = 1) it is LoRA.

    Raises:
        ValueError: the kernel is not square.
    """

    def build(self, site: Site) -> Start:
        """A Kaiming-uniform A, and a B of zeros."""
        kernel = site.kernel or (1, 1)
        if len(kernel) != 2 or kernel[0] != kernel[1]:
            raise ValueError(f"method: mosa_conv expects a square kernel, got {kernel}")
        k = kernel[0]
        self.__dict__["plain"] = not site.kernel
        lora_a = site.kaiming(self.r * k, site.in_features // k)
        return Start({"kernel_A": lora_a, "kernel_B": site.zeros(site.out_features * k, self.r * k)})

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> LowRank | Dense:
        """ΔW, one small product; of a linear its factors."""
        if not self.kernel:
            return LowRank(self.kernel_A, self.kernel_B, self.scaling)
        delta = self.scaling * (self.kernel_B @ self.kernel_A)
        return Dense(delta.view(self.out_features, self.in_features))
