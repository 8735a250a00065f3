"""Sparse attention with torch alone: gather, then F.scaled_dot_product_attention.

Query blocks that visit the same key blocks become one group; groups of equal (queries, keys)
lengths run as one batched call. The tokens of a group are gathered in raster order straight from
the caller's tensors, so runs that need no gathering (all keys, consecutive tokens) are views.
Which tokens make up each group is worked out once per plan, on the host. Groups that see pooled
keys have these gathered behind their own.

A key that the token mask cuts off must not reach its row even where it is NaN or infinite, but
F.scaled_dot_product_attention adds -inf to its score and multiplies its value by 0, which is NaN.
So where keys or values of a plan with a token mask are not finite, its masked groups are written
out (`written_out`), where such pairs add nothing. All others run as before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dit_accel.kernels.blocks import BlockTable
from dit_accel.kernels.once import once
from dit_accel.kernels.plan import BlockPlan, Visits
from dit_accel.kernels.pooling import PooledKeys
from dit_accel.kernels.torch_lists import (
    CPU_CHUNK_BYTES,
    GPU_CHUNK_BYTES,
    attend_lists,
    attention_and_lse,
    written_out,
)

Tokens = Tensor | slice
Host = np.ndarray


@dataclass(frozen=True, eq=False)
class _Bucket:
    """G groups of nq queries and nk keys each, of some samples and heads.

    queries, keys: int32 [G, n] raster tokens, or a slice where G is 1 and they are consecutive.
    full: bool [G, nk], keys that need no token mask; None where no key does.
    pooled: int32 [G, np], pooled keys, which stand after the others; None where there are none.
    """

    samples: slice
    heads: slice
    groups: int
    n_queries: int
    n_keys: int
    queries: Tokens
    keys: Tokens
    full: Tensor | None
    pooled: Tensor | None = None


def torch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    return_lse: bool = False,
    pooled: PooledKeys | None = None,
) -> tuple[Tensor, Tensor | None]:
    """out [B, Lq, H, D] and, if asked, LSE float32 [B, H, Lq], from q, k, v in BSHD.

    Rows without keys are 0 with LSE -inf.
    """
    if plan.shape.online and not (plan.shape.kinds.partial or plan.shape.kinds.pooled):
        return attend_lists(q, k, v, plan, scale, return_lse)
    batch, length, heads, _ = q.shape
    out = torch.empty_like(q) if plan.blocks.covers else torch.zeros_like(q)
    lse = None
    if return_lse:
        lse = q.new_full((batch, heads, length), -torch.inf, dtype=torch.float32)
    limit = GPU_CHUNK_BYTES if q.is_cuda else CPU_CHUNK_BYTES
    careful = plan.mask is not None and not _finite(k, v)
    for bucket in _buckets(plan):
        shared = heads // k.shape[2]
        kv_heads = bucket.heads
        if bucket.heads.start is not None:
            kv_heads = slice(bucket.heads.start // shared, bucket.heads.start // shared + 1)
        query = q[bucket.samples, :, bucket.heads]
        key, value = k[bucket.samples, :, kv_heads], v[bucket.samples, :, kv_heads]
        more = None
        if pooled is not None and bucket.pooled is not None:
            logs = pooled.log_count
            more = PooledKeys(
                pooled.key[bucket.samples, :, kv_heads],
                pooled.value[bucket.samples, :, kv_heads],
                logs[bucket.samples] if len(logs) > 1 else logs,
            )
        target = out[bucket.samples, :, bucket.heads]
        target_lse = None if lse is None else lse[bucket.samples, bucket.heads]
        for part in _chunks(bucket, key, limit):
            _attend(query, key, value, plan, part, scale, target, target_lse, more, careful)
    return out, lse


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    part: _Bucket,
    scale: float,
    out: Tensor,
    lse: Tensor | None,
    pooled: PooledKeys | None,
    careful: bool,
) -> None:
    if part.n_keys == 0 and part.pooled is None:
        _put(out, part.queries, torch.zeros((), dtype=out.dtype, device=out.device))
        return
    query = _take(q, part.queries, part.groups)  # [B * G, H, nq, D]
    key, value = (_take(x, part.keys, part.groups) for x in (k, v))
    bias = None
    if pooled is not None and part.pooled is not None:
        key, value = (
            torch.cat([x, _take(y, part.pooled, part.groups)], 2)
            for x, y in ((key, pooled.key), (value, pooled.value))
        )
        bias = pooled.log_count[:, part.pooled.long()].expand(len(q), -1, -1).flatten(0, 1)
    if key.shape[1] != query.shape[1]:
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    mask = _token_mask(plan, part, q)
    row_lse: Tensor | None = None
    careful = careful and mask is not None
    if bias is None and not careful:
        result, row_lse = attention_and_lse(query, key, value, mask, scale, lse is not None)
    else:  # F.sdpa rounds a bias to the type of q
        result, row_lse = written_out(query, key, value, mask, scale, bias, careful)
    batch, heads = q.shape[0], query.shape[1]
    # [B * G, H, nq, D] -> [B, G * nq, H, D]
    rows = result.unflatten(0, (batch, part.groups)).permute(0, 1, 3, 2, 4)
    _put(out, part.queries, rows.reshape(batch, -1, heads, q.shape[-1]))
    if lse is not None and row_lse is not None:
        values = row_lse.unflatten(0, (batch, part.groups)).transpose(1, 2)
        _put(lse.transpose(1, 2), part.queries, values.reshape(batch, heads, -1).transpose(1, 2))


def _finite(*tensors: Tensor) -> bool:
    """Whether all numbers are finite, by one pass over them; False may also mean very large ones.

    A GPU is asked and waited for, but not while a graph is recorded: False then.
    """
    if tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    total = sum(x.sum(dtype=torch.float32) for x in tensors)
    return bool(torch.as_tensor(total).isfinite())


def _take(x: Tensor, tokens: Tokens, groups: int) -> Tensor:
    """[B * G, H, n, D] of x [B, L, H, D]."""
    if isinstance(tokens, slice):
        return x[:, tokens].transpose(1, 2)
    rows = _along_tokens(x, lambda y, dim: y.index_select(dim, tokens.flatten()))
    return rows.unflatten(1, tokens.shape).flatten(0, 1).transpose(1, 2)


def _along_tokens(x: Tensor, pick) -> Tensor:  # type: ignore[no-untyped-def]
    """`pick` on dimension 1 of x, run on the transposed view where memory is head-major."""
    if x.stride(1) < x.stride(2):
        return pick(x.transpose(1, 2), 2).transpose(1, 2)
    return pick(x, 1)


def _put(out: Tensor, tokens: Tokens, rows: Tensor) -> None:
    if isinstance(tokens, slice):
        out[:, tokens] = rows
    elif rows.ndim == 0:
        out.index_fill_(1, tokens.flatten().long(), rows)
    else:
        out.index_copy_(1, tokens.flatten().long(), rows)


def _token_mask(plan: BlockPlan, part: _Bucket, q: Tensor) -> Tensor | None:
    """bool [B * G, 1, nq, nk], or None where every pair counts."""
    if part.full is None or plan.mask is None:
        return None
    queries, keys = (
        torch.arange(t.start, t.stop, device=q.device)[None] if isinstance(t, slice) else t
        for t in (part.queries, part.keys)
    )
    kept = plan.mask.allowed(queries, keys) | part.full[:, None, :]
    return kept.repeat(q.shape[0], 1, 1).unsqueeze(1)


def _chunks(bucket: _Bucket, k: Tensor, limit: int) -> Iterator[_Bucket]:
    """The bucket in parts whose gathered keys and values stay within `limit` bytes."""
    batch, _, heads, dim = k.shape
    extra = 0 if bucket.pooled is None else bucket.pooled.shape[1]
    each = 2 * batch * max(1, bucket.n_keys + extra) * heads * dim * k.element_size()
    some = max(1, limit // each)
    if bucket.groups <= some:
        yield bucket
        return
    assert isinstance(bucket.queries, Tensor) and isinstance(bucket.keys, Tensor)
    for first in range(0, bucket.groups, some):
        rows = slice(first, first + some)
        queries = bucket.queries[rows]
        yield replace(
            bucket,
            groups=len(queries),
            queries=queries,
            keys=bucket.keys[rows],
            full=None if bucket.full is None else bucket.full[rows],
            pooled=None if bucket.pooled is None else bucket.pooled[rows],
        )


@once
def _buckets(plan: BlockPlan) -> list[_Bucket]:
    return list(_make_buckets(plan))


def _make_buckets(plan: BlockPlan) -> Iterator[_Bucket]:
    visits, pooled = _host_lists(plan.visits), _host_lists(plan.pooled)
    tables = [_host_table(table) for table in (plan.blocks.q, plan.blocks.k)]
    samples = max(plan.batch, len(plan.blocks.q.lengths))
    for sample in range(samples):
        for head in range(plan.heads):
            groups: dict[tuple[bytes, ...], list[int]] = {}
            for block in range(plan.blocks.q.count):
                full, masked = _entries(visits, (sample, head, block))
                more, _ = _entries(pooled, (sample, head, block))
                groups.setdefault((full, masked, more), []).append(block)
            yield from _stacked(
                groups,
                tables,
                sample,
                plan.device,
                slice(sample, sample + 1) if samples > 1 else slice(None),
                slice(head, head + 1) if plan.heads > 1 else slice(None),
            )


def _host_lists(lists: Visits | None) -> tuple[Host, ...] | None:
    if lists is None:
        return None
    parts = (lists.start, lists.full, lists.count, lists.index)
    return tuple(part.cpu().numpy() for part in parts)


def _entries(lists: tuple[Host, ...] | None, row: tuple[int, int, int]) -> tuple[bytes, bytes]:
    """The entries of a list that count in full, and those under the token mask, each ascending."""
    if lists is None:
        return b"", b""
    start, full, count, index = lists
    row = row[0] % len(start), row[1], row[2]
    middle = start[row] + full[row]
    parts = index[start[row] : middle], index[middle : start[row] + count[row]]
    return np.sort(parts[0]).tobytes(), np.sort(parts[1]).tobytes()


def _stacked(
    groups: dict[tuple[bytes, ...], list[int]],
    tables: list[tuple[Host, Host, Host]],
    sample: int,
    device: torch.device,
    samples: slice,
    heads: slice,
) -> Iterator[_Bucket]:
    """Groups with the same numbers of queries and keys, together."""
    alike: dict[tuple[int, ...], list[tuple[Host, Host, Host, Host]]] = {}
    for (full, partial, pooled), blocks in groups.items():
        queries = _tokens(tables[0], sample, np.array(blocks))
        sure = _tokens(tables[1], sample, np.frombuffer(full, np.int32))
        masked = _tokens(tables[1], sample, np.frombuffer(partial, np.int32))
        more = np.frombuffer(pooled, np.int32)
        keys = np.concatenate([sure, masked])
        flags = np.arange(len(keys)) < len(sure)
        by_token = np.argsort(keys, kind="stable")
        if len(queries):
            shape = (len(queries), len(keys), len(masked) > 0, len(more))
            rows = (np.sort(queries), keys[by_token], flags[by_token], more)
            alike.setdefault(shape, []).append(rows)
    for (n_queries, n_keys, masked_any, extra), members in alike.items():
        stacked = [np.stack(column) for column in zip(*members, strict=True)]
        yield _Bucket(
            samples,
            heads,
            len(members),
            n_queries,
            n_keys,
            _as_tokens(stacked[0], device),
            _as_tokens(stacked[1], device),
            torch.from_numpy(stacked[2]).to(device) if masked_any else None,
            torch.from_numpy(stacked[3]).to(device) if extra else None,
        )


def _as_tokens(tokens: Host, device: torch.device) -> Tokens:
    row = tokens[0]
    if len(tokens) == 1 and len(row) and row[-1] - row[0] == len(row) - 1:
        return slice(int(row[0]), int(row[-1]) + 1)
    return torch.from_numpy(tokens.astype(np.int32)).to(device)


def _host_table(table: BlockTable) -> tuple[Host, Host, Host]:
    starts, lengths = table.starts.cpu().numpy(), table.lengths.cpu().numpy()
    stop = int((starts + lengths.max(0)).max()) if len(starts) else 0
    order = np.arange(stop, dtype=np.int32) if table.order is None else table.order.cpu().numpy()
    return order, starts, lengths


def _tokens(table: tuple[Host, Host, Host], sample: int, blocks: Host) -> Host:
    """Raster tokens of `blocks`, one after another."""
    order, starts, all_lengths = table
    lengths = all_lengths[sample if len(all_lengths) > 1 else 0][blocks]
    within = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
    return order[np.repeat(starts[blocks], lengths) + within]
