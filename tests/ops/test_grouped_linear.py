"""``grouped_linear``: the operator, and the functions that are its kernels on CUDA, against a loop in float64."""

import pytest
import torch
from cases import dtypes
from compare import assert_near, assert_same_bits, spread

import topn_gating
from topn_gating import grouped
from topn_gating.ops import GroupedLinear

ops = torch.ops.topn_gating

# The operator's kernels: on the CPU, and on CUDA, which are functions of tensors of any device.
KERNELS = {
    "cpu": (ops.grouped_linear, ops.grouped_linear_backward),
    "torch": (grouped.forward, grouped.backward),
}
kernels = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
ALL = True, True, True

GROUPS = {
    "even": ([5, 5, 5], 0),
    "empty experts": ([0, 3, 0, 0, 9, 0], 0),
    "one row each": ([1] * 9, 0),
    "one row": ([0, 1, 0], 0),
    "all in one": ([0, 40, 0], 0),
    "rows of no expert": ([4, 0, 7], 6),
    "no row": ([0, 0, 0], 0),
    "no row of an expert": ([0, 0], 5),
    "many": ([1500, 3, 2, 0, 1], 1),
    "at the limits of thin groups": ([8, 9, 0, 32, 33, 1, 31], 2),  # csrc/torch/grouped_linear.h
}
groups = pytest.mark.parametrize(("counts", "rest"), GROUPS.values(), ids=GROUPS.keys())


def tensors(counts, rest=0, in_features=24, out_features=16, dtype=torch.float32):
    """Random rows, weight, bias, offsets and gradient of the result."""
    experts, rows = len(counts), sum(counts) + rest
    shapes = (rows, in_features), (experts, out_features, in_features), (experts, out_features), (rows, out_features)
    x, weight, bias, grad = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)
    return x, weight, bias, torch.tensor(counts).cumsum(0).int(), grad


def by_columns(weight):
    """The same matrices, stored column after column."""
    return weight.transpose(1, 2).contiguous().transpose(1, 2)


def oracle(rows, weight, bias, offsets, grad):
    """The result and the three gradients, computed in float64 by a loop over the experts."""
    x, w = rows.double(), weight.double()
    out, grad_rows, grad_weight = (torch.zeros(s, dtype=torch.float64) for s in (grad.shape, x.shape, w.shape))
    grad_bias, begin = torch.zeros(w.shape[:2], dtype=torch.float64), 0
    for expert, end in enumerate(offsets.tolist()):
        group = slice(begin, begin := min(len(x), max(begin, end)))
        g = grad[group].double()
        out[group] = x[group] @ w[expert].T + (0 if bias is None else bias[expert].double())
        grad_rows[group] = g @ w[expert]
        grad_weight[expert] = g.T @ x[group]
        grad_bias[expert] = g.sum(0)
    return out, grad_rows, grad_weight, grad_bias


def check(kernel, rows, weight, bias, offsets, grad):
    forward, backward = kernel
    expected = oracle(rows, weight, bias, offsets, grad)
    actual = forward(rows, weight, bias, offsets), *backward(grad, rows, weight, offsets, *ALL)
    for a, e in zip(actual, expected, strict=True):
        assert (a.dtype, a.shape) == (rows.dtype, e.shape)
        twice = kernel is KERNELS["torch"] and bias is not None and rows.dtype.itemsize == 2  # rounded before the bias, too
        assert_near(a, e) if not twice else torch.testing.assert_close(a.double(), e, rtol=0.02, atol=0.05)


@kernels
@groups
@dtypes
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_the_products(nan_memory, kernel, counts, rest, dtype, with_bias):
    rows, weight, bias, offsets, grad = tensors(counts, rest, dtype=dtype)
    check(kernel, rows, weight, bias if with_bias else None, offsets, grad)


@kernels
@dtypes
@pytest.mark.parametrize(("in_features", "out_features"), [(1, 1), (1, 5), (7, 1), (3, 70), (130, 33), (512, 256)], ids=str)
@pytest.mark.parametrize("columns", [False, True], ids=["by rows", "by columns"])
def test_any_size(nan_memory, kernel, dtype, in_features, out_features, columns):
    rows, weight, bias, offsets, grad = tensors([3, 0, 1, 20], 2, in_features, out_features, dtype)
    check(kernel, rows, by_columns(weight) if columns else weight, bias, offsets, grad)


