"""Draw the picture of the README from the run of local/quickstart.py: `uv run local/picture.py`."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from basic.common import command_line

SENTENCE = "Once upon a time, there was a brave puppy who wanted to dance."
END = "<|endoftext|>"
COLORS = ("#cfe3f6", "#fbe3c0", "#d6edd3", "#f4d2d8", "#e3daf1")


@dataclass(frozen=True, kw_only=True)
class Options:
    run: tyro.conf.Positional[Path] = Path("runs/quickstart")
    """Run folder of local/quickstart.py, trained on the embedded stories."""
    output: Path = Path("picture.svg")
    """Image file to write."""
    overwrite: bool = False
    """Replace the picture that exists."""


def main(options: Options) -> None:
    from basic.analysis.plotting import picture_output
    from basic.common.outputs import reserved_outputs

    with reserved_outputs([picture_output(options.output)], overwrite=options.overwrite):
        draw(options.run, options.output)
    print(f"wrote {options.output}")


def draw(run_dir: Path, output: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    from basic.analysis.evaluation import compare_with_entropy
    from basic.analysis.plotting import save_figure
    from basic.corpus.stories.grammar import story_nats
    from basic.Tokenizer import Tokenizer
    from basic.tokens.opening import open_tokens, read_info
    from basic.training.records.metrics import read_metrics
    from basic.training.run_folder import load_run

    run = load_run(run_dir, device="cpu")
    tokenizer = Tokenizer.load(run_dir / "tokenizer")
    stories = list(filter(None, map(str.strip, (run_dir / "valid.txt").read_text(encoding="utf-8").split(END))))
    exact = [story_nats(story) for story in stories]
    compared = compare_with_entropy(
        run.model, [tokenizer.encode(story) for story in stories], exact, open_tokens(run_dir / "train.bin"),
        tokenizer.special_token_ids[END],
    )  # fmt: skip

    matplotlib.rcParams.update({"svg.hashsalt": "basic", "font.size": 10})
    figure = Figure(figsize=(11, 5.6), facecolor="white")
    left = x = 0.06
    heading: dict[str, Any] = {"color": "gray", "fontsize": 11, "va": "center"}
    figure.text(left, 0.95, "it reads", **heading)
    for number, token_id in enumerate(tokenizer.encode(SENTENCE)):
        token = tokenizer.decode([token_id]).replace(" ", "·")
        box = {"boxstyle": "square,pad=0.3", "facecolor": COLORS[number % len(COLORS)], "edgecolor": "none"}
        drawn = figure.text(x + 0.006, 0.87, token, family="monospace", fontsize=13, va="center", bbox=box)
        figure.text(x + 0.004, 0.81, str(token_id), family="monospace", fontsize=8, va="center", color="gray")
        x = drawn.get_window_extent().x1 / figure.bbox.width + 0.006

    axes = {
        "loss": figure.add_axes((left, 0.3, 0.4, 0.42)),
        "stories": figure.add_axes((left + 0.56, 0.3, 0.3, 0.42)),
    }
    records, info = read_metrics(run_dir / "metrics.jsonl"), read_info(run_dir / "valid.bin")
    steps = [record["step"] for record in records]
    axes["loss"].plot(steps, [record["train_loss"] for record in records], color="C0", alpha=0.4, label="training")
    valid = [(record["step"], record["valid_loss"]) for record in records if "valid_loss" in record]
    axes["loss"].plot(*zip(*valid, strict=True), "o-", color="C0", label="validation")
    axes["loss"].axhline(sum(exact) / info.count, color="black", ls="--", lw=1, label="entropy of the source")
    axes["loss"].set(xlabel="step", ylabel="nats per token", yscale="log", title="it learns")
    axes["loss"].set_yticks([0.6, 0.8, 1, 2, 4], ["0.6", "0.8", "1", "2", "4"])
    axes["loss"].minorticks_off()
    axes["loss"].legend(frameon=False)

    bars = {"a bigram model": compared.bigram, "this model": compared.model, "exact": compared.exact}
    drawn = axes["stories"].barh(list(bars), list(bars.values()), color=["#c8c8c8", "C0", "black"], height=0.6)
    axes["stories"].bar_label(drawn, fmt="%.1f", padding=4)
    axes["stories"].set(xlabel="nats per story", title=f"needed for {compared.num_fitting:,} unseen stories")
    for name in ("loss", "stories"):
        axes[name].spines[["top", "right"]].set_visible(False)

    sample = (run_dir / "samples.txt").read_text(encoding="utf-8").split("\n\n")[0].strip()
    figure.text(left, 0.165, "it writes", **heading)
    figure.text(left, 0.13, textwrap.fill(sample, 124), va="top", family="serif", fontsize=11.5)
    save_figure(figure, output)


if __name__ == "__main__":
    command_line.run(lambda: main(command_line.parse(Options, __doc__)))
