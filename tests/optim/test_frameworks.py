"""What Lightning and Accelerate ask of an optimizer; skipped without them (extra "training")."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.optim.nets import small_net
from tnconv.optim import KFAC, SINGD, RFAdamW, RFShampoo

MADE = {
    "KFAC": lambda m: KFAC(m, lr=0.01, update_inverses_every=2),
    "SINGD": lambda m: SINGD(m, lr=0.01, structures="hierarchical", update_factors_every=2),
    "RFShampoo": lambda m: RFShampoo(m, lr=1e-3, damping=0.1),
    "RFAdamW": lambda m: RFAdamW(m.parameters(), batch_size=4, lr=1e-3),
}
every = pytest.mark.parametrize("name", MADE)


def dataset():
    torch.manual_seed(1)
    return TensorDataset(torch.rand(16, 2, 5, 5), torch.randint(3, (16,)))


def plainly_trained(name):
    """Parameters after a plain loop over four batches."""
    torch.manual_seed(0)
    model = small_net()
    optimizer = MADE[name](model)
    for x, y in DataLoader(dataset(), batch_size=4):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.fixture(scope="module")
def operators_of_torchvision():
    """Torchmetrics imports torchvision where it is installed, and needs its operators declared."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, arguments in (
        ("nms", "Tensor dets, Tensor scores, float iou_threshold"),
        ("qnms", "Tensor dets, Tensor scores, float iou_threshold"),
        ("roi_align", "Tensor input, Tensor rois, float scale, int h, int w, int ratio, bool a"),
    ):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}({arguments}) -> Tensor")
    return library


@every
def test_lightning(name, tmp_path, operators_of_torchvision):
    """Closures that run forward and backward; checkpoints are resumed by a trainer."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = small_net()

        def training_step(self, batch, at):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return MADE[name](self.net)

    def trainer(epochs):
        return lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path, enable_checkpointing=False,
        )  # fmt: skip

    module, loader = Module(), DataLoader(dataset(), batch_size=4)
    first = trainer(1)
    first.fit(module, loader)
    for own, other in zip(module.net.parameters(), plainly_trained(name), strict=True):
        torch.testing.assert_close(own.detach(), other)
    first.save_checkpoint(tmp_path / "step.ckpt")
    resumed = Module()
    trainer(2).fit(resumed, loader, ckpt_path=tmp_path / "step.ckpt", weights_only=True)
    whole = Module()
    trainer(2).fit(whole, loader)
    for own, other in zip(resumed.net.parameters(), whole.net.parameters(), strict=True):
        assert torch.equal(own, other)


@every
def test_accelerate(name):
    """The wrapper loads the state before the first step, and accumulates gradients."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    torch.manual_seed(0)
    model = small_net()
    net, optimizer, loader = accelerator.prepare(
        model, MADE[name](model), DataLoader(dataset(), batch_size=4)
    )
    for x, y in loader:
        with accelerator.accumulate(net):
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(net(x), y))
            optimizer.step()
    for own, other in zip(model.parameters(), plainly_trained(name), strict=True):
        torch.testing.assert_close(own.detach(), other)
    optimizer.load_state_dict(state_dict=optimizer.state_dict())


@every
def test_parameters_are_looked_up_at_step_time(name):
    """FSDP2 puts other Parameter objects into the groups, and into the modules."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = MADE[name](model)
    for layer in (model[0], model[2]):
        for key in ("weight", "bias"):
            old = getattr(layer, key)
            new = nn.Parameter(old.detach().clone())
            setattr(layer, key, new)
            for group in optimizer.param_groups:
                group["params"] = [new if p is old else p for p in group["params"]]
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    model(torch.randn(4, 3)).square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
