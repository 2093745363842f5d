"""Decoding of one token for a batch of sequences, in five Triton kernel launches per layer, or seven.

A step reads every weight once and computes almost nothing. Its time is that of reading the weights from memory, plus
some microseconds for each kernel launch. The launches of a layer are

    project     RMSNorm, then the matrix multiplication with the packed weights of queries, keys, values and of the
                gates of value embeddings, and biases
    attend      value embeddings, RMSNorm of queries and keys if the model has it, RoPE, the new key and value into the
                cache, attention to some of the keys; the last program of a head combines the partial results
    project     the output projection, added to the residual stream
    activate    RMSNorm, then the matrix multiplications with W1 and, for SwiGLU, W3, and the activation
    project     the matrix multiplication with W2, added to the residual stream

`embed` runs before the layers; `project` and `choose` after them. With a few sequences, every program that needs the
norm computes it again: the vectors are small and in the cache. With more, `normalize` computes it before, once. On
Hopper and newer GPUs, a kernel starts while the one before it still runs: it loads its weights, which do not change,
and then waits for the other's results.

Legend: R sequences of the batch, ROWS of them in a program (a power of two); K input features, N output features.

Source: Dao et al. 2023, "Flash-Decoding for long-context inference" (keys divided among programs).
"""

from __future__ import annotations

import triton
import triton.language as tl

from basic.transformer.kernels.interpreter import dot


@triton.jit
def _wait_for_previous_kernel(OVERLAP: tl.constexpr):
    """Let the next kernel start, then wait for the results of the previous one."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _load_weights(W, outputs, K, N, BLOCK_K: tl.constexpr):
    columns = tl.arange(0, BLOCK_K)
    return tl.load(W + outputs[:, None].to(tl.int64) * K + columns[None, :],
                   mask=(outputs[:, None] < N) & (columns[None, :] < K), other=0.0)  # fmt: skip


@triton.jit
def _load_vector(X, gain, K, eps, BLOCK_K: tl.constexpr, NORM: tl.constexpr):
    """A row of the input in float32; with NORM normalized, and rounded as if it had been stored."""
    columns = tl.arange(0, BLOCK_K)
    x = tl.load(X + columns, mask=columns < K, other=0.0).to(tl.float32)
    if NORM:
        x = (x * (1 / tl.sqrt(tl.sum(x * x, 0) / K + eps)) * gain).to(X.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def _multiply_vectors(X, w, w3, gain, R, K, eps, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                      NORM: tl.constexpr, TWO: tl.constexpr):  # fmt: skip
    """W x and, with TWO, W3 x, of shape (outputs, rows), for one row after the other.

    The tiles of the matrix units would be almost empty.
    """
    rows = tl.arange(0, ROWS)[None, :]
    sums = tl.zeros([BLOCK_N, ROWS], tl.float32)
    sums3 = sums
    for row in tl.static_range(ROWS):
        x = _load_vector(X + tl.minimum(row, R - 1) * K, gain, K, eps, BLOCK_K, NORM)
        sums = tl.where(rows == row, tl.sum(w.to(tl.float32) * x[None, :], 1)[:, None], sums)
        if TWO:
            sums3 = tl.where(rows == row, tl.sum(w3.to(tl.float32) * x[None, :], 1)[:, None], sums3)
    return sums, sums3


@triton.jit
def _multiply(X, W, W3, rows, outputs, R, K, N, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
              TWO: tl.constexpr):  # fmt: skip
    """W x and, with TWO, W3 x, of shape (outputs, rows)."""
    sums = tl.zeros([BLOCK_N, ROWS], tl.float32)
    sums3 = sums
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        weights = outputs[:, None].to(tl.int64) * K + columns[None, :]
        inside = (outputs[:, None] < N) & (columns[None, :] < K)
        mask = (rows[:, None] < R) & (columns[None, :] < K)
        x = tl.trans(tl.load(X + rows[:, None] * K + columns[None, :], mask=mask, other=0.0))
        sums = dot(tl.load(W + weights, mask=inside, other=0.0), x, sums)
        if TWO:
            sums3 = dot(tl.load(W3 + weights, mask=inside, other=0.0), x, sums3)
    return sums, sums3


@triton.jit
def normalize(X, GAIN, Y, K, eps, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr):
    """Y = RMSNorm(X), for the rows of a prompt or of many sequences."""
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_K)
    gain = tl.load(GAIN + columns, mask=columns < K, other=0.0)
    _wait_for_previous_kernel(OVERLAP)
    x = _load_vector(X + row * K, gain, K, eps, BLOCK_K, True)
    tl.store(Y + row * K + columns, x.to(Y.dtype.element_ty), mask=columns < K)


@triton.jit
def embed(EMBEDDING, TOKENS, POSITIONS, X, capacity, K, eps, BLOCK_K: tl.constexpr, NORM: tl.constexpr,
          OVERLAP: tl.constexpr):  # fmt: skip
    """X = the embeddings of the tokens at the sequences' positions, with NORM normalized."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK_K)
    _wait_for_previous_kernel(OVERLAP)
    token = tl.load(TOKENS + row * capacity + tl.load(POSITIONS + row))
    token = tl.maximum(token, 0)  # it is -1 if the step before found NaN (see choose); then any row will do
    x = tl.load(EMBEDDING + token * K + columns, mask=columns < K, other=0.0)
    if NORM:
        wide = x.to(tl.float32)
        x = (wide * (1 / tl.sqrt(tl.sum(wide * wide, 0) / K + eps))).to(x.dtype)
    tl.store(X + row * K + columns, x, mask=columns < K)


