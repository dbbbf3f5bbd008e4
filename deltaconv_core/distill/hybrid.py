"""Fitting hybrid mixers to a model's own attention: one pass while it samples, and no gradient step.

A hybrid mixer is linear in its parameters (`mixers.hybrid.features`), so the best ones follow from sums over
queries: the Gram matrix of the features and their products with what attention answers. The sums are taken
for some queries of each call, drawn by the seed, and forgotten with the call. There are two sets of them, of
the pictures that parameters are solved from and of those held out, whose error follows from the sums as well.
So memory does not grow with the pictures: it is that of the sums, known before the first call (`sums_bytes`),
and of one call's features (FEATURE_BYTES).

What is solved for is the change from the mixer as it starts, with a ridge of `FitSettings.ridge` times the
mean of the Gram matrix's diagonal: with few pictures a mixer stays near its start.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import CheckpointError, DeltaConvError
from ..mixers.hybrid import HybridMixer, HybridSpec
from ..mixers.hybrid.features import count, features, unpack
from ..mixers.hybrid.flops import hybrid_flops
from ..mixers.joint import JointMixer, JointSpec
from ..util.devices import float64_device
from ..util.foreign_json import parse_json
from ..util.text import listing, quoted
from ..weights.safefile import Pathlike, read_file, write_file
from .budget import Attention, Decision, Option
from .hybrid_sums import HybridSums, add_queries, named_sums, sums_bytes
from .order import generator

MixerSpec = HybridSpec | JointSpec
SeeCall = Callable[[str, Tensor, Tensor, Tensor, Any, Tensor | None], None]
"""Is told (site id, q, k, v (B, heads, N, d), grid, mask of the keys (B, N) or None) of a call; of joint
attention, what `JointFit.see` takes."""

FEATURE_BYTES = 2**26  # bytes of features that exist at a time
FIT_KEY = "deltaconv_hybrid_fit"
FIT_FORMAT = 1


@dataclass(frozen=True)
class FitSettings:
    """How hybrid mixers are fitted.

    Args:
        rows: queries looked at in each call of an attention, drawn without repetition.
        ridge: times the mean of the Gram matrix's diagonal.
        held_out: every so many-th picture is held out; its error is the one reported.
        seed: of the queries that are drawn.
        memory: bytes that the sums may take.

    Raises:
        DeltaConvError: a value that makes no sense.
    """

    rows: int = 128
    ridge: float = 1e-2
    held_out: int = 4
    seed: int = 0
    memory: int = 2**30

    def __post_init__(self) -> None:
        for name, least in (("rows", 1), ("ridge", 0), ("held_out", 2), ("memory", 1)):
            if not getattr(self, name) >= least:
                raise DeltaConvError(
                    f"expected {name} of a fit to be at least {least}, got {getattr(self, name)!r}"
                )


@dataclass(frozen=True, eq=False)
class Fitted:
    """One mixer fitted to one attention.

    Args:
        mixer: with its parameters, float32.
        error: relative error on the held-out pictures: |mixer - attention| / |attention| before the last
            projection, in the 2-norm over all queries, heads and channels.
        start_error: the same of the mixer as it starts.
    """

    mixer: HybridMixer | JointMixer
    error: float
    start_error: float


class HybridFit:
    """Fits any number of candidate mixers to each attention of a model that samples pictures.

    Call `picture` before each picture and `see` for each call of an attention; then `fitted`.

    Args:
        candidates: site id -> specs of the mixers to fit there.
        settings: how.

    Raises:
        DeltaConvError: the sums would take more memory than the settings allow.
    """

    def __init__(
        self, candidates: Mapping[str, Sequence[MixerSpec]], settings: FitSettings | None = None
    ) -> None:
        self.candidates: dict[str, tuple[Any, ...]] = {site: tuple(s) for site, s in candidates.items()}
        self.settings = settings or FitSettings()
        needed = sums_bytes([spec for specs in self.candidates.values() for spec in specs])
        if needed > self.settings.memory:
            raise DeltaConvError(
                f"fitting these mixers takes {needed / 2**20:,.0f} MiB for sums, and "
                f"{self.settings.memory / 2**20:,.0f} MiB are allowed; share kernels by "
                "head, choose smaller kernels, or fit fewer candidates"
            )
        self.number = -1
        self.grids: dict[str, tuple[int, int]] = {}
        """Site id -> (H, W) of its tokens in the last call."""
        self._calls: Counter[str] = Counter()
        self._sums: dict[str, list[tuple[HybridSums, HybridSums]]] = {}

    @property
    def pictures(self) -> int:
        """How many there were so far."""
        return self.number + 1

    def picture(self, number: int) -> None:
        """The picture that comes next; they are numbered from 0."""
        self.number = number
        self._calls.clear()

    @torch.no_grad()
    def see(
        self,
        site: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: Any,
        mask: Tensor | None = None,
    ) -> None:
        """One call of an attention: its queries, keys and values (B, heads, H * W, d), as it uses them.

        Args:
            grid: (H, W).
            mask: (B, H * W) of the keys, as `HybridMixer` takes it.
        """
        if site not in self.candidates:
            return
        call = self._calls[site]
        self._calls[site] += 1
        self.grids[site] = grid
        random = generator(self.settings.seed, f"{site} {call}", self.number)
        rows = torch.randperm(q.shape[2], generator=random)[: self.settings.rows].to(q.device)
        dtype = torch.promote_types(q.dtype, torch.float32)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        added = mask
        if mask is not None:
            added = (mask if mask.dtype == torch.bool else mask.to(dtype))[:, None, None]
        answers = F.scaled_dot_product_attention(q[:, :, rows], k, v, attn_mask=added)
        held_out = self.number % self.settings.held_out == self.settings.held_out - 1
        for spec, both in zip(self.candidates[site], self._of(site, q.device), strict=True):
            step = max(1, FEATURE_BYTES // (8 * len(q) * spec.inner * count(spec)))
            for start in range(0, len(rows), step):
                some = slice(start, start + step)
                x = features(spec, q, k, v, grid, mask, rows[some])
                add_queries(both[held_out], spec, x, answers[:, :, some])

    # Parameters that were made in a host's inference mode could not be trained later.
    @torch.inference_mode(False)
    @torch.no_grad()
    def fitted(self) -> dict[str, list[Fitted]]:
        """Site id -> a mixer for each of its candidates. Sites that were never called are left out.

        Raises:
            DeltaConvError: there were pictures of one kind only, those to solve from or those held out, or
                nothing can be solved from them (`HybridSums.solve`).
        """
        least = self.settings.held_out
        if self.pictures < least:
            raise DeltaConvError(
                f"expected at least {least} pictures, of which one in {least} is held out to measure the "
                f"error, got {self.pictures}"
            )
        found: dict[str, list[Fitted]] = {}
        for site, sums in self._sums.items():
            found[site] = []
            for spec, (own, others) in zip(self.candidates[site], sums, strict=True):
                change = own.solve(self.settings.ridge)
                start = torch.zeros_like(change)
                start[:, -1] = bool(spec.landmarks)
                mixer = self._mixer(spec, (start + change).cpu())
                errors = (others.error(change), others.error(torch.zeros_like(change)))
                found[site].append(Fitted(mixer, *errors))
        return found

    def forget(self) -> None:
        """Drops the sums, which may take a GPU's memory; what was fitted stays."""
        self._sums.clear()

    def _mixer(self, spec: Any, w: Tensor) -> Any:
        """The mixer with these parameters, in float32."""
        return unpack(spec, w)

    def flops(self, site: str, spec: Any) -> float:
        """Operations of a mixer, or of the attention (None), on the grid that was seen at a site."""
        if spec is not None:
            return hybrid_flops(spec, self.grids[site])
        tokens, own = self.grids[site][0] * self.grids[site][1], self.candidates[site][0]
        return float(8 * tokens * own.dim * own.inner + 4 * tokens**2 * own.inner)

    def save(self, path: Pathlike) -> None:
        """Writes the sums, so that `restore` continues after the last picture.

        Raises:
            CheckpointError: the place cannot be written, or a sum is not finite.
        """
        described = self._described() | {"picture": self.number}
        write_file(path, named_sums(self._sums), {FIT_KEY: json.dumps(described)})

    def restore(self, path: Pathlike) -> None:
        """Takes over saved sums; the next picture is number `pictures`.

        Raises:
            CheckpointError: no such file, another kind of file, or a damaged one; nothing was taken over.
            DeltaConvError: the sums are of other candidates or settings.
        """
        header, tensors = read_file(path)
        try:
            saved = parse_json(header[FIT_KEY])
            number, grids = saved.pop("picture"), saved.pop("grids")
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} is not the state of a fit ({error}); choose another place"
            ) from error
        own = json.loads(json.dumps(self._described()))
        del own["grids"]
        other = sorted(name for name in own.keys() | saved.keys() if own.get(name) != saved.get(name))
        if other:
            raise DeltaConvError(
                f"the fit in {path} was started with other {', '.join(other)}; continue it with the same, or "
                "choose another place"
            )
        try:
            grids = _checked_grids(number, grids)
            sums = self._checked_sums(grids, tensors)
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} is not a whole state of a fit ({error}); remove it to start from the first picture"
            ) from error
        self.number, self.grids, self._sums = number, grids, sums

    def _checked_sums(
        self, grids: Mapping[str, tuple[int, int]], tensors: Mapping[str, Tensor]
    ) -> dict[str, list[tuple[HybridSums, HybridSums]]]:
        """The sums of the sites that were seen, from a file's tensors.

        Raises:
            ValueError: sites that are no candidates; tensors missing, unknown, of other shapes or dtypes, or
                squares below zero.
        """
        if unknown := sorted(grids.keys() - self.candidates.keys()):
            raise ValueError(f"sites that were not asked for, {listing(unknown)}")
        cpu = torch.device("cpu")
        sums = {site: self._empty(site, cpu) for site in grids}
        expected = named_sums(sums)
        if other := sorted(expected.keys() ^ tensors.keys()):
            raise ValueError(f"missing or unknown sums, {listing(other)}")
        for name, tensor in expected.items():
            saved = tensors[name]
            if saved.shape != tensor.shape or saved.dtype != tensor.dtype:
                raise ValueError(
                    f"{name} is {tuple(saved.shape)} of {saved.dtype}, expected {tuple(tensor.shape)} of "
                    f"{tensor.dtype}"
                )
            squares = saved.diagonal(dim1=-2, dim2=-1) if name.endswith("/gram") else saved
            if not name.endswith("/products") and (squares < 0).any():
                raise ValueError(f"{name} has squares below zero")
            tensor.copy_(saved)
        return sums

    def _described(self) -> dict[str, object]:
        return {
            "format": FIT_FORMAT,
            "settings": {name: v for name, v in asdict(self.settings).items() if name != "memory"},
            "candidates": {s: [spec.to_dict() for spec in specs] for s, specs in self.candidates.items()},
            "grids": self.grids,
        }

    def _empty(self, site: str, place: torch.device) -> list[tuple[HybridSums, HybridSums]]:
        return [(HybridSums(spec, place), HybridSums(spec, place)) for spec in self.candidates[site]]

    def _of(self, site: str, device: torch.device) -> list[tuple[HybridSums, HybridSums]]:
        """The sums of a site: for each candidate those to solve from and those held out."""
        place = float64_device(device)
        if site not in self._sums:
            self._sums[site] = self._empty(site, place)
        for sums in self._sums[site]:
            for one in sums:
                one.to(place)
        return self._sums[site]


