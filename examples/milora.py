"""MiLoRA, and the other starts that need nothing but the weight."""

from tiny import llama, tokens

from lora_kernels import LoRAConfig, apply_lora

base = llama()(input_ids=tokens()).logits
for init in ("milora", "olora", "pissa_niter_4", "orthogonal", "gaussian", "mica", "asym"):
    config = LoRAConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=init)
    model = apply_lora(llama(), config)
    gap = (model(input_ids=tokens()).logits - base).abs().max().item()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{init}: starts within {gap:.0e} of the base, trains {trained} numbers")