@triton.jit
def project(X, W, GAIN, BIASES, Y, R, K, N, eps, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
            FEW: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr,
            OVERLAP: tl.constexpr):  # fmt: skip
    """Y = X W^T (+ BIASES), or Y += X W^T. With FEW rows X is normalized by NORM, and BLOCK_K must be at least K."""
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    pointers = Y + rows[None, :] * N + outputs[:, None]
    mask = (rows[None, :] < R) & (outputs[:, None] < N)
    addend = tl.zeros([BLOCK_N, ROWS], tl.float32)
    if FEW:
        w = _load_weights(W, outputs, K, N, BLOCK_K)
        gain = tl.load(GAIN + tl.arange(0, BLOCK_K), mask=tl.arange(0, BLOCK_K) < K, other=0.0)
        _wait_for_previous_kernel(OVERLAP)
        if ADD:  # loaded here, so that it arrives together with the vectors
            addend = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        sums, _ = _multiply_vectors(X, w, w, gain, R, K, eps, ROWS, BLOCK_N, BLOCK_K, NORM, False)
    else:
        _wait_for_previous_kernel(OVERLAP)
        sums, _ = _multiply(X, W, W, rows, outputs, R, K, N, ROWS, BLOCK_N, BLOCK_K, False)
        if ADD:
            addend = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        sums = sums.to(Y.dtype.element_ty).to(tl.float32) + addend
    if BIAS:
        biases = tl.load(BIASES + outputs, mask=outputs < N, other=0.0).to(tl.float32)
        sums = sums.to(Y.dtype.element_ty).to(tl.float32) + biases[:, None]
    tl.store(pointers, sums.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def activate(X, W, GAIN, Y, R, K, N, eps, FFN: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
             BLOCK_K: tl.constexpr, FEW: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """The activations inside the feed-forward layer (`ModelConfig.ffn`), with W1 (N, K) and, for swiglu, W3 after it in
    the rows of W. FEW rows of X are normalized here."""
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    W3 = W + N.to(tl.int64) * K
    if FEW:
        w1 = _load_weights(W, outputs, K, N, BLOCK_K)
        w3 = w1
        if FFN == "swiglu":
            w3 = _load_weights(W3, outputs, K, N, BLOCK_K)
        gain = tl.load(GAIN + tl.arange(0, BLOCK_K), mask=tl.arange(0, BLOCK_K) < K, other=0.0)
        _wait_for_previous_kernel(OVERLAP)
        x1, x3 = _multiply_vectors(X, w1, w3, gain, R, K, eps, ROWS, BLOCK_N, BLOCK_K, True, FFN == "swiglu")
    else:
        _wait_for_previous_kernel(OVERLAP)
        x1, x3 = _multiply(X, W, W3, rows, outputs, R, K, N, ROWS, BLOCK_N, BLOCK_K, FFN == "swiglu")
    if FFN == "relu2":
        positive = tl.maximum(x1, 0.0)
        y = positive * positive
    else:
        y = x1 * tl.sigmoid(x1)
    if FFN == "swiglu":
        y *= x3
    mask = (rows[None, :] < R) & (outputs[:, None] < N)
    tl.store(Y + rows[None, :] * N + outputs[:, None], y.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _load_rotated(pointer, gain, cos, sin, features, eps, D: tl.constexpr, WIDTH: tl.constexpr, NORM: tl.constexpr):
    x = tl.load(pointer + features, mask=features < D, other=0.0).to(tl.float32)
    if NORM:
        x = (x * (1 / tl.sqrt(tl.sum(x * x, 0) / D + eps)) * gain).to(pointer.dtype.element_ty).to(tl.float32)
    even, odd = tl.split(tl.reshape(x, (WIDTH // 2, 2)))
    rotated = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (WIDTH,))
    return rotated.to(pointer.dtype.element_ty)


@triton.jit
def _load_keys(pointer, keys, position, features, D: tl.constexpr):
    """Rows of the cache that earlier steps have written."""
    mask = (keys[:, None] < position) & (features[None, :] < D)
    return tl.load(pointer + keys[:, None] * D + features[None, :], mask=mask, other=0.0)


@triton.jit
def attend(QKV, stride, Q_GAIN, K_GAIN, EMBEDDINGS, TOKENS, KEYS, VALUES, COS, SIN, POSITIONS, PARTIALS, FINISHED,
           ATTENDED, H, capacity, scale, eps, GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
           SPLITS: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, HAVE_EMBEDDINGS: tl.constexpr,
           WINDOW: tl.constexpr, EARLY: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """Attention of one head of one sequence to a split of its keys; the last program to finish combines the splits.

    The cache is (R, H / GROUP, capacity, D): GROUP neighboring query heads share a head of keys and values, and each
    reads them from the GPU's cache. With WINDOW > 0, only blocks with some of the last WINDOW keys are read. Features
    are padded to WIDTH, a power of two. With HAVE_EMBEDDINGS, rows of QKV end with the gates with which the token's row
    of EMBEDDINGS is added to the values. Blocks of keys are dealt out to the splits in turn, so that all splits have
    work from the first keys on. PARTIALS has each split's sum of weighted values, maximum and sum of weights. FINISHED
    counts the programs of a head that have finished; it is zero before and after the launch.

    EARLY is for small batches. The previous step has written the positions and the old keys, so they are loaded before
    the wait for the previous kernel, which is faster as long as the waiting programs leave room for the others.
    """
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_head, kv_heads = head // GROUP, H // GROUP
    pairs, features = tl.arange(0, WIDTH // 2), tl.arange(0, WIDTH)
    inside = pairs < D // 2
    if not EARLY:
        _wait_for_previous_kernel(OVERLAP)
    position = tl.load(POSITIONS + row).to(tl.int32)
    cos = tl.load(COS + position * (D // 2) + pairs, mask=inside, other=0.0)
    sin = tl.load(SIN + position * (D // 2) + pairs, mask=inside, other=0.0)
    packed = QKV + row * stride
    cache = (row.to(tl.int64) * kv_heads + kv_head) * capacity * D
    KEYS += cache
    VALUES += cache
    first = split * BLOCK
    if WINDOW > 0:
        first += tl.maximum(position - WINDOW + 1, 0) // BLOCK * BLOCK
    keys = first + tl.arange(0, BLOCK)
    k = _load_keys(KEYS, keys, position, features, D)
    v = _load_keys(VALUES, keys, position, features, D)
    if EARLY:
        _wait_for_previous_kernel(OVERLAP)
    q_gain, k_gain = 1.0, 1.0
    if NORM:
        q_gain = tl.load(Q_GAIN + features, mask=features < D, other=0.0)
        k_gain = tl.load(K_GAIN + features, mask=features < D, other=0.0)
    q = _load_rotated(packed + head * D, q_gain, cos, sin, features, eps, D, WIDTH, NORM).to(tl.float32)
    k_new = _load_rotated(packed + (H + kv_head) * D, k_gain, cos, sin, features, eps, D, WIDTH, NORM)
    v_new = tl.load(packed + (H + kv_heads + kv_head) * D + features, mask=features < D, other=0.0)
    if HAVE_EMBEDDINGS:  # rounded as the plain operations are
        token = tl.maximum(tl.load(TOKENS + row * (capacity + 1) + position), 0)  # as in `embed`
        embedding = EMBEDDINGS + (token * kv_heads + kv_head) * D
        value = tl.load(embedding + features, mask=features < D, other=0.0).to(tl.float32)
        gate = tl.load(packed + (H + 2 * kv_heads) * D + kv_head).to(tl.float32)
        gate = (2 * tl.sigmoid(gate).to(v_new.dtype).to(tl.float32)).to(v_new.dtype).to(tl.float32)
        v_new = (v_new.to(tl.float32) + (gate * value).to(v_new.dtype).to(tl.float32)).to(v_new.dtype)
    if (split == 0) & (head % GROUP == 0):
        tl.store(KEYS + position * D + features, k_new, mask=features < D)
        tl.store(VALUES + position * D + features, v_new, mask=features < D)
    if EARLY:
        maximum, total = -1e30, 0.0
        weighted = tl.zeros([WIDTH], tl.float32)
    else:
        # A running softmax for each slot of a block, so that no thread waits for another inside the loop.
        maximum = tl.full([BLOCK], -1e20, tl.float32)  # above all masked scores
        total = tl.zeros([BLOCK], tl.float32)
        weighted = tl.zeros([BLOCK, WIDTH], tl.float32)
    for start in range(first, position + 1, SPLITS * BLOCK):
        keys = start + tl.arange(0, BLOCK)
        # The new key may not be in memory yet: insert it here.
        is_new = keys == position
        k_wide = tl.where(is_new[:, None], k_new[None, :], k).to(tl.float32)
        v_wide = tl.where(is_new[:, None], v_new[None, :], v).to(tl.float32)
        keys += SPLITS * BLOCK
        k = _load_keys(KEYS, keys, position, features, D)
        v = _load_keys(VALUES, keys, position, features, D)
        keys -= SPLITS * BLOCK
        visible = keys <= position
        if WINDOW > 0:
            visible &= keys > position - WINDOW
        scores = tl.where(visible, tl.sum(k_wide * q[None, :], 1) * scale, -1e30)
        new_maximum = tl.maximum(maximum, tl.max(scores, 0) if EARLY else scores)
        weights = tl.exp2(scores - new_maximum)
        rescale = tl.exp2(maximum - new_maximum)
        if EARLY:
            total = total * rescale + tl.sum(weights, 0)
            weighted = weighted * rescale + tl.sum(weights[:, None] * v_wide, 0)
        else:
            total = total * rescale + weights
            weighted = weighted * rescale[:, None] + weights[:, None] * v_wide
        maximum = new_maximum
    if not EARLY:
        shares = tl.exp2(maximum - tl.max(maximum, 0))
        maximum, total = tl.max(maximum, 0), tl.sum(total * shares, 0)
        weighted = tl.sum(weighted * shares[:, None], 0)
    attended = ATTENDED + (row * H + head) * D + features
    if SPLITS == 1:
        tl.store(attended, (weighted / total).to(ATTENDED.dtype.element_ty), mask=features < D)
    else:
        partials = PARTIALS + (row * H + head) * SPLITS * (D + 2)
        tl.store(partials + split * (D + 2) + features, weighted, mask=features < D)
        tl.store(partials + split * (D + 2) + D, maximum)
        tl.store(partials + split * (D + 2) + D + 1, total)
        # All threads have stored their results before one thread increments the counter.
        tl.debug_barrier()
        finished = FINISHED + row * H + head
        if tl.atomic_add(finished, 1, sem="acq_rel") == SPLITS - 1:
            all_splits = partials + tl.arange(0, SPLITS) * (D + 2)
            maxima = tl.load(all_splits + D, cache_modifier=".cg")
            factors = tl.exp2(maxima - tl.max(maxima, 0))
            total = tl.sum(tl.load(all_splits + D + 1, cache_modifier=".cg") * factors, 0)
            all_weighted = tl.load(
                all_splits[:, None] + features[None, :], mask=features[None, :] < D, other=0.0, cache_modifier=".cg"
            )
            weighted = tl.sum(all_weighted * factors[:, None], 0)
            tl.store(attended, (weighted / total).to(ATTENDED.dtype.element_ty), mask=features < D)
            tl.store(finished, 0)


@triton.jit
def choose(LOGITS, TOKENS, PROMPT_LENGTHS, POSITIONS, capacity, stride, N, BLOCK_N: tl.constexpr,
           OVERLAP: tl.constexpr):  # fmt: skip
    """Advance every sequence by one token: that of its prompt, or after it the first of the likeliest of N ids.

    If a logit is NaN, the token is -1 (`sampling.NO_TOKEN`), and who reads the tokens raises an error.
    """
    row = tl.program_id(0)
    _wait_for_previous_kernel(OVERLAP)
    columns = tl.arange(0, BLOCK_N)
    best = tl.full([BLOCK_N], -float("inf"), tl.float32)
    ids = tl.zeros([BLOCK_N], tl.int32)
    num_nan = tl.zeros([BLOCK_N], tl.int32)
    for start in range(0, N, BLOCK_N):
        inside = start + columns < N
        x = tl.load(LOGITS + row.to(tl.int64) * stride + start + columns, mask=inside, other=-float("inf")).to(
            tl.float32
        )
        ids = tl.where(x > best, start + columns, ids)
        best = tl.maximum(best, x)
        num_nan += (x != x).to(tl.int32)
    likeliest = tl.min(tl.where(best == tl.max(best, 0), ids, N), 0)
    likeliest = tl.where(tl.sum(num_nan, 0) > 0, -1, likeliest)
    position = tl.load(POSITIONS + row) + 1
    pointer = TOKENS + row * capacity + position
    if position >= tl.load(PROMPT_LENGTHS + row):
        tl.store(pointer, likeliest.to(tl.int64))
    tl.store(POSITIONS + row, position)
