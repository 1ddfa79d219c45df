"""Three lines in a training script that knows nothing of the monitor."""

from typing import Any

from tnconv.monitor import read_run

SCRIPT = """
import torch
from torch import nn

torch.manual_seed(0)
x = torch.randn(44, 1, 6, 6)
y = (x.mean((1, 2, 3)) > 0).long()
layers = nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(48, 2)
model, criterion = nn.Sequential(*layers), nn.CrossEntropyLoss()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for epoch in range(2):
    for images, labels in zip(x.split(10), y.split(10)):
        optimizer.zero_grad()
        loss = criterion(model(images), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(x).argmax(1) == y).float().mean()
        validation = criterion(model(x), y)
    model.train()
"""
OPTIMIZER = "optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)\n"


def test_three_lines(tmp_path: Any) -> None:
    """Every step is recorded, the last batch and both epochs, too; validation is not."""
    added = f"""\
from tnconv.monitor import Monitor
monitor = Monitor(model, criterion, folder={str(tmp_path / "run")!r})
monitor.attach(optimizer)
"""
    assert len(added.splitlines()) == 3
    alone: dict[str, Any] = {}
    watched: dict[str, Any] = {}
    exec(SCRIPT, alone)
    exec(SCRIPT.replace(OPTIMIZER, OPTIMIZER + added), watched)
    for p, q in zip(alone["model"].parameters(), watched["model"].parameters(), strict=True):
        assert p.equal(q)
    records = watched["monitor"].records
    assert [r["step"] for r in records] == list(range(10))
    assert all(r["NormTest"] > 0 and r["Loss"] > 0 for r in records)
    assert all("Alpha" in r for r in records[:-1])
    assert [r["Loss"] for r in read_run(tmp_path / "run").records] == [r["Loss"] for r in records]
