"""LoraRetriever: each prompt of a batch runs with the adapters whose sample inputs are nearest to it."""

import torch
from tiny import llama, tokens

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.nn import mixed_adapters
from lora_kernels.routing import AdapterIndex


def embed(texts):
    """A bag of letters; in earnest, a sentence encoder."""
    letters = [torch.tensor([*text.lower().encode()]) for text in texts]
    return torch.stack([torch.bincount(one, minlength=128) for one in letters]).float()


model, index = llama(), AdapterIndex(embed, instruction="", cosine=True)
config = LoRAConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
for name, samples in (("sums", ["2 + 3"]), ("cities", ["capital of Peru"]), ("odds", ["a coin, or dice"])):
    apply_lora(model, config, adapter_name=name)
    index.add(name, samples)
found = index.search(["1 + 1", "capital of Chad", "9 + 4", "capital of Oman"], k=2)
with torch.no_grad(), mixed_adapters(model, found.names, weights=found.weights):
    print(found.names, model(input_ids=tokens(), labels=tokens()).loss.item())
