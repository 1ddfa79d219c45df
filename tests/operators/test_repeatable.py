"""Plans and releases are the same whatever Python's hash seed is, which orders sets of strings."""

import os
import subprocess
import sys

PROGRAM = """
import hashlib, weakref, torch, tnconv
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

class Log(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.held, self.lines = {}, []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor) and each.untyped_storage()._cdata not in self.held:
                storage = each.untyped_storage()
                self.held[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.held.pop, storage._cdata, None)
        shapes = [tuple(x.shape) for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
        self.lines.append(f"{operation} {shapes} {sum(self.held.values())}")
        return result

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.Flatten(),
    nn.Linear(128, 16), nn.Tanh(), nn.Linear(16, 5),
)
batch = torch.rand(6, 3, 14, 14), torch.arange(6) % 5
for _ in range(2):  # before and after the search for programs
    with Log() as log:
        ggn = tnconv.low_rank_ggn(model, nn.CrossEntropyLoss(), *batch)
        pairs = ggn.eigh(4)
        ggn.directional_derivatives(pairs), ggn.gradient()
        drawn = tnconv.low_rank_ggn(model, nn.CrossEntropyLoss(), *batch, fisher="mc")
        drawn.newton_step(0.1, 4)
    for block in ggn.blocks.values():
        log.lines += [f"{name} {term.v is None}" for name, term in block.rows.terms.items()]
    print(len(log.lines), hashlib.sha256("\\n".join(log.lines).encode()).hexdigest())
    del ggn, pairs, drawn
"""


def test_plans_and_releases_do_not_depend_on_hashes() -> None:
    """Every operation, its operands' shapes, what is held then, and what rows are kept as."""
    runs = []
    for seed in ("1", "2", "3"):
        command = [sys.executable, "-c", PROGRAM]
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        runs.append(subprocess.Popen(command, env=environment, **how))
    found = [run.communicate() for run in runs]
    assert all(run.returncode == 0 for run in runs), found[0][1]
    assert len({out for out, _ in found}) == 1, [out for out, _ in found]
    assert len(found[0][0].splitlines()) == 2
