"""ΔConv Benchmark: what self-attention costs in a model on this machine, and what ΔConv would save."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui

from ..deltaconv_core.bench import device_name, layer_table
from ..deltaconv_core.bench.layers import ATTENTION, DELTACONV
from ..deltaconv_core.sites.choose_specs import FORMS, LEAN
from ..deltaconv_core.weights.checkpoint import Checkpoint
from .host.bench.measure import NOTHING, Measured, MeasureSettings, measure
from .host.patch.blocks import network_dtype
from .host.report import Report, TellsAgain, left_out, tell
from .sockets import ADVANCED, CATEGORY, Weights, search_aliases

LEGEND = """\
- ms: one pass of all layers of the part; times: how many times ΔConv's time attention takes.
- GFLOP: floating point operations of the same, two for each multiply-add."""


class Benchmark(TellsAgain):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DeltaConvBenchmark",
            display_name="ΔConv Benchmark",
            category=CATEGORY,
            **search_aliases("speed", "faster", "measure", "attention"),
            description="Measures on this machine what a model's self-attention costs, layer by layer, what "
            "ΔConv costs in its place, and how much faster the whole model gets.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A U-Net (SD 1.x, SD 2.x, SDXL, ...) or PixArt. With ΔConv on it, the blocks "
                    "that are there are measured, and the attention that they stand in for.",
                ),
                io.Int.Input(
                    "width", default=1024, min=16, max=16384, step=16, tooltip="Of the picture, in pixels."
                ),
                io.Int.Input(
                    "height", default=1024, min=16, max=16384, step=16, tooltip="Of the picture, in pixels."
                ),
                io.Int.Input(
                    "batch_size",
                    default=2,
                    min=1,
                    max=64,
                    tooltip="Samples in one pass. One picture with a negative prompt makes two.",
                ),
                io.Int.Input(
                    "repeats",
                    default=3,
                    min=1,
                    max=100,
                    tooltip="Timed passes with attention, with ΔConv and with nothing, after one of each "
                    "that does not count.",
                ),
                io.Combo.Input(
                    "form",
                    **ADVANCED,
                    options=list(FORMS),
                    default=LEAN,
                    optional=True,
                    tooltip="Of the untrained blocks: 'lean', as ΔConv Distill makes them, or 'released', as "
                    "in the weights that the authors published.",
                ),
                Weights.Input(
                    "deltaconv",
                    optional=True,
                    tooltip="Weights from another node. Without them, untrained blocks are measured, which "
                    "take the same time.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model as it came in."),
                io.String.Output(display_name="table"),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        width: int,
        height: int,
        batch_size: int,
        repeats: int,
        form: str = LEAN,
        deltaconv: Checkpoint | None = None,
    ) -> io.NodeOutput:
        settings = MeasureSettings(width, height, batch_size, repeats, form)
        measured = measure(model, deltaconv, settings)
        report = _report(measured)
        table = f"{_title(model, measured, settings)}\n\n{layer_table(measured.costs)}\n\n{report.text}"
        return io.NodeOutput(model, f"{table}\n\n{LEGEND}", ui=ui.PreviewText(tell(report, cls.hidden)))


def _title(model: ModelPatcher, measured: Measured, settings: MeasureSettings) -> str:
    dtype = str(network_dtype(model) or model.model_dtype()).removeprefix("torch.")
    return (
        f"{measured.architecture}, {settings.width} × {settings.height}, batch {settings.batch}, {dtype}, "
        f"{device_name(model.load_device)}; {measured.blocks}"
    )


def _report(measured: Measured) -> Report:
    attention, own, nothing = (measured.passes[name] for name in (ATTENTION, DELTACONV, NOTHING))
    lines = [
        f"One pass of the network: {attention:.3g} s with attention, {own:.3g} s with ΔConv "
        f"({attention / own:.2f} times as fast), {nothing:.3g} s with nothing in its place.",
        f"Self-attention takes {1 - nothing / attention:.0%} of a pass, and nothing that replaces it can "
        f"save more; ΔConv saves {1 - own / attention:.0%}.",
    ]
    if nothing >= attention:
        lines[-1] = (
            "The passes differ by less than this machine's noise; the layers say more, or raise repeats."
        )
    elif own >= attention:
        lines[-1] = (
            f"Self-attention takes {1 - nothing / attention:.0%} of a pass; ΔConv saves no time at this size."
        )
    return Report(lines, left_out(measured.unseen))
