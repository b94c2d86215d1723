"""The ladder: every row of the paper's tables on the toy world, and which of its claims hold there.

    python tests/ladder.py --seeds 3            # in out/toy/ladder; what is there is kept
    python tests/ladder.py --seeds 3 --world 1  # another toy world, in out/world1

Each rung is a command that a user could give; it is printed, and run in this process.
"""
import argparse
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # before torch: it sets OpenMP's environment
import curate
import evaluate
import finetune
import pretrain

import numpy as np
from matplotlib.figure import Figure

SCRIPTS = {"pretrain.py": pretrain, "curate.py": curate, "finetune.py": finetune,
           "evaluate.py": evaluate}
OUT = Path("out/toy/ladder")
ROWS = {  # row of the paper's tables -> source of captions ("" is a pre-training), flags
    "VA-Rand": ("", "--init", "random"), "vip-AnT": ("",), "AC": ("ac",), "FC": ("fc",),
    "VC": ("vc",), "RC": ("rc",), "GL": ("gl",), "GC": ("gc",),
    "VAT GC": ("gc", "--objective", "vat"),
    "GC 1 %": ("gc", "--pairs", 10), "GC 2 %": ("gc", "--pairs", 20),
    "GC 5 %": ("gc", "--pairs", 50), "GC 20 %": ("gc", "--pairs", 200),  # of 1,000
}
METRICS = {"a2t_r1": "audio->text R@1", "a2t_r10": "R@10", "t2a_r1": "text->audio R@1",
           "t2a_r10": "R@10", "prompt": "labels, prompt", "no prompt": "no prompt"}
CLAIMS = [  # what the paper says: the claim, the better row and metric, the worse row and metric
    ("CLIP's weights are the better start (§4.1)", "vip-AnT a2t_r1", "VA-Rand a2t_r1"),
    ("mined captions of sounds beat pivoting (Table 3)", "AC a2t_r1", "vip-AnT a2t_r1"),
    ("mined captions beat random ones", "AC a2t_r1", "RC a2t_r1"),
    ("captions of sounds beat generated ones", "AC a2t_r1", "FC a2t_r1"),
    ("generated captions beat those of pictures", "FC a2t_r1", "VC a2t_r1"),
    ("gold captions beat mined ones", "GC a2t_r1", "AC a2t_r1"),
    ("gold captions beat gold labels", "GC a2t_r1", "GL a2t_r1"),
    ("a few gold pairs (5 %) beat none (§4.2)", "GC 5 % a2t_r1", "vip-AnT a2t_r1"),
    ("captions alone beat captions and frames (App. E)", "GC a2t_r1", "VAT GC a2t_r1"),
    ("pivoting goes better to text than back (App. G)", "vip-AnT a2t_r1", "vip-AnT t2a_r1"),
    ("a prompt helps classification (§4.1)", "vip-AnT prompt", "vip-AnT no prompt"),
]
# Of the paper's other findings: random captions help text -> audio (Table 3)
ASIDE = ("random captions beat pivoting from text to audio", "RC t2a_r1", "vip-AnT t2a_r1")


def command(script, *flags):
    """Run one of our scripts in this process, as a user would in one of its own."""
    sys.argv = [script, *map(str, flags)]
    print(f"\n$ python {' '.join(sys.argv)}", flush=True)
    try:
        SCRIPTS[script].main()
    except SystemExit as stop:
        if stop.code:
            raise


def folder_of(row, seed):
    return OUT / f"seed{seed}-{row.replace(' ', '').replace('%', '')}"


def climb(seed, curated):
    """All rows with one seed -> {row: {metric: %}}. curated: sources that are curated already."""
    results = {}
    for row, (source, *flags) in ROWS.items():
        out = folder_of(row, seed)
        if not (out / "toy.json").exists():
            flags += ["--data", "toy", "--seed", seed, "--out", out]
            if not source:
                command("pretrain.py", *flags)
            else:
                if source not in curated:
                    command("curate.py", "--source", source, "--data", "toy", "--out", OUT)
                    curated.add(source)
                start = folder_of("vip-AnT", seed) / "checkpoint.pt"
                command("finetune.py", "--source", source, "--init", start, *flags)
                command("evaluate.py", "--task", "toy", "--checkpoint", out / "checkpoint.pt")
        parts = json.loads((out / "toy.json").read_text())["results"]
        found = parts["audio-text"]["values"]["no prompt"]
        results[row] = {metric: found[metric][0] for metric in found if "_r" in metric}
        for variant in ("prompt", "no prompt"):
            results[row][variant] = parts["labels"]["values"][variant]["accuracy"][0]
    return results


def spread(values):
    """Mean ± standard deviation."""
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" if len(values) > 1 \
        else f"{values[0]:.1f}"


