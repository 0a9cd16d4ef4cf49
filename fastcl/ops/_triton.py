"""What the Triton halves share in their kernels: loads and stores, the reserved share, the loop over all elements.

A body is a jitted function of a block of elements,

    body(p, i, left, free, aux, s, F, A, FULL)

with the pointers `p` of one tensor from each list, places `i` (below `left`, always so if FULL), the free share
`free` = 1 - r of each weight, one more pointer `aux` for a tensor's own number, numbers `s`, constants `F` and the
arithmetic type `A`. _sweep.py launches it over lists of tensors.

No `from __future__ import annotations` here: Triton reads the annotations.
"""

import triton
import triton.language as tl

COLUMNS = 6  # lists of tensors in a table's row, then: mask, inner, length of a mask's row, aux, number of elements
MASK_, INNER_, ROW_, AUX_, NUMEL_, WIDTH_ = (tl.constexpr(COLUMNS + k) for k in range(6))
NO_MASK, BOOL, PACKED, FLOATS, VECTORS = (tl.constexpr(k) for k in range(5))


@triton.jit
def load(p, i, left, A: tl.constexpr, FULL: tl.constexpr):
    """p[i] in the arithmetic type. A mask i < left of unknown left makes every access scalar: none where FULL."""
    if FULL:
        return tl.load(p + i).to(A)
    else:
        return tl.load(p + i, mask=i < left, other=0).to(A)


@triton.jit
def raw(p, i, left, FULL: tl.constexpr):
    """p[i] as it is stored."""
    if FULL:
        return tl.load(p + i)
    else:
        return tl.load(p + i, mask=i < left, other=0)


@triton.jit
def store(p, i, value, left, FULL: tl.constexpr):
    if FULL:
        tl.store(p + i, value.to(p.dtype.element_ty))
    else:
        tl.store(p + i, value.to(p.dtype.element_ty), mask=i < left)


@triton.jit
def store_free(p, i, value, old, free, left, FULL: tl.constexpr):
    """Writes the stored bits `old` back where the weight is reserved: never through another type."""
    store(p, i, tl.where(free == 0, old, value.to(p.dtype.element_ty)), left, FULL)


@triton.jit
def number(x, A: tl.constexpr):
    """A float64 argument in the arithmetic type (in the interpreter it is a Python float)."""
    return tl.full((1,), x, A)


@triton.jit
def within(x, i, left, FULL: tl.constexpr):
    """x, 0 beyond the end: for sums."""
    if FULL:
        return x
    else:
        return tl.where(i < left, x, 0)


@triton.jit
def free_part(g, free):
    """g (1 - r): 0 where reserved, also where g is Inf or NaN."""
    return tl.where(free == 0, 0, g * free)


@triton.jit
def share_gradient(p, i, left, free, aux, s, F: tl.constexpr, A: tl.constexpr, FULL: tl.constexpr):
    """The body of g = g (1 - r)."""
    store(p[0], i, free_part(load(p[0], i, left, A, FULL), free), left, FULL)


