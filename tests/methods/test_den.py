"""DEN's stages, one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcl import checkpoint, streams
from fastcl.methods import DEN
from fastcl.nn import mlp
from fastcl.runner import Config, Run

STREAM = streams.make(streams.load("digits"), "permuted", "task", 3)


def learner(**options: Any) -> DEN:
    return DEN.build(STREAM, hidden=(20, 16), **{"split_epochs": 2, **options})


def trained(den: DEN, tasks: int, epochs: int = 3) -> DEN:
    for task in STREAM.tasks[:tasks]:
        den.begin_task(task)
        x, y = task.train()
        for _ in range(epochs):
            for part in torch.randperm(len(x)).split(64):
                den.observe(x[part], y[part])
        den.end_task([(x, y)])
    return den


def test_eq_3_moves_the_task_s_outputs_alone() -> None:
    den = trained(learner(), 1)
    before = [p.detach().clone() for p in den.model.parameters()]
    den.begin_task(STREAM.tasks[1])
    rows = list(STREAM.tasks[1].classes)
    for i, (p, old) in enumerate(zip(den.model.parameters(), before, strict=True)):
        changed = (p != old).flatten(1).any(1) if p.dim() == 2 else p != old
        if i < len(before) - 2:
            assert not changed.any()
        else:
            assert changed[rows].any()
            changed[rows] = False
            assert not changed.any()


def test_selection_is_breadth_first_over_nonzero_weights() -> None:
    den = trained(learner(), 1)
    den.tasks.append(STREAM.tasks[1].classes)
    _, two, head = den.layers
    with torch.no_grad():
        head.weight[list(den.tasks[-1])] = 0
        head.weight[den.tasks[-1][0], [3, 5]] = 1.0
        two.weight[3] = 0
        two.weight[3, 7] = 1.0
        two.weight[5] = 0
        two.weight[5, [7, 9]] = 1.0
    below, above = den._reached()
    assert above.nonzero().flatten().tolist() == [3, 5]
    assert below.nonzero().flatten().tolist() == [7, 9]


def test_eq_4_moves_the_selected_sub_network_alone() -> None:
    den = trained(learner(), 1)
    den.begin_task(STREAM.tasks[1])
    rows, above = den._selected[0].clone(), den._selected[1].clone()
    rows[: len(rows) // 2] = False
    above[::2] = False
    den._stage(den._free([rows, above], [rows, above]))
    before = [p.detach().clone() for p in den.model.parameters()]
    x, y = STREAM.tasks[1].train()
    den.observe(x, y)
    first, second = den.layers[0].weight != before[0], den.layers[1].weight != before[2]
    assert not first[~rows].any()
    assert not second[~above].any()
    assert not second[:, ~rows].any()
    assert second[above][:, rows].any()


def test_useless_new_units_go_again() -> None:
    few = trained(learner(group=1e4, k=7, tau=0.0, sigma=1e9), 2)
    assert few.reports[1]["removed"] == [7, 7]
    assert few.reports[1]["units"] == [20, 16]
    none = trained(learner(group=0.0, l1=0.0, k=7, tau=0.0, sigma=1e9), 2)
    assert none.reports[1]["added"] == [7, 7]
    assert none.reports[1]["units"] == [27, 23]
    assert [s.tolist().count(1) for s in none.stamps] == [7, 7]


def test_no_expansion_below_tau() -> None:
    den = trained(learner(tau=1e9), 2)
    assert den.reports[1]["added"] == den.reports[1]["removed"] == [0, 0]


def test_split_gives_the_old_unit_back_and_keeps_the_drifted_copy() -> None:
    den = trained(learner(k=0, split_epochs=0, sigma=0.0, hold=False), 1)
    den.begin_task(STREAM.tasks[1])
    x, y = STREAM.tasks[1].train()
    old = [layer.weight.detach().clone() for layer in den.layers]
    for part in torch.randperm(len(x)).split(64):
        den.observe(x[part], y[part])
    new = [layer.weight.detach().clone() for layer in den.layers]
    logits = den.logits(x, 1).detach()
    den.end_task([(x, y)])
    n, m = den.reports[1]["split"]
    drifted = (new[0] != old[0]).any(1)
    assert n == drifted.sum()
    assert torch.equal(den.layers[0].weight[:20], old[0])
    assert torch.equal(den.layers[0].weight[20:], new[0][drifted])
    assert torch.equal(den.layers[1].weight[:16, :20], old[1])
    assert (den.layers[1].weight[:16, 20:] == 0).all()  # no old unit reads a new one
    assert [len(s) for s in den.stamps] == [20 + n, 16 + m]
    if n == 20 and m == 16:  # everything of the new task was copied: its function is the same
        torch.testing.assert_close(den.logits(x, 1), logits, rtol=1e-4, atol=1e-4)


def test_old_tasks_do_not_change_by_a_bit_when_held() -> None:
    den = trained(learner(), 1)
    x = STREAM.tasks[0].test()[0]
    want = den.logits(x, 0).detach()
    weights = [p.detach().clone() for p in den.model.parameters()]
    for task in STREAM.tasks[1:]:
        den.begin_task(task)
        a, b = task.train()
        for part in torch.randperm(len(a)).split(64):
            den.observe(a[part], b[part])
        den.end_task([(a, b)])
    assert den.layers[0].out_features > 20
    for p, old in zip(den.model.parameters(), weights, strict=True):
        corner = p.detach()[tuple(slice(size) for size in old.shape)]
        if p.shape[0] == STREAM.n_outputs:  # the head: the first task's rows
            corner, old = corner[list(den.tasks[0])], old[list(den.tasks[0])]
        assert torch.equal(corner, old)
    torch.testing.assert_close(den.logits(x, 0), want)  # GEMMs of another size round otherwise
    assert torch.equal(den.predict(x, 0), torch.tensor(den.tasks[0])[want.argmax(1)])


def test_drift_is_pulled_back() -> None:
    """Eq. 6's pull against none: the stronger, the nearer to the past."""
    far = []
    for pull in (0.0, 50.0):
        torch.manual_seed(0)
        den = trained(learner(), 1)
        den.begin_task(STREAM.tasks[1])
        den._before = den._padded(den._before)
        den._stage(den._free(den._selected, den._selected), pull=pull)
        x, y = STREAM.tasks[1].train()
        for _ in range(10):
            den.observe(x, y)
        far.append(sum((p - q).square().sum().item() for p, q in zip(den.model.parameters(), den._before, strict=True)))
    assert far[1] < 0.8 * far[0]


