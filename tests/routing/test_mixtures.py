"""The mixtures of the register against a plain loop over experts, in fp64; what each promises beside."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.nn import LoRALinear, fill_experts, mixed_adapters, side_inputs
from lora_kernels.routing import (
    UtteranceRouter,
    balance_loss,
    domain_loss,
    localized_balance_loss,
    majority,
    seen,
    train_by_turns,
)

IN, OUT, R, E = 12, 10, 3, 4
WIDE = torch.float64
P = torch.rand(2, E, generator=torch.Generator().manual_seed(1), dtype=WIDE)
TOKENS = torch.rand(2, 5, E, generator=torch.Generator().manual_seed(2), dtype=WIDE)


def linear(method, dtype=WIDE, dropout=0.0, **options):
    torch.manual_seed(0)
    own = {"experts": E, **options}
    layer = LoRALinear(IN, OUT, R, 6, dropout, dtype=dtype, method=method, method_options=own)
    with torch.no_grad():
        for parameter in layer.adapters.parameters():
            parameter.normal_()
    return layer, layer.adapters["default"]


def experts(one):
    """A and B of each."""
    return [(one.lora_A[j * R : j * R + R], one.lora_B[:, j * R : j * R + R]) for j in range(E)]


def mixed(layer, x, weights):
    """Expert after expert on every row, by its weight there."""
    one = layer.adapters["default"]
    while weights.dim() < x.dim():
        weights = weights.unsqueeze(-2)
    y = F.linear(x, layer.weight, layer.bias)
    for j, (a, b) in enumerate(experts(one)):
        y = y + weights[..., j, None] * one.scaling * (x @ a.T @ b.T)
    return y


def averaged(layer, x, weights):
    """Each sample with the weighted sums of the factors."""
    one = layer.adapters["default"]
    ys = []
    for part, w in zip(x, weights, strict=True):
        a, b = (sum(w[j] * pair[i] for j, pair in enumerate(experts(one))) for i in (0, 1))
        ys.append(F.linear(part, layer.weight, layer.bias) + one.scaling * (part @ a.T @ b.T))
    return torch.stack(ys)


def chosen(scores, k, normalised=True):
    """Dense weights, 0 of what is not among the best k."""
    weights = scores.softmax(-1)
    picked = torch.zeros_like(weights).scatter(-1, scores.topk(k, -1).indices, 1.0) * weights
    return picked / picked.sum(-1, keepdim=True) if normalised else picked


def one_hot(ids):
    return F.one_hot(ids, E).to(WIDE)


def router(x, one):
    return x @ one.router.T


def straight(scores):
    """One expert with weight 1, and the gradient of its softmax."""
    soft, hard = scores.softmax(-1), one_hot(scores.argmax(-1))
    return hard * (1 + soft - soft.detach())


def ramole(layer, x, mask=None):
    """v_e formed, and scored against the router's own."""
    one = layer.adapters["default"]
    v = torch.stack([one.scaling * x @ a.T @ b.T for a, b in experts(one)], -2)
    q = x @ one.router_A.T
    scores = torch.einsum("...r,...er->...e", q, v @ one.router_B) / math.sqrt(one.router_A.shape[0])
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    alpha = scores.softmax(-1).nan_to_num(0.0)
    return F.linear(x, layer.weight, layer.bias) + (alpha[..., None] * v).sum(-2)


# Key: (method, options, side inputs, the same by a plain loop).
CASES = {
    "mixlora": ("mixlora", {}, {}, lambda m, x, o: mixed(m, x, chosen(router(x, o), 2))),
    "mixlora, as they are": (
        *("mixlora", {"top_k": 3, "norm_topk_prob": False}, {}),
        lambda m, x, o: mixed(m, x, chosen(router(x, o), 3, False)),
    ),
    "loramoe": ("loramoe", {}, {}, lambda m, x, o: mixed(m, x, router(x, o).softmax(-1))),
    "sira": (
        *("sira", {"top_k": 2, "capacity": None, "expert_dropout": 0.0}, {}),
        lambda m, x, o: mixed(m, x, chosen(router(x, o), 2)),
    ),
    "moa": ("moa", {}, {}, lambda m, x, o: mixed(m, x, straight(router(x.mean(1), o)))),
    "saml": ("saml", {}, {"expert_weights": P}, lambda m, x, o: averaged(m, x, P)),
    "xlora": ("xlora", {}, {"expert_weights": {"": TOKENS}}, lambda m, x, o: mixed(m, x, TOKENS)),
    "xlora, samples": ("xlora", {}, {"expert_weights": P}, lambda m, x, o: mixed(m, x, P)),
    "arrow": ("arrow", {"top_k": 2, "temperature": 0.7}, {}, lambda m, x, o: arrow(m, x, o)),
    "ramole": ("ramole", {"router_rank": 2}, {}, lambda m, x, o: ramole(m, x)),
}