@kernels
@dtypes
def test_the_gradient_of_the_weight_has_its_layout(kernel, dtype):
    rows, weight, _, offsets, grad = tensors([3, 0, 8], dtype=dtype)
    assert kernel[1](grad, rows, weight, offsets, *ALL)[1].stride() == weight.stride()
    weight = by_columns(weight)
    assert kernel[1](grad, rows, weight, offsets, *ALL)[1].stride() == weight.stride()


@kernels
@dtypes
def test_any_layout(kernel, dtype):
    rows, weight, bias, offsets, grad = tensors([3, 0, 8], 2, dtype=dtype)
    check(kernel, spread(rows), spread(weight), spread(bias), spread(offsets), spread(grad))
    wide = torch.cat([rows, rows], 1)[:, :24]  # rows apart from each other, as halves of a chunked tensor are
    check(kernel, wide, weight, bias, offsets, grad[:1].expand_as(grad))
    check(kernel, rows.t().contiguous().t(), weight[:1].expand_as(weight), bias, offsets, grad.t().contiguous().t())


@kernels
def test_gradients_that_are_not_wanted_are_empty(kernel):
    rows, weight, _, offsets, grad = tensors([30, 0, 9], 2)
    expected = kernel[1](grad, rows, weight, offsets, *ALL)
    for mask in range(8):
        wanted = [bool(mask >> i & 1) for i in range(3)]
        for got, full, wants in zip(kernel[1](grad, rows, weight, offsets, *wanted), expected, wanted, strict=True):
            assert_same_bits(got, full if wants else full.new_empty(0))


@kernels
@pytest.mark.parametrize(
    "offsets",
    [[9, 4, 20], [-5, -1, 3], [100, 200, 2**31 - 1], [-(2**31), 2**31 - 1, 0], [20, 20, 19], [0, 0, -1]],
    ids=str,
)
@dtypes
def test_offsets_out_of_order_or_range_are_moved(nan_memory, kernel, offsets, dtype):
    rows, weight, bias, _, grad = tensors([20, 0, 0], dtype=dtype)
    check(kernel, rows, weight, bias, torch.tensor(offsets, dtype=torch.int32), grad)


@dtypes
def test_a_bad_row_reaches_its_group_alone(dtype):
    rows, weight, bias, offsets, grad = tensors([5, 4, 3], 2, dtype=dtype)
    bad_rows, bad_grad = rows.clone(), grad.clone()
    bad_rows[6], bad_grad[13] = float("nan"), float("nan")
    out, expected = ops.grouped_linear(bad_rows, weight, bias, offsets), ops.grouped_linear(rows, weight, bias, offsets)
    rest = torch.arange(len(rows)) != 6
    assert_same_bits(out[rest], expected[rest])
    grads = ops.grouped_linear_backward(bad_grad, bad_rows, weight, offsets, *ALL)
    expected = ops.grouped_linear_backward(grad, rows, weight, offsets, *ALL)
    assert_same_bits((grads[0], grads[2]), (expected[0], expected[2]))
    assert_same_bits(grads[1][[0, 2]], expected[1][[0, 2]])


@dtypes
@pytest.mark.parametrize("counts", [[700, 90, 0, 3, 1, 64], [1] * 30, [3000, 10]], ids=["uneven", "one row each", "large"])
def test_near_for_any_number_of_threads_and_the_same_bits_again(dtype, counts):
    rows, weight, bias, offsets, grad = tensors(counts, 3, 256, 192, dtype)
    expected = oracle(rows, weight, bias, offsets, grad)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)

            def run():
                out = ops.grouped_linear(rows, weight, bias, offsets)
                return out, *ops.grouped_linear_backward(grad, rows, weight, offsets, *ALL)

            first = run()
            for actual, e in zip(first, expected, strict=True):
                assert_near(actual, e)
            assert_same_bits(run(), first)
    finally:
        torch.set_num_threads(threads)


def test_large_outputs():
    rows, weight, bias, offsets, grad = tensors([900, 0, 700, 500], 40, 768, 1100)
    check(KERNELS["cpu"], rows, weight, bias, offsets, grad)
    check(KERNELS["cpu"], rows, by_columns(weight), None, offsets, grad)


