"""CLIP-LoRA: rank 2 on q, k and v of both towers, trained by the recipe on four images a class."""

import torch
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from lora_kernels.nn.methods.clip_lora import apply_clip_lora, few_shot_loss, few_shot_recipe

torch.manual_seed(0)
sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
text = CLIPTextConfig(**sizes, vocab_size=20, max_position_embeddings=8, eos_token_id=19)
vision = CLIPVisionConfig(**sizes, image_size=8, patch_size=4)
config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
clip = apply_clip_lora(CLIPModel(config))
recipe = few_shot_recipe(clip, shots=4)
prompts, images, labels = torch.randint(1, 19, (3, 6)), torch.randn(12, 3, 8, 8), torch.arange(12) % 3
for _ in range(20):  # of recipe.steps
    recipe.optimizer.zero_grad()
    y = clip(input_ids=prompts, pixel_values=images)
    loss = few_shot_loss(y.image_embeds, y.text_embeds, labels, clip.logit_scale.exp())
    loss.backward()
    recipe.optimizer.step()
    recipe.schedule.step()
print(f"loss {loss.item():.3f} after 20 of {recipe.steps} steps")
