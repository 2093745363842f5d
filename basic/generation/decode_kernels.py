"""One token for a batch of sequences in four Triton kernels a layer: decoding at the speed of memory.

A step reads every weight once and computes almost nothing. What counts is that the weights come as fast as memory gives
them and that few kernels follow each other (each costs some microseconds whatever it does). A layer is

    project     RMSNorm, then the product with the packed weights of queries, keys and values
    attend      RoPE, the new key and value into the cache, a share of the keys; whoever ends last joins the shares
    project     the output projection, added to the stream
    gate        RMSNorm, then the products with W1 and W3, SiLU, times
    project     the product with W2, added to the stream

and around the layers stand `embed` and `choose`. The norm is computed again by every program that needs it: the vector
is small and lies in the cache. On a GPU that can (Hopper and newer), a kernel is already started while the one before
still runs: it loads its weights, which nobody changes, and then waits for the other's results.

Legend: R sequences of the batch, padded to ROWS for the matrix units; K features in, N features out.
"""

from __future__ import annotations

import triton
import triton.language as tl

from basic.transformer.kernels.interpreter import dot


@triton.jit
def _follow(OVERLAP: tl.constexpr):
    """Let the kernel behind start, and wait for the results of the one before."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _rows_of_weights(W, outputs, K, N, BLOCK_K: tl.constexpr):
    columns = tl.arange(0, BLOCK_K)
    return tl.load(W + outputs[:, None].to(tl.int64) * K + columns[None, :],
                   mask=(outputs[:, None] < N) & (columns[None, :] < K), other=0.0)  # fmt: skip


@triton.jit
def _vector(X, gain, K, eps, BLOCK_K: tl.constexpr, NORM: tl.constexpr):
    """The one vector of a batch of one, normalised if wanted, in float32 (rounded as if it had been stored)."""
    columns = tl.arange(0, BLOCK_K)
    x = tl.load(X + columns, mask=columns < K, other=0.0).to(tl.float32)
    if NORM:
        x = (x * (1 / tl.sqrt(tl.sum(x * x, 0) / K + eps)) * gain).to(X.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def _inverse_rms(X, rows, R, K, eps, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        mask = (rows[:, None] < R) & (columns[None, :] < K)
        x = tl.load(X + rows[:, None] * K + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(x * x, 1)
    return 1 / tl.sqrt(total / K + eps)


@triton.jit
def _product(X, W, GAIN, inverse_rms, rows, outputs, R, K, N, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
             BLOCK_K: tl.constexpr, NORM: tl.constexpr):  # fmt: skip
    """(outputs, rows) of W x, with x normalised on the way."""
    sums = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        w = tl.load(W + outputs[:, None].to(tl.int64) * K + columns[None, :],
                    mask=(outputs[:, None] < N) & (columns[None, :] < K), other=0.0)  # fmt: skip
        mask = (rows[:, None] < R) & (columns[None, :] < K)
        x = tl.load(X + rows[:, None] * K + columns[None, :], mask=mask, other=0.0)
        if NORM:
            gain = tl.load(GAIN + columns, mask=columns < K, other=0.0)
            x = (x.to(tl.float32) * inverse_rms[:, None] * gain[None, :]).to(w.dtype)
        sums = dot(w, tl.trans(x), sums)
    return sums


@triton.jit
def embed(EMBEDDING, TOKENS, POSITIONS, X, capacity, K, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr):
    """X = the embeddings of the tokens at their rows' positions."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK_K)
    _follow(OVERLAP)
    token = tl.load(TOKENS + row * capacity + tl.load(POSITIONS + row))
    x = tl.load(EMBEDDING + token * K + columns, mask=columns < K, other=0.0)
    tl.store(X + row * K + columns, x, mask=columns < K)


