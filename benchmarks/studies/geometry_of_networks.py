# %% [markdown]
# # Sharpness, preconditioners, evidence and BatchNorm under reparametrisation
#
# A Hessian's eigenvalues depend on how a network is written (Dinh et al. 2017); those of G⁻¹H
# with a metric G that is carried along do not (Kristiadi, Dangel & Hennig 2023). Four studies on
# handwritten digits measure what this means in practice, with `tnconv.geometry` in double
# precision. Numbers and pictures are those of the committed results: `python -m
# benchmarks.sharpness` and `python -m benchmarks.geometry_studies` make them anew. First, the
# statement itself.

# %%
import json
from pathlib import Path

import torch
from IPython.display import Image
from torch import nn

from tnconv.geometry import Euclidean, points_of, relu_rescale, shape_operator

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
layers = (
    nn.Conv2d(1, 3, 3),
    nn.ReLU(),
    nn.Conv2d(3, 3, 3),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(48, 4),
)
model, x, y = nn.Sequential(*layers), torch.randn(8, 1, 8, 8), torch.randint(4, (8,))
rescale = relu_rescale(model, "0", "2", 16.0, x)
theta = {name: p.clone() for name, p in points_of(model).items()}
metric, loss_fn = Euclidean(theta), nn.CrossEntropyLoss()
print(float(shape_operator(model, loss_fn, [(x, y)], metric).max_eigenvalue(1e-9)), "before")
with torch.no_grad():
    for name, value in rescale(theta).items():
        model.get_parameter(name).copy_(value)
carried, anew = metric.pushforward(rescale, theta), Euclidean(points_of(model))
for each, said in ((carried, "after, metric carried along"), (anew, "after, identity anew")):
    print(float(shape_operator(model, loss_fn, [(x, y)], each).max_eigenvalue(1e-9)), said)

# %% [markdown]
# ## Sharpness of a trained network under ReLU rescaling
#
# The first layer times a, the second over a: one function, one loss.

# %%
RESULTS = Path("benchmarks/results")


def rows(study: str) -> list[dict]:
    return json.loads((RESULTS / f"{study}-cpu.json").read_text())["rows"]


for row in rows("sharpness"):
    shown = {name: row[name]["largest"] for name in row if name != "factor"}
    print(f"a = {row['factor']:>6}: " + ", ".join(f"{n} {v:.6g}" for n, v in shown.items()))
Image(str(RESULTS / "sharpness-cpu.png"))

# %% [markdown]
# With the identity the largest eigenvalue grows like a², with a damping that is a number in the
# parameters as they are it moves by half and changes its sign, with a damping that is carried
# along it stays to 13 digits. Not shown: that either number says something about generalisation.
#
# ## Bias of preconditioned optimizers in their own metric
#
# Networks with one training loss (0.05), found by four optimizers, three seeds each; the largest
# eigenvalue of G⁻¹H for the metrics that these optimizers step in.

# %%
found = rows("geometry-optimizers")
optimizers, metrics = (
    list(dict.fromkeys(r[key] for r in found)) for key in ("optimizer", "metric")
)
print(f"{'':10}" + "".join(f"{metric:>22}" for metric in metrics))
for optimizer in optimizers:
    cells = []
    for metric in metrics:
        values = [
            r["largest"] for r in found if (r["optimizer"], r["metric"]) == (optimizer, metric)
        ]
        cells.append(f"{sum(values) / len(values):8.1f} ({min(values):.1f} to {max(values):.1f})")
    print(f"{optimizer:10}" + "".join(f"{cell:>22}" for cell in cells))
Image(str(RESULTS / "geometry-optimizers.png"))

# %% [markdown]
# In the identity, SGD's networks are the flattest by far (3.4; Shampoo's 33): a preconditioner's
# minima look sharp there. That its own metric would show them as flat as SGD's are in the
# identity is not what is found for Adam and Shampoo: SGD's networks are flatter in these metrics,
# too, by 3.5 and 2.6. In KFAC's metric, which the network's function determines but for the
# damping, all four are alike (16 to 19), and the order is reversed. So most of the differences in
# the identity are ones of coordinates. Not shown: other learning rates, which move each
# optimizer's flatness; larger networks; whether any of these numbers orders the networks' test
# errors.
#
# ## Laplace's evidence in the standard and the NTK parametrisation
#
# Modes of 60 images' posterior for normal priors that are multiples of the identity in one of
# both parametrisations, and the evidence of the network as it is, and written in the other one.

# %%
for row in rows("geometry-evidence"):
    shown = [row[k] for k in ("evidence", "estimate", "estimate, carried", "estimate, anew")]
    head = f"width {row['width']:>2}, {row['prior']:>8} prior of precision {row['precision']:>4}: "
    print(head + "exact {:8.2f}, estimated {:8.2f}, carried {:8.2f}, anew {:8.2f}".format(*shown))
Image(str(RESULTS / "geometry-evidence.png"))

# %% [markdown]
# Carried along, the evidence is one number to 12 digits, for every prior, and so is each estimate
# by two probes of Lanczos quadrature, though such an estimate is off by up to 15. The identity
# anew is another prior: for the standard one the evidence moves by up to 1,360, or seems better
# where it is worse. (For the NTK prior the identity anew is the right one; what differs there are
# the draws.) By exact evidence the standard prior is preferred at both widths (-82.9 and -83.9,
# at precision 0.3); the NTK prior, which is fan-in times as strong on weights, wants a precision
# below 0.1. From precision 10 on both modes are constant functions, near 60 log(1/10) = -138. Not
# shown: the infinite-width limit, for which the NTK parametrisation is made; other modes of the
# same posterior.
#
# ## BatchNorm and its folding
#
# A layer times a, the factors of its BatchNorm over a and the mean moved: one function in
# evaluation mode. The folded network is one point for all a.

# %%
for row in rows("geometry-folding"):
    print(", ".join(f"{name} {value:.8g}" for name, value in row.items()))
Image(str(RESULTS / "geometry-folding.png"))

# %% [markdown]
# Before folding, the largest eigenvalue in the identity is anything from 9 to 58,000. The map to
# the folded layer is a submersion: curvature in a metric of the folded network, with the identity
# there or with KFAC's, is one number along all a, to 13 digits. Which metric of the folded
# network to take is a choice that invariance does not make: 4.2 with the identity of the folded
# layer, 24.7 with KFAC's. Not shown: training mode, where the batch's statistics depend on the
# layer and a is no symmetry of the loss's curvature along other directions.
