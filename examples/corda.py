"""CorDA, EVA and LoRA-GA: starts from what samples say of each layer, gathered in one pass."""

from tiny import llama, tokens

from lora_kernels import LoRAConfig, apply_lora, calibrate

samples = [{"input_ids": part, "labels": part} for part in tokens().chunk(4)]
statistics = calibrate(llama(), samples, ("covariance", "activation_svd", "gradient"))
for init, options in (("corda", {"corda_method": "kpm"}), ("eva", {}), ("lora_ga", {})):
    config = LoRAConfig(r=4, target_modules="all-linear", init_lora_weights=init, method_options=options)
    model = apply_lora(llama(), config, statistics=statistics)
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    print(f"{init}: loss {loss.item():.3f} at the start")
