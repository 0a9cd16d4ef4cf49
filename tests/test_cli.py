from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastcl.bench.race import Call, Contest, race
from fastcl.cli import main

from .conftest import ROOT


def fastcl(*args: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastcl", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd or ROOT, timeout=300)


def test_run_writes_result_and_picture(tmp_path: Path) -> None:
    out, plot = tmp_path / "result.json", tmp_path / "result.png"
    options = ["--option", "strength=50", "--option", "form=separate"]
    done = fastcl("run", "ewc", "--setting", "task", "--epochs", 2, *options, "--out", out, "--plot", plot)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    wanted = "method setting scenario data seed accuracy average_accuracy forgetting acc_generated parameters"
    assert set(wanted.split()) | {"seconds", "versions"} <= set(result)
    assert result["options"] == {"strength": 50.0, "form": "separate"}
    assert result["acc_generated"] is None
    assert len(result["accuracy"]) == 5
    assert plot.read_bytes()[:4] == b"\x89PNG"
    assert "average" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["result.json", "result.png"]


def test_methods_and_info() -> None:
    listed = json.loads(fastcl("methods", "--json").stdout)
    assert {"finetune", "joint", "ewc"} <= {m["name"] for m in listed}
    assert all(set(m) >= {"name", "paper", "seed"} for m in listed)
    assert "ewc" in fastcl("methods").stdout
    assert json.loads(fastcl("info").stdout)["kernels"]["masked_grad_"] in ("c++", "reference")


def test_bench_writes_table_and_picture(tmp_path: Path) -> None:
    done = fastcl("bench", "--quick", "--threads", 1, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bench.json", "bench.md", "bench.png"]
    result = json.loads((tmp_path / "bench.json").read_text())
    table = (tmp_path / "bench.md").read_text()
    assert len(result["cases"]) == 10
    for case in result["cases"]:
        assert len(case["medians"]) >= 3
        assert all(0 < seconds < 60 for seconds in case["medians"].values())
        assert f"| {case['name']} | " in table
    assert (tmp_path / "bench.png").read_bytes()[:4] == b"\x89PNG"
    assert "EM iteration" in done.stdout


def test_race_compares_before_it_times() -> None:
    timed = []

    def check(contenders: dict[str, Call]) -> None:
        torch.testing.assert_close(contenders["other"](), contenders["fastcl"]())

    contest = Contest({"fastcl": lambda: torch.ones(2), "other": lambda: torch.zeros(2)}, check)
    contest.contenders["third"] = lambda: timed.append(1)
    with pytest.raises(AssertionError, match="not close"):
        race(contest, torch.device("cpu"))
    assert not timed


BAD = {
    "bench device": (["bench", "--device", "quantum"], "device is 'quantum' but cannot be used here"),
    "bench threads": (["bench", "--threads", "0"], "threads is 0 but must be at least 1"),
    "unknown method": (["run", "sgd"], "method is 'sgd' but must be one of finetune, joint, ewc, mas, si, rwalk"),
    "unknown data": (["run", "ewc", "--data", "svhn"], "data is 'svhn'"),
    "unknown scenario": (["run", "ewc", "--scenario", "shuffled"], "scenario is 'shuffled'"),
    "unknown setting": (["run", "ewc", "--setting", "both"], "setting is 'both'"),
    "tasks": (["run", "ewc", "--tasks", "3"], "tasks is 3 but must divide the 10 classes of digits"),
    "epochs": (["run", "ewc", "--epochs", "0"], "epochs is 0"),
    "batch size": (["run", "ewc", "--batch-size", "-1"], "batch_size is -1"),
    "learning rate": (["run", "ewc", "--lr", "-1"], "lr is -1.0"),
    "threads": (["run", "ewc", "--threads", "0"], "threads is 0"),
    "device": (["run", "ewc", "--device", "quantum"], "device is 'quantum'"),
    "no data": (["run", "ewc", "--data", "mnist", "--data-root", "nowhere"], "no train-images-idx3-ubyte"),
    "unknown option": (["run", "ewc", "--option", "power=2"], "option 'power' is unknown to ewc: it has budget, form"),
    "option without value": (["run", "ewc", "--option", "form"], "must be key=value"),
    "option type": (["run", "ewc", "--option", "strength=strong"], "must be of type float"),
    "option value": (["run", "ewc", "--option", "strength=-1"], "strength is -1.0"),
    "plot format": (["run", "ewc", "--plot", "x.bmp"], "must end in .png"),
    "resume without folder": (["run", "ewc", "--resume"], "resume needs checkpoint"),
    "resume from nothing": (["run", "ewc", "--resume", "--checkpoint", "none"], "is not a checkpoint"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_writes_nothing(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    args, message = BAD[case]
    out = [] if args[:1] != ["run"] else ["--out", str(tmp_path / "result.json")]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fastcl", *args, *out])
    with pytest.raises(SystemExit) as ending:  # in this process: three seconds of imports less for every case
        main()
    assert ending.value.code == 2
    told = capfd.readouterr().err
    assert message in told
    assert told.startswith("fastcl: ")
    assert len(told.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_bad_input_ends_the_process_with_2(tmp_path: Path) -> None:
    done = fastcl("run", "sgd", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("fastcl: method is 'sgd'")
    assert len(done.stderr.strip().splitlines()) == 1


def test_missing_extra_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise ImportError('gone', name='typer')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from fastcl.cli import main"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.strip() == "fastcl: the command line needs the package typer: run `pip install 'fastcl[cli]'`"
