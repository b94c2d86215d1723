"""The ladder: every row of the paper's tables on the toy world, and which of its claims hold there.

    python tests/ladder.py --seeds 3            # in out/toy/ladder; what is there is kept
    python tests/ladder.py --seeds 3 --world 1  # another toy world, in out/world1
"""
import argparse
import importlib
import json
import os
import sys
from contextlib import suppress
from pathlib import Path

import figures  # first: it knows where our modules are
import data
import evaluate
import numpy as np

OUT = Path("out/toy/ladder")
ROWS = {  # row of the paper's tables -> source of captions ("" is a pre-training), flags
    "VA-Rand": ("", "--init", "random"), "vip-AnT": ("",), "AC": ("ac",), "FC": ("fc",),
    "VC": ("vc",), "RC": ("rc",), "GL": ("gl",), "GC": ("gc",),
    "VAT GC": ("gc", "--objective", "vat"),
    # of 2,000 gold pairs; 100 are learned by heart unless the rates are gentle
    "GC 5 %": ("gc", "--pairs", 100, "--steps", 60, "--warmup-steps", 10, "--lr-weights", 0.5),
    "GC 12 %": ("gc", "--pairs", 240), "GC 20 %": ("gc", "--pairs", 400),
    "GC 35 %": ("gc", "--pairs", 700), "GC 60 %": ("gc", "--pairs", 1200),
}
METRICS = {"a2t_r1": "audio->text R@1", "a2t_r10": "R@10", "t2a_r1": "text->audio R@1",
           "t2a_r10": "R@10", "prompt": "labels, prompt", "no prompt": "no prompt"}
CLAIMS = {  # what the paper says: the better row and metric, the worse row and metric
    "CLIP's weights are the better start (§4.1)": ("vip-AnT", "a2t_r1", "VA-Rand", "a2t_r1"),
    "mined captions of sounds beat pivoting (Table 3)": ("AC", "a2t_r1", "vip-AnT", "a2t_r1"),
    "mined captions beat random ones": ("AC", "a2t_r1", "RC", "a2t_r1"),
    "captions of sounds beat generated ones": ("AC", "a2t_r1", "FC", "a2t_r1"),
    "generated captions beat those of pictures": ("FC", "a2t_r1", "VC", "a2t_r1"),
    "gold captions beat mined ones": ("GC", "a2t_r1", "AC", "a2t_r1"),
    "gold captions beat gold labels": ("GC", "a2t_r1", "GL", "a2t_r1"),
    "a few gold pairs (5 %) beat none (§4.2)": ("GC 5 %", "a2t_r1", "vip-AnT", "a2t_r1"),
    "captions alone beat captions and frames (App. E)": ("GC", "a2t_r1", "VAT GC", "a2t_r1"),
    "pivoting goes better to text than back (App. G)": ("vip-AnT", "a2t_r1", "vip-AnT", "t2a_r1"),
    "a prompt helps classification (§4.1)": ("vip-AnT", "prompt", "vip-AnT", "no prompt"),
    # no claim, but among the paper's findings (Table 3)
    "random captions beat pivoting from text to audio": ("RC", "t2a_r1", "vip-AnT", "t2a_r1"),
}


def command(script, *flags):
    """Run one of our scripts in this process, as a user would in one of its own."""
    sys.argv = [script, *map(str, flags)]
    print(f"\n$ python {' '.join(sys.argv)}", flush=True)
    with suppress(SystemExit):  # whose failure shows: there is no result to read
        importlib.import_module(script.removesuffix(".py")).main()


def folder_of(row, seed):
    return OUT / f"seed{seed}-{row.replace(' ', '').replace('%', '')}"


def climb(seed):
    """All rows with one seed -> {row: {metric: %}}."""
    results = {}
    for row, (source, *flags) in ROWS.items():
        out = folder_of(row, seed)
        flags += ["--data", "toy", "--seed", seed, "--out", out]
        if (out / "toy.json").exists():
            pass
        elif not source:
            command("pretrain.py", *flags)
        else:
            if not (OUT / f"{source}.jsonl").exists():
                command("curate.py", "--source", source, "--data", "toy", "--out", OUT)
            start = folder_of("vip-AnT", seed) / "checkpoint.pt"
            command("finetune.py", "--source", source, "--init", start, *flags)
            command("evaluate.py", "--task", "toy", "--checkpoint", out / "checkpoint.pt")
        parts = json.loads((out / "toy.json").read_text())["results"]
        found = parts["audio-text"]["values"]["no prompt"]
        for variant, values in parts["labels"]["values"].items():
            found[variant] = values["accuracy"]
        results[row] = {metric: found[metric][0] for metric in METRICS}
    return results


