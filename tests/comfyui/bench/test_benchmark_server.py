"""ΔConv Benchmark in a real server, on the demo model; stopped on the way, too."""

from __future__ import annotations

from testing.comfy_prompts import node

SIZE = {"width": 48, "height": 64, "batch_size": 2}


def prompt(repeats):
    measured = node("DeltaConvBenchmark", model=["model", 0], repeats=repeats, **SIZE)
    return {
        "model": node("DeltaConvDemoModel"),
        "measured": measured,
        "table": node("PreviewAny", source=["measured", 1]),
    }


def test_the_node(comfy_server):
    seen = []
    outputs = comfy_server.run(prompt(repeats=2), lambda kind, data: seen.append((kind, data)))
    assert outputs["measured"]["text"][0].startswith("One pass of the network: ")
    table = outputs["table"]["text"][0]
    assert table.startswith("unet-64x2-128x7, 48 × 64, batch 2, float32, ")
    assert "| down_blocks.0 |      1 |  32x24 |" in table
    progress = [data["value"] for kind, data in seen if kind == "progress" and data["node"] == "measured"]
    assert progress[-1] == 3 * (2 + 1)


def test_stopped_on_the_way(comfy_server):
    def stop(kind, data):
        if kind == "progress" and data["node"] == "measured" and data["value"] >= 4:
            comfy_server.interrupt()

    assert comfy_server.failure(comfy_server.queue(prompt(repeats=100), stop)) == "interrupted"
    assert "measured" in comfy_server.run(prompt(repeats=1))
