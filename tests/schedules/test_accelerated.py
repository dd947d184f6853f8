"""Every optimiser, schedule and statistic on an accelerated PEFT Llama, with its groups and fused MLP.

Each does there what it does on the same model as PEFT left it, or refuses with a reason.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from schedule_cases import CASES
from torch import nn

from lora_kernels import accelerate, calibrate, optim, schedules
from lora_kernels.nn import lora_pairs
from lora_kernels.stats import LaplaceLoRA

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = (torch.arange(2)[:, None] * 5 + torch.arange(6)) % 32


def llama(fused, **options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=2, max_position_embeddings=16, attn_implementation="eager"
    )
    model = transformers.LlamaForCausalLM(config).double()
    torch.manual_seed(1)
    model = (
        peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=LINEARS, **options)).double().train()
    )
    if fused:
        report = accelerate(model)
        assert len(report.accelerated) == 7 and report.groups and report.mlps
    return model


def blocks(model):
    return model.base_model.model.model.layers


def loss(model):
    return model(input_ids=TOKENS, labels=TOKENS).loss


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def train(model, optimizer, schedule=None, steps=4, loss=loss):
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return model


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(make):
    """A run leaves the same of the weights as PEFT left them and accelerated, and gives the same."""
    found = []
    for fused in (False, True):
        model = llama(fused)
        before = values(model)
        torch.manual_seed(2)
        extra = make(model) or []
        found.append({**values(model), **{f"extra {i}": one for i, one in enumerate(extra)}})
    want, got = found
    assert got.keys() == want.keys()
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], rtol=1e-7, atol=1e-9, msg=name)
    assert extra or any(not torch.equal(value, got[name]) for name, value in before.items())


def derivative_free(model):
    pytest.importorskip("cma")
    optimizer = optim.DerivativeFree(model, dim=8, popsize=3, sigma=0.3)

    def losses(batch):
        logits = model(input_ids=batch).logits[:, :-1]
        return F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none").mean(1)

    return [torch.tensor(optimizer.step(losses, TOKENS), dtype=torch.float64)]


def trained_by(make):
    return lambda model: train(model, make(model)) and None


OPTIMISERS = {
    "lora_plus": trained_by(lambda m: optim.lora_plus(m, lr=1e-2, ratio=4)),
    "lora_plus_groups": trained_by(lambda m: torch.optim.SGD(optim.lora_plus_groups(m, 1e-2, 4))),
    "LoRAFA": trained_by(lambda m: optim.LoRAFA(m, 1e-2)),
    "riemannian": trained_by(lambda m: optim.riemannian(m, torch.optim.SGD, lr=1e-3)),
    "Flora": trained_by(lambda m: optim.Flora([p for p in m.parameters() if p.requires_grad], 1e-2, rank=2)),
    "GaLoreAdamW": trained_by(lambda m: optim.GaLoreAdamW(m, 1e-2, update_proj_gap=3)),
    "DerivativeFree": derivative_free,
}


def of_batch(model):
    return lambda batch: model(input_ids=batch, labels=batch).loss


# What is put on a PEFT Llama, beside its optimiser.
SCHEDULES = {
    "adalora": lambda m, o: schedules.AdaLoRA(m, 8, target_r=1),
    "alora_alloc": lambda m, o: schedules.ALoRAAllocator(m, lambda: loss(m), o),
    "blora": lambda m, o: schedules.BLoRA(m),
    "autolora_rank": lambda m, o: schedules.AutoLoRA(m, of_batch(m), iter([]), iter([])),
    "bilora": lambda m, o: schedules.BiLoRA(m, of_batch(m), iter([]), iter([])),
    "delta_lora": lambda m, o: schedules.DeltaLoRA(m),
    "lisa": lambda m, o: schedules.LISA(m, blocks(m), n_active=1, interval=2),
    "lorasc": lambda m, o: schedules.LoRASC(m, o, every=2),
    "plora": lambda m, o: schedules.PeriodicLoRA(m, o, every=2, momentum=0.3),
    "lamda_freezer": lambda m, o: schedules.LaMDAFreezer(m, max_steps=10),
    "aflora_freezer": lambda m, o: schedules.AFLoRAFreezer(m, total_steps=8, t_i=1, t_f=2, window=2),
    "dylora_sampler": lambda m, o: schedules.DyLoRASampler(m),
    "sora_schedule": lambda m, o: schedules.SoRASchedule(m),
    "prilora": lambda m, o: schedules.PRILoRA(m, every=2, ratio=0.4),
    "roselora": lambda m, o: schedules.RoseLoRA(m, density=0.3, t_i=1, t_f=3),
    "lora_asr_study": lambda m, o: schedules.RankWarmup(m, o, r_lo=1, steps=2),
    "relora": lambda m, o: schedules.ReLoRA(m, o, every=2, ratio=0.5),
    "tensor_rank_reduction": lambda m, o: schedules.RankReducer(m, every=2),
}
# They need adapters of a method that PEFT has not, or another than its LoRA.
REFUSED = {
    "adalora",
    "alora_alloc",
    "blora",
    "autolora_rank",
    "bilora",
    "delta_lora",
    "dylora_sampler",
    "sora_schedule",
}


def test_all_are_here():
    named = {name for name in optim.__all__ if not name.startswith("Flora")} | {"Flora"}
    assert named - {*OPTIMISERS} == {"compressed_weight_grad"} & named
    assert {*SCHEDULES} == {*CASES}


SLOW = {"DerivativeFree"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.exhaustive) if name in SLOW else name for name in OPTIMISERS],
)
def test_an_optimiser(name):
    assert_same(OPTIMISERS[name])


@pytest.mark.parametrize("key", [key for key in SCHEDULES if key not in REFUSED])
def test_a_schedule(key):
    def run(model):
        optimizer = sgd(model)
        train(model, optimizer, SCHEDULES[key](model, optimizer))

    assert_same(run)


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_a_schedule_that_needs_another_method_says_so(key):
    model = llama(True)
    with pytest.raises(ValueError, match=r"model: .*expected adapters of "):
        SCHEDULES[key](model, sgd(model))


def hiddenkey(model):
    attention, hidden = zip(*[(one.self_attn, one.mlp) for one in blocks(model)], strict=True)
    regulariser = schedules.HiddenKey(attention, hidden, kl=0.1)
    train(model, sgd(model), loss=lambda m: regulariser.loss(lambda: m(input_ids=TOKENS, labels=TOKENS)))


def lampat(model):
    optimizer = sgd(model)
    embeddings = model.get_input_embeddings()(TOKENS).detach()
    for mode in ("pgd", "newton"):
        optimizer.zero_grad()
        schedules.adversarial_step(
            lambda e: model(inputs_embeds=e).logits,
            embeddings,
            lambda logits: F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()),
            mode=mode,
            lr=1e-2,
            radius=1e-1,
            seed=3,
        )
        optimizer.step()


def advlora(model):
    embeddings = model.get_input_embeddings()(TOKENS).detach()
    attack = {"radius": 1e-2, "step": 5e-3, "bounds": None, "start": 0.0}

    def robust(model):
        return schedules.advlora_loss(
            lambda e: model(inputs_embeds=e, labels=TOKENS).loss, embeddings, **attack
        )

    train(model, sgd(model), loss=robust)


def two_branches(model):
    branches = schedules.TwoBranches(model)
    optimizer = torch.optim.SGD(branches.parameters(), lr=0.1)
    labels = TOKENS[:, -1]

    def robust(model):
        natural, adversarial = (
            run(input_ids=TOKENS).logits[:, -1] for run in (branches.natural, branches.adversarial)
        )
        return schedules.two_branch_loss(natural, adversarial, labels, 0.5, 1.0)

    train(model, optimizer, loss=robust)


def inflora(model):
    schedule = schedules.InfLoRA(model, 2)
    for _ in range(2):
        schedule.begin_task(lambda ids: model(input_ids=ids), [TOKENS])
        train(model, sgd(model), steps=2)
        schedule.end_task(lambda ids: model(input_ids=ids), [TOKENS])
        return None


def laplace(model):
    train(model, sgd(model), steps=2)
    generator = torch.Generator().manual_seed(3)
    laplace = LaplaceLoRA(model, lambda m, ids: m(input_ids=ids).logits[:, -1, :4], generator=generator)
    laplace.fit([(TOKENS, TOKENS[:, -1] % 4)])
    return [laplace.predict(TOKENS), torch.tensor(laplace.log_evidence(), dtype=torch.float64)]


OTHERS = {one.__name__: one for one in (hiddenkey, lampat, advlora, two_branches, inflora, laplace)}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_schedule(name):
    assert_same(OTHERS[name])


def test_calibration_refuses_a_model_with_adapters():
    with pytest.raises(ValueError, match="model: expected one without adapters"):
        calibrate(llama(True), [{"input_ids": TOKENS}])


def test_pairs_are_those_of_the_plain_model():
    one, other = (list(lora_pairs(llama(fused))) for fused in (False, True))
    assert [(p.name, p.plain, p.scaling) for p in one] == [(p.name, p.plain, p.scaling) for p in other]
    assert len(one) == 7 and all(isinstance(p.layer, nn.Module) for p in other)
