"""One call per operation: tensors in, tensors out, with torch's argument names and defaults.

Programs are compiled on the first call for given shapes and hyper-parameters and looked up later.
Every function can be differentiated (also twice), transformed by ``torch.func``, and used under
``torch.compile(fullgraph=True)``, also where nothing has been compiled before.
"""

from tnconv.functional.derivatives import (
    bias_vjp,
    input_vjp,
    per_sample_bias_grad,
    per_sample_weight_grad,
    weight_vjp,
)
from tnconv.functional.factors import (
    grad_expand,
    grad_reduce,
    kfac_expand,
    kfac_reduce,
    mean_patches,
)
from tnconv.functional.forward import (
    avg_pool,
    conv,
    conv_transpose,
    fold,
    linear,
    unfold,
    unfolded_kernel,
)
from tnconv.functional.hessians import (
    input_diagonal_vjp,
    input_hessian_vjp,
    weight_diagonal_vjp,
    weight_hessian_vjp,
)
from tnconv.functional.per_sample import (
    ggn_block,
    ggn_diagonal,
    ggn_vector_product,
    gradient_dots,
    gradient_norms,
    ntk_block,
    per_sample_ggn_diagonal,
)
from tnconv.functional.sampling import sampled_input_vjp, sampled_weight_vjp
from tnconv.functional.tangents import (
    bias_jvp,
    input_jacobian,
    input_jvp,
    per_sample_weight_jvp,
    weight_jacobian,
    weight_jvp,
)

__all__ = [
    "avg_pool",
    "bias_jvp",
    "bias_vjp",
    "conv",
    "conv_transpose",
    "fold",
    "ggn_block",
    "ggn_diagonal",
    "ggn_vector_product",
    "grad_expand",
    "grad_reduce",
    "gradient_dots",
    "gradient_norms",
    "input_diagonal_vjp",
    "input_hessian_vjp",
    "input_jacobian",
    "input_jvp",
    "input_vjp",
    "kfac_expand",
    "kfac_reduce",
    "linear",
    "mean_patches",
    "ntk_block",
    "per_sample_bias_grad",
    "per_sample_ggn_diagonal",
    "per_sample_weight_grad",
    "per_sample_weight_jvp",
    "sampled_input_vjp",
    "sampled_weight_vjp",
    "unfold",
    "unfolded_kernel",
    "weight_diagonal_vjp",
    "weight_hessian_vjp",
    "weight_jacobian",
    "weight_jvp",
    "weight_vjp",
]
