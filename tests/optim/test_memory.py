"""What `memory` says before the first step is what states then hold."""

import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.optim.nets import small_net, train
from tnconv.optim import KFAC, SINGD, RFAdamW, RFRMSProp, RFShampoo
from tnconv.optim.structures import STRUCTURES

MADE = {
    **{f"SINGD {s}": lambda m, s=s: SINGD(m, structures=s) for s in STRUCTURES},
    "SINGD half": lambda m: SINGD(
        m, factor_dtype=torch.bfloat16, momentum_dtype=torch.float64, kfac_like=True
    ),
    "KFAC": KFAC,
    "KFAC blocks": lambda m: KFAC(m, max_factor=30, inverse="eigen"),
    "EKFAC": lambda m: KFAC(m, inverse="ekfac", momentum=0.0),
    "RF-Shampoo": lambda m: RFShampoo(m, max_size=50, riemannian_momentum=0.0),
    "RF-Shampoo diagonal": lambda m: RFShampoo(m, structures="diagonal"),
    "RF-AdamW": lambda m: RFAdamW(m.parameters(), batch_size=6),
    "RF-RMSProp": lambda m: RFRMSProp(m.parameters(), batch_size=6, momentum=0.0),
}


@pytest.mark.parametrize("name", MADE)
def test_memory_is_known_before_the_first_step(name):
    torch.manual_seed(0)
    model = small_net()
    optimizer = MADE[name](model)
    memory = optimizer.memory()
    train(model, optimizer, 1)
    tensors = [
        t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)
    ]
    assert memory.total == sum(t.numel() * t.element_size() for t in tensors)
    assert sum(memory.parameters.values()) == 4 * sum(p.numel() for p in model.parameters())
    assert f"state in all: {memory.total} bytes" in str(memory)


def test_structures_need_little_memory():
    """State over parameters, of a layer with 512 channels."""
    model = nn.Conv2d(512, 512, 3, device="meta", bias=False)
    ratios = {s: SINGD(model, structures=s).memory().ratio for s in
              ("diagonal", "block_diagonal", "hierarchical", "triangular_toeplitz")}  # fmt: skip
    assert ratios["diagonal"] <= 1.05 and ratios["triangular_toeplitz"] <= 1.05
    assert ratios["block_diagonal"] <= 1.25 and ratios["hierarchical"] <= 1.25


def test_the_page_of_sizes_is_current():
    """`docs/state-sizes.md` is what `docs/state_sizes.py` writes."""
    docs = Path(__file__).resolve().parents[2] / "docs"
    page = runpy.run_path(str(docs / "state_sizes.py"))["page"]
    assert page() == (docs / "state-sizes.md").read_text()
