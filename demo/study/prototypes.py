"""Prototype queries in place of attention, to set beside hybrid mixers: ``python -m demo.study.prototypes``.

Each head keeps M queries of its own, the means of its queries in drawings (k-means). They attend to all keys,
and a token's answer is a mix of theirs. The mix is linear in the token's query, 1, and the softmax of its
products with the prototypes; ridge regression on what attention answers solves it. Prints for each M the
relative error of the layers on drawings held out of the fit, and the paper's feature and output losses, as
`demo.study.compare_hybrids` does.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..files import teacher_file
from .compare_hybrids import distillation_losses
from .device import add_device, use_device
from .hybrids import FIT_BATCH, FIT_SEED, Between, watched
from .train_student import Teacher

RIDGE = 1e-2  # of the mean of the Gram matrix's diagonal
QUERIES, ROUNDS = 64, 10  # of each picture that k-means sees, and of k-means


class Prototypes(torch.nn.Module):
    """Prototype queries and the mix of their answers, called as a hybrid mixer.

    Args:
        queries: (heads, M, d), the prototypes.
    """

    def __init__(self, queries: Tensor) -> None:
        super().__init__()
        heads, count, width = queries.shape
        self.queries = queries
        #: (heads, M, d + 1 + M); it starts as the softmax alone
        self.mix = torch.cat(
            [queries.new_zeros(heads, count, width + 1), torch.eye(count).expand(heads, -1, -1)], 2
        )

    def features(self, q: Tensor) -> Tensor:
        """(B, heads, N, d + 1 + M) of queries (B, heads, N, d)."""
        near = (q @ self.queries.transpose(1, 2) / q.shape[3] ** 0.5).softmax(3)
        return torch.cat([q, torch.ones_like(q[..., :1]), near], dim=3)

    def answers(self, k: Tensor, v: Tensor) -> Tensor:
        """(B, heads, M, d): what the prototypes get."""
        return F.scaled_dot_product_attention(self.queries.expand(len(k), -1, -1, -1), k, v)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], mask: None = None) -> Tensor:
        return self.features(q) @ self.mix.transpose(1, 2) @ self.answers(k, v)


def means_of(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(heads, count, d): k-means of each head's points (heads, n, d)."""
    means = points[:, torch.randperm(points.shape[1], generator=generator)[:count]]
    for _ in range(ROUNDS):
        own = F.one_hot(torch.cdist(points, means).argmin(2), count).to(points.dtype)
        sizes = own.sum(1)[..., None]
        means = torch.where(sizes > 0, own.transpose(1, 2) @ points / sizes.clamp(min=1), means)
    return means


def gather(teacher: Teacher, numbers: range) -> dict[str, Tensor]:
    """Site -> some of its queries (heads, n, d) in noisy drawings."""
    found: dict[str, list[Tensor]] = defaultdict(list)

    def see(site: str, q: Tensor, *_: Any) -> None:
        chosen = torch.randint(q.shape[2], (QUERIES,), generator=torch.manual_seed(len(found[site])))
        found[site].append(q[:, :, chosen].transpose(0, 1).flatten(1, 2))

    passing(teacher, see, numbers)
    return {site: torch.cat(parts, 1) for site, parts in found.items()}


def solve(teacher: Teacher, sites: Mapping[str, Prototypes], numbers: range) -> None:
    """Sets the mixes to what ridge regression finds, of the change from their start."""
    sums: dict[str, list[Tensor]] = {}

    def see(site: str, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> None:
        mixer = sites[site]
        features, answers = mixer.features(q).double(), mixer.answers(k, v).double()
        rest = F.scaled_dot_product_attention(q, k, v).double() - features @ mixer.mix.double().mT @ answers
        # A feature is a product: of one of a query, and one answer. So the Gram matrix is of products, too.
        gram = torch.einsum("bhmn,bhfg->hmfng", answers @ answers.mT, features.mT @ features)
        products = (answers @ rest.mT @ features).sum(0)
        own = sums.setdefault(site, [torch.zeros_like(gram), torch.zeros_like(products)])
        own[0] += gram
        own[1] += products

    passing(teacher, see, numbers)
    for site, (gram, products) in sums.items():
        square = gram.flatten(3, 4).flatten(1, 2)
        ridge = RIDGE * square.diagonal(dim1=1, dim2=2).mean(1)
        square.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
        change = torch.linalg.solve(square, products.flatten(1)[..., None])
        sites[site].mix = sites[site].mix + change.view_as(products).float()


def errors(teacher: Teacher, sites: Mapping[str, Prototypes], numbers: range) -> dict[str, float]:
    """Site -> the relative error of its answers, the square root of a ratio of sums of squares."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def see(site: str, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], _: Any) -> None:
        exact = F.scaled_dot_product_attention(q, k, v)
        sums[site][0] += float((sites[site](q, k, v, grid) - exact).square().sum())
        sums[site][1] += float(exact.square().sum())

    passing(teacher, see, numbers)
    return {site: (wrong / all) ** 0.5 for site, (wrong, all) in sums.items()}


@torch.no_grad()
def passing(teacher: Teacher, see: Any, numbers: range) -> None:
    """Tells ``see`` of every attention's calls for these batches of noisy drawings."""
    batches = teacher.batches(FIT_BATCH, FIT_SEED)
    with watched(teacher, see):
        for number in numbers:
            teacher.network(batches(number))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", type=Path, default=teacher_file(), help="the teacher's safetensors file")
    parser.add_argument(
        "--counts", type=int, nargs="+", default=[16, 36], help="of prototypes (default 16 36)"
    )
    parser.add_argument("--fit-batches", type=int, default=24, help="of 8 drawings to fit on (default 24)")
    parser.add_argument("--loss-batches", type=int, default=4, help="for the losses (default 4)")
    add_device(parser)
    args = parser.parse_args()
    use_device(args.device)
    teacher, fitting = Teacher(args.teacher), 3 * args.fit_batches // 4
    points = gather(teacher, range(fitting))
    print("| prototypes | layer error | feature loss | output loss |\n|---|---|---|---|")
    for count in args.counts:
        sites = {
            site: Prototypes(means_of(own, count, torch.Generator().manual_seed(0)))
            for site, own in points.items()
        }
        solve(teacher, sites, range(fitting))
        error = statistics.mean(errors(teacher, sites, range(fitting, args.fit_batches)).values())
        stands = {site: Between(teacher, site, one) for site, one in sites.items()}
        losses = distillation_losses(teacher, stands, args.loss_batches, FIT_BATCH, f"{count} prototypes")
        print(f"| {count} | {error:.3f} | {losses['feature']:.3f} | {losses['output']:.5f} |", flush=True)


if __name__ == "__main__":
    main()
