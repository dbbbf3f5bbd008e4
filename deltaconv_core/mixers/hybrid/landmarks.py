"""The global part: attention by way of the landmarks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .cells import Cells
from .nystrom import corrected
from .spec import HybridSpec
from .windowed import windowed_attention

QUERIES_AT_ONCE = 4096  # queries whose scores exist at a time where they are formed one by one


def global_part(
    spec: HybridSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cells: Cells,
    change: Callable[[Tensor], Tensor] = lambda values: values,
    rows: Tensor | None = None,
) -> Tensor:
    """(B, heads, H * W, d) each -> (B, heads, H * W, d), before gains.

    Args:
        spec: of the mixer; it has landmarks.
        q, k, v: of the tokens.
        cells: what the landmarks are taken of.
        change: of the landmarks' values (B, heads, P, d); where there are such, and no window.
        rows: numbers of the queries to answer; None: all.
    """
    asked = q if rows is None else q[:, :, rows]
    added = None if cells.weights is None else cells.weights.log().to(q.dtype)[:, None, None]
    if cells.are_tokens:
        return F.scaled_dot_product_attention(asked, k, v, attn_mask=added)
    if spec.window:
        keys, values = (cells.means(t).to(t.dtype) for t in (k, v))
        y = windowed_attention(q, k, v, cells, spec.window, keys, values)
        return y if rows is None else y[:, :, rows]
    keys, bias = cells.means(k), cells.bias()
    if spec.nystrom == "none":
        values = cells.means(v)
    else:
        queries = cells.means(q)
        scores = queries @ keys.mT / spec.head_dim**0.5
        among = (scores if bias is None else scores + bias).softmax(dim=-1)
        to_all = F.scaled_dot_product_attention(queries.to(q.dtype), k, v, attn_mask=added)
        values = corrected(among, to_all.to(among.dtype), spec.nystrom)
    values = change(values).to(q.dtype)
    bias = None if bias is None else bias.to(q.dtype)
    return F.scaled_dot_product_attention(asked, keys.to(q.dtype), values, attn_mask=bias)


def own_share(q: Tensor, k: Tensor, cells: Cells, rows: Tensor | None = None) -> Tensor:
    """(B, heads, H * W, 1): the share that the softmax over landmarks gives to each query's own cell.

    Args:
        q, k: (B, heads, H * W, d).
        cells: what the landmarks are taken of.
        rows: numbers of the queries to answer; None: all.
    """
    keys, bias, own = cells.means(k).to(q.dtype).mT, cells.bias(), cells.own()
    if rows is not None:
        q, own = q[:, :, rows], own[rows]
    parts = []
    for start in range(0, q.shape[2], QUERIES_AT_ONCE):
        some = slice(start, start + QUERIES_AT_ONCE)
        scores = (q[:, :, some] / q.shape[3] ** 0.5) @ keys  # divided before, for float16's range
        shares = (scores if bias is None else scores + bias.to(scores.dtype)).softmax(dim=-1)
        parts.append(shares.gather(3, own[some, None].expand(*shares.shape[:2], -1, 1)))
    return torch.cat(parts, dim=2)
