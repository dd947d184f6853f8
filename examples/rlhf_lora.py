"""PPO on one base: policy, value and reference in one pass; the sampler's pool serves each new policy."""

import torch
from tiny import llama, tokens

from lora_kernels import LoRAConfig
from lora_kernels.compose import Rollout, forward_each, gae, kl_penalty, ppo_loss, token_rewards
from lora_kernels.nn import train_adapters
from lora_kernels.serving.lowered import lower_adapter
from lora_kernels.serving.modules import pool_linears
from lora_kernels.serving.pool import AdapterPool

model, ids, names, mask = llama(), tokens(), ["q_proj", "v_proj"], torch.ones(4, 15).bool()
pool = AdapterPool(pool_linears(model, names), slots=2)
train_adapters(model, {name: LoRAConfig(r=4, target_modules=names) for name in ("policy", "value")})
pool.register("policy", *lower_adapter(model, "policy"))
for _ in range(2):
    each = forward_each(model, ["policy", "value", None], input_ids=ids)
    policy, value, reference = (one.logits[:, :-1] for one in each)
    logp, ref = (x.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0] for x in (policy, reference))
    rewards = token_rewards(torch.ones(4), kl_penalty(logp, ref, "jensen_shannon").detach(), mask)
    rollout = Rollout(logp.detach(), value[..., 0].detach(), *gae(rewards, value[..., 0].detach()), mask)
    ppo_loss(logp, value[..., 0], rollout).backward()  # and a step of any optimiser
    pool.refresh("policy", *lower_adapter(model, "policy"))
print("policy served by the pool:", "policy" in pool)