@dtypes
@pytest.mark.parametrize("columns", [False, True], ids=["by rows", "by columns"])
@pytest.mark.parametrize("wanted", ["all", "rows", "weight", "bias"])
def test_opcheck(dtype, columns, wanted):
    rows, weight, bias, offsets, grad = tensors([2, 0, 3], 1, 5, 3, dtype)
    weight = by_columns(weight) if columns else weight
    leaves = dict(zip(("rows", "weight", "bias"), (rows, weight, bias), strict=True))
    args = [t.detach().requires_grad_(wanted in (name, "all")) for name, t in leaves.items()]
    torch.library.opcheck(ops.grouped_linear.default, (*args, offsets))
    torch.library.opcheck(ops.grouped_linear.default, (*args[:2], None, offsets))
    flags = [wanted in (name, "all") for name in leaves]
    torch.library.opcheck(ops.grouped_linear_backward.default, (grad, rows, weight, offsets, *flags))


@pytest.mark.parametrize("function", [ops.grouped_linear, GroupedLinear.apply], ids=["torch.ops", "Function.apply"])
@pytest.mark.parametrize("columns", [False, True], ids=["by rows", "by columns"])
def test_gradcheck(function, columns):
    rows, weight, bias, offsets, _ = tensors([2, 0, 3], 1, 5, 3, torch.float64)
    weight = by_columns(weight) if columns else weight
    leaves = [t.requires_grad_() for t in (rows, weight, bias)]
    assert torch.autograd.gradcheck(lambda *t: function(*t, offsets), leaves)
    assert torch.autograd.gradcheck(lambda x, w: function(x, w, None, offsets), leaves[:2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.zeros(4, 6)}, "rows must have shape"),
        ({"rows": torch.zeros(4)}, "rows must have shape"),
        ({"rows": torch.zeros(4, 5, dtype=torch.int32)}, "rows must be float32"),
        ({"rows": torch.zeros(4, 5, dtype=torch.float64)}, "weight must be Double"),
        ({"weight": torch.zeros(3, 5)}, "weight must have shape"),
        ({"weight": torch.zeros(2, 0, 5)}, "weight must have shape"),
        ({"weight": torch.zeros(0, 3, 5)}, "weight must have shape"),
        ({"weight": torch.zeros(2, 3, 6)}, "rows must have shape"),
        ({"offsets": torch.zeros(3, dtype=torch.int32)}, "offsets has a shape"),
        ({"offsets": torch.zeros(2, dtype=torch.int64)}, "offsets must be Int"),
        ({"bias": torch.zeros(2, 4)}, "bias has a shape"),
        ({"bias": torch.zeros(2, 3, dtype=torch.float64)}, "bias must be Float"),
        ({"grad": torch.zeros(4, 2)}, "grad has a shape"),
        ({"grad": torch.zeros(5, 3)}, "grad has a shape"),
        ({"grad": torch.zeros(4, 3, dtype=torch.float64)}, "grad must be Float"),
    ],
    ids=str,
)
def test_bad_arguments_of_the_operator(change, message):
    given = dict(zip(("rows", "weight", "bias", "offsets", "grad"), tensors([3, 1], 0, 5, 3), strict=True)) | change
    rows, weight, bias, offsets, grad = given.values()
    if "bias" not in change:
        with pytest.raises(RuntimeError, match=message):
            ops.grouped_linear_backward(grad, rows, weight, offsets, *ALL)
    if "grad" not in change:
        with pytest.raises(RuntimeError, match=message):
            ops.grouped_linear(rows, weight, bias, offsets)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": [1.0]}, TypeError, "rows must be a tensor, got list"),
        ({"rows": torch.zeros(4, 6)}, ValueError, r"rows must have shape \(rows, 5\) to fit weight, got \(4, 6\)"),
        ({"rows": torch.zeros(4)}, ValueError, r"rows must have shape \(rows, 5\) to fit weight, got \(4,\)"),
        ({"rows": torch.zeros(4, 5, dtype=torch.int32)}, TypeError, "rows must be one of .*, got torch.int32"),
        ({"rows": torch.zeros(4, 5).double()}, TypeError, "rows must be torch.float32 like weight.*, got torch.float64"),
        ({"rows": torch.zeros(4, 5, device="meta")}, ValueError, "rows must be on cpu with weight, got meta"),
        ({"weight": torch.zeros(3, 5)}, ValueError, r"weight must have shape \(experts, out, in\).*, got \(3, 5\)"),
        ({"weight": torch.zeros(2, 3, 0)}, ValueError, r"weight must have shape .* one of each or more, got \(2, 3, 0\)"),
        ({"offsets": torch.zeros(3, dtype=torch.int32)}, ValueError, r"offsets must have shape \(2,\), got \(3,\)"),
        ({"offsets": torch.zeros(2)}, TypeError, "offsets must be a torch.int32 tensor, got torch.float32"),
        ({"offsets": torch.zeros(2, device="meta").int()}, ValueError, "offsets must be on cpu, got meta"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias must have shape \(2, 3\), got \(3,\)"),
        ({"bias": torch.zeros(2, 3).double()}, TypeError, "bias must be torch.float32 like weight.*, got torch.float64"),
        ({"bias": 1.0}, TypeError, "bias must be a tensor, got float"),
    ],
    ids=str,
)
def test_bad_arguments_of_the_function(change, error, message):
    rows, weight, bias, offsets, _ = tensors([3, 1], 0, 5, 3)
    given = {"rows": rows, "weight": weight, "offsets": offsets, "bias": bias} | change
    with pytest.raises(error, match=message):
        topn_gating.grouped_linear(**given)


