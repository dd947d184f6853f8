"""LoRA-FA's optimiser on a PEFT model: A frozen, the gradient of B projected."""

from peft import LoraConfig, get_peft_model
from tiny import llama, tokens

from lora_kernels import accelerate
from lora_kernels.optim import LoRAFA

model = get_peft_model(llama(), LoraConfig(r=4, target_modules="all-linear"))
accelerate(model)
optimizer = LoRAFA(model, lr=5e-3)
for _ in range(20):
    optimizer.zero_grad()
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    optimizer.step()
print(f"loss {loss.item():.3f}")
