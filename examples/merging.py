"""Two adapters become one of rank 4, saved as any LoRA is: half of each, and of TIES the signs that win."""

from tiny import llama

from lora_kernels import LoRAConfig, apply_lora, save_adapter
from lora_kernels.compose import add_weighted_adapter

model = llama()
config = LoRAConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
for name in ("poems", "code"):
    apply_lora(model, config, name)
add_weighted_adapter(model, ["poems", "code"], [0.5, 0.5], "both", "ties", density=0.5)
add_weighted_adapter(model, ["poems", "code"], [0.5, 0.5], "sum", "svd", svd_rank=4)
save_adapter(model, "both", "both")
print(f"adapters: {', '.join(model.model.layers[0].self_attn.q_proj.adapters)}")
