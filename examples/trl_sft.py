"""TRL's SFTTrainer on an accelerated model of PEFT: packed sequences, checkpointed activations."""

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny import llama, tokenizer
from trl import SFTConfig, SFTTrainer

from lora_kernels import accelerate

model = get_peft_model(llama(), LoraConfig(r=4, lora_dropout=0.05, target_modules="all-linear"))
print(accelerate(model))
data = Dataset.from_list([{"text": f"{i} + {i} = {2 * i}."} for i in range(16)])
quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "bf16": False}
options = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 2}
args = SFTConfig("run", max_length=32, packing=True, **options, **quiet)
trainer = SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer())
trainer.train()
trainer.save_model("adapter")  # PEFT's two files
