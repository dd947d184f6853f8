"""Laplace-LoRA: how sure a fine-tuned model may be of the next token."""

import torch
from tiny import llama, tokens

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.stats import LaplaceLoRA

model = apply_lora(llama(), LoRAConfig(r=2, target_modules=["q_proj", "v_proj"]))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for _ in range(5):
    optimizer.zero_grad()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer.step()


def next_token(model, ids):
    return model(input_ids=ids).logits[:, -1, :8]


laplace = LaplaceLoRA(model, next_token).fit([(tokens()[:, :-1], tokens()[:, -1] % 8)])
sigma = laplace.tune_prior([0.01, 0.1, 1.0])
print(f"prior variance {sigma}, sure to {laplace.predict(tokens()).max():.2f}")
