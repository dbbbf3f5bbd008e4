"""`python -m deltaconv_core fetch`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltaconv_core.cli import main
from deltaconv_core.commands import fetch as command
from deltaconv_core.weights.fetch.address import ALLOW_LOOPBACK
from deltaconv_core.weights.manifest import builtin_path, load_manifest
from testing.fault_server import Content, FaultServer, serving
from testing.weight_records import sha256, weights

BODY = weights(5_000)


def add(folder: Path, **changes: object) -> None:
    """Put a manifest with one record of the user's own into the folder."""
    template = json.loads(builtin_path().read_text(encoding="utf-8"))[0]
    record = {**template, "name": "mine", "recommended_for": [], "size": len(BODY), "sha256": sha256(BODY)}
    (folder / "manifest.json").write_text(json.dumps([{**record, **changes}]), encoding="utf-8")


def test_the_list_names_all_and_what_is_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add(tmp_path)
    (tmp_path / "mine.safetensors").write_bytes(BODY)
    assert main(["fetch", "--list", "--folder", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in load_manifest().names())
    assert "mine  [here]" in printed and "ConvFusion-sd15-mjv5  [to fetch]  sd15 (auto for sd15)" in printed


def test_a_broken_manifest_does_not_hide_the_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    add(tmp_path, sha256="abc")
    assert main(["fetch", "--list", "--folder", str(tmp_path)]) == 0
    assert "ConvFusion-sd15-mjv5" in capsys.readouterr().out
    assert "record 1 ('mine')" in caplog.text


def test_a_name_is_fetched_and_its_path_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ALLOW_LOOPBACK, "1")
    with serving(FaultServer()) as server:
        server.files["/w.safetensors"] = Content(BODY)
        add(tmp_path, source={"url": f"{server.url}/w.safetensors"})
        assert main(["fetch", "mine", "--folder", str(tmp_path)]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == tmp_path / "mine.safetensors" and path.read_bytes() == BODY


@pytest.mark.parametrize(("arguments", "said"), [(["nope"], "no weights called 'nope'"), ([], "--list")])
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(["fetch", *arguments, "--folder", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert said in printed and printed.count("\n") == 1


@pytest.mark.parametrize(
    ("repository", "folder"),
    [("ComfyUI/custom_nodes/pack", "ComfyUI/models/deltaconv"), ("src/pack", "models/deltaconv")],
)
def test_the_folder_is_comfyuis_when_the_repository_is_its_pack(
    monkeypatch: pytest.MonkeyPatch, repository: str, folder: str
) -> None:
    monkeypatch.setattr(command, "REPOSITORY", Path(repository))
    assert command.default_folder() == Path(folder)


def test_an_interrupt_is_told_and_keeps_the_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "resolve", interrupt)
    assert main(["fetch", "ConvFusion-sd15-mjv5", "--folder", str(tmp_path)]) == 130
    assert "kept" in capsys.readouterr().out
