"""Runs the sections one after another, each in a process of its own, until the time is up; prints JSON lines and a table."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.sections import NAMES, SECTIONS, Section

ROOT = Path(__file__).resolve().parents[2]
RESERVE = 5.0
"""Seconds below which no further section is started."""
FAILED, MISTAKE, NOT_RUN = 1, 2, 3
NO_GPU = "no GPU"
ENDS = {
    "ok": "all held",
    "failed": "checks failed",
    "crashed": "crashed",
    "time": "ended at its limit",
    "not run": "not run",
}


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0 all checks held; 1 one failed, or a section crashed or took too long; 2 no GPU; 3 the time was up before."""
    given = _parser().parse_args(arguments)
    if given.section:
        return _child(given)
    deadline = time.monotonic() + 60 * given.minutes
    what = _what(given)
    if what["device"] == NO_GPU:
        print(
            f"error: torch {what['torch']} sees no GPU here; --device cpu --tiny checks the check itself",
            file=sys.stderr,
        )
        return MISTAKE
    out = Path(given.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    results = []
    for section in SECTIONS:
        if section.name not in (given.sections or NAMES):
            continue
        result = _kept(out, section, what)
        if result is None:
            result = _run(section, given, out, deadline - time.monotonic()) | {"of": what}
            if result["end"] in ("ok", "failed"):
                (out / f"{section.name}.json").write_text(
                    json.dumps(result, ensure_ascii=False, indent=1), encoding="utf-8"
                )
        else:
            result["kept"] = True
        results.append(result)
        print("\n".join(_lines(result)), flush=True)
    lines = [line for r in results for line in _lines(r)]
    (out / "results.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    table = _table(results, what)
    (out / "report.md").write_text(table, encoding="utf-8")
    print("\n" + table)
    ends = {r["end"] for r in results}
    return FAILED if ends & {"failed", "crashed", "time"} else NOT_RUN if "not run" in ends else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description="Check the first GPU there is.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes of a test instead of the published network")
    parser.add_argument("--minutes", type=float, default=12.0, help="stop after this time (default 12)")
    parser.add_argument("--sections", nargs="+", metavar="NAME", choices=NAMES, help=", ".join(NAMES))
    parser.add_argument(
        "--out",
        default="gpu-check",
        metavar="FOLDER",
        help="results; those of the same code, device and torch are kept",
    )
    parser.add_argument("--section", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--plant", help=argparse.SUPPRESS)
    return parser


# -- one section, in its own process ------------------------------------------------------------------------------------


def _child(given: argparse.Namespace) -> int:
    """Run one section here; rows go to the file --out."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # before CUDA starts, or deterministic=true cannot be tried
    import torch

    from benchmarks.gpu_check import plants
    from benchmarks.gpu_check.setting import Report, Setting

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")) if given.device == "cpu" else 4)
    device = torch.device("cuda", 0) if given.device == "cuda" else torch.device("cpu")
    given.folder.mkdir()
    report = Report(Path(given.out))
    with plants.planted(given.plant):
        section = importlib.import_module(f"benchmarks.gpu_check.{given.section}")
        section.run(Setting(device, given.tiny, given.folder), report)
    return 0


def _run(section: Section, given: argparse.Namespace, out: Path, left: float) -> dict[str, Any]:
    """The result of a section: how it ended, its rows, seconds, and the last lines of a crash."""
    result: dict[str, Any] = {"section": section.name, "end": "not run", "rows": [], "seconds": 0.0, "error": ""}
    if left < RESERVE:
        return result
    log, began = out / f"{section.name}.log", time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as folder:
        rows = Path(folder) / "rows.jsonl"
        words = ["--section", section.name, "--device", given.device, "--out", str(rows), "--folder", f"{folder}/files"]
        words += ["--tiny"] * given.tiny + (["--plant", given.plant] if given.plant else [])
        code = _ended(words, log, min(float(section.limit), left))
        result["seconds"] = round(time.monotonic() - began, 1)
        result["rows"] = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    result["end"] = "time" if code is None else "crashed" if code else "ok"
    if code == 0 and any(r["ok"] is False for r in result["rows"]):
        result["end"] = "failed"
    if code != 0:
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-3:]
        result["error"] = f"exit status {code}: " * (code is not None) + " | ".join(last)[-600:]
    return result


def _ended(words: list[str], log: Path, limit: float) -> int | None:
    """The exit status of the section's process; None when it was ended after `limit` seconds, with all that it started."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with open(log, "wb") as text:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu_check", *words],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": paths},
            stdout=text,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


# -- results ------------------------------------------------------------------------------------------------------------


def _what(given: argparse.Namespace) -> dict[str, Any]:
    """What results depend on: the code, the device, torch, the sizes."""
    version, device = importlib.metadata.version("torch"), given.device
    if device == "cuda":
        asked = "import torch; print(torch.__version__, torch.cuda.is_available() and torch.cuda.get_device_name(0))"
        found = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=False)
        version, _, device = found.stdout.strip().partition(" ") if found.returncode == 0 else (version, "", "False")
        device = NO_GPU if device == "False" else device
    digest = hashlib.sha256()
    for folder in ("multitrain", "launch", "benchmarks"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    sizes = {"tiny": given.tiny, "plant": given.plant}
    return {"code": digest.hexdigest()[:16], "device": device, "torch": version, **sizes}


def _kept(out: Path, section: Section, what: dict[str, Any]) -> dict[str, Any] | None:
    """An earlier result of a section that ran to its end; None if it was of something else."""
    try:
        found: dict[str, Any] = json.loads((out / f"{section.name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if found.get("of") == what else None


def _lines(result: dict[str, Any]) -> list[str]:
    """A result as JSON lines: one a row, and one for the section."""
    head = {k: v for k, v in result.items() if k != "rows"}
    rows = [{"section": result["section"], **row} for row in result["rows"]]
    return [json.dumps(line, ensure_ascii=False) for line in [*rows, head]]


def _table(results: list[dict[str, Any]], what: dict[str, Any]) -> str:
    """The report in Markdown: sections first, then every row."""
    titles = {s.name: s.title for s in SECTIONS}
    checks = {r["section"]: [row["ok"] for row in r["rows"] if row["ok"] is not None] for r in results}
    lines = [f"GPU check: {what['device']}, torch {what['torch']}, code {what['code']}", ""]
    lines += ["| section | end | checks | seconds |", "|---|---|---|---|"]
    for r in results:
        held = checks[r["section"]]
        end = ENDS[r["end"]] + (" (kept)" if r.get("kept") else "") + (f": {_cell(r['error'])}" if r["error"] else "")
        lines.append(f"| {titles[r['section']]} | {end} | {sum(held)} of {len(held)} | {r['seconds']:.0f} |")
    for r in results:
        if r["rows"]:
            lines += ["", titles[r["section"]], "", "| figure | value | held | note |", "|---|---|---|---|"]
            lines += [_row(row) for row in r["rows"]]
    missing = [titles[r["section"]] for r in results if r["end"] == "not run"]
    if missing:
        lines += ["", f"Not run, because the time was up: {'; '.join(missing)}. The same command goes on from here."]
    return "\n".join(lines) + "\n"


def _row(row: dict[str, Any]) -> str:
    value = row["value"]
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    held = {True: "yes", False: "**no**", None: ""}[row["ok"]]
    return f"| {_cell(row['name'])} | {_cell(text)} {row['unit']} | {held} | {_cell(row['note'])} |"


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")
