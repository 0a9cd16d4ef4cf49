"""The speeds in README and in fastcl/ops/*/README.md, and bench/results/speeds.png: python bench/speeds.py

Every figure is copied out of bench/results/*.md, so no page can say other than what was measured. In a page
``<!-- speeds: cpu.md CASE, CASE -->`` to ``<!-- /speeds -->`` becomes those rows; in README ``<!-- speeds -->``
becomes ROWS.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "fastcl" / "ops").glob("*/README.md"))]
PICTURE = RESULTS / "speeds.png"

# what it is; file and case of bench/results; contenders as (name in README, name there)
AUTOGRAD, COMPILED = ("eager autograd", "eager autograd"), ("torch.compile", "torch.compile")
PLAIN, BACKPACK = (
    ("an *ordinary* forward + backward", "plain forward + backward"),
    ("BackPACK", "BackPACK SumGradSquared"),
)
EAGER_ADAM = ("eager mask + torch's Adam", "eager mask + torch Adam")
FUSED_ADAM = ("fused Adam *without* a mask", "torch fused, no mask")
ROWS = [
    ("EWC penalty with gradient, MLP 0.5M", "cpu.md", "penalty_with_gradient[MLP-0.5M]", [AUTOGRAD, COMPILED]),
    (
        "the same, ResNet-18's 11.2M",
        "cpu.md",
        "penalty_with_gradient[ResNet-18-11.2M]",
        [AUTOGRAD, COMPILED],
    ),
    ("exact Fisher of a batch of 128, ResNet-18", "cpu.md", "fisher[ResNet-18-contiguous]", [PLAIN]),
    (
        "the same, 4-conv net",
        "cpu.md",
        "fisher[4-conv net-contiguous]",
        [PLAIN, BACKPACK, ("sample by sample", "sample by sample")],
    ),
    (
        "the same, MLP 0.5M",
        "cpu.md",
        "fisher[MLP 0.5M-contiguous]",
        [PLAIN, BACKPACK, ("torch.func", "torch.func, chunks of 16")],
    ),
    ("`MaskedAdam` step, bool mask, 9.9M", "cpu.md", "masked_step[DCGAN-9.9M-Adam]", [EAGER_ADAM, FUSED_ADAM]),
    ("the same, 200 tensors of 16", "cpu.md", "masked_step[200-tiny-tensors-Adam]", [EAGER_ADAM, FUSED_ADAM]),
    (
        "the same after a pass of its network, 10M",
        "cpu.md",
        "step_in_training[MLP 10M-Adam]",
        [EAGER_ADAM, FUSED_ADAM],
    ),
    (
        "`masked_grad_`, bool mask, 9.9M",
        "cpu.md",
        "masked_grad[DCGAN-9.9M-bool]",
        [
            ("(1 - m) * g", "loop (1 - m) * g"),
            ("`_foreach_mul_`, mask made before", "_foreach_mul_ (mask precomputed)"),
        ],
    ),
    (
        "`masked_weight` forward + backward, 10M",
        "cpu.md",
        "masked_weight[10000000]",
        [("eager", "eager"), COMPILED],
    ),
    (
        "`gmm_sample`, K = 10, D = 32, full",
        "cpu.md",
        "sampling[full-K=10-D=32]",
        [
            ("eager GEMMs", "eager, bucketed GEMMs"),
            ("torch.distributions", "torch.distributions"),
            ("scikit-learn", "scikit-learn"),
        ],
    ),
    (
        "`gmm_log_prob`, K = 10, D = 32",
        "cpu.md",
        "log_prob[full-K=10-D=32]",
        [("eager GEMMs", "eager GEMMs"), ("`MultivariateNormal`", "MultivariateNormal.log_prob")],
    ),
    (
        "EM iteration, K = 10, D = 32, full",
        "cpu.md",
        "em_iteration[full-K=10-D=32]",
        [("scikit-learn", "scikit-learn"), ("pomegranate", "pomegranate")],
    ),
    ("a whole DGM step, one-class digits", "cpu.md", "dgm_step[6-whole]", [("plain torch", "plain torch")]),
]


def read(name: str) -> dict[str, tuple[str, str, dict[str, float]]]:
    """Of a table that bench/report.py wrote: case -> (fastcl's time, the other cells as they stand, their ratios)."""
    cases = {}
    for line in (RESULTS / name).read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and "**" in cells[2]:
            ratios = {k: float(v) for k, v in re.findall(r"(?:^|, )((?:[^*]|\*(?!\*))+) \*\*([\d.]+)\*\*", cells[2])}
            cases[cells[0]] = cells[1], cells[2], ratios
    return cases


def short(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 20 else f"{ratio:.1f}" if ratio >= 2 else f"{ratio:.2f}"


def summary() -> str:
    lines = ["| | contender | ratio |", "|---|---|---|"]
    for what, name, case, contenders in ROWS:
        ratios = read(name)[case][2]
        lines.append(
            f"| {what} | {' / '.join(shown for shown, _ in contenders)} | "
            f"{' / '.join(short(ratios[there]) for _, there in contenders)} |"
        )
    return "\n".join(lines)


def rows(name: str, cases: list[str]) -> str:
    found = read(name)
    lines = [f"| [{name}](../../../bench/results/{name}) | fastcl | others, as ratios |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {case} | {found[case][0]} | {found[case][1]} |" for case in cases)])


