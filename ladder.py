"""The toy ladder: every row of the paper's tables on the toy world, and which of its claims hold there.

    python finetune.py ladder --seeds 3          # what is there is not done again

Each rung is a command that a user could give.
"""
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from evaluate import save_json, table
from finetune import mean_and_spread
from processes import Claim
from train import setting, versions


@dataclass(frozen=True)
class Ladder:
    """Every row of the paper's tables on the toy world."""
    seeds: int = setting(1, "so many seeds, from 0 on")
    out: str = setting("out/toy/ladder", "folder of all runs; what is there is not done again")


ROWS = {  # row of the tables -> source of captions, or none where the row is a pre-training; and flags
    "VA-Rand": ("", "--init", "random"),
    "vip-AnT": ("",),
    "+AT AC": ("ac", "--epochs", 3), "+AT FC": ("fc", "--epochs", 3), "+AT VC": ("vc", "--epochs", 3),
    "+AT RC": ("rc",), "+AT GL": ("gl",), "+AT GC": ("gc",),  # fewer clips, more epochs
    "+VAT GC": ("gc", "--objective", "vat"),
    "+AT GC 1 %": ("gc", "--pairs", 10, "--epochs", 20),  # of the toy's 1000 gold pairs
    "+AT GC 5 %": ("gc", "--pairs", 50, "--epochs", 20),
    "+AT GC 20 %": ("gc", "--pairs", 200, "--epochs", 6),
}
COLUMNS = {"a2t_r1": "audio->text R@1", "a2t_r10": "R@10", "t2a_r1": "text->audio R@1", "t2a_r10": "R@10",
           "prompt": "labels, prompt", "no prompt": "no prompt"}
CLAIMS = [  # what the paper says: claim, the better row and its metric, the worse row and its metric
    ("CLIP's weights are the better start (§4.1)", ("vip-AnT", "a2t_r1"), ("VA-Rand", "a2t_r1")),
    ("mined audio captions beat pivoting (Table 3, AC)", ("+AT AC", "a2t_r1"), ("vip-AnT", "a2t_r1")),
    ("mined audio captions beat random ones (AC, RC)", ("+AT AC", "a2t_r1"), ("+AT RC", "a2t_r1")),
    ("captions of sounds beat generated ones (AC, FC)", ("+AT AC", "a2t_r1"), ("+AT FC", "a2t_r1")),
    ("generated captions beat those of pictures (FC, VC)", ("+AT FC", "a2t_r1"), ("+AT VC", "a2t_r1")),
    ("gold captions beat all mined ones (GC, AC)", ("+AT GC", "a2t_r1"), ("+AT AC", "a2t_r1")),
    ("gold captions beat gold labels (GC, GL)", ("+AT GC", "a2t_r1"), ("+AT GL", "a2t_r1")),
    ("a few gold pairs beat none (§4.2)", ("+AT GC 5 %", "a2t_r1"), ("vip-AnT", "a2t_r1")),
    ("captions alone beat captions and frames (App. E)", ("+AT GC", "a2t_r1"), ("+VAT GC", "a2t_r1")),
    ("pivoting is better from sound to text than back (App. G)", ("vip-AnT", "a2t_r1"), ("vip-AnT", "t2a_r1")),
    ("a prompt helps classification (§4.1)", ("vip-AnT", "prompt"), ("vip-AnT", "no prompt")),
]


def command(*parts):
    """Run one of our scripts as a user would, its output into the terminal. Raises ValueError where it fails."""
    print(f"\n$ python {' '.join(map(str, parts))}", flush=True)
    script = Path(__file__).with_name(str(parts[0]))
    if subprocess.run([sys.executable, script, *map(str, parts[1:])], check=False).returncode:
        raise ValueError(f"this failed: python {' '.join(map(str, parts))}; mend it and run the ladder again")


def folder_of(row):
    """A row's name without what a shell would trip over."""
    return row.replace(" ", "").replace("%", "")


def climb(ladder, seed, curated):
    """All rows with one seed -> {row: {metric: %}}. curated: set of the sources that this ladder has curated."""
    out, results = Path(ladder.out) / f"seed{seed}", {}
    for row, (source, *flags) in ROWS.items():
        place = out / folder_of(row)
        if not (place / "toy.json").exists():
            script = ["pretrain.py", "--data", "toy"]
            if source:
                script = ["finetune.py", "--data", "toy", "--init", out / "vip-AnT/checkpoint.pt", "--source", source]
                if source not in curated:  # what is there may have been made with other flags; mining is not repeated
                    command("curate.py", "--data", "toy", "--source", source)
                    curated.add(source)
            command(*script, *flags, "--seed", seed, "--out", place)
            if source:  # pre-training has measured itself
                command("evaluate.py", "--task", "toy", "--checkpoint", place / "checkpoint.pt")
        measured = json.loads((place / "toy.json").read_text())["results"]
        retrieval, labels = measured["audio-text"]["values"]["no prompt"], measured["zero-shot labels"]["values"]
        results[row] = {metric: value[0] if isinstance(value, list) else value for metric, value in retrieval.items()}
        results[row] |= {variant: labels[variant]["accuracy"][0] for variant in ("prompt", "no prompt")}
    return results


def run_ladder(ladder):
    """Climb with every seed, print the table with its spread, and for each claim of the paper whether it holds here."""
    began, lock = time.time(), Claim(Path(ladder.out) / "lock")
    curated = set()
    runs = [climb(ladder, seed, curated) for seed in range(ladder.seeds)]
    print(f"\nthe toy world, {ladder.seeds} seed(s), mean ± std in %; {(time.time() - began) / 60:.1f} min")
    table(["", *COLUMNS.values()], [[row, *(mean_and_spread([run[row][metric] for run in runs]) for metric in COLUMNS)]
                                    for row in ROWS])
    print("\nwhat the paper finds, and whether it holds here (difference in points; in how many seeds it is positive)")
    lines = []
    for claim, (better, one), (worse, other) in CLAIMS:
        gaps = [run[better][one] - run[worse][other] for run in runs]
        positive = sum(gap > 0 for gap in gaps)
        verdict = "holds" if positive == len(gaps) else "does not hold" if positive == 0 else "unclear"
        lines.append([claim, mean_and_spread(gaps), f"{positive} of {len(gaps)}", verdict])
    table(["", "difference", "seeds", ""], lines)
    save_json(Path(ladder.out) / "ladder.json", {"runs": runs, "versions": versions()})
    lock.close()
    few = [row for row in ROWS if row.startswith("+AT GC ")]
    curve, scaling = (" ".join(f"{ladder.out}/seed0/{folder_of(row)}/checkpoint.pt" for row in rows)
                      for rows in (["vip-AnT", "VA-Rand"], [*few, "+AT GC"]))
    print(f"\nFig. 5: python evaluate.py --task curve --compare {curve}\n"
          f"Fig. 7: python evaluate.py --task scaling --data toy --compare {scaling}")
