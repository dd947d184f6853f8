"""Flora: all weights train; momentum and accumulated gradients are sketches of rank 8."""

from tiny import llama, tokens

from lora_kernels.optim import Flora, FloraAccumulator

model = llama()
optimizer = Flora(model.parameters(), lr=1e-2, rank=8, beta1=0.9)
accumulator = FloraAccumulator(model.parameters(), rank=8)
for _ in range(20):
    optimizer.zero_grad()
    for part in tokens().chunk(2):
        loss = model(input_ids=part, labels=part).loss
        loss.backward()
    accumulator.restore()
    optimizer.step()
print(f"loss {loss.item():.3f}")
