"""Results are kept, merged and shown without sampling anything twice; curves are read and drawn."""

import argparse
import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from deltaconv_core import BlockSpec, Checkpoint, DeltaConvBlock, DeltaConvError, save_checkpoint
from demo.files import named_file, student_file, teacher_file
from demo.study import evaluate
from demo.study.curves import curve, draw_curves, read_log, stage_changes
from demo.study.evaluate import Folder, Models, Settings, Size, count_gflop, sha256
from demo.study.metrics import held_out_prompts
from demo.study.tables import differences, markdown, write_report

SIZE = Size(48, 3, 2)
SETTINGS = Settings(sizes=(SIZE,), cfg=3.0, seed=0, batch=4, reference=10, teacher="ab", classifier="cd")
PICTURES = np.arange(3 * 48 * 48 * 3, dtype=np.uint8).reshape(3, 48, 48, 3)


def never():
    raise AssertionError("sampled again")


def test_pictures_are_sampled_once(tmp_path):
    folder = Folder(tmp_path, SETTINGS)
    assert folder.pictures("ΔConv", SIZE, "hash", lambda: PICTURES) is PICTURES
    np.testing.assert_array_equal(Folder(tmp_path, SETTINGS).pictures("ΔConv", SIZE, "hash", never), PICTURES)
    measured_anew = replace(SETTINGS, reference=20, classifier="other")
    np.testing.assert_array_equal(
        Folder(tmp_path, measured_anew).pictures("ΔConv", SIZE, "hash", never), PICTURES
    )


@pytest.mark.parametrize(
    ("settings", "size", "model"),
    [
        (SETTINGS, SIZE, "new weights"),
        (SETTINGS, SIZE._replace(steps=3), "hash"),
        (replace(SETTINGS, cfg=4.0), SIZE, "hash"),
        (replace(SETTINGS, teacher="new"), SIZE, "hash"),
    ],
)
def test_pictures_of_something_else_are_not_taken(tmp_path, settings, size, model):
    Folder(tmp_path, SETTINGS).pictures("x", SIZE, "hash", lambda: PICTURES)
    with pytest.raises(AssertionError, match="sampled again"):
        Folder(tmp_path, settings).pictures("x", size, model, never)


def measured(folder, name, shape, words="665"):
    folder.pictures(name, SIZE, name, lambda: PICTURES)
    measures = {"shape": shape, "shape_error": 0.03, "all": 0.5, "frechet": 12.0, "frechet_error": 1.5}
    measures |= {"all_difference": -0.1, "all_difference_error": 0.02, "words": words}
    folder.keep(name, {"sha256": name, "weights": 1234, "sizes": {"48": measures}})


def test_students_measured_one_by_one_come_into_one_table(tmp_path, capsys):
    folder = Folder(tmp_path, SETTINGS)
    for name in ("attention", "second", "first"):
        measured(folder, name, 0.25)
    measured(Folder(tmp_path, replace(SETTINGS, seed=7)), "other", 1.0)
    results = folder.results(["attention"])
    assert list(results) == ["attention", "first", "second"]
    assert "other is left out" in capsys.readouterr().out
    write_report(tmp_path, results)
    rows = [line for line in (tmp_path / "evaluation.md").read_text("utf-8").splitlines() if line[:1] == "|"]
    assert len(rows) == 2 * (2 + 3) and len({row.count("|") for row in rows[:5]}) == 1
    assert rows[3].startswith("| first | 0.250 ± 0.030 |  |") and "| -0.100 ± 0.020 | 12.0 ± 1.5 |" in rows[3]
    assert rows[3].endswith("|  |  | 1,234 |  |")
    assert rows == (markdown(results, "48") + "\n" + differences(results, "48")).splitlines()
    stored = json.loads((tmp_path / "evaluation.json").read_text("utf-8"))
    assert stored["models"]["second"]["sizes"]["48"]["shape"] == 0.25
    assert (tmp_path / "sheet-48.png").stat().st_size > 0