@triton.jit
def project(X, W, GAIN, Y, R, K, N, eps, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
            NORM: tl.constexpr, ADD: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """Y = norm(X) W^T, or Y += X W^T; of a single row, BLOCK_K must take in all of K."""
    rows = tl.arange(0, ROWS)
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    places = Y + rows[None, :] * N + outputs[:, None]
    mask = (rows[None, :] < R) & (outputs[:, None] < N)
    addend = tl.zeros([BLOCK_N, ROWS], tl.float32)
    if ROWS == 1:
        # A single vector: no matrix unit, whose tiles would be almost empty.
        w = _rows_of_weights(W, outputs, K, N, BLOCK_K)
        gain = tl.load(GAIN + tl.arange(0, BLOCK_K), mask=tl.arange(0, BLOCK_K) < K, other=0.0)
        _follow(OVERLAP)
        if ADD:  # asked for now, so that it comes together with the vector
            addend = tl.load(places, mask=mask, other=0.0).to(tl.float32)
        x = _vector(X, gain, K, eps, BLOCK_K, NORM)
        sums = tl.sum(w.to(tl.float32) * x[None, :], 1)[:, None]
    else:
        _follow(OVERLAP)
        inverse_rms = tl.full([ROWS], 1.0, tl.float32)
        if NORM:
            inverse_rms = _inverse_rms(X, rows, R, K, eps, ROWS, BLOCK_K)
        sums = _product(X, W, GAIN, inverse_rms, rows, outputs, R, K, N, ROWS, BLOCK_N, BLOCK_K, NORM)
        if ADD:
            addend = tl.load(places, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        sums = sums.to(Y.dtype.element_ty).to(tl.float32) + addend
    tl.store(places, sums.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def gate(X, W, GAIN, Y, R, K, N, eps, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
         OVERLAP: tl.constexpr):  # fmt: skip
    """Y = silu(norm(X) W1^T) * (norm(X) W3^T), with W1 above W3 in W (2 N, K)."""
    rows = tl.arange(0, ROWS)
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    W3 = W + N.to(tl.int64) * K
    if ROWS == 1:
        w1 = _rows_of_weights(W, outputs, K, N, BLOCK_K)
        w3 = _rows_of_weights(W3, outputs, K, N, BLOCK_K)
        gain = tl.load(GAIN + tl.arange(0, BLOCK_K), mask=tl.arange(0, BLOCK_K) < K, other=0.0)
        _follow(OVERLAP)
        x = _vector(X, gain, K, eps, BLOCK_K, True)
        x1 = tl.sum(w1.to(tl.float32) * x[None, :], 1)[:, None]
        x3 = tl.sum(w3.to(tl.float32) * x[None, :], 1)[:, None]
    else:
        _follow(OVERLAP)
        inverse_rms = _inverse_rms(X, rows, R, K, eps, ROWS, BLOCK_K)
        x1 = _product(X, W, GAIN, inverse_rms, rows, outputs, R, K, N, ROWS, BLOCK_N, BLOCK_K, True)
        x3 = _product(X, W3, GAIN, inverse_rms, rows, outputs, R, K, N, ROWS, BLOCK_N, BLOCK_K, True)
    y = (x1 * tl.sigmoid(x1) * x3).to(Y.dtype.element_ty)
    tl.store(Y + rows[None, :] * N + outputs[:, None], y, mask=(rows[None, :] < R) & (outputs[:, None] < N))


@triton.jit
def _rotated(pointer, cos, sin, D: tl.constexpr):
    even, odd = tl.split(tl.reshape(tl.load(pointer + tl.arange(0, D)).to(tl.float32), (D // 2, 2)))
    rotated = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (D,))
    return rotated.to(pointer.dtype.element_ty)


@triton.jit
def attend(QKV, KEYS, VALUES, COS, SIN, POSITIONS, SHARES, ARRIVALS, ATTENDED, H, capacity, scale, D: tl.constexpr,
           SPLITS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """Attention of one head of one sequence to a share of its keys; the last program to end joins the shares.

    The cache is (R, H, capacity, D). Keys are dealt out in blocks, one split after the other, so that all splits have
    work from the first keys on. ARRIVALS counts the programs that have ended, zero before and after.

    Positions and old keys are those of the step before, which has ended: with EARLY they are loaded before the wait.
    That is a gain as long as the programs that wait leave room for those they wait for, with few rows.
    """
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    pairs, features = tl.arange(0, D // 2), tl.arange(0, D)
    if not EARLY:
        _follow(OVERLAP)
    position = tl.load(POSITIONS + row).to(tl.int32)
    cos, sin = tl.load(COS + position * (D // 2) + pairs), tl.load(SIN + position * (D // 2) + pairs)
    packed = QKV + row * 3 * H * D + head * D
    cache = (row.to(tl.int64) * H + head) * capacity * D
    keys = split * BLOCK + tl.arange(0, BLOCK)
    k = tl.load(KEYS + cache + keys[:, None] * D + features[None, :], mask=keys[:, None] < position, other=0.0)
    v = tl.load(VALUES + cache + keys[:, None] * D + features[None, :], mask=keys[:, None] < position, other=0.0)
    if EARLY:
        _follow(OVERLAP)
    q = _rotated(packed, cos, sin, D).to(tl.float32)
    k_new = _rotated(packed + H * D, cos, sin, D)
    v_new = tl.load(packed + 2 * H * D + features)
    if split == 0:
        tl.store(KEYS + cache + position * D + features, k_new)
        tl.store(VALUES + cache + position * D + features, v_new)
    maximum, total = -1e30, 0.0
    weighted = tl.zeros([D], tl.float32)
    for start in range(split * BLOCK, position + 1, SPLITS * BLOCK):
        keys = start + tl.arange(0, BLOCK)
        # The new key may not have reached memory yet: it is put in its place here.
        new = keys == position
        k_wide = tl.where(new[:, None], k_new[None, :], k).to(tl.float32)
        v_wide = tl.where(new[:, None], v_new[None, :], v).to(tl.float32)
        keys += SPLITS * BLOCK
        k = tl.load(KEYS + cache + keys[:, None] * D + features[None, :], mask=keys[:, None] < position, other=0.0)
        v = tl.load(VALUES + cache + keys[:, None] * D + features[None, :], mask=keys[:, None] < position, other=0.0)
        keys -= SPLITS * BLOCK
        scores = tl.where(keys <= position, tl.sum(k_wide * q[None, :], 1) * scale, -1e30)
        new_maximum = tl.maximum(maximum, tl.max(scores, 0))
        weights = tl.exp2(scores - new_maximum)
        rescale = tl.exp2(maximum - new_maximum)
        total = total * rescale + tl.sum(weights, 0)
        weighted = weighted * rescale + tl.sum(weights[:, None] * v_wide, 0)
        maximum = new_maximum
    shares = SHARES + (row * H + head) * SPLITS * (D + 2)
    tl.store(shares + split * (D + 2) + features, weighted)
    tl.store(shares + split * (D + 2) + D, maximum)
    tl.store(shares + split * (D + 2) + D + 1, total)
    # All threads' shares are there before one of them says so.
    tl.debug_barrier()
    arrivals = ARRIVALS + row * H + head
    if tl.atomic_add(arrivals, 1, sem="acq_rel") == SPLITS - 1:
        each = shares + tl.arange(0, SPLITS) * (D + 2)
        maxima = tl.load(each + D, cache_modifier=".cg")
        factors = tl.exp2(maxima - tl.max(maxima, 0))
        total = tl.sum(tl.load(each + D + 1, cache_modifier=".cg") * factors, 0)
        parts = tl.load(each[:, None] + features[None, :], cache_modifier=".cg")
        attended = tl.sum(parts * factors[:, None], 0) / total
        tl.store(ATTENDED + (row * H + head) * D + features, attended.to(ATTENDED.dtype.element_ty))
        tl.store(arrivals, 0)


@triton.jit
def choose(LOGITS, TOKENS, PROMPT_LENGTHS, POSITIONS, capacity, stride, N, BLOCK_N: tl.constexpr,
           OVERLAP: tl.constexpr):  # fmt: skip
    """Move every row on by one, to the token of its prompt or, behind that, the first of the likeliest of N ids."""
    row = tl.program_id(0)
    _follow(OVERLAP)
    columns = tl.arange(0, BLOCK_N)
    best = tl.full([BLOCK_N], -float("inf"), tl.float32)
    ids = tl.zeros([BLOCK_N], tl.int32)
    for start in range(0, N, BLOCK_N):
        inside = start + columns < N
        x = tl.load(LOGITS + row.to(tl.int64) * stride + start + columns, mask=inside, other=-float("inf")).to(
            tl.float32
        )
        ids = tl.where(x > best, start + columns, ids)
        best = tl.maximum(best, x)
    likeliest = tl.min(tl.where(best == tl.max(best, 0), ids, N), 0)
    position = tl.load(POSITIONS + row) + 1
    place = TOKENS + row * capacity + position
    if position >= tl.load(PROMPT_LENGTHS + row):
        tl.store(place, likeliest.to(tl.int64))
    tl.store(POSITIONS + row, position)
