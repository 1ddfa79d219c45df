"""Per-sample gradients of a layer and what is made of them: norms, Gram matrices, Gauss-Newton.

``J[m, n, θ] = Σ_o v[m, n, o] ∂y[n, o] / ∂θ`` is the layer's per-sample vjp in an operand θ, for one
cotangent per sample or for several, m. What the vectors m are decides what the same diagrams mean:
columns of the loss Hessian's root give the Gauss-Newton, gradients at sampled or given labels the
(Monte-Carlo or empirical) Fisher, rows of the network's Jacobian, one per class, the neural tangent
kernel. All functions take a batched layer such as ``conv(...)``, ``conv_transpose(...)``,
``linear(...)``, or one ``with_bias``; their operands are the layer's without θ, and ``grad_output``
of shape ``(m, n, *o)``, or ``(n, *o)`` where ``vectors`` is None.
"""

from collections.abc import Sequence

from tnconv.diagrams.affine import Axis, Leg, Tensor, View
from tnconv.diagrams.expression import Expression
from tnconv.diagrams.network import TensorNetwork


def per_sample_gradients(
    layer: Expression, operand: str = "weight", vectors: int | None = None
) -> TensorNetwork:
    """``J[m, n, θ]`` itself, in the operand's shape; ``(n, *operand)`` where ``vectors`` is None.

    >>> from tnconv.diagrams import linear
    >>> per_sample_gradients(linear((8, 3), (4, 3)), vectors=2).shape
    (2, 8, 4, 3)

    Raises:
        ValueError: a layer without batch, or without the operand.
    """
    extra = {} if vectors is None else {"m": vectors}
    (term,) = layer.vjp(operand, per_sample=True, extra=extra).terms
    return term


def gradient_sum(
    layer: Expression, operand: str = "weight", vectors: int | None = None
) -> TensorNetwork:
    """``Σ_{m,n} J[m, n, θ]``, in the operand's shape: the gradient of the sum over samples.

    >>> from tnconv.diagrams import linear
    >>> gradient_sum(linear((8, 3), (4, 3))).shape
    (4, 3)

    Raises:
        ValueError: a layer without the operand.
    """
    if vectors is None:
        return layer.vjp(operand).terms[0]
    (term,) = layer.vjp(operand, extra={"m": vectors}).terms
    return term.with_(result=View(layer.operands[operand], term.result.axes[1:]))


def gradient_dots(
    layer: Expression, operand: str = "weight", vectors: int | None = None
) -> TensorNetwork:
    """``G[m, n, m', n'] = Σ_θ J[m, n, θ] J[m', n', θ]``: the Gram matrix of all gradients.

    The Gauss-Newton's Gram matrix (Dangel et al. 2022, ViViT), the empirical Fisher's, and the
    layer's block of the empirical neural tangent kernel on one batch, for which m runs over
    classes; ``(n, n')`` where ``vectors`` is None. Between two batches: `ntk_block`.

    >>> from tnconv.diagrams import linear
    >>> gradient_dots(linear((8, 3), (4, 3)), vectors=4).shape
    (4, 8, 4, 8)

    Raises:
        ValueError: a layer without batch, or without the operand.
    """
    j = _gradients(layer, operand, vectors)
    return j.gram(over=_parameters(j, vectors))


def ntk_block(
    layer: Expression,
    other: Expression,
    operand: str = "weight",
    vectors: int | None = None,
    other_vectors: int | None = None,
) -> TensorNetwork:
    """``G[m, n, m', n'] = Σ_θ J[m, n, θ] J'[m', n', θ]``: `gradient_dots` between two batches.

    The layer's block of the empirical neural tangent kernel (Jacot et al. 2018), with m and m' the
    classes; ``(n, n')`` without vectors. ``other`` is the layer at the other batch: its operands
    get the prefix ``other_`` (``other_x``, ``other_grad_output``). Only θ's shape is common, so
    inputs of two sizes are legal.

    >>> from tnconv.diagrams import linear
    >>> train, test = linear((8, 3), (4, 3)), linear((2, 3), (4, 3))
    >>> net = ntk_block(train, test, vectors=4, other_vectors=4)
    >>> net.shape, list(net.operands)
    ((4, 8, 4, 2), ['x', 'grad_output', 'other_x', 'other_grad_output'])

    Raises:
        ValueError: a layer without batch, without the operand, or operands of two shapes.
    """
    j, k = _gradients(layer, operand, vectors), _gradients(other, operand, other_vectors)
    first, second = layer.operands[operand], other.operands[operand]
    if first != second or (theta := _parameters(j, vectors)) != _parameters(k, other_vectors):
        raise ValueError(
            f"{operand!r} has shapes {first} and {second} in the two layers; expected one layer at "
            "two batches"
        )
    k = k.rename_operands({name: f"other_{name}" for name in k.operands})
    pair, shown = j.connect(k, share=theta), len(_open(vectors))
    axes = pair.result.axes
    half = len(j.result.axes)
    return _with_axes(pair, axes[:shown] + axes[half : half + len(_open(other_vectors))])


def gradient_norms(
    layer: Expression, operand: str = "weight", vectors: int | None = None
) -> TensorNetwork:
    """``s[m, n] = Σ_θ J[m, n, θ]²``: squared norms, the diagonal of `gradient_dots`.

    >>> from tnconv.diagrams import linear
    >>> gradient_norms(linear((8, 3), (4, 3))).shape
    (8,)

    Raises:
        ValueError: a layer without batch, or without the operand.
    """
    j = _gradients(layer, operand, vectors)
    return j.gram(over=_parameters(j, vectors), keep=_open(vectors))