def test_resumes_with_its_grown_network(tmp_path: Path) -> None:
    config = Config("den", scenario="permuted", setting="task", tasks=2, epochs=2, options={"split_epochs": 1})
    want = Run(config).train()
    run = Run(config, tmp_path)

    def stop(task: int, epoch: int, batch: int, batches: int, loss: float) -> None:
        if task == 1 and epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.train(stop)
    assert checkpoint.load(tmp_path)["task"] == 1
    got = Run(config, tmp_path, resume=True).train()
    assert got["accuracy"] == want["accuracy"]
    done = Run(config, tmp_path, resume=True)  # and from the end
    assert done.learner.reports == Run(config, tmp_path, resume=True).learner.reports
    assert len(done.learner.reports) == 2


def test_finetune_lowers_every_task_s_loss() -> None:
    den = trained(learner(), 2, epochs=1)
    tasks = STREAM.tasks[:2]

    def losses() -> list[float]:
        with torch.no_grad():
            return [den._loss_of(*task.train(), t).item() for t, task in enumerate(tasks)]

    before, stamps = losses(), [s.clone() for s in den.stamps]
    den.finetune(tasks, 3)
    assert all(now < then for now, then in zip(losses(), before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(den.stamps, stamps, strict=True))
    with pytest.raises(ValueError, match="3 tasks and 1 epochs"):
        den.finetune(STREAM.tasks, 1)


def test_picture(tmp_path: Path) -> None:
    trained(learner(), 3).plot_growth(tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 5000


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="Linear layers"):
        DEN(torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3)), setting="task")
    with pytest.raises(ValueError, match="sigma is"):
        DEN(mlp((4,), (4,), 2), setting="task", sigma=float("nan"))


def test_learns_and_keeps() -> None:
    config = Config("den", scenario="permuted", setting="task", tasks=3, epochs=6, options={"split_epochs": 5})
    result = Run(config).train()
    assert result["average_accuracy"] > 0.85
    assert result["forgetting"] < 0.02


def test_variation_is_balanced_and_repeatable() -> None:
    stream = streams.make(streams.load("digits"), "variation", "task", 10, seed=1)
    again = streams.make(streams.load("digits"), "variation", "task", 10, seed=1)
    for task, same in zip(stream.tasks, again.tasks, strict=True):
        x, y = task.train()
        counts: Tensor = y.bincount(minlength=20)
        assert counts[task.classes[0]] == counts[task.classes[1]] == len(y) / 2
        assert torch.equal(x, same.train()[0])
        assert x.min() >= 0
        assert x.max() <= 1
    with pytest.raises(ValueError, match="only 10 classes"):
        streams.make(streams.load("digits"), "variation", "task", 11)
