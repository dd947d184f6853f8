"""A new method: LoRA whose output channels have a learnt scale, ΔW = (α/r) · diag(d) B A."""

from tiny import llama, tokens

from lora_kernels import LoRAConfig, apply_lora, load_adapter, save_adapter
from lora_kernels.adapters.base import register
from lora_kernels.adapters.lora import LoRA
from lora_kernels.adapters.site import Start
from lora_kernels.adapters.update import LowRank


@register("channel_lora")
class ChannelLoRA(LoRA):
    """ΔW = (α/r) · diag(d) B A"""

    peft = False  # PEFT knows no d
    splits = LoRA.splits | {"d": ("out", 0)}  # what tensor parallelism may cut

    def build(self, site):
        return Start({**super().build(site).tensors, "d": site.zeros(site.out_features) + 1})

    def lower(self, x=None, call=None):
        return LowRank(self.lora_A, self.d[:, None] * self.lora_B, self.scaling)


model = apply_lora(llama(), LoRAConfig(r=4, target_modules="all-linear", method="channel_lora"))
model(input_ids=tokens(), labels=tokens()).loss.backward()
save_adapter(model, "adapter")
print(type(load_adapter(llama(), "adapter").model.layers[0].mlp.up_proj.adapters["default"]).__name__)
