"""What the tests of generative memories share: a stream, small networks, and a short run."""

from __future__ import annotations

import torch

from fastcl import streams
from fastcl.methods import Method

STREAM = streams.make(streams.load("digits"), "split", "class", 5)
GAN = {"width": 4, "discriminator_width": 4, "latent": 16}


def run_tasks(learner: Method, stream: streams.Stream, tasks: int, steps: int = 6) -> Method:
    torch.manual_seed(0)
    for task in stream.tasks[:tasks]:
        learner.begin_task(task)
        x, y = learner.training_data(task)
        for part in torch.randperm(len(x))[: 32 * steps].split(32):
            learner.observe(x[part], y[part])
        learner.end_task([task.train()])
    return learner
