"""FedDecomp: two clients share the weights and average them; each keeps adapters of its own."""

import torch
from tiny import llama, tokens

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.compose import FedDecompClient, Server, run_round, split_state

config = LoRAConfig(r=4, target_modules=["q_proj", "v_proj"])
models = [apply_lora(llama(), config) for _ in range(2)]
batches = {id(model): (tokens() + 20 * i) % 64 for i, model in enumerate(models)}


def fit(model, parameters, epochs):
    optimizer = torch.optim.AdamW(parameters, lr=5e-3)
    for _ in range(epochs):
        optimizer.zero_grad()
        model(input_ids=batches[id(model)], labels=batches[id(model)]).loss.backward()
        optimizer.step()


server = Server(split_state(models[0])[0])
clients = dict(enumerate(FedDecompClient(model, fit) for model in models))
traffic = [run_round(server, clients) for _ in range(3)]
print([round(model(input_ids=x, labels=x).loss.item(), 2) for model in models for x in [batches[id(model)]]])
