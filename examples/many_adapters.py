"""Three users' adapters, of different ranks, in one batch: trained together, then served together."""

import torch
from tiny import llama, tokens

from lora_kernels import LoRAConfig
from lora_kernels.nn import mixed_adapters, train_adapters
from lora_kernels.serving.lowered import lower_adapter
from lora_kernels.serving.modules import apply_multi_lora, pool_linears
from lora_kernels.serving.pool import AdapterPool

targets, ranks = ["q_proj", "v_proj"], {"ann": 2, "bob": 4, "eve": 8}
model = llama()
train_adapters(model, {name: LoRAConfig(r=r, target_modules=targets) for name, r in ranks.items()})
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for _ in range(10):
    optimizer.zero_grad()
    with mixed_adapters(model, ["ann", "bob", "eve", "ann"]):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer.step()
served = llama().eval()
pool = AdapterPool(pool_linears(served, targets), slots=4)
for name in ranks:
    pool.register(name, *lower_adapter(model, name))
apply_multi_lora(served, pool)
with torch.no_grad():
    logits = served(tokens(), adapter_names=["bob", "__base__", "eve", "ann"]).logits
print("one batch, four rows:", tuple(logits.shape))
