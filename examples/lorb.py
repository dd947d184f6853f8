"""LoRB: a BERT with LoRA rescores n-best lists; the loss is the expected number of word errors."""

import torch
from torch import nn
from transformers import BertConfig, BertModel

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.analysis import correlation_penalty, mwer_loss

torch.manual_seed(0)
sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
bert = BertModel(BertConfig(vocab_size=50, **sizes), add_pooling_layer=False)
apply_lora(bert, LoRAConfig(r=8, target_modules=["query", "value"]))
head = nn.Linear(32, 1)
hypotheses, errors = torch.randint(0, 50, (8, 4, 12)), torch.randint(0, 5, (8, 4)).float()
acoustic = torch.rand(8, 4)
trained = [p for p in (*bert.parameters(), *head.parameters()) if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=5e-3)
for _ in range(20):
    optimizer.zero_grad()
    hidden = bert(hypotheses.flatten(0, 1)).last_hidden_state[:, 0]
    loss = mwer_loss(acoustic + head(hidden).view(8, 4), errors)
    (loss + 1e-3 * correlation_penalty(hidden)).backward()
    optimizer.step()
print(f"expected errors beside the mean of a list: {loss.item():.3f}")
