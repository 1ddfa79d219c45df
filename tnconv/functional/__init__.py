"""One call per operation: tensors in, tensors out, with torch's argument names and defaults.

Programs are compiled on the first call for given shapes and hyper-parameters and looked up later.
Every function can be differentiated (also twice), transformed by ``torch.func``, and used under
``torch.compile(fullgraph=True)``, also where nothing has been compiled before.
"""

from tnconv.functional.curvature import kfac_expand, kfac_reduce
from tnconv.functional.derivatives import input_vjp, per_sample_weight_grad, weight_vjp
from tnconv.functional.layers import avg_pool, conv, conv_transpose, fold, linear, unfold

__all__ = [
    "avg_pool",
    "conv",
    "conv_transpose",
    "fold",
    "input_vjp",
    "kfac_expand",
    "kfac_reduce",
    "linear",
    "per_sample_weight_grad",
    "unfold",
    "weight_vjp",
]
