"""The Transformers Trainer on an accelerated model of PEFT, with a schedule as its callback."""

from peft import LoraConfig, get_peft_model
from tiny import llama, tokens
from transformers import Trainer, TrainingArguments

from lora_kernels import accelerate
from lora_kernels.schedules import ReLoRA, as_callback

model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
print(accelerate(model))
quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
options = {"max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 4}
data = [{"input_ids": row, "labels": row} for row in tokens().repeat(2, 1)]
callbacks = [as_callback(ReLoRA(model, every=4))]
Trainer(model, TrainingArguments("run", **options, **quiet), train_dataset=data, callbacks=callbacks).train()
model.save_pretrained("adapter")
