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
from itertools import combinations, product

from tnconv.diagrams.affine import Axis, Leg, Tensor, View, injective
from tnconv.diagrams.composition import tie
from tnconv.diagrams.expression import Expression, Sum
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
    terms = layer.vjp(operand, per_sample=True, extra=extra).terms
    if len(terms) > 1:
        raise ValueError(f"the layer holds {operand!r} in {len(terms)} places; expected one")
    return terms[0]


def gradient_sum(
    layer: Expression,
    operand: str = "weight",
    vectors: int | None = None,
    per_vector: bool = False,
) -> TensorNetwork:
    """``Σ_{m,n} J[m, n, θ]``, in the operand's shape: the gradient of the sum over samples.

    With ``per_vector`` ``Σ_n J[m, n, θ]``, of shape ``(m, *operand)``.

    >>> from tnconv.diagrams import linear
    >>> gradient_sum(linear((8, 3), (4, 3))).shape
    (4, 3)
    >>> gradient_sum(linear((8, 3), (4, 3)), vectors=2, per_vector=True).shape
    (2, 4, 3)

    Args:
        layer: a batched layer's network, or one ``with_bias``.
        operand: θ, the operand that gradients are of.
        vectors: how many cotangents m each sample has; None stands for one, without a leg m.
        per_vector: whether vectors are kept apart, in a leading dimension.

    Raises:
        ValueError: a layer without the operand.
    """
    if vectors is None:
        return layer.vjp(operand).terms[0]
    (term,) = layer.vjp(operand, extra={"m": vectors}).terms
    if per_vector:
        return term
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
    tied: Sequence[Leg] = (),
    summed: Sequence[Leg] = (),
) -> TensorNetwork:
    """``G[m, n, m', n'] = Σ_θ J[m, n, θ] J'[m', n', θ]``: `gradient_dots` between two batches.

    The layer's block of the empirical neural tangent kernel (Jacot et al. 2018), with m and m' the
    classes; ``(n, n')`` without vectors. ``other`` is the layer at the other batch: its operands
    get the prefix ``other_`` (``other_x``, ``other_grad_output``). Only θ's shape is common, so
    inputs of two sizes are legal.

    Args:
        layer: The layer at the first batch.
        other: The layer at the second batch.
        operand: The operand θ.
        vectors: The number of vectors m; None where there is one without a dimension.
        other_vectors: The number of vectors m'.
        tied: Legs among m and n that both sides share: ``m = m'``, ``n = n'``. They stay once.
        summed: Legs among m and n that both sides share and that are summed.

    >>> from tnconv.diagrams import linear
    >>> train, test = linear((8, 3), (4, 3)), linear((2, 3), (4, 3))
    >>> net = ntk_block(train, test, vectors=4, other_vectors=4)
    >>> net.shape, list(net.operands)
    ((4, 8, 4, 2), ['x', 'grad_output', 'other_x', 'other_grad_output'])
    >>> ntk_block(train, test, vectors=4, other_vectors=4, tied=("m",)).shape
    (4, 8, 2)
    >>> ntk_block(train, test, vectors=4, other_vectors=4, summed=("m",)).shape
    (8, 2)

    Raises:
        ValueError: a layer without batch, without the operand, operands of two shapes, or shared
            legs of two sizes.
    """
    j, k = _gradients(layer, operand, vectors), _gradients(other, operand, other_vectors)
    first, second = layer.operands[operand], other.operands[operand]
    if first != second or (theta := _parameters(j, vectors)) != _parameters(k, other_vectors):
        raise ValueError(
            f"{operand!r} has shapes {first} and {second} in the two layers; expected one layer at "
            "two batches"
        )
    k = k.rename_operands({name: f"other_{name}" for name in k.operands})
    shared = (*tied, *summed)
    pair, half = j.connect(k, share=(*theta, *shared)), len(j.result.axes)
    rows = zip(_open(vectors), pair.result.axes, strict=False)
    columns = zip(_open(other_vectors), pair.result.axes[half:], strict=False)
    axes = [axis for leg, axis in rows if leg not in summed]
    return _with_axes(pair, axes + [axis for leg, axis in columns if leg not in shared])


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

    Args:
        layer: a batched layer's network, or one ``with_bias``.
        operand: θ, the operand that gradients are of.
        vectors: how many cotangents m each sample has; None stands for one, without a leg m.
        per_sample: whether samples are kept apart, in a leading dimension.

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


