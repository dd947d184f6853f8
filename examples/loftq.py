"""LoftQ: quantise the base to 4 bits and start from factors that make up for it."""

from tiny import llama, tokens

from lora_kernels import LoRAConfig, apply_lora, quantize_base

wide = {"target_modules": ["q_proj", "k_proj", "v_proj"]}
config = LoRAConfig(r=8, init_lora_weights="loftq", method_options={"loftq_iter": 4}, **wide)
dense = llama()(input_ids=tokens()).logits
quantized = quantize_base(llama(), "nf4", **wide)(input_ids=tokens()).logits
model = quantize_base(apply_lora(llama(), config), "nf4", **wide)
with_loftq = model(input_ids=tokens()).logits
for name, logits in (("4 bits", quantized), ("4 bits with LoftQ", with_loftq)):
    print(f"{name}: off by {(logits - dense).norm().item():.3f}")