def arrow(layer, x, one):
    return mixed(layer, x, chosen(router(x, one).abs() / 0.7, 2))


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("key", CASES)
def test_values_and_every_gradient_by_a_loop_over_experts(key, same):
    method, options, side, want = CASES[key]
    layer, one = linear(method, batch_invariant=same, **options)
    x = torch.randn(2, 5, IN, dtype=WIDE, requires_grad=True)
    with side_inputs(layer, **side):
        y = layer(x)
    expected = want(layer, x, one)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    leaves = [x, *(p for p in one.parameters() if p.requires_grad)]
    dy = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(o, leaves, dy) for o in (y, expected))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)
    assert all(grad.abs().max() > 0 for grad in ours)


@pytest.mark.parametrize("key", ["saml", "xlora", "xlora, samples"])
def test_gradients_reach_the_weights_of_the_call(key):
    layer, _ = linear(CASES[key][0], **CASES[key][1])
    x = torch.randn(2, 5, IN, dtype=WIDE)
    p = (TOKENS if key == "xlora" else P).clone().requires_grad_()
    with side_inputs(layer, expert_weights=p):
        y = layer(x)
    expected = averaged(layer, x, p) if key == "saml" else mixed(layer, x, p)
    dy = torch.randn_like(y)
    torch.testing.assert_close(*(torch.autograd.grad(o, p, dy)[0] for o in (y, expected)))


@pytest.mark.parametrize("key", [key for key in CASES if key != "ramole"])
def test_a_row_is_the_same_whoever_else_is_in_the_batch(key):
    """Bit for bit, with the option that says so, where the router's word is the same."""
    method, options, side, _ = CASES[key]
    layer, _ = linear(method, torch.float32, batch_invariant=True, **options)
    layer.eval()
    x = torch.randn(2, 5, IN)
    if not side:  # a router that says the same of every row
        with torch.no_grad():
            layer.adapters["default"].router.zero_()
    given = side.get("expert_weights")
    given = given[""] if isinstance(given, dict) else given
    with torch.no_grad(), side_inputs(layer, **({} if given is None else {"expert_weights": given.float()})):
        whole = layer(x)
    for i in range(2):
        part = slice(i, i + 1)
        alone = {} if given is None else {"expert_weights": given[part].float()}
        with torch.no_grad(), side_inputs(layer, **alone):
            assert torch.equal(layer(x[part]), whole[part])


def test_a_router_without_an_opinion_gives_the_mean():
    layer, one = linear("loramoe")
    x = torch.randn(5, IN, dtype=WIDE)
    with torch.no_grad():
        one.router.zero_()
        mean = sum(one.scaling * x @ a.T @ b.T for a, b in experts(one)) / E
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias) + mean)


