"""How the tests of the protocol build each schedule: a line for each."""

from __future__ import annotations

import itertools

import torch
from optim_models import loss, net, ours

from lora_kernels import schedules


def fresh(dtype=torch.float32, **options):
    """A model whose adapters start as LoRA's, and with a norm that trains beside them."""
    return ours(dtype, init_lora_weights=True, modules_to_save=["norm"], **options)


def adam(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def run(model, optimizer, schedule, steps, first=0):
    for seed in range(first, first + steps):
        optimizer.zero_grad()
        loss(model, seed).backward()
        optimizer.step()
        schedule.step()


def bilevel(cls, model):
    """On the seeds of losses that stay the same, so that a run goes on as it was."""
    return cls(model, lambda seed: loss(model, seed), itertools.repeat(50), itertools.repeat(60), lr=1e-2)


def softmax():
    return fresh(method="bilora", method_options={"values": "softmax"})


# Key -> (the model, the schedule); what it does falls into six steps, on either side of the third.
CASES = {
    "adalora": (
        lambda: fresh(method="adalora"),
        lambda m, o: schedules.AdaLoRA(m, 8, target_r=2, tinit=1, tfinal=2),
    ),
    "alora_alloc": (
        lambda: fresh(method="alora_alloc"),
        lambda m, o: schedules.ALoRAAllocator(m, lambda: loss(m, 70), o, first=2, every=2, rounds=2),
    ),
    "blora": (lambda: fresh(method="blora"), lambda m, o: schedules.BLoRA(m, warmup=2)),
    "autolora_rank": (softmax, lambda m, o: bilevel(schedules.AutoLoRA, m)),
    "bilora": (softmax, lambda m, o: bilevel(schedules.BiLoRA, m)),
    "delta_lora": (
        lambda: fresh(method="delta_lora"),
        lambda m, o: schedules.DeltaLoRA(m, start_step=4, lam=0.5),
    ),
    "lisa": (fresh, lambda m, o: schedules.LISA(m, [m.wide, m.tall, m.square], n_active=1, interval=2)),
    "lorasc": (fresh, lambda m, o: schedules.LoRASC(m, o, every=4)),
    "plora": (fresh, lambda m, o: schedules.PeriodicLoRA(m, o, every=2, momentum=0.3)),
    "lamda_freezer": (
        lambda: fresh(method="lamda"),
        lambda m, o: schedules.LaMDAFreezer(m, max_steps=15),
    ),
    "aflora_freezer": (
        lambda: fresh(method="aflora"),
        lambda m, o: schedules.AFLoRAFreezer(m, total_steps=8, t_i=1, t_f=2, window=2),
    ),
    "dylora_sampler": (lambda: fresh(method="dylora"), lambda m, o: schedules.DyLoRASampler(m, seed=3)),
    "sora_schedule": (
        lambda: fresh(method="sora"),
        lambda m, o: schedules.SoRASchedule(m, xis=(1e-3, 2e-2), steps=(2, 2)),
    ),
    "prilora": (fresh, lambda m, o: schedules.PRILoRA(m, every=2, ratio=0.4)),
    "roselora": (fresh, lambda m, o: schedules.RoseLoRA(m, density=0.3, t_i=1, t_f=5)),
    "tensor_rank_reduction": (
        lambda: net(torch.float32),
        lambda m, o: schedules.RankReducer(m, every=2, eps=0.1),
    ),
    "lora_asr_study": (fresh, lambda m, o: schedules.RankWarmup(m, o, r_lo=2, steps=4)),
    "relora": (fresh, lambda m, o: schedules.ReLoRA(m, o, every=2, ratio=0.5)),
}
# Those that also act on weights of their own accord.
WITHOUT_ADAPTERS = ("lisa", "tensor_rank_reduction")