def spread(values):
    """Mean ± standard deviation."""
    mean = f"{np.mean(values):.1f}"
    return f"{mean} ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else mean


def table(rows):
    """Print rows of texts as aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for first, *others in rows:
        cells = [text.rjust(width) for text, width in zip(others, widths[1:])]
        print("  " + "   ".join([first.ljust(widths[0]), *cells]))


def report(runs):
    """The table, and for each claim its difference and in how many seeds it is positive."""
    lines = [["", *METRICS.values()]]
    for row in ROWS:
        lines.append([row, *(spread([run[row][metric] for run in runs]) for metric in METRICS)])
    table(lines)
    print("\nwhat the paper finds, and whether it holds here (difference in points)")
    lines, everywhere = [["", "difference", "seeds"]], []
    for claim, (better, metric, worse, other_metric) in CLAIMS.items():
        differences = [run[better][metric] - run[worse][other_metric] for run in runs]
        positive = sum(difference > 0 for difference in differences)
        everywhere.append(positive == len(runs))
        lines.append([claim, spread(differences), f"{positive} of {len(runs)}"])
    table(lines)
    print(f"  {sum(everywhere[:-1])} of {len(CLAIMS) - 1} claims hold in {len(runs)} of "
          f"{len(runs)} seeds (the last line is no claim of the eleven)")


def draw(runs, path):
    """Rows over metrics, the paper's beside the toy's, each divided by its own pivoting's."""
    panels = (("audio->text R@1\n(paper: AudioCaps)", "a2t_r1", "audiocaps", "no prompt", "a2t_r1"),
              ("text->audio R@1\n(paper: AudioCaps)", "t2a_r1", "audiocaps", "no prompt", "t2a_r1"),
              ("labels with prompt\n(paper: ESC-50)", "prompt", "esc50", "prompt", "accuracy"))
    rows = [row for row in evaluate.PAPER if row in ROWS]
    at, pivoting = np.arange(len(rows)), rows.index("vip-AnT")
    figure, row_of_axes = figures.blank(10, 3.2, 1, 3, sharey=True)
    for axes, (title, metric, part, variant, name) in zip(row_of_axes, panels):
        ours = np.array([np.mean([run[row][metric] for run in runs]) for row in rows])
        paper = np.array([evaluate.PAPER[row][part][variant][name] for row in rows])
        axes.barh(at - 0.2, ours / ours[pivoting], 0.4, label="toy", color=figures.LEARNED)
        axes.barh(at + 0.2, paper / paper[pivoting], 0.4, label="paper", color=figures.FROZEN)
        axes.set(title=title, xscale="log", xlabel="relative to vip-AnT")
        axes.set_yticks(at, rows)
        axes.set_xticks([0.1, 0.3, 1, 3, 10, 30], ["0.1", "0.3", "1", "3", "10", "30"])
        axes.set_xlim(0.05, 50)
        axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.legend(loc="upper right")
    figures.save(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=1, help="so many seeds, from 0 on")
    parser.add_argument("--world", type=int, default=0, help="the toy world's own seed")
    args = parser.parse_args()
    if args.world:
        Path(f"out/world{args.world}").mkdir(parents=True, exist_ok=True)
        os.chdir(f"out/world{args.world}")
    if not Path("data/toy").exists():
        data.make_toy("data/toy", seed=args.world)
    OUT.mkdir(parents=True, exist_ok=True)
    runs = [climb(seed) for seed in range(args.seeds)]
    # Fig. 5, 7, 10
    few = [row for row in ROWS if row.startswith("GC") and row != "GC 5 %"]  # with equal rates
    for task, rows, seeds, *flags in (("curve", ("vip-AnT", "VA-Rand"), 1),
                                      ("scaling", few, args.seeds, "--target", 90),
                                      ("pivot", ("vip-AnT", "GC"), 1)):
        paths = [folder_of(row, seed) / "checkpoint.pt" for seed in range(seeds) for row in rows]
        command("evaluate.py", "--task", task, "--data", "toy", *flags, "--out", OUT,
                "--checkpoint", *paths)
    print(f"\ntoy world {args.world}, {args.seeds} seed(s), mean ± std in %")
    report(runs)
    (OUT / "ladder.json").write_text(json.dumps(runs, indent=1))
    draw(runs, OUT / "ladder.png")


if __name__ == "__main__":
    data.run(main)
