"""Our kernels run by Triton's interpreter, and compiled for GPUs that are not here.

The interpreter has to be chosen before Triton is imported: a test runs this file once more, in a
process where it is.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.own_kernels import DISTINCT, own_kernels, windows
from tests.strategies import Case, assert_close, geometries
from tnconv import compile, diagrams
from tnconv.codegen.kernels import launching
from tnconv.codegen.kernels.launching import INTERPRETED, launched
from tnconv.codegen.kernels.patch_gram import patch_gram
from tnconv.codegen.kernels.tiling import SIDES, Tiling
from tnconv.codegen.kernels.windows import Windows, unfolded_gram

ROOT = Path(__file__).parents[2]
FEW = settings(max_examples=settings.default.max_examples // 4)
HERE = INTERPRETED and "cpu" in launching.KERNELS_ON
interpreted = pytest.mark.skipif(not HERE, reason="runs in the process of the interpreter")


def test_kernels_by_the_interpreter() -> None:
    """All tests below."""
    pytest.importorskip("triton")
    if INTERPRETED:
        pytest.skip("this is the interpreter's process")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [*command, "-k", "interpreted", __file__],
        **{"cwd": ROOT, "env": environment, "capture_output": True, "text": True},
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr
    assert "skipped" not in done.stdout


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "channels last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "every other":
        return x.repeat_interleave(2, -1)[..., ::2]
    return x


LAYOUTS = st.sampled_from(("contiguous", "channels last", "every other"))


@interpreted
@FEW
@given(geometries(), LAYOUTS)
def test_interpreted_factors_are_those_of_the_definition(case: Case, layout: str) -> None:
    """Groups, strides, dilations, padding of each side, no samples; one to three dimensions."""
    network = diagrams.kfac_expand(case.input_shape, case.kernel_size, **case.kwargs)
    with own_kernels():
        program = compile(network, routes=["patch gram"], dtype=torch.float64)
    x = torch.randn(case.input_shape, dtype=torch.float64)
    assert_close(program(x=laid_out(x, layout)), network.reference(x=x))


@interpreted
@example(DISTINCT[0], "contiguous", torch.float64)
@example(DISTINCT[1], "every other", torch.float32)
@example(DISTINCT[2], "channels last", torch.float64)
@settings(max_examples=settings.default.max_examples // 2)
@given(windows(), LAYOUTS, st.sampled_from((torch.float16, torch.float32, torch.float64)))
def test_interpreted_kernels_equal_unfolded_inputs(
    drawn: tuple[tuple[int, ...], Windows], layout: str, dtype: torch.dtype
) -> None:
    shape, given = drawn
    x = laid_out(torch.randn(shape, dtype=torch.float64).to(dtype), layout)
    found = patch_gram(x, *given)
    assert found.dtype == dtype and torch.equal(found, found.mT)
    tolerance = {torch.float16: 1e-3, torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    assert_close(found.double(), unfolded_gram(x.double(), given), tolerance)


@interpreted
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("block", "wide"), [*((block, False) for block in SIDES), (16, True)])
def test_interpreted_tiles_of_any_size(
    block: int, wide: bool, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sides that do not divide, one part or several, numbers of 32 and 64 bits."""
    if wide:
        monkeypatch.setattr(launching, "MOST", 1)
    x = laid_out(torch.randn(2, 18, 3, 4, dtype=torch.float64), "channels last" if last else "")
    given = Windows((1, 2), (3, 4), (1, 1), (0, 1), (1, 1))
    expected = unfolded_gram(x, given)
    for per_split, splits in ((32, 1), (16, 2)):
        tiles = Tiling(block, 16, -(-36 // block), per_split, splits)
        found = launched(x, given, tiles=tiles)
        assert torch.equal(found, found.mT)
        assert_close(found, expected, 1e-14)


@interpreted
def test_interpreted_derivatives() -> None:
    """Of first and second order, backwards and forwards, and of several inputs."""
    given = Windows((2, 3), (2, 3), (2, 1), (1, 1), (1, 1), groups=2)
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    factor = torch.randn(2, 12, 12, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return (factor * patch_gram(x, *given)).square().sum()

    def plain(x: Tensor) -> Tensor:
        return (factor * unfolded_gram(x, given)).square().sum()

    def derivatives(call: Any) -> tuple[Tensor, Tensor]:
        (first,) = torch.autograd.grad(call(x), x, create_graph=True)
        return first, torch.autograd.grad(first.square().sum(), x)[0]

    assert all(map(torch.allclose, derivatives(loss), derivatives(plain)))
    one, several = x.detach(), torch.randn(3, *x.shape, dtype=torch.float64)
    for change in (torch.func.grad, torch.func.jacfwd, torch.func.hessian):
        assert torch.allclose(change(loss)(one), change(plain)(one))
    found = torch.func.vmap(torch.func.grad(loss))(several)
    assert torch.allclose(found, torch.func.vmap(torch.func.grad(plain))(several))


@interpreted
def test_interpreted_programs_are_compiled_and_checked() -> None:
    given = Windows((3,), (6,), (1,), (1,), (1,))
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    seen = torch._dynamo.testing.EagerAndRecordGraphs()
    torch.compile(lambda x: patch_gram(x, *given), fullgraph=True, backend=seen)(x)
    assert "patch_gram" in str(seen.graphs[0].graph) and "matmul" not in str(seen.graphs[0].graph)
    network = diagrams.kfac_expand((2, 3, 6), 3, padding=1)
    with own_kernels():
        program = compile(network, routes=["patch gram"])
    assert "patch gram" in program.terms[0][0].routes
    whole = torch.compile(lambda x: program(x=x), fullgraph=True, backend="aot_eager")
    leaf = x.detach().float().requires_grad_()
    assert_close(whole(leaf), program(x=leaf), 1e-6)
    (found,) = torch.autograd.grad(whole(leaf).sum(), leaf)
    (expected,) = torch.autograd.grad(program(x=leaf).sum(), leaf)
    assert_close(found, expected, 1e-6)


@interpreted
def test_interpreted_kernels_are_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above compare are kernels indeed; complex numbers unfold their input."""
    calls: list[torch.dtype] = []

    def counted(x: Tensor, *rest: Any) -> Tensor:
        calls.append(x.dtype)
        return launched(x, *rest)

    monkeypatch.setattr("tnconv.codegen.kernels.patch_gram.launched", counted)
    given = Windows((3,), (6,), (1,), (1,), (1,))
    for dtype in (torch.float32, torch.complex64):
        patch_gram(torch.randn(2, 3, 6, dtype=dtype), *given)
    assert calls == [torch.float32]


@interpreted
def test_interpreted_kernels_that_cannot_be_compiled_are_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a warning that says why."""

    def fails(*_: object) -> Tensor:
        raise FileNotFoundError("no C compiler")

    x, given = torch.randn(2, 3, 6), Windows((3,), (6,), (1,), (1,), (1,))
    expected = patch_gram(x, *given)
    launching.works.cache_clear()
    with monkeypatch.context() as patch, pytest.warns(RuntimeWarning, match="no C compiler"):
        patch.setattr(launching, "launched", fails)
        assert_close(patch_gram(x, *given), expected, 1e-6)
    assert_close(patch_gram(x, *given), expected, 1e-6)
    launching.works.cache_clear()


NUMBERS = ("rows", "channels", "total", "stride_n", "stride0", "stride1", "stride2")
ONES = ("step1", "step2", "dilation0", "dilation1", "dilation2")


@pytest.mark.parametrize(
    ("capability", "dtype", "last"), [(90, "fp32", False), (80, "bf16", True)], ids=str
)
def test_kernels_compile_for_gpus(
    capability: int, dtype: str, last: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Tensor cores, loads ahead of products, no atomics; no more shared memory than GPUs have."""
    pytest.importorskip("triton")
    if INTERPRETED:
        pytest.skip("functions are not compiled in the interpreter's process")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tnconv.codegen.kernels.triton_grams import dtypes, patch_gram_tiles

    block = 64
    constants: dict[str, Any] = {"DIMS": 2, "MASKED": 6, "LAST": last, "WIDE": False}
    constants |= {"BLOCK": block, "DEPTH": 128 // (4 if dtype == "fp32" else 2), "SPLIT": True}
    constants |= {"PRECISION": "tf32", "TOTAL": dtypes[torch.float32]}
    constants |= dict.fromkeys((*ONES, "stride_c" if last else "stride2"), 1)
    names = patch_gram_tiles.arg_names
    kinds = {"x": f"*{dtype}", "result": "*fp32", **dict.fromkeys(constants, "constexpr")}
    signature = {name: kinds.get(name, "i32") for name in names}
    aligned = ("x", "result", *(name for name in NUMBERS if name not in constants))
    divisible = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(patch_gram_tiles, signature, constants, divisible)
    how = {"num_warps": launching.WARPS[block], "num_stages": launching.STAGES}
    how["enable_fp_fusion"] = True
    found = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=how)
    code = found.asm["ptx"]
    assert ("wgmma" if capability == 90 else "mma.sync") in code and "cp.async" in code
    assert "atom." not in code and found.metadata.shared <= 99 * 1024
    if last:  # vectors of eight numbers
        assert "cp.async.cg" in code