def diagonal_vjp(layer: Expression, operand: str = "x", per_sample: bool = False) -> Expression:
    """``d[θ] = Σ_o h[o] (∂y[o] / ∂θ)²``: a diagonal output Hessian, pulled back to its diagonal.

    The recursion of Becker & LeCun 1989 and HesScale through a layer. The cotangent h is operand
    ``diagonal``. Where an output meets an entry of θ at most once, as in a convolution, the square
    of the sum is the sum of squares: the vjp with every other operand squared. Elsewhere (a layer
    composed with a reflecting pad, say) it is a network of two copies that share o and θ, summed
    over pairs of terms. With ``per_sample`` samples are kept apart, as ``(n, *operand)``.

    >>> from tnconv.diagrams import compose, conv, linear, pad
    >>> diagonal_vjp(linear((8, 3), (4, 3))).operands
    {'diagonal': (8, 4), 'weight': (4, 3)}
    >>> padded = compose(conv((8, 3, 10), (4, 3, 3)), "x", pad((8, 3, 8), 1, "reflect"))
    >>> diagonal_vjp(padded).shape
    (8, 3, 8)

    Raises:
        ValueError: no such operand.
    """
    halves = layer.vjp(operand, per_sample=per_sample, cotangent="diagonal").terms
    squares = [_square(a) if _meets_once(a) else _two_copies(a, a) for a in halves]
    mixed = [_two_copies(a, b).scaled(2) for a, b in combinations(halves, 2)]
    return Sum((*squares, *mixed)) if mixed else squares[0]


def hessian_vjp(layer: Expression, operand: str = "x") -> Expression:
    """``H[θ, θ'] = Σ_{o,o'} (∂y[o] / ∂θ) B[o, o'] (∂y[o'] / ∂θ')``: ``Jᵀ B J``.

    Operand ``hessian`` of shape ``(*y, *y)``, result ``(*operand, *operand)``, for a layer without
    batch: one sample, or the batch-averaged Hessian of KFRA (Botev et al. 2017), for which J must
    not depend on the sample.

    >>> from tnconv.diagrams import conv
    >>> hessian_vjp(conv((3, 8), (4, 3, 3))).shape
    (3, 8, 3, 8)

    Raises:
        ValueError: a layer with batch, or no such operand.
    """
    for term in layer.terms:
        if "n" in term.sizes:
            raise ValueError(f"the layer has a batch of {term.sizes['n']}; expected one without")
    halves = layer.vjp(operand, cotangent="hessian").terms
    terms = []
    for a, b in product(halves, repeat=2):
        pair, first, second = _pair(a, b, "hessian")
        hessian = Tensor("hessian", View(2 * layer.shape, first.axes + second.axes))
        terms.append(pair.with_((*pair.nodes, hessian)))
    return Sum(tuple(terms)) if len(terms) > 1 else terms[0]


def _pair(a: TensorNetwork, b: TensorNetwork, cotangent: str) -> tuple[TensorNetwork, View, View]:
    """Two halves next to each other without their cotangents, and how these were read."""
    pair = a.connect(b)
    held = [at for at, n in enumerate(pair.nodes) if isinstance(n, Tensor) and n.name == cotangent]
    first, second = (node.view for node in pair.tensors if node.name == cotangent)
    return pair.without(*held), first, second


def _two_copies(a: TensorNetwork, b: TensorNetwork) -> TensorNetwork:
    """``Σ_o h[o] A[o, θ] B[o, θ]`` from ``Σ_o h[o] A[o, θ]`` and ``Σ_o h[o] B[o, θ]``."""
    pair, first, second = _pair(a, b, "diagonal")
    axes, half = pair.result.axes, len(a.result.axes)
    one, other = View(a.shape, axes[:half]), View(b.shape, axes[half:])
    joined = pair.with_((*pair.nodes, Tensor("diagonal", first)), one)
    whole = View(first.shape + one.shape, first.axes + one.axes)
    return tie(joined, whole, View(second.shape + other.shape, second.axes + other.axes))


def _square(a: TensorNetwork) -> TensorNetwork:
    """Every operand but the cotangent squared; a 0/1 pattern is its own square."""
    squares = [node for node in a.tensors if node.name != "diagonal"]
    return a.with_((*a.nodes, *squares), scale=a.scale**2)


def _meets_once(a: TensorNetwork) -> bool:
    """Whether entries of the cotangent and of θ determine every leg (sufficient test)."""
    given = next(node for node in a.tensors if node.name == "diagonal")
    axes = [axis.terms for axis in (*given.view.axes, *a.result.axes)]
    known = {leg for terms in axes if injective(terms, a.sizes) for leg, _ in terms}
    forms = axes + [node.terms for _, node in a.patterns if node.value is not None]
    while True:
        unknown = [{leg for leg, _ in terms} - known for terms in forms]
        found = {leg for legs in unknown if len(legs) == 1 for leg in legs}
        if not found:
            return known == a.sizes.keys()
        known |= found


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