def ggn_diagonal(
    layer: Expression,
    operand: str = "weight",
    vectors: int | None = None,
    per_sample: bool = False,
) -> TensorNetwork:
    """``d[θ] = Σ_{m,n} J[m, n, θ]²``, or with ``per_sample`` ``d[n, θ] = Σ_m J[m, n, θ]²``.

    The diagonal of the Gauss-Newton or Fisher matrix, in the operand's shape.

    >>> from tnconv.diagrams import linear
    >>> ggn_diagonal(linear((8, 3), (4, 3)), vectors=4, per_sample=True).shape
    (8, 4, 3)

    Raises:
        ValueError: a layer without batch, or without the operand.
    """
    j = _gradients(layer, operand, vectors)
    kept = (("n",) if per_sample else ()) + _parameters(j, vectors)
    diagonal = j.gram(over=[leg for leg in j.result.legs if leg not in kept], keep=kept)
    samples = (j.sizes["n"],) if per_sample else ()
    return diagonal.reshape(*samples, *layer.operands[operand])


def ggn_block(
    layer: Expression, operand: str = "weight", vectors: int | None = None
) -> TensorNetwork:
    """``B[θ, θ'] = Σ_{m,n} J[m, n, θ] J[m, n, θ']``: the layer's Gauss-Newton or Fisher block.

    Shape ``(*operand, *operand)``.

    >>> from tnconv.diagrams import linear
    >>> ggn_block(linear((8, 3), (4, 3)), vectors=4).shape
    (4, 3, 4, 3)

    Raises:
        ValueError: a layer without batch, or without the operand.
    """
    shape = layer.operands.get(operand, ())
    return _gradients(layer, operand, vectors).gram(over=_open(vectors)).reshape(*shape, *shape)


def ggn_vector_product(
    layer: Expression, operand: str = "weight", vectors: int | None = None
) -> TensorNetwork:
    """``p[θ] = Σ_{m,n,θ'} J[m, n, θ] J[m, n, θ'] u[θ']``: `ggn_block` times operand ``vector``.

    >>> from tnconv.diagrams import linear
    >>> ggn_vector_product(linear((8, 3), (4, 3)), vectors=4).operands["vector"]
    (4, 3)

    Raises:
        ValueError: a layer without batch, or without the operand.
    """
    block = ggn_block(layer, operand, vectors)
    shape, half = layer.operands[operand], len(block.result.axes) // 2
    vector = Tensor("vector", View(shape, block.result.axes[half:]))
    result = View(shape, block.result.axes[:half])
    return block.with_((*block.nodes, vector), result)


def diagonal_vjp(layer: TensorNetwork, operand: str = "x") -> TensorNetwork:
    """``d[θ] = Σ_o h[o] (∂y[o] / ∂θ)²``: a diagonal output Hessian, pulled back to its diagonal.

    The recursion of Becker & LeCun 1989 and HesScale through a layer: its vjp with every other
    operand squared, which is exact because an index pattern meets each pair at most once. The
    cotangent h is operand ``diagonal``.

    >>> from tnconv.diagrams import linear
    >>> diagonal_vjp(linear((8, 3), (4, 3))).operands
    {'diagonal': (8, 4), 'weight': (4, 3)}

    Raises:
        ValueError: no such operand, or one that the layer holds more than once.
    """
    (term,) = layer.vjp(operand, cotangent="diagonal").terms
    squares = [node for node in term.tensors if node.name != "diagonal"]
    return term.with_((*term.nodes, *squares), scale=term.scale**2)


def hessian_vjp(layer: TensorNetwork, operand: str = "x") -> TensorNetwork:
    """``H[θ, θ'] = Σ_{o,o'} (∂y[o] / ∂θ) B[o, o'] (∂y[o'] / ∂θ')``: ``Jᵀ B J``.

    Operand ``hessian`` of shape ``(*y, *y)``, result ``(*operand, *operand)``, for a layer without
    batch: one sample, or the batch-averaged Hessian of KFRA (Botev et al. 2017), for which J must
    not depend on the sample.

    >>> from tnconv.diagrams import conv
    >>> hessian_vjp(conv((3, 8), (4, 3, 3))).shape
    (3, 8, 3, 8)

    Raises:
        ValueError: a layer with batch, no such operand, or one that it holds more than once.
    """
    if "n" in layer.sizes:
        raise ValueError(f"the layer has a batch of {layer.sizes['n']}; expected one without batch")
    (j,) = layer.jacobian(operand).terms
    pair, outputs, shape = j.connect(j), len(layer.result.axes), layer.operands[operand]
    half = len(j.result.axes)
    first, second = pair.result.axes[:half], pair.result.axes[half:]
    hessian = Tensor("hessian", View(2 * layer.shape, first[:outputs] + second[:outputs]))
    return pair.with_((*pair.nodes, hessian), View(2 * shape, first[outputs:] + second[outputs:]))


def _gradients(layer: Expression, operand: str, vectors: int | None) -> TensorNetwork:
    """J with one result dimension per leg: m, n, then the operand's."""
    term = per_sample_gradients(layer, operand, vectors)
    return _with_axes(term, term.result.axes)


def _with_axes(network: TensorNetwork, axes: Sequence[Axis]) -> TensorNetwork:
    """The network with these axes as its result, one dimension for each."""
    return network.with_(result=View(tuple(axis.size for axis in axes), tuple(axes)))


def _open(vectors: int | None) -> tuple[Leg, ...]:
    return ("n",) if vectors is None else ("m", "n")


def _parameters(j: TensorNetwork, vectors: int | None) -> tuple[Leg, ...]:
    return tuple(leg for leg in j.result.legs if leg not in _open(vectors))
