"""What the command line is given and where it writes: refused in one sentence, before training, nothing changed.

In this process: `train` is replaced where only the arguments are asked about.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastcl import checkpoint, cli
from fastcl._paths import check_outputs
from fastcl.methods import METHODS
from fastcl.runner import Config, Run

from .conftest import ROOT
from .streams.test_streams import write_mnist

TRAINED = 77
QUICK = ["run", "ewc", "--setting", "task", "--tasks", "2", "--epochs", "1", "--option", "hidden=(8,)"]


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: object) -> tuple[Any, str]:
    """Exit status (None: ended well) and stderr of `fastcl ARGS`; any other exception is a traceback, and fails."""
    monkeypatch.setattr(sys, "argv", ["fastcl", *map(str, args)])
    try:
        cli.main()
    except SystemExit as ending:
        return ending.code or None, capsys.readouterr().err
    return None, capsys.readouterr().err


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(run: Run) -> None:
        raise SystemExit(TRAINED)

    monkeypatch.setattr(cli, "_train", stop)


def places(root: Path) -> dict[str, tuple[list[object], str]]:
    """Arguments and what must be said about them."""
    (root / "file").write_text("mine")
    (root / "folder").mkdir()
    (root / "loop").symlink_to(root / "loop")
    os.mkfifo(root / "pipe")
    write_mnist(root / "data")
    mnist = ["--data", "mnist", "--data-root", root / "data"]
    images = root / "data" / "train-images-idx3-ubyte.gz"
    (root / "link").symlink_to(images)
    run = root / "run"
    return {
        "NUL in data_root": (["--data", "mnist", "--data-root", "a\0b"], "data_root is .* no NUL"),
        "folder": (["--out", root / "folder"], "out is the folder"),
        "folder for a picture": (["--plot", root / "folder"], r"must end in \.png"),
        "loop": (["--out", root / "loop"], "a link that leads round to itself"),
        "checkpoint in a loop": (["--checkpoint", root / "loop"], "checkpoint is .* round to itself"),
        "data in a loop": (["--data", "mnist", "--data-root", root / "loop"], "no train-images-idx3-ubyte"),
        "data in a file": (["--data", "mnist", "--data-root", root / "file"], "no train-images-idx3-ubyte"),
        "pipe": (["--out", root / "pipe"], "a device or pipe"),
        "device": (["--out", "/dev/null"], "a device or pipe"),
        "file in the way": (["--out", root / "file" / "result.json"], "cannot be written: Not a directory"),
        "checkpoint is a file": (["--checkpoint", root / "file"], "checkpoint is the file .* must be a folder"),
        "out in checkpoint": (["--checkpoint", run, "--out", run / "state.json"], "a file of the checkpoint"),
        "out is checkpoint": (["--checkpoint", run, "--out", run], "out is .* but so is checkpoint"),
        "out is plot": (["--out", root / "x.png", "--plot", root / "x.png"], "plot is .* but so is out"),
        "out is an input": ([*mnist, "--out", images], "out is .* but that is an input"),
        "out leads to an input": ([*mnist, "--out", root / "link"], "out is .* but that is an input"),
        "a name too long": (["--out", root / ("x" * 300) / "y"], "cannot be written"),
        "a name too long for its temporary one": (
            ["--out", root / ("x" * 250)],
            "cannot be written: File name too long",
        ),
        "no such filesystem": (["--out", "/proc/fastcl/result.json"], "cannot be written"),
        "checkpoint there": (["--checkpoint", "/proc/fastcl"], "checkpoint is /proc/fastcl but cannot be written"),
        "previous of nothing": (["--checkpoint", run, "--previous"], r"has no previous\.json"),
        "previous without folder": (["--previous"], "resume needs checkpoint"),
    }


def listing(root: Path) -> dict[str, Any]:
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(root.rglob("*"))}


@pytest.mark.usefixtures("untrained")
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's file systems")
def test_places_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = places(tmp_path)
    before = listing(tmp_path)
    for name, (args, message) in cases.items():
        status, said = call(monkeypatch, capsys, *QUICK, *args)
        assert status == 2, (name, said)
        assert len(said.strip().splitlines()) == 1, said
        assert re.search(message, said), (name, said)
    assert listing(tmp_path) == before
    good = ["--out", tmp_path / "new" / "r.json", "--plot", tmp_path / "p.png", "--checkpoint", tmp_path / "run"]
    assert call(monkeypatch, capsys, *QUICK, *good)[0] == TRAINED
    assert listing(tmp_path) == before


def full(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """The disk is full from the `after`-th flush on."""
    real, left = os.fsync, [after]

    def fsync(handle: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_full_disk_is_known_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], untrained: None
) -> None:
    for option, name in (("--out", "r.json"), ("--plot", "r.png"), ("--checkpoint", "run")):
        with monkeypatch.context() as context:
            full(context, 0)
            status, said = call(context, capsys, *QUICK, option, tmp_path / name)
        assert (status, said.count("\n")) == (2, 1)
        assert f"{option[2:]} is {tmp_path / name} but cannot be written: No space left on device" in said
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_the_old_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, run = tmp_path / "result.json", tmp_path / "run"
    out.write_text("old")
    with monkeypatch.context() as context:
        full(context, 1)
        status, said = call(context, capsys, *QUICK, "--out", out)
    assert (status, out.read_text()) == (1, "old")
    wanted = "No space left on device; nothing to go on from: --checkpoint keeps one, --resume continues from it"
    assert said == f"fastcl: {wanted}\n"
    with monkeypatch.context() as context:
        full(context, 2 + 4 + 1)  # two probes, the first checkpoint's two files and their folder; into the second
        status, said = call(context, capsys, *QUICK, "--out", out, "--checkpoint", run)
    assert status == 1
    assert f"; the same command with --resume continues from the last epoch in {run}" in said
    assert checkpoint.load(run)["epoch"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["result.json", "run"]
    assert not list(run.glob("*.tmp"))
    assert call(monkeypatch, capsys, *QUICK, "--out", out, "--checkpoint", run, "--resume")[0] is None
    assert '"method": "ewc"' in out.read_text()


def test_files_that_may_not_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The kernel's own limit instead of a replaced function: the checkpoint's tensors do not fit."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        status, said = call(monkeypatch, capsys, *QUICK, "--checkpoint", tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 1
    assert said.startswith("fastcl: File too large; --resume has nothing to go on from")
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes everywhere")
def test_read_only_folders(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OSError, match="cannot be written: Permission denied"):
            check_outputs({"out": tmp_path / "result.json"})
    finally:
        tmp_path.chmod(0o700)


def test_ctrl_c_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop_in(epoch: int) -> Any:
        real = Run.train

        def train(run: Run, report: Any = None) -> Any:
            def stop(task: int, now: int, *rest: Any) -> None:
                if now == epoch:
                    raise KeyboardInterrupt

            return real(run, stop)

        return train

    args = [*QUICK, "--epochs", 2, "--checkpoint", tmp_path]
    for epoch, message in ((0, "no epoch has ended in"), (1, "--resume continues from the last epoch in")):
        with monkeypatch.context() as context:
            context.setattr(Run, "train", stop_in(epoch))
            status, said = call(context, capsys, *args)
        assert status == 130
        assert said.startswith("fastcl: interrupted; ")
        assert f"{message} {tmp_path}" in said
    assert call(monkeypatch, capsys, *args, "--resume")[0] is None


def test_resume_from_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [*QUICK, "--checkpoint", tmp_path / "run"]
    assert call(monkeypatch, capsys, *args)[0] is None
    whole = checkpoint.load(tmp_path / "run")
    (tmp_path / "run" / "state.json").write_text("{}")
    status, said = call(monkeypatch, capsys, *args, "--resume")
    assert status == 2
    assert "the one before it is whole: previous=True (--previous) reads it" in said
    status, said = call(monkeypatch, capsys, *args, "--previous")
    assert status is None
    assert said == "fastcl: goes on from the previous checkpoint: task 2, epoch 1\n"
    again = checkpoint.load(tmp_path / "run")
    weights = [state["learner"]["model"] for state in (whole, again)]
    assert all(torch.equal(t, weights[1][name]) for name, t in weights[0].items())


def test_resume_refuses_what_is_not_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [*QUICK, "--checkpoint", tmp_path]
    call(monkeypatch, capsys, *args)
    good = checkpoint.load(tmp_path)
    for change, message in {
        "hidden": ({"learner": {**good["learner"], "model": {}}}, "does not fit: state does not fit this EWC"),
        "task": ({"task": 9}, "is of task 9, epoch 0"),
        "accuracy": ({"accuracy": []}, "its accuracies are"),
        "rng": ({"rng": torch.zeros(3, dtype=torch.uint8)}, "RNG state"),
        "config": ({"config": 3}, "is not of a run"),
        "method": ({"learner": {**good["learner"], "method": "mas"}}, "state is of the method 'mas'"),
    }.values():
        checkpoint.save(tmp_path, {**good, **change})
        status, said = call(monkeypatch, capsys, *args, "--resume")
        assert status == 2, said
        assert message in said
        assert said.count("\n") == 1
    for other in (["--option", "strength=3"], ["--seed", "1"]):
        status, said = call(monkeypatch, capsys, *args, *other, "--resume")
        assert (status, "was made with" in said) == (2, True)


ODD = ["", "None", "()", "(8,", "[]" * 99, "(" * 300, "-" * 5000, "9" * 5000, "1e999", "{1:[2]}", "x=y", "\0"]
TEXT = st.one_of(st.text(max_size=30), st.integers().map(str), st.floats().map(str), st.sampled_from(ODD))
OPTIONS = ("strength", "hidden", "form", "epochs", "budget", "s_max", "width", "latent", "r", "labels", "unknown")
FLAGS = ("--data", "--scenario", "--setting", "--tasks", "--epochs", "--batch-size", "--lr", "--seed", "--device")


@settings(max_examples=200, deadline=None, suppress_health_check=[*HealthCheck])
@given(method=st.sampled_from([*METHODS, "sgd"]), data=st.data())
def test_no_option_makes_a_traceback(method: str, data: st.DataObject) -> None:
    pairs = data.draw(st.lists(st.one_of(TEXT, st.builds("{}={}".format, st.sampled_from(OPTIONS), TEXT)), max_size=3))
    try:
        found = cli._options(method, pairs)
    except cli._BadInput:
        return
    assert set(found) <= {pair.partition("=")[0] for pair in pairs}


@pytest.mark.usefixtures("untrained")
@settings(max_examples=60, deadline=None, suppress_health_check=[*HealthCheck])
@given(method=st.sampled_from(["ewc", "hat", "nothing", "--help", ""]), data=st.data())
def test_no_argument_makes_a_traceback(
    method: str, data: st.DataObject, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Whatever stands on the command line: it would train, it prints help, or one error with status 2."""
    values = st.one_of(TEXT, st.sampled_from(["digits", "split", "task", "cpu", "2", "0", "-1", str(2**70), "nan"]))
    pairs = data.draw(
        st.lists(st.tuples(st.sampled_from([*FLAGS, "--option", "--out", "--resume", "--plot"]), values), max_size=4)
    )
    arguments = [part for pair in pairs for part in pair]
    with pytest.MonkeyPatch.context() as context:
        # a network of the wanted size is not what is asked about
        context.setattr(cli, "Run", lambda config, folder, **how: config.resolved())
        context.chdir(tmp_path)
        status, said = call(context, capsys, "run", method, *arguments)
    assert status in (None, 2, TRAINED), said
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["hidden=(-1,)", "hidden=('a',)", "hidden=(10000000000000,)", "hidden=3"])
def test_networks_that_cannot_be_built(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], untrained: None
) -> None:
    status, said = call(monkeypatch, capsys, "run", "ewc", "--option", option)
    assert status == 2
    assert said.count("\n") == 1
    assert "hidden" in said


def test_a_nul_in_a_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"out is '.*' but must have no NUL in it"):
        check_outputs({"out": tmp_path / "a\0b"})


def test_numbers_that_no_generator_takes() -> None:
    with pytest.raises(ValueError, match="seed is 1180591620717411303424 but must"):
        Config("ewc", seed=2**70).resolved()


KILLS = ROOT / ".ci" / "kills"


@pytest.mark.skipif(not KILLS.is_file() or not hasattr(os, "fork"), reason="a checkout on posix only")
@pytest.mark.parametrize("how", [[], ["--sigint"]], ids=["SIGKILL", "Ctrl-C"])
def test_killed_and_resumed_is_as_never_killed(how: list[str]) -> None:
    """Two kills of EWC and of HAT; 50 of each of four methods: `make kills`."""
    command = [sys.executable, str(KILLS), "--kills", "2", "--each", "2", "--epochs", "2", *how, "ewc", "hat"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("as one never killed, to the bit") == 2
