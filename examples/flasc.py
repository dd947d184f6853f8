"""FLASC: a quarter of the numbers goes down, a quarter of the changes comes back; training is dense."""

import torch
from tiny import llama, tokens

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.compose import FLASC, run_round
from lora_kernels.nn import lora_state_dict

model = apply_lora(llama(), LoRAConfig(r=4, target_modules=["q_proj", "v_proj"]))


def train(state):
    model.load_state_dict(state, strict=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    return lora_state_dict(model)


server = FLASC(lora_state_dict(model), d_dl=0.25, d_ul=0.25, lr=1e-2)
clients = {number: server.client(number, train) for number in range(2)}
traffic = [run_round(server, clients) for _ in range(3)]
dense = 2 * sum(tensor.numel() * tensor.element_size() for tensor in server.state.values())
print(f"{traffic[-1].down} bytes down and {traffic[-1].up} up, of {dense}")