def gradients(function, leaves, grad):
    leaves = [t.detach().requires_grad_() for t in leaves]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


@dtypes
def test_the_function_and_its_gradients(dtype):
    rows, weight, bias, offsets, grad = tensors([5, 0, 2], 3, dtype=dtype)
    actual = gradients(lambda x, w, b: topn_gating.grouped_linear(x, w, offsets, b), (rows, weight, bias), grad)
    for a, e in zip(actual, oracle(rows, weight, bias, offsets, grad), strict=True):
        assert_near(a, e)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_asks_for_the_type(dtype):
    rows, weight, bias, offsets, grad = tensors([5, 0, 2], 3)
    with torch.autocast("cpu", dtype=dtype):
        out, *grads = gradients(
            lambda x, w, b: topn_gating.grouped_linear(x, w, offsets, b), (rows, weight.to(dtype), bias), grad.to(dtype)
        )
        double = topn_gating.grouped_linear(rows.double(), weight.double(), offsets)
    assert [t.dtype for t in (out, *grads, double)] == [dtype, torch.float32, dtype, torch.float32, torch.float64]
    assert_same_bits(out, ops.grouped_linear(rows.to(dtype), weight.to(dtype), bias.to(dtype), offsets))


def test_the_functions_for_cuda_do_not_read_what_autocast_is(monkeypatch):
    """``implement_on_cuda`` turns autocast off around them: the types are those of the operator's arguments."""
    rows, weight, bias, offsets, _ = tensors([5, 0, 2], 3)
    library = []
    monkeypatch.setattr("topn_gating.registry._library", type("", (), {"impl": lambda _, *args: library.append(args)})())
    topn_gating.registry.implement_on_cuda("grouped_linear", grouped.forward)
    (name, kernel, key), twin = library
    assert (name, key) == ("grouped_linear", "CUDA")
    assert twin == ("grouped_linear_kernel", kernel, "CUDA")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(kernel(rows, weight, bias, offsets), grouped.forward(rows, weight, bias, offsets))


@pytest.mark.parametrize("columns", [False, True], ids=["by rows", "by columns"])
def test_one_graph_for_any_number_of_rows(columns):
    compiled = torch.compile(topn_gating.grouped_linear, fullgraph=True, dynamic=True, backend="aot_eager")
    for counts, rest in (([4, 0, 3], 1), ([9, 2, 0], 0), ([1, 1, 1], 0)):
        rows, weight, bias, offsets, grad = tensors(counts, rest)
        weight = by_columns(weight) if columns else weight
        actual = gradients(lambda x, w, b: compiled(x, w, offsets, b), (rows, weight, bias), grad)  # noqa: B023
        expected = gradients(lambda x, w, b: topn_gating.grouped_linear(x, w, offsets, b), (rows, weight, bias), grad)  # noqa: B023
        assert_same_bits(actual, expected)


