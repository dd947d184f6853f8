"""Federated LoRA of unequal ranks: clients of rank 2 and 8; slices that only one has are not watered down."""

import torch
from tiny import llama, tokens

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.compose import ReplicationServer, Upload, run_round
from lora_kernels.nn import lora_state_dict

configs = [LoRAConfig(r=r, lora_alpha=r, target_modules=["q_proj", "v_proj"]) for r in (2, 8)]
models = [apply_lora(llama(), config) for config in configs]


def train(model, state):
    model.load_state_dict(state, strict=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    return Upload(lora_state_dict(model))


server = ReplicationServer(lora_state_dict(models[1]), {0: 2, 1: 8})
clients = {i: lambda state, model=model: train(model, state) for i, model in enumerate(models)}
print([f"{run_round(server, clients).up} bytes up" for _ in range(3)])