def fit_hybrids(
    fit: HybridFit,
    watched: Callable[[SeeCall], AbstractContextManager[None]],
    sample: Callable[[int], None],
    pictures: int,
    state: Path | None = None,
    on_picture: Callable[[int], None] | None = None,
) -> dict[str, list[Fitted]]:
    """Samples calibration pictures and fits the mixers to what the attentions do meanwhile.

    Whatever stops it, an exception of `sample` or `on_picture` (a user's cancel) included, the sums of the
    last whole picture are in the state; a fit that finds one continues after it, with the same result.

    Args:
        fit: what to fit.
        watched: inside, every call of the model's attention is told to the function that it is given.
        sample: has the model sample the picture of a number, always the same one.
        pictures: how many.
        state: file that the sums are kept in while it lasts; None keeps none.
        on_picture: told the number of pictures done after each.

    Raises:
        DeltaConvError: a saved state of another fit, or too few pictures.
    """
    if state is not None and os.path.isfile(state):
        fit.restore(state)
    with watched(fit.see):
        for number in range(fit.pictures, pictures):
            fit.picture(number)
            sample(number)
            if state is not None:
                fit.save(state)
            if on_picture is not None:
                on_picture(number + 1)
    return fit.fitted()


@dataclass(frozen=True)
class Chosen:
    """What becomes of a model's attentions.

    Args:
        mixers: site id -> the mixer that stands in, as `Checkpoint.blocks` takes them.
        kept: site id -> why the attention stays, as `Checkpoint.kept` takes them.
        decisions: site id -> all that was decided, with reasons.
    """

    mixers: dict[str, HybridMixer | JointMixer]
    kept: dict[str, str]
    decisions: dict[str, Decision]