def table(header, rows):
    """Rows of texts under a header, as lines of aligned columns."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    for first, *others in (header, *rows):
        cells = [first.ljust(widths[0]), *(o.rjust(w) for o, w in zip(others, widths[1:]))]
        print("  " + "   ".join(cells).rstrip())


def report(runs):
    """The table, and for each claim its difference and in how many seeds it is positive."""
    table(["", *METRICS.values()],
          [[row, *(spread([run[row][metric] for run in runs]) for metric in METRICS)]
           for row in ROWS])
    print("\nwhat the paper finds, and whether it holds here (difference in points)")
    lines, held = [], 0
    for claim, better, worse in (*CLAIMS, ASIDE):
        differences = []
        for run in runs:
            (row, metric), (other, other_metric) = (
                next((row, name[len(row) + 1:]) for row in ROWS
                     if name.startswith(row + " ") and name[len(row) + 1:] in METRICS)
                for name in (better, worse))
            differences.append(run[row][metric] - run[other][other_metric])
        positive = sum(difference > 0 for difference in differences)
        held += positive == len(runs) and (claim, better, worse) != ASIDE
        lines.append([claim, spread(differences), f"{positive} of {len(runs)}"])
    table(["", "difference", "seeds"], lines)
    print(f"  {held} of {len(CLAIMS)} claims hold in {len(runs)} of {len(runs)} seeds (the last "
          f"line is no claim of the eleven)")


def draw(runs, path):
    """Rows over metrics, the paper's beside the toy's, each divided by its own pivoting's."""
    panels = {"a2t_r1": ("audio->text R@1; paper: AudioCaps", "audiocaps", "no prompt"),
              "t2a_r1": ("text->audio R@1; paper: AudioCaps", "audiocaps", "no prompt"),
              "prompt": ("labels with prompt; paper: ESC-50", "esc50", "prompt")}
    rows = [row for row in evaluate.PAPER if row in ROWS]
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for axes, (metric, (title, part, variant)) in zip(figure.subplots(1, 3, sharey=True),
                                                     panels.items()):
        ours = np.array([np.mean([run[row][metric] for run in runs]) for row in rows])
        name = "accuracy" if part == "esc50" else metric
        paper = np.array([evaluate.paper_of(row, part)[variant][name] for row in rows])
        at, pivoting = np.arange(len(rows)), rows.index("vip-AnT")
        axes.barh(at - 0.2, ours / ours[pivoting], 0.4, label="toy", color="#c8382e")
        axes.barh(at + 0.2, paper / paper[pivoting], 0.4, label="paper", color="#7a7a7a")
        axes.set(title=title, xscale="log", xlabel="relative to vip-AnT")
        axes.set_yticks(at, rows)
        axes.axvline(1, color="black", linewidth=0.8)
    figure.axes[0].invert_yaxis()
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=90)
    print(f"drawn in {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=1, help="so many seeds, from 0 on")
    parser.add_argument("--world", type=int, default=0, help="the toy world's own seed")
    args = parser.parse_args()
    began = time.time()
    if args.world:
        Path(f"out/world{args.world}").mkdir(parents=True, exist_ok=True)
        os.chdir(f"out/world{args.world}")
    if not Path("data/toy").exists():
        data.make_toy("data/toy", seed=args.world)
    OUT.mkdir(parents=True, exist_ok=True)
    curated = {path.stem for path in OUT.glob("*.jsonl")}
    runs = [climb(seed, curated) for seed in range(args.seeds)]
    seeds = range(args.seeds)
    first = [folder_of(row, 0) / "checkpoint.pt" for row in ("vip-AnT", "VA-Rand")]
    # Fig. 5, 7, 10
    command("evaluate.py", "--task", "curve", "--checkpoint", *first, "--out", OUT)
    few = [folder_of(row, seed) / "checkpoint.pt" for seed in seeds for row in ROWS
           if row.startswith("GC")]
    command("evaluate.py", "--task", "scaling", "--data", "toy", "--target", 90, "--out", OUT,
            "--checkpoint", *few)
    pivoted = [folder_of(row, 0) / "checkpoint.pt" for row in ("vip-AnT", "GC")]
    command("evaluate.py", "--task", "pivot", "--data", "toy", "--out", OUT, "--checkpoint",
            *pivoted)
    minutes = (time.time() - began) / 60
    print(f"\ntoy world {args.world}, {args.seeds} seed(s), mean ± std in %; {minutes:.1f} min")
    report(runs)
    (OUT / "ladder.json").write_text(json.dumps(runs, indent=1))
    draw(runs, OUT / "ladder.png")


if __name__ == "__main__":
    data.run(main)