def test_differences_within_the_error_are_called_equal(tmp_path):
    folder = Folder(tmp_path, SETTINGS)
    measured(folder, "attention", 0.5, "66666666")
    measured(folder, "alike", 0.5, "66666665")
    measured(folder, "worse", 0.5, "33343333")
    rows = differences(folder.results(["attention"]), "48").splitlines()
    assert rows[0] == "| words right, less those of | attention | alike | worse |"
    alike, worse = rows[3].split(" | "), rows[4].split(" | ")
    assert alike[0] == "| alike" and alike[1] == "-0.021 ± 0.021, equal" and alike[2] == ""
    assert worse[1] == "-0.479 ± 0.021"


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(DeltaConvError, match=r"there is no file .*gone"):
        sha256(tmp_path / "gone")


@pytest.mark.parametrize("text", ["name", "=file", "name=", "a/b=file", ".=file"])
def test_students_need_a_name_and_a_file(text):
    with pytest.raises(argparse.ArgumentTypeError, match="NAME=FILE"):
        named_file(text)


def test_a_file_may_have_an_equals_sign():
    assert named_file("ΔConv, one stage=a=b") == ("ΔConv, one stage", Path("a=b"))


LOG = """step,stage,learning_rate,feature,teacher,noise,seconds
20,layer-wise,4e-4,2.5,,,13
40,layer-wise,8e-4,1.5,,,25
60,end to end,8e-4,1.0,0.2,0.3,40
"""


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_curves_are_the_same_file_again(tmp_path, ending):
    pytest.importorskip("matplotlib")
    log = tmp_path / "log.csv"
    log.write_text(LOG)
    rows = read_log(log)
    assert curve(rows, "feature") == ([20, 40, 60], [2.5, 1.5, 1.0])
    assert curve(rows, "feature", mean=2) == ([40], [2.0])
    assert curve(rows, "teacher") == ([60], [0.2]) and stage_changes(rows) == [40]
    files = [tmp_path / f"{number}.{ending}" for number in (1, 2)]
    for file in files:
        draw_curves({"ΔConv": rows, "linear": rows[:2]}, file)
    assert files[0].read_bytes() == files[1].read_bytes() and files[0].stat().st_size > 1000


@pytest.mark.parametrize(("text", "message"), [("a,b\n1,2\n", "columns a, b"), (LOG[:55], "0 rows")])
def test_other_files_are_no_logs(tmp_path, text, message):
    (tmp_path / "log.csv").write_text(text)
    with pytest.raises(DeltaConvError, match=message):
        read_log(tmp_path / "log.csv")


@pytest.mark.slow
def test_operations_grow_with_the_square_of_the_pixels_for_attention_only(pack, tmp_path):
    models = Models(teacher_file(), {"ΔConv": tmp_path / "all.safetensors"})
    models.pack = pack.__name__
    found = import_module(".nodes.host.model.sites", models.pack).find_sites(models.teacher)
    blocks = {site: DeltaConvBlock(BlockSpec.lean(dim, 5)) for site, dim in found.channels.items()}
    save_checkpoint(Checkpoint(found.architecture, blocks), models.students["ΔConv"])
    prompts = held_out_prompts(2, 0)
    small, large = (
        {
            name: count_gflop(models[name], models.words, prompts, Size(side, 2, 1))
            for name in ("attention", "ΔConv")
        }
        for side in (24, 48)
    )
    assert small["attention"] > small["ΔConv"]
    assert large["attention"] / small["attention"] > 4.2
    assert large["ΔConv"] / small["ΔConv"] == pytest.approx(4, rel=0.01)


@pytest.mark.slow
def test_a_whole_evaluation_in_small(pack, tmp_path, capsys):
    """Everything from the files to the tables."""
    options = argparse.Namespace(
        teacher=teacher_file(), student=[("ΔConv", student_file())], prompts=12, prompts_large=11, size=48,
        steps=1, steps_large=None, cfg=3.0, seed=0, batch=3, reference=20, output=tmp_path,
    )  # fmt: skip
    evaluate.run(options)
    found = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))["models"]
    assert list(found) == ["drawn", "attention", "ΔConv"]
    assert found["ΔConv"]["sizes"]["96"]["psnr"] > 5 and found["attention"]["sizes"]["48"]["gflop"] > 1
    assert "11 held-out prompts, 96x96, 1 steps" in capsys.readouterr().out