def test_localized_balance_loss():
    """By its definition; 0 where Z is constant, and for one sample."""
    layer, one = linear("loramoe")
    x, kinds = torch.randn(3, 5, IN, dtype=WIDE), torch.tensor([1, 0, 1])
    with side_inputs(layer) as call:
        layer(x)
    q = router(x, one).softmax(-1).sum(1)
    own = torch.tensor([[e < E // 2 if kind else e >= E // 2 for e in range(E)] for kind in kinds.tolist()])
    z = q * torch.where(own, 1.3, 0.7)
    torch.testing.assert_close(localized_balance_loss(call, kinds, 0.3), z.var() / (z.mean() ** 2 + 1e-10))
    with torch.no_grad():
        one.router.zero_()
    with side_inputs(layer) as call:
        layer(x)
    assert localized_balance_loss(call, kinds, 0.0) < 1e-20
    with side_inputs(layer) as call:
        layer(x[:1])
    assert localized_balance_loss(call, kinds[:1], 0.5) == 0
    with pytest.raises(ValueError, match="delta: expected 0 <= delta <= 1, got 2"):
        localized_balance_loss(call, kinds, 2)
    with pytest.raises(ValueError, match=r"kinds: expected one for each of 1 samples, got shape \(3,\)"):
        localized_balance_loss(call, kinds)


def sira(**options):
    layer, one = linear("sira", top_k=2, **options)
    x = torch.randn(20, IN, dtype=WIDE)
    return layer, one, x


def test_an_expert_takes_the_first_rows_that_chose_it_up_to_its_capacity():
    layer, one, x = sira(capacity=0.8, expert_dropout=0.0)
    limit = math.ceil(0.8 * 2 * 20 / E)
    weights, taken = chosen(router(x, one), 2).detach(), [0] * E
    for row in weights:
        for j in range(E):
            if row[j] > 0:
                taken[j] += 1
                row[j] = row[j] if taken[j] <= limit else 0.0
    assert max(taken) > limit
    torch.testing.assert_close(layer(x), mixed(layer, x, weights))
    layer.eval()
    torch.testing.assert_close(layer(x), mixed(layer, x, chosen(router(x, one), 2)))


def test_experts_left_out_are_the_seeds_and_k_remain():
    layer, _, x = sira(capacity=None, expert_dropout=0.9)

    def used(seed):
        torch.manual_seed(seed)
        with side_inputs(layer) as call:
            y = layer(x)
        return y, set(seen(call)[""].ids.flatten().tolist())

    sets = [used(seed)[1] for seed in range(20)]
    assert torch.equal(used(3)[0], used(3)[0]) and all(len(one) >= 2 for one in sets)
    assert len({frozenset(one) for one in sets}) > 1
    layer.eval()
    assert torch.equal(used(0)[0], used(1)[0])
    with side_inputs(layer) as call:
        layer(x)
    assert balance_loss(call) > 0


def test_a_sequence_uses_the_expert_of_its_label_and_the_loss_teaches_the_router_alone():
    layer, one = linear("moa")
    x, domain = torch.randn(2, 5, IN, dtype=WIDE), torch.tensor([3, 1])
    with side_inputs(layer, domain=domain) as call:
        y = layer(x)
    torch.testing.assert_close(y, mixed(layer, x, one_hot(domain)))
    loss = domain_loss(call, domain)
    torch.testing.assert_close(loss, F.cross_entropy(router(x.mean(1), one), domain))
    grads = torch.autograd.grad(loss, [one.router, one.lora_A, one.lora_B], allow_unused=True)
    assert grads[0].abs().max() > 0 and grads[1] is grads[2] is None
    assert torch.equal(majority(call), router(x.mean(1), one).argmax(-1))
    alone = torch.stack([layer(one_row[None])[0] for one_row in x])
    torch.testing.assert_close(layer(x), alone)
    with (
        side_inputs(layer, domain=domain[:1]),
        pytest.raises(ValueError, match="domain: expected an integer"),
    ):
        layer(x)


def test_fusion_is_an_expert_where_the_weights_are_one_hot_and_no_mixture_else():
    layer, _ = linear("saml")
    x = torch.randn(2, 5, IN, dtype=WIDE)
    hot = one_hot(torch.tensor([2, 0]))
    with side_inputs(layer, expert_weights=hot):
        torch.testing.assert_close(layer(x), mixed(layer, x, hot))
    with side_inputs(layer, expert_weights=P):
        assert not torch.allclose(layer(x), mixed(layer, x, P))
    wrong = {"": P[:, :2]}
    with (
        side_inputs(layer, expert_weights=wrong),
        pytest.raises(ValueError, match="expert_weights: exp"),
    ):
        layer(x)


def test_the_router_of_an_utterance_and_its_turns():
    model = nn.Sequential(nn.Linear(IN, IN), nn.Tanh(), nn.Linear(IN, OUT))
    config = {"method": "saml", "method_options": {"experts": E}, "target_modules": "all-linear"}
    apply_lora(model, LoRAConfig(R, **config))
    for cross in (False, True):
        own = UtteranceRouter(IN, E, 2.0, cross)
        width = IN * (2 if cross else 1)
        count = 3 * IN**2 + IN + IN + 1 + (width + 1) * E
        assert sum(p.numel() for p in own.parameters()) == count
        x = torch.randn(2, 7, IN)
        p = own(x, x) if cross else own(x)
        torch.testing.assert_close(p.sum(-1), torch.ones(2))
        with pytest.raises(ValueError, match="memory: expected"):
            own(x) if cross else own(x, x)
    z = own.convolution(x.transpose(1, 2)).transpose(1, 2)
    pools = [(F.softmax(own.attention(one), 1) * one).sum(1) for one in (z, x)]
    torch.testing.assert_close(p, (own.head(torch.cat(pools, -1)) / 2).softmax(-1))
    before = [q.detach().clone() for q in model.parameters()]
    for step in (0, 1):
        train_by_turns(step, own, model)
        with side_inputs(model, expert_weights=own(x, x)):
            y = model(x)
        if step == 0:
            y.sum().backward()
            assert all(q.grad is None for q in model.parameters())
        assert any(q.requires_grad for q in model.parameters()) == (step == 1)
        assert any(q.requires_grad for q in own.parameters()) == (step == 0)
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


def test_candidates_alone_count_and_a_silent_router_weighs_them_alike():
    layer, one = linear("ramole", router_rank=2)
    x = torch.randn(3, 5, IN, dtype=WIDE, requires_grad=True)
    ids = torch.tensor([[2, 0], [3, -1], [-1, -1]])
    mask = torch.tensor([[True, False, True, False], [False, False, False, True], [False] * 4])
    with side_inputs(layer, candidates=ids):
        y = layer(x)
    expected = ramole(layer, x, mask[:, None])
    torch.testing.assert_close(y, expected)
    leaves, dy = [one.router_A, one.router_B], torch.randn_like(y)
    grads = torch.autograd.grad(y, [x, *leaves], dy)
    assert all(torch.isfinite(grad).all() for grad in grads)
    first = torch.autograd.grad(ramole(layer, x[:2], mask[:2, None]), leaves, dy[:2])
    for got, want in zip(grads[1:], first, strict=True):
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(y[1], mixed(layer, x, one_hot(torch.tensor([3, 3, 3])))[1])
    torch.testing.assert_close(y[2], F.linear(x, layer.weight, layer.bias)[2])
    with torch.no_grad():
        one.router_B.zero_()
        torch.testing.assert_close(layer(x), mixed(layer, x, torch.full((3, E), 1 / E, dtype=WIDE)))
    for wrong in (ids[:2], torch.tensor([[9, 0]] * 3)):
        with side_inputs(layer, candidates=wrong), pytest.raises(ValueError, match="candidates: expected"):
            layer(x)


def test_candidates_left_out_are_the_seeds_and_one_remains():
    layer, one = linear("ramole", router_rank=2, candidate_dropout=0.9)
    x = torch.randn(6, 5, IN, dtype=WIDE)
    ys = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        with side_inputs(layer) as call:
            ys.append(layer(x))
        left = (seen(call)[""].scores > -torch.inf).sum(-1)
        assert left.min() >= 1 and left.max() < E
    assert torch.equal(ys[0], ys[1]) and not torch.equal(ys[0], ys[2])
    layer.eval()
    torch.testing.assert_close(layer(x), ramole(layer, x))
    assert not one.lora_A.requires_grad


def trained_model():
    """A model with two plain adapters of different ranks and scales, all of whose tensors matter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, IN), nn.Tanh(), nn.Linear(IN, OUT)).double()
    apply_lora(model, LoRAConfig(2, lora_alpha=1, target_modules="all-linear"), "first")
    apply_lora(model, LoRAConfig(3, lora_alpha=6, target_modules=["2"]), "second")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adapters" in name:
                parameter.normal_()
    return model


def test_adapters_become_experts():
    model = trained_model()
    options = {"method": "moa", "method_options": {"experts": 2}, "target_modules": "all-linear"}
    apply_lora(model, LoRAConfig(3, lora_alpha=2, **options), "mixture")
    x, names, domain = torch.randn(2, 5, IN, dtype=WIDE), ["first", "second"], torch.tensor([1, 0])
    with mixed_adapters(model, ["second", "first"]):
        want = model(x)
    assert fill_experts(model, names, "mixture") is model
    for layer in (model[0], model[2]):
        layer.set_adapter("mixture")
    with side_inputs(model, domain=domain):
        torch.testing.assert_close(model(x), want)


def test_what_cannot_be_an_expert_leaves_the_mixture_alone():
    model = trained_model()
    options = {"method": "moa", "method_options": {"experts": 2}, "target_modules": "all-linear"}
    apply_lora(model, LoRAConfig(2, **options), "mixture")
    before = {name: p.clone() for name, p in model.named_parameters()}
    for names, to, message in (
        (["first", "second"], "mixture", "names: expected ranks up to 2 at '2', got 3 of 'second'"),
        (["first"], "mixture", "adapter_name: expected a mixture of 1 experts at '0', got a mixture of 2"),
        (["first", "third"], "mixture", "got 'third'"),
        (["first", "first"], "second", "adapter_name: expected a mixture of 2 experts at '2', got lora"),
    ):
        with pytest.raises(ValueError, match=message):
            fill_experts(model, names, to)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_arrow_is_pefts():
    """Its routing layer, given our experts."""
    arrow_module = pytest.importorskip("peft.tuners.lora.arrow")
    torch.manual_seed(0)
    layer = LoRALinear(
        IN, OUT, R, 6, method="arrow", method_options={"experts": E, "top_k": 2, "temperature": 0.7}
    )
    one = layer.adapters["default"]
    nn.init.normal_(one.lora_B)
    one.filled()
    names = [f"task_{j}" for j in range(E)]
    config = type("Config", (), {"top_k": 2, "router_temperature": 0.7, "rng_seed": 0, "use_gks": False})
    config.task_adapter_names, config.gks_adapter_names = names, []
    theirs = arrow_module.ArrowLoraLinearLayer(IN, config)
    factors = [{}, {}]
    for name, pair in zip(names, experts(one), strict=True):
        for into, factor in zip(factors, pair, strict=True):
            into[name] = nn.Linear(*factor.T.shape, bias=False)
            into[name].weight = nn.Parameter(factor.detach().clone())
    theirs.top_right_singular_vec_from_BA = lambda a, b: torch.linalg.svd(b @ a).Vh[0]
    theirs.build_prototypes(*factors)
    x = torch.randn(2, 5, IN)
    delta = theirs(x, *factors, nn.Identity(), dict.fromkeys(names, one.scaling))
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias) + delta)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("mixlora", {"top_k": 5}, "top_k: expected 1 to 4, got 5"),
        ("mixlora", {"norm_topk_prob": "no"}, "norm_topk_prob: expected one of"),
        ("loramoe", {"experts": 0}, "experts: expected at least 1, got 0"),
        ("loramoe", {"top_k": 2}, "method_options: loramoe takes batch_invariant, experts, got 'top_k'"),
        ("sira", {"capacity": 0}, "capacity: expected a number above 0, got 0"),
        ("sira", {"expert_dropout": 1.0}, r"expert_dropout: expected a number in \[0, 1\), got 1.0"),
        ("saml", {"experts": 2.5}, "experts: expected an int, got float"),
        ("arrow", {"temperature": 0}, "temperature: expected a number above 0, got 0"),
        ("ramole", {"router_rank": 0}, "router_rank: expected at least 1, got 0"),
        ("moa", {"batch_invariant": 1.5}, "batch_invariant: expected one of"),
    ],
    ids=str,
)
def test_bad_options_leave_the_model_as_it_was(method, options, message):
    model = nn.Sequential(nn.Linear(IN, OUT))
    before = model[0]
    with pytest.raises((ValueError, TypeError), match=message):
        own = {"experts": E, **options}
        apply_lora(model, LoRAConfig(R, method=method, method_options=own, target_modules=["0"]))
    assert model[0] is before and before.weight.requires_grad
