"""DPO on one base with two adapters: the trained one, and a frozen one that it is compared with."""

from datasets import Dataset
from tiny import llama, tokenizer
from trl import DPOConfig, DPOTrainer

from lora_kernels import LoRAConfig, apply_lora, save_adapter
from lora_kernels.nn import frozen_copy

targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
policy = apply_lora(llama(), LoRAConfig(r=4, target_modules=targets))  # or load_adapter(llama(), "sft")
reference = frozen_copy(policy)  # its own adapter, the same base
pairs = [{"prompt": f"{i} + {i} = ", "chosen": f"{2 * i}.", "rejected": f"{i}."} for i in range(16)]
quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "bf16": False}
options = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 2}
args = DPOConfig("run", beta=0.5, max_length=32, **options, **quiet)
data, words = Dataset.from_list(pairs), tokenizer()
DPOTrainer(policy, reference, args, train_dataset=data, processing_class=words).train()
save_adapter(policy, "dpo")
print("one base:", policy.lm_head.weight is reference.lm_head.weight)
