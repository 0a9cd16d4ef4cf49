"""A network of its own for every task: the reference that DEN is measured against."""

from __future__ import annotations

import statistics
import time
from typing import Any

from fastcl.runner import Run


def separate(config: Any) -> dict[str, Any]:
    """Every network's accuracy on its task, and all their parameters."""
    start, accuracy, parameters = time.process_time(), [], 0
    whole = Run(config)
    for task in whole.stream.tasks:
        run = Run(config)
        run.learner.begin_task(task)
        x, y = task.train()
        for _ in range(run.config.epochs):
            for a, b in run._batches(x, y, shuffle=True):
                run.learner.observe(a, b)
        accuracy.append(_own(run, task))
        head = run.learner.model[-1]
        unused = (head.out_features - len(task.classes)) * (head.in_features + 1)
        parameters += sum(p.numel() for p in run.learner.model.parameters()) - unused
    return {
        "average_accuracy": statistics.mean(accuracy),
        "forgetting": 0.0,
        "accuracy": [accuracy],
        "parameters": parameters,
        "seconds": time.process_time() - start,
        "versions": {},
    }


def _own(run: Any, task: Any) -> float:
    x, y = task.test()
    right = [int((run.learner.predict(a, 0) == b).sum()) for a, b in zip(x.split(1024), y.split(1024), strict=True)]
    return sum(right) / len(x)
