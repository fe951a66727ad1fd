"""What the doctor judges, on facts that are given: versions, threads, places to write."""

from __future__ import annotations

from pathlib import Path

import pytest

from looktwice.doctor import environment
from looktwice.doctor.environment import OPTIONAL, disk, findings, optional, report, required, shared_memory, threads


@pytest.mark.parametrize(
    ("found", "verdict"),
    [("2.13.0+cpu", "ok"), ("2.11", "ok"), ("3.0.0a1", "ok"), ("2.9.1", "problem"), (None, "problem")],
)
def test_an_old_or_missing_package_is_a_problem_with_its_mend(found: str | None, verdict: str) -> None:
    finding = required("torch", found, "2.11")
    assert finding.verdict == verdict
    assert ("pip install 'torch>=2.11'" in finding.mend) == (verdict == "problem")


def test_more_threads_than_cores_are_a_problem_and_idle_cores_a_note() -> None:
    assert threads(8, 2, None).verdict == "problem" and "OMP_NUM_THREADS=2" in threads(8, 2, None).mend
    assert threads(1, 8, "1").verdict == "note"
    assert threads(4, 8, None).verdict == threads(8, 8, None).verdict == "ok"


def test_an_optional_package_says_what_it_enables() -> None:
    video = next(each for each in OPTIONAL if each.package == "av")
    assert optional(video, "18.1.0").found == "18.1.0: video files"
    missing = optional(video, None)
    assert (missing.verdict, missing.mend) == ("note", "pip install 'looktwice[video]'")


def test_what_is_full_or_small_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert disk(tmp_path, 10**9).verdict == "note" and disk(tmp_path, 10**12).verdict == "ok"
    monkeypatch.setattr(environment, "LEAST_SHARED", 10**18)
    assert shared_memory(tmp_path).verdict == "note"
    assert shared_memory(tmp_path / "none").verdict == "ok"


def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied", str(dir))

    assert environment.writable(tmp_path / "not" / "yet").verdict == "ok"
    monkeypatch.setattr(environment.tempfile, "TemporaryFile", refuse)
    finding = environment.writable(tmp_path)
    assert finding.verdict == "problem" and "Permission denied" in finding.found


def test_the_report_has_all_that_was_looked_at(tmp_path: Path) -> None:
    found = report(tmp_path)
    assert found["devices"][-1]["name"] == "cpu" and found["devices"][-1]["attention"] == "sdpa"
    assert found["optional"].keys() == {each.package for each in OPTIONAL}
    assert [finding["name"] for finding in found["findings"]] == [finding.name for finding in findings(tmp_path)]


def test_every_required_package_is_one_of_the_project() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert all(f'"{package}>={least}"' in text for package, least in environment.REQUIRED.items())
    extras = {each.install for each in OPTIONAL if each.install.startswith("looktwice[")}
    assert all(f"\n{extra.removeprefix('looktwice[').removesuffix(']')} = [" in text for extra in extras)
