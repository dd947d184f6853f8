"""The main job: a pretrained encoder fine-tuned with LoRA on real text, checked and timed against PEFT."""
