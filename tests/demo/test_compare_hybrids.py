"""One command fits every shape of hybrid mixer, measures them beside students, and continues where it was."""

from __future__ import annotations

import json

import pytest

from demo.files import student_file
from demo.study import compare_hybrids
from demo.study.compare_hybrids import parse, run, table
from demo.study.hybrids import SHAPES

SMALL = ["--fit-batches", "4", "--loss-batches", "1", "--batch-size", "2", "--repeats", "1", "--prompts", "0"]


def arguments(folder, *more):
    return parse(["--output", str(folder), *SMALL, *more])


def test_fits_measures_and_continues(pack, tmp_path, capsys, monkeypatch):
    shapes = ["--shapes", "pooled 36, K 5", "Nyström 64, 36, 16"]
    student = ["--student", f"ΔConv={student_file()}"]
    run(arguments(tmp_path, *shapes, *student))
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "hybrids.json").read_text(encoding="utf-8"))
    assert list(rows) == ["attention", "pooled 36, K 5", "Nyström 64, 36, 16", "ΔConv"]
    assert 0 < rows["Nyström 64, 36, 16"]["feature"] < rows["pooled 36, K 5"]["feature"] < 1
    errors = [list(rows["Nyström 64, 36, 16"][part].values()) for part in ("errors", "starts")]
    assert all(len(part) == 9 and 0.01 < sum(part) / 9 < 0.3 for part in errors), errors
    assert all(row["seconds"] > 0 for row in rows.values())
    assert (tmp_path / "hybrids.md").read_text(encoding="utf-8").strip() in printed
    assert not list(tmp_path.glob("fit-*"))

    monkeypatch.setattr(compare_hybrids, "fit_shapes", None)
    monkeypatch.setattr(compare_hybrids, "EndToEnd", None)
    run(arguments(tmp_path, *shapes, *student))
    again = json.loads((tmp_path / "hybrids.json").read_text(encoding="utf-8"))
    assert again["pooled 36, K 5"]["feature"] == rows["pooled 36, K 5"]["feature"]
    with pytest.raises(TypeError):
        run(arguments(tmp_path, "--shapes", "pooled 16"))


def test_the_table_marks_what_is_within_the_noise_of_the_best():
    def row(psnr, error):
        found = {"psnr": psnr, "psnr_error": error, "gflop": 1.0, "mean": 0.8, "frechet": 3.0}
        return {"seconds": 0.01, "feature": 0.2, "output": 1e-4, "pictures": {"48": found}}

    text = table({"best": row(30.0, 0.3), "near": row(29.2, 0.3), "far": row(29.0, 0.3)})
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    psnr = cells[0].index("PSNR, 48")
    assert [line[psnr] for line in cells[2:]] == ["30.0 ± 0.3 *", "29.2 ± 0.3 *", "29.0 ± 0.3"]


def test_unknown_shapes_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        arguments(tmp_path, "--shapes", "pooled 37")
    assert "unknown shapes pooled 37" in capsys.readouterr().err and "pooled 36" in SHAPES