def choose(
    fit: HybridFit,
    fitted: Mapping[str, Sequence[Fitted]],
    budget: Callable[[Mapping[str, Attention]], dict[str, Decision]],
    cost: Callable[[str, MixerSpec | None], float] | None = None,
) -> Chosen:
    """Decides which attentions are replaced, and by which of the mixers that were fitted to them.

    Args:
        fit: what was fitted.
        fitted: its result.
        budget: `budget.within_error` or `budget.within_cost` with its limit.
        cost: (site id, mixer's spec, or None for the attention) -> cost of a call, in any unit, such as
            measured seconds; None: operations, on the grids that the fit saw.
    """
    cost = cost or fit.flops
    sites = {
        id: Attention(cost(id, None), [Option(one.error, cost(id, one.mixer.spec)) for one in some])
        for id, some in fitted.items()
    }
    decisions = budget(sites)
    mixers = {id: fitted[id][d.option].mixer for id, d in decisions.items() if d.option is not None}
    kept = {id: d.reason for id, d in decisions.items() if d.option is None}
    kept |= {id: "the model never called it" for id in fit.candidates if id not in fitted}
    return Chosen(mixers, kept, decisions)


def _checked_grids(number: object, grids: Mapping[str, object]) -> dict[str, tuple[int, int]]:
    """The grids in the state of a fit that has seen pictures up to a number.

    Raises:
        ValueError: a number or a grid that cannot be.
    """
    if type(number) is not int or number < 0:
        raise ValueError(f"its last picture has the number {quoted(number)}")
    checked: dict[str, tuple[int, int]] = {}
    for site, grid in grids.items():
        if not isinstance(grid, list) or [type(side) for side in grid] != [int, int] or min(grid) < 1:
            raise ValueError(f"the grid of {site} is {quoted(grid)}")
        checked[site] = (grid[0], grid[1])
    return checked