@triton.jit
def sqrt(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def _free_share(mask, inner, i, left, begin, row, MASK: tl.constexpr, A: tl.constexpr, FULL: tl.constexpr):
    """1 - r of the elements begin + i, from a mask in one of its stored forms."""
    if MASK == BOOL:
        return (raw(mask + begin, i, left, FULL) == 0).to(A)
    elif MASK == PACKED:  # bit i % 8 of byte i / 8; begin is a multiple of the chunk
        bits = raw(mask + begin // 8, i >> 3, (left + 7) >> 3, FULL).to(tl.int32)
        return (1 - ((bits >> (i & 7)) & 1)).to(A)
    elif MASK == FLOATS:
        return 1 - load(mask + begin, i, left, A, FULL)
    elif MASK == VECTORS:
        outer = (begin + i) // row
        r = tl.minimum(
            load(mask, tl.where(i < left, outer, 0), 1, A, True),
            load(inner, tl.where(i < left, begin + i - outer * row, 0), 1, A, True),
        )
        return 1 - r
    else:
        return tl.full(i.shape, 1, A)


@triton.jit
def _sweep(
    p, mask, inner, row, aux, begin, left, partial, s,
    BODY: tl.constexpr, F: tl.constexpr, MASK: tl.constexpr, A: tl.constexpr, SUM: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk, and the sum of what the body returns if SUM."""
    acc = tl.zeros((BLOCK,), A)
    if left >= CHUNK:
        for at in range(0, CHUNK, BLOCK):
            i = at + tl.arange(0, BLOCK)
            free = _free_share(mask, inner, i, CHUNK, begin, row, MASK, A, True)
            if SUM:
                acc += BODY(p, i, CHUNK, free, aux, s, F, A, True)
            else:
                BODY(p, i, CHUNK, free, aux, s, F, A, True)
    else:
        rest = tl.cast(left, tl.int32)
        for at in range(0, rest, BLOCK):
            i = at + tl.arange(0, BLOCK)
            free = _free_share(mask, inner, i, rest, begin, row, MASK, A, False)
            if SUM:
                acc += BODY(p, i, rest, free, aux, s, F, A, False)
            else:
                BODY(p, i, rest, free, aux, s, F, A, False)
    if SUM:
        tl.store(partial, tl.sum(acc).to(tl.float64))


@triton.jit
def _address(row, column: tl.constexpr, TYPE: tl.constexpr, ALIGN: tl.constexpr):
    p = tl.load(row + column).to(tl.pointer_type(TYPE))
    return tl.multiple_of(p, ALIGN)


@triton.jit
def many(
    table, chunks, partials,
    s0: tl.float64, s1: tl.float64, s2: tl.float64, s3: tl.float64, s4: tl.float64,
    s5: tl.float64, s6: tl.float64, s7: tl.float64, s8: tl.float64, s9: tl.float64,
    BODY: tl.constexpr, T: tl.constexpr, F: tl.constexpr, MASK: tl.constexpr, A: tl.constexpr, SUM: tl.constexpr,
    ALIGN: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Many tensors: a program finds its chunk's tensor in `chunks` and the addresses in the table's row."""
    program = tl.program_id(0).to(tl.int64)
    row = table + tl.load(chunks + 2 * program) * WIDTH_
    begin = tl.load(chunks + 2 * program + 1) * CHUNK
    p = (
        tl.multiple_of(_address(row, 0, T[0], ALIGN) + begin, ALIGN),
        tl.multiple_of(_address(row, 1, T[1], ALIGN) + begin, ALIGN),
        tl.multiple_of(_address(row, 2, T[2], ALIGN) + begin, ALIGN),
        tl.multiple_of(_address(row, 3, T[3], ALIGN) + begin, ALIGN),
        tl.multiple_of(_address(row, 4, T[4], ALIGN) + begin, ALIGN),
        tl.multiple_of(_address(row, 5, T[5], ALIGN) + begin, ALIGN),
    )
    _sweep(
        p, _address(row, MASK_, T[6], ALIGN), _address(row, INNER_, T[7], ALIGN), tl.load(row + ROW_),
        _address(row, AUX_, T[8], 4), begin, tl.load(row + NUMEL_) - begin, partials + program,
        (s0, s1, s2, s3, s4, s5, s6, s7, s8, s9), BODY, F, MASK, A, SUM, CHUNK, BLOCK,
    )  # fmt: skip


@triton.jit
def single(
    p0, p1, p2, p3, p4, p5, mask, inner, row: tl.int64, aux, numel: tl.int64, partials,
    s0: tl.float64, s1: tl.float64, s2: tl.float64, s3: tl.float64, s4: tl.float64,
    s5: tl.float64, s6: tl.float64, s7: tl.float64, s8: tl.float64, s9: tl.float64,
    BODY: tl.constexpr, F: tl.constexpr, MASK: tl.constexpr, A: tl.constexpr, SUM: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tensor from each list: no table."""
    program = tl.program_id(0).to(tl.int64)
    begin = program * CHUNK
    p = (p0 + begin, p1 + begin, p2 + begin, p3 + begin, p4 + begin, p5 + begin)
    _sweep(
        p, mask, inner, row, aux, begin, numel - begin, partials + program,
        (s0, s1, s2, s3, s4, s5, s6, s7, s8, s9), BODY, F, MASK, A, SUM, CHUNK, BLOCK,
    )  # fmt: skip