def test_inductor():
    rows, weight, bias, offsets, grad = tensors([4, 0, 3], 1)

    def expert(x, w, b):
        return topn_gating.grouped_linear(x * 2, by_columns(w), offsets, b).relu()

    actual = gradients(torch.compile(expert, fullgraph=True), (rows, weight, bias), grad)
    for a, e in zip(actual, gradients(expert, (rows, weight, bias), grad), strict=True):
        torch.testing.assert_close(a, e)


class Layer(torch.nn.Module):
    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)

    def forward(self, rows, offsets):
        return topn_gating.grouped_linear(rows, self.weight, offsets, self.bias)


def test_export():
    rows, weight, bias, offsets, _ = tensors([4, 0, 3], 1)
    dynamic = {"rows": {0: torch.export.Dim("rows", min=2)}, "offsets": None}
    exported = torch.export.export(Layer(weight, bias), (rows, offsets), dynamic_shapes=dynamic).module()
    more, _, _, offsets, _ = tensors([9, 2, 0])
    assert_same_bits(exported(more, offsets), topn_gating.grouped_linear(more, weight, offsets, bias))


def test_checkpoint():
    rows, weight, bias, offsets, grad = tensors([4, 0, 3], 1)

    def plain(x, w, b):
        return topn_gating.grouped_linear(x, w, offsets, b)

    def checkpointed(*leaves):
        return torch.utils.checkpoint.checkpoint(plain, *leaves, use_reentrant=False)

    assert_same_bits(gradients(checkpointed, (rows, weight, bias), grad), gradients(plain, (rows, weight, bias), grad))


def test_transforms():
    leaves, all_offsets = [], []
    for counts in ([4, 0, 3], [1, 5, 1]):
        *given, offsets, _ = tensors(counts, 1)
        leaves.append(given)
        all_offsets.append(offsets)
    stacked, offsets = [torch.stack(t) for t in zip(*leaves, strict=True)], torch.stack(all_offsets)

    def loss(x, w, b, offsets):
        return topn_gating.grouped_linear(x, w, offsets, b).square().sum()

    grad = torch.func.grad(loss, (0, 1, 2))
    each = [grad(*given, o) for given, o in zip(leaves, all_offsets, strict=True)]
    assert_same_bits(torch.vmap(grad)(*stacked, offsets), [torch.stack(t) for t in zip(*each, strict=True)])
    out = torch.vmap(topn_gating.grouped_linear, (0, None, 0))(stacked[0], leaves[0][1], offsets)
    for i, o in enumerate(all_offsets):
        assert_same_bits(out[i], topn_gating.grouped_linear(leaves[i][0], leaves[0][1], o))


@pytest.mark.parametrize("columns", [False, True], ids=["by rows", "by columns"])
def test_meta(columns):
    rows, weight, bias, offsets, grad = (t.to("meta") for t in tensors([4, 0, 3], 1))
    weight = by_columns(weight) if columns else weight
    out, *grads = gradients(lambda x, w, b: topn_gating.grouped_linear(x, w, offsets, b), (rows, weight, bias), grad)
    assert out.shape == grad.shape
    assert [(g.shape, g.stride()) for g in grads] == [(t.shape, t.stride()) for t in (rows, weight, bias)]


def test_what_torchs_grouped_product_takes():
    """On CUDA: bfloat16, whose rows or columns start at multiples of 16 bytes. All else is computed expert by expert."""
    aligned = torch.zeros(4, 16, 24, dtype=torch.bfloat16)
    for taken in (aligned, aligned.mT, aligned[..., :16], aligned[:, 8:], aligned[0]):
        assert grouped._grouped_mm_takes(taken)
    narrow = torch.zeros(4, 16, 20, dtype=torch.bfloat16)
    for refused in (aligned.float(), aligned.half(), narrow, narrow.mT, aligned[..., 4:], aligned[..., ::2], aligned[:0]):
        assert not grouped._grouped_mm_takes(refused)
    assert not grouped._grouped_mm_takes(aligned, narrow)
