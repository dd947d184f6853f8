"""LoRB: a model with LoRA rescores n-best lists; the loss is the expected number of word errors."""

import torch
from tiny import llama, tokens

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.analysis import correlation_penalty, mwer_loss

model = apply_lora(llama(), LoRAConfig(r=8, target_modules=["q_proj", "v_proj"])).model
head = torch.nn.Linear(32, 1)
# Four lists of four hypotheses: the true one, and ones with more and more wrong words.
errors = torch.arange(4).expand(4, 4).float()
wrong = torch.rand(4, 4, 16).argsort(-1) < errors[..., None]
hypotheses = torch.where(wrong, torch.randint(64, (4, 4, 16)), tokens()[:, None])
acoustic = torch.rand(4, 4)
trained = [p for p in (*model.parameters(), *head.parameters()) if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=5e-3)
for _ in range(20):
    optimizer.zero_grad()
    hidden = model(hypotheses.flatten(0, 1)).last_hidden_state[:, -1]
    loss = mwer_loss(acoustic + head(hidden).view(4, 4), errors)
    (loss + 1e-3 * correlation_penalty(hidden)).backward()
    optimizer.step()
print(f"expected errors beside the mean of a list: {loss.item():.3f}")
