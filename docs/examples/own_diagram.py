"""A diagram of one's own
======================

A depthwise-separable convolution as one network: drawn, simplified, compiled, differentiated, and
exported as an einsum.
"""

import torch
import torch.nn.functional as F

import tnconv
from tnconv import diagrams
from tnconv.simplify import simplify

# %%
# Two layers are composed: the depthwise one is the input of the pointwise one. Operands with one
# name are one operand, so the second weight gets a name of its own.
depthwise = diagrams.conv((8, 4, 16, 16), (4, 1, 3, 3), padding=1, groups=4)
pointwise = diagrams.conv((8, 4, 16, 16), (6, 4, 1, 1)).rename_operands({"weight": "mixing"})
network = diagrams.compose(pointwise, "x", depthwise)
print(network)
network.draw()

# %%
# Connectivity says that the pointwise patterns do nothing.
print(*simplify(network).trace, sep="\n")

# %%
# The program is source that needs torch alone.
program = tnconv.compile(network)
print(program.source)
x, weight, mixing = torch.rand(8, 4, 16, 16), torch.rand(4, 1, 3, 3), torch.rand(6, 4, 1, 1)
y = program(x=x, weight=weight, mixing=mixing)
torch.testing.assert_close(y, F.conv2d(F.conv2d(x, weight, padding=1, groups=4), mixing))

# %%
# Derivatives are networks, too: here the per-sample gradient of the depthwise weight, the Gram
# matrix of these gradients over samples, and the einsum of the forward pass.
gradients = network.vjp("weight", per_sample=True)
gram = gradients.gram(over=("c", "d'", "c'", "k1'", "k2'"))
print(gradients.shape, gram.shape)
equation, arrays = network.einsum(x=x, weight=weight, mixing=mixing)
print(equation, [tuple(array.shape) for array in arrays])
torch.testing.assert_close(torch.einsum(equation, *arrays).reshape(y.shape), y)
