"""Names of results: none is lost, none replaces what it should not, and their number costs time in proportion only."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from harmoq_ao.common.errors import ConfigError, DatasetError, OutputError
from harmoq_ao.images import Found
from harmoq_ao.runtime.targets import Naming, Plan, plan_jobs


def files(folder: Path, *names: str) -> list[Found]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"image")
    return [Found(folder / name, Path(name)) for name in names]


def targets(plan: Plan, output: Path) -> list[str]:
    return [job.target.relative_to(output).as_posix() for job in plan.jobs]


def test_names_of_results(tmp_path: Path) -> None:
    given, out = files(tmp_path / "in", "b.png", "a/c.JPG", "a/d.gif"), tmp_path / "out"
    assert targets(plan_jobs(given, Naming(out)), out) == ["b.png", "c.JPG", "d.png"]
    assert targets(plan_jobs(given, Naming(out, "_x2", mirror=True)), out) == ["b_x2.png", "a/c_x2.JPG", "a/d_x2.png"]
    assert not out.exists()


def test_suffixes_that_cannot_be_written_do_not_collide(tmp_path: Path) -> None:
    given = files(tmp_path / "in", "frame.gif", "frame.png", "frame.ppm", "other.gif")
    names = targets(plan_jobs(given, Naming(tmp_path / "out")), tmp_path / "out")
    assert names == ["frame.gif.png", "frame.png", "frame.ppm.png", "other.png"]
    twins = files(tmp_path / "in", "a/x.png", "b/x.png")
    with pytest.raises(DatasetError, match=r"one file. Found: .*a/x.png and .*b/x.png, to .*--recursive"):
        plan_jobs(twins, Naming(tmp_path / "out"))
    assert len(plan_jobs(twins, Naming(tmp_path / "out", mirror=True)).jobs) == 2
    appended = files(tmp_path / "in", "y.gif", "y.png", "y.gif.png")
    with pytest.raises(DatasetError, match=r"y.gif"):
        plan_jobs(appended, Naming(tmp_path / "out"))


def test_an_image_that_is_named_twice_is_made_once(tmp_path: Path) -> None:
    given = files(tmp_path / "in", "a.png")
    assert len(plan_jobs([*given, *given], Naming(tmp_path / "out")).jobs) == 1


def test_one_image_to_one_file(tmp_path: Path) -> None:
    given = files(tmp_path / "in", "a.png", "b.png")
    plan = plan_jobs(given[:1], Naming(tmp_path / "new.jpg"))
    assert [job.target for job in plan.jobs] == [tmp_path / "new.jpg"]
    with pytest.raises(ConfigError, match=r"names one file. Found: 2 images"):
        plan_jobs(given, Naming(tmp_path / "new.jpg"))
    with pytest.raises(ConfigError, match=r"names one file. Found: a --suffix"):
        plan_jobs(given[:1], Naming(tmp_path / "new.jpg", "_x2"))
    for suffix in ("gif", "avif", "heic"):
        with pytest.raises(OutputError, match=f"suffix '.{suffix}'"):
            plan_jobs(given[:1], Naming(tmp_path / f"new.{suffix}"))
    with pytest.raises(OutputError, match="no folder"):
        plan_jobs(given[:1], Naming(tmp_path / "none" / "new.jpg"))
    (tmp_path / "folder.png").mkdir()
    assert targets(plan_jobs(given, Naming(tmp_path / "folder.png")), tmp_path / "folder.png") == ["a.png", "b.png"]


def test_what_is_there(tmp_path: Path) -> None:
    given, out = files(tmp_path / "in", "a.png", "b.png", "c.png"), tmp_path / "out"
    files(out, "a.png")
    (out / "b.png").touch()  # empty: what a full disk left
    with pytest.raises(OutputError, match=r"2 of the images exist already. Found: .*a.png.*--skip-existing"):
        plan_jobs(given, Naming(out))
    assert targets(plan_jobs(given, Naming(out, overwrite=True)), out) == ["a.png", "b.png", "c.png"]
    plan = plan_jobs(given, Naming(out, skip_existing=True))
    assert targets(plan, out) == ["b.png", "c.png"]
    assert plan.kept == [given[0].path]
    with pytest.raises(ConfigError, match="both replaced and kept"):
        Naming(out, overwrite=True, skip_existing=True)


def test_sources_are_never_replaced(tmp_path: Path) -> None:
    given = files(tmp_path, "a.png")
    for naming in (Naming(tmp_path, overwrite=True), Naming(tmp_path, skip_existing=True), Naming(tmp_path / "a.png")):
        with pytest.raises(OutputError, match="its own source"):
            plan_jobs(given, naming)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.png").hardlink_to(given[0].path)  # the same file by another name
    with pytest.raises(OutputError, match="its own source"):
        plan_jobs(given, Naming(tmp_path / "out", overwrite=True))
    both = files(tmp_path / "b", "a.png", "a_x2.png")
    with pytest.raises(OutputError, match="another's source"):
        plan_jobs(both, Naming(tmp_path / "b", "_x2", overwrite=True))


def test_results_in_the_folder_of_the_images_are_not_made_larger_again(tmp_path: Path) -> None:
    given = files(tmp_path, "a.png", "a_x2.png", "b.png")
    plan = plan_jobs(given, Naming(tmp_path, "_x2", skip_existing=True))
    assert targets(plan, tmp_path) == ["b_x2.png"]
    assert (plan.kept, plan.results) == ([tmp_path / "a.png"], [tmp_path / "a_x2.png"])


@pytest.mark.parametrize("output", ["file", "file/below", "a/" + "x" * 300])
def test_outputs_that_are_no_folder(tmp_path: Path, output: str) -> None:
    given = files(tmp_path / "in", "a.png")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written to"):
        plan_jobs(given, Naming(tmp_path / output))


def test_time_is_in_proportion_to_the_number(tmp_path: Path) -> None:
    def calls(count: int) -> int:
        given = [Found(tmp_path / f"{index}.png", Path(f"{index}.png")) for index in range(count)]
        seen = 0

        def see(frame: object, event: str, argument: object) -> None:
            nonlocal seen
            seen += event in ("call", "c_call")

        sys.setprofile(see)
        try:
            jobs = plan_jobs(given, Naming(tmp_path / "out")).jobs
        finally:
            sys.setprofile(None)
        assert len(jobs) == count
        return seen

    calls(10)
    assert calls(2_000) < 12 * calls(200)  # 100 times as many where it is quadratic
