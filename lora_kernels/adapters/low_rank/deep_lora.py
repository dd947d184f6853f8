"""Deep LoRA: a product of three or more factors, and its compressed form.

Over 60 lines: the compressed form is a decomposition of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...init.base import statistic
from ..base import register
from ..call import Call
from ..lora import LoRA
from ..site import Site, Start
from ..update import LowRank


@register("deep_lora")
class DeepLoRA(LoRA):
    """ΔW = (α/r) · W_L … W_1

    Deep LoRA (Yaras et al., 2024, arXiv 2406.04112), which has no α/r: ``lora_alpha = r``. A = W_1
    ``[r, in]``, B = W_L ``[out, r]`` and the cores W_2 … W_{L-1} ``[L-2, r, r]`` train; each starts as ε
    times an orthonormal matrix, so that ‖ΔW‖ starts at (α/r) · ε^L. ``method_options``: ``depth`` L (3),
    ``eps`` ε (1e-3), and ``compress`` (False): factors of full width in r of their directions,
    ΔW = (α/r) · U C_L … C_1 Vᵀ from C_l = ε I. U = B and Vᵀ = A come from the statistic ``gradient`` of
    :func:`lora_kernels.calibrate` and stay frozen unless ``train_outer`` (the paper then gives them a
    learning rate of their own, a hundredth say).

    Raises:
        ValueError: with ``compress``, r is odd or above the smaller side, or there is no gradient.
    """

    options = frozenset({"depth", "eps", "compress", "train_outer"})
    zero_start = False
    peft = False

    def build(self, site: Site) -> Start:
        """The factors."""
        depth, eps = site.whole_option("depth", 3, 3), site.option("eps", 1e-3)
        if isinstance(eps, bool) or not isinstance(eps, float) or not eps > 0:
            raise ValueError(f"method_options: eps: expected a float above 0, got {eps!r}")
        r, sizes = self.r, (site.out_features, site.in_features)
        self.compressed = site.option("compress", False, (False, True))
        if self.compressed:
            if not site.option("train_outer", False, (False, True)):
                self.frozen = frozenset({"lora_A", "lora_B"})
            lora_b, lora_a = self._outer(site, depth, eps)
            equal = eps * torch.eye(r, device=site.device).repeat(depth, 1, 1)
            return Start({"lora_A": lora_a, "lora_B": lora_b, "cores": equal})
        lora_a, lora_b = (
            nn.init.orthogonal_(site.empty(*size), eps) for size in ((r, sizes[1]), (sizes[0], r))
        )
        cores = [nn.init.orthogonal_(site.empty(r, r), eps) for _ in range(depth - 2)]
        return Start({"lora_A": lora_a, "lora_B": lora_b, "cores": torch.stack(cores)})

    def _outer(self, site: Site, depth: int, eps: float) -> tuple[Tensor, Tensor]:
        sizes = (site.out_features, site.in_features)
        if self.r % 2 or self.r > min(sizes):
            want = f"an even rank of at most {min(sizes)}"
            raise ValueError(f"r: deep_lora's compress expects {want}, got {self.r}")
        if site.weight is not None and site.weight.is_meta:  # to be filled from a file
            return site.empty(sizes[0], self.r), site.empty(self.r, sizes[1])
        if "gradient" not in site.statistics:
            how = "apply_lora(model, config, statistics=calibrate(model, batches, ('gradient',)))"
            raise ValueError(f"statistics: deep_lora's compress expects 'gradient', got none; use {how}")
        return compressed_factors(statistic(site, "gradient", *sizes), self.r, depth)

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> LowRank:
        """The cores' product folded into A, or where that is frozen into B."""
        core = self.cores[0]
        for factor in self.cores[1:]:
            core = factor @ core
        if self.compressed:
            return LowRank(self.lora_A, self.lora_B @ core, self.scaling)
        return LowRank(core @ self.lora_A, self.lora_B, self.scaling)


def compressed_factors(gradient: Tensor, r: int, depth: int) -> tuple[Tensor, Tensor]:
    """U ``[out, r]`` and Vᵀ ``[r, in]``: where factors of full width would learn

    for the gradient G ``[out, in]`` of W at W_L … W_1 ≈ 0, W_l random orthogonal of width max(in, out). The
    longer of the two is orthonormal, and both are where W is square.
    """
    if gradient.shape[0] > gradient.shape[1]:
        lora_b, lora_a = compressed_factors(gradient.T, r, depth)
        return lora_a.T, lora_b.T
    out, n = gradient.shape
    first, rest = _orthonormal(gradient, n, n), _orthonormal(gradient, out, n)
    for _ in range(depth - 2):
        rest = rest @ _orthonormal(gradient, n, n)
    u, _, vh = torch.linalg.svd(rest.T @ gradient)  # of the gradient of W_1
    still_left, still_right = first.T @ u[:, r // 2 :], vh[r // 2 :].T
    null = torch.linalg.svd(torch.cat([still_left, -still_right], 1))[2].T[:, n:]
    still = still_left @ null[: still_left.shape[1]]  # the directions that no factor moves in
    v = torch.linalg.svd(still)[0].flip(1)[:, :r]
    return rest @ first @ v, v.T.contiguous()


def _orthonormal(like: Tensor, rows: int, columns: int) -> Tensor:
    return nn.init.orthogonal_(like.new_empty(rows, columns))
