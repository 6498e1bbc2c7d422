"""Products of two batches of matrices, in whichever function of PyTorch a model writes them.

And the names of PyTorch's functions that multiply and add elementwise.
"""

from typing import Any, NamedTuple

from torch import Tensor

MULTIPLIES = {"mul", "mul_", "multiply", "multiply_"}
ADDS = {"add", "add_", "sub", "sub_", "subtract", "__rsub__"}
PRODUCTS = {"matmul", "bmm", "einsum", "baddbmm"}  # Tensor's @ is matmul


class Product(NamedTuple):
    """left @ right^T: `left` (*b, n, c), `right` (*b, m, c); `out` says how the result is laid out."""

    left: Tensor
    right: Tensor
    out: tuple[int, ...] | None = None  # a permutation of (*b, n, m), None: as it is
    bias: Tensor | float | None = None  # what is added to it
    scale: float = 1.0


def product_of(name: str, args: Any, kwargs: Any) -> Product | None:
    """A function's two batches of matrices, or None where it multiplies something else."""
    if name == "einsum":
        return _einsum(args)
    operands = args[1:3] if name == "baddbmm" else args[:2]
    if len(operands) != 2 or not all(isinstance(x, Tensor) and x.dim() >= 3 for x in operands):
        return None
    left, right = operands[0], operands[1].transpose(-1, -2)
    if name != "baddbmm":
        return Product(left, right)
    beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
    adds = beta and not alike_for_keys(args[0])
    return Product(left, right, bias=args[0] * beta if adds else None, scale=alpha)


def alike_for_keys(operand: Any) -> bool:
    """Whether what meets logits (..., n, m) is the same for all keys: added, it does not pass the softmax."""
    return not isinstance(operand, Tensor) or operand.dim() == 0 or operand.shape[-1] == 1


def _einsum(args: Any) -> Product | None:
    equation, operands = args[0], args[1:]
    if len(operands) == 1 and isinstance(operands[0], tuple | list):
        operands = operands[0]
    if not isinstance(equation, str) or "->" not in equation or "." in equation or len(operands) != 2:
        return None
    terms, out = equation.replace(" ", "").split("->")
    (one, other), (left, right) = terms.split(","), operands
    if not out or any(len(set(term)) != len(term) for term in (one, other, out)):
        return None
    if out[-1] in one:  # what the rows of the result go over is on the right
        one, other, left, right = other, one, right, left
    rows = [x for x in one if x in out and x not in other]
    columns = [x for x in other if x in out and x not in one]
    summed = [x for x in one if x in other and x not in out]
    if not rows or len(columns) != 1 or len(summed) != 1 or len(one) + len(columns) - 1 != len(out):
        return None
    row, column = rows[-1], columns[0]
    batch = [x for x in one if x not in (row, summed[0])]
    missing = [x for x in batch if x not in other]  # heads that share their keys, say
    left = left.permute([one.index(x) for x in (*batch, row, summed[0])])
    right = right[(None,) * len(missing)]
    letters = [*missing, *other]
    right = right.permute([letters.index(x) for x in (*batch, column, summed[0])])
    order = [*batch, row, column]
    permutation = tuple(order.index(x) for x in out)
    return Product(left, right, None if permutation == tuple(range(len(out))) else permutation)
