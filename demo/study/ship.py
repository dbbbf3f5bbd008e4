"""Put trained weights and logs into the repository.

    python -m demo.study.ship [--teacher RUN] [--student RUN] [--joint RUN]

Copies the weights to ``demo/weights`` and the logs to ``demo/logs``, and writes size and hash of the
student's ΔConv weights into their record in ``weights_manifest.json``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path

from deltaconv_core import load_checkpoint

from ..files import joint_file, student_file, teacher_file

REPOSITORY = Path(__file__).parents[2]
LOGS = Path(__file__).parents[1] / "logs"


def manifest_record(student: Path) -> dict[str, object]:
    """The record of the ΔConv weights at ``student``, as `weights_manifest.json` holds it."""
    architecture = load_checkpoint(student).architecture
    return {
        "name": "demo",
        "title": "ΔConv demo model: shapes from a few words (comes with the extension)",
        "architecture": architecture,
        "base_model": "ΔConv Demo Model",
        "recommended_for": [architecture],
        "source": {"path": student_file().relative_to(REPOSITORY).as_posix()},
        "size": student.stat().st_size,
        "sha256": hashlib.sha256(student.read_bytes()).hexdigest(),
        "form": {"gate": None, "scales": None, "pooling": None},
        "licence": "Apache-2.0",
        "citation": "ComfyUI-DeltaConv, demo/study/train_student.py",
        "note": "Small on purpose: it shows what the nodes do, not what ΔConv saves on large models.",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--teacher", type=Path, help="output folder of demo.study.train_teacher")
    add("--student", type=Path, help="output folder of demo.study.train_student")
    add("--joint", type=Path, help="output folder of demo.study.train_teacher --model joint")
    args = parser.parse_args()
    for name, weights, target in (
        ("teacher", "teacher.safetensors", teacher_file()),
        ("student", "deltaconv.safetensors", student_file()),
        ("joint", "teacher.safetensors", joint_file()),
    ):
        if run := getattr(args, name):
            copy(run / weights, target)
            copy(run / "log.csv", LOGS / f"{name}.csv")
    if args.student:
        record_student()


def copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    print(f"{target.relative_to(REPOSITORY)}: {target.stat().st_size:,} bytes")


def record_student() -> None:
    """Write the record of the ΔConv weights into the manifest."""
    manifest = REPOSITORY / "weights_manifest.json"
    record = manifest_record(student_file())
    records = [other for other in json.loads(manifest.read_text()) if other["name"] != record["name"]]
    manifest.write_text(json.dumps([*records, record], indent=2, ensure_ascii=False) + "\n")
    print(f"{manifest.name}: record {record['name']!r}, sha256 {record['sha256']}")


if __name__ == "__main__":
    main()
