"""Exits on a vision transformer, trained by distillation in a plain PyTorch loop of your own.

`attach_exits` puts exits after submodules of any network, and `ExitDistillation` is the objective. Nothing else of dist_train
is used: no configuration, no shards, no DeepSpeed. Needs `pip install "dist-train[transformers]"`.

Run it anywhere: python docs/examples/vit_with_exits.py [EPOCHS]
Prints the mean loss of every epoch, then a line per exit: its accuracy on digits that were not trained on.
"""

import sys

import torch
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification

from dist_train import ExitDistillation, attach_exits
from dist_train.config import LossConfig

torch.manual_seed(0)
torch.set_num_threads(1)  # for batches this small, threads cost more than they give
epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 10

# 1,797 handwritten digits of 8 x 8 pixels, as images [N, 3, 8, 8] with values from 0 to 1.
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).div(16).unsqueeze(1).expand(-1, 3, -1, -1)
labels = torch.tensor(digits.target)
order = torch.randperm(len(images))
training, testing = order[:1437], order[1437:]

# Six layers; any transformer that gives logits will do, such as a pretrained one of the hub.
vit = ViTForImageClassification(
    ViTConfig(
        image_size=8,
        patch_size=2,
        hidden_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=96,
        num_labels=10,
    )
)
# Exits classify the class token after the layers 2 and 4; the transformer's own end is the last exit.
network = attach_exits(vit, ["vit.layers.1", "vit.layers.3"], 10, head="class_token", image_size=8)

criterion = ExitDistillation.from_config(LossConfig(teachers="last", distill_loss="kl"), network.num_exits)
optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)

for epoch in range(epochs):
    network.train()
    total = 0.0
    for batch in training[torch.randperm(len(training))].split(64):
        loss, stats = criterion(network(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(batch)
        # The temperature follows the teacher's confidence.
        criterion.end_batch((stats.confidence, stats.samples))
    print(f"epoch {epoch + 1}: loss {total / len(training):.3f}, temperature {float(criterion.temperature.mean()):.2f}")

network.eval()
with torch.inference_mode():
    for number, logits in enumerate(network(images[testing]), start=1):
        right = (logits.argmax(1) == labels[testing]).float().mean()
        print(f"exit {number}: top-1 {100 * right:.1f} %")