def filled(text: str) -> str:
    """A page with its figures put in anew."""

    def fill(block: re.Match[str]) -> str:
        if not block[1]:
            return f"<!-- speeds -->\n{summary()}\n<!-- /speeds -->"
        name, _, cases = block[1].strip().partition(" ")
        return f"<!-- speeds: {name} {cases} -->\n{rows(name, cases.split(', '))}\n<!-- /speeds -->"

    return re.sub(r"<!-- speeds(?:: (.*?))? -->\n.*?<!-- /speeds -->", fill, text, flags=re.DOTALL)


def draw(path: Path) -> None:
    """A bar for every ratio of ROWS, on a logarithmic axis that begins at fastcl's own time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def plain(markdown: str) -> str:
        return re.sub(r"\*(\w+)\*", r"\1", markdown.replace("`", ""))

    figure, axis = plt.subplots(figsize=(8.6, 6.2), layout="constrained")
    y, head, ticks, largest, least = 0.0, "", [], 1.0, 0.8
    for what, name, case, contenders in ROWS:
        if not what.startswith("the same, "):  # which says nothing without the row above
            head = what.rpartition(", ")[0]
        ticks.append((y, plain(what.replace("the same, ", f"{head}, "))))
        for shown, there in contenders:
            ratio = read(name)[case][2][there]
            axis.barh(y, ratio - 1, left=1, height=0.8, color="#2a7f62" if ratio >= 1 else "#c0563f")
            axis.text(max(ratio, 1) * 1.04, y, f"{plain(shown)}  {short(ratio)}", va="center", fontsize=7.5)
            y, largest, least = y + 1, max(largest, ratio), min(least, ratio)
        y += 0.5
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set(xscale="log", xlim=(0.93 * least, 3.2 * largest), ylim=(y - 0.8, -0.7))
    axis.set_yticks([at for at, _ in ticks], [what for _, what in ticks], fontsize=8)
    axis.tick_params(axis="y", length=0)
    times = [t for t in (1, 2, 5, 10, 20, 50, 100, 200) if t <= largest]
    axis.set_xticks(times, [str(t) for t in times], fontsize=8)
    axis.set_xticks([], minor=True)
    axis.set_xlabel("time relative to fastcl on 2 cores, logarithmic; red: faster than fastcl", fontsize=8)
    axis.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, dpi=130)


def stale() -> list[Path]:
    return [page for page in PAGES if filled(page.read_text()) != page.read_text()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, fail where a page is not current")
    if parser.parse_args().check:
        for page in stale():
            print(f"{page.relative_to(ROOT)} is not current: run python bench/speeds.py")
        return bool(stale())
    for page in stale():
        page.write_text(filled(page.read_text()))
    draw(PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
