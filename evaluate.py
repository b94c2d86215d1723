"""Measure a checkpoint with text alone: retrieval and zero-shot classification (§4).

    python evaluate.py --task toy                                     # the toy world's held-out clips
    python evaluate.py --task esc50 --checkpoint out/audioset/pretrain/checkpoint.pt
    python evaluate.py --task clotho

The table on the screen is saved as JSON beside the checkpoint.

N  clips     M  captions     K  classes     D  embedding
"""
import argparse
import json
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from clip_load import Tokenizer, fingerprint, load_clip
from data import dataset_folder, load_image, read_clotho, read_esc50, read_index
from pretrain import (
    audio_encoder_of,
    embed_all,
    load_checkpoint,
    ranks,
    run,
    start_ranks,
    versions,
)

STAGES = ["pretrain", "finetune"]
PROMPT = "the sound of"  # §4, "Prompting (usually) helps"


# ------------------------------------------------------------------------------------- metrics

def recalls(best_ranks, prefix):
    """Ranks from 0 of the right answers (Q,) -> recall at 1, 5, 10 in % and the median rank from 1."""
    found = {f"{prefix}_r{k}": 100 * (best_ranks < k).float().mean().item() for k in (1, 5, 10)}
    return found | {f"{prefix}_median": best_ranks.float().quantile(0.5).item() + 1}


def retrieval_metrics(audio, captions, captions_per_clip=5):
    """Retrieval both ways: audio (N, D), captions (5N, D), caption j belongs to clip j // 5 -> recalls in %.

    Audio to text takes the best-ranked of a clip's captions; text to audio queries with every caption (§4).
    A tie counts against the model: a rank is the number of others at least as near, so that embeddings that
    are all alike score as chance or worse.
    """
    audio, captions = F.normalize(audio.float(), dim=1), F.normalize(captions.float(), dim=1)
    if not (audio.isfinite().all() and captions.isfinite().all()):
        raise ValueError("an embedding is not finite; the checkpoint's weights are broken")
    if len(captions) != captions_per_clip * len(audio):
        raise ValueError(f"{len(captions)} captions for {len(audio)} clips; needed: {captions_per_clip} a clip")
    owner = torch.arange(len(captions)) // captions_per_clip                          # (M,)
    similarity = audio @ captions.T                                                   # (N, M)
    best_own = similarity.gather(1, torch.arange(len(captions)).view(len(audio), -1)).max(1, keepdim=True).values
    others = owner != torch.arange(len(audio))[:, None]                               # (N, M)
    a2t = ((similarity >= best_own) & others).sum(1)                                  # (N,)
    right = similarity[owner, torch.arange(len(captions))]                            # (M,)
    t2a = (similarity >= right).sum(0) - 1                                            # (M,)
    return recalls(a2t, "a2t") | recalls(t2a, "t2a")


def zero_shot(audio, texts, target, fold):
    """Accuracy in % of argmax cos(audio, label text) (Eq. 5), overall and by fold.

    audio: (N, D), texts: (K, D), target: (N,) class of each clip, fold: (N,) from 1, or all 0 for none.
    """
    hit = ((F.normalize(audio, dim=1) @ F.normalize(texts, dim=1).T).argmax(1) == target).float()  # (N,)
    result = {"accuracy": 100 * hit.mean().item()}
    by_fold = [100 * hit[fold == f].mean().item() for f in fold.unique().tolist()]
    if len(by_fold) > 1:
        result |= {"fold_accuracy": by_fold, "fold_mean": torch.tensor(by_fold).mean().item(),
                   "fold_std": torch.tensor(by_fold).std().item()}
    return result


# --------------------------------------------------------------------------------------- model

class Model:
    """A checkpoint's audio encoder beside the CLIP that it was trained against."""

    def __init__(self, path, clip=None, vocab=None, device="cpu"):
        checkpoint = load_checkpoint(path, STAGES)
        self.path, self.stage, self.device = str(path), checkpoint["stage"], device
        self.encoder, self.front_end = audio_encoder_of(checkpoint)
        self.encoder.to(device)
        made_with = checkpoint["clip"]
        self.clip = load_clip(clip or made_with["weights"], device)
        if fingerprint(self.clip) != made_with["fingerprint"]:
            raise ValueError(f"{clip or made_with['weights']}: not the CLIP that {path} was trained against; its "
                             f"fingerprint is not {made_with['fingerprint']}. Name the right one with --clip")
        self.tokenizer = Tokenizer(vocab or made_with["vocab"], self.clip.context_length)
        if self.tokenizer.vocab_size != self.clip.token_embedding.num_embeddings:
            raise ValueError(f"{vocab or made_with['vocab']}: {self.tokenizer.vocab_size} tokens, this CLIP has "
                             f"{self.clip.token_embedding.num_embeddings}; name the right one with --vocab")
        self.dimensions = self.clip.visual.proj.shape[1]
        self.identity = {"checkpoint": self.path, "stage": self.stage, "step": checkpoint["step"],
                         "steps": checkpoint["steps"], "init": checkpoint["settings"].get("init"),
                         "weights": fingerprint(self.encoder), "clip": made_with["fingerprint"]}

    def needs(self, seconds, what):
        """Refuse a front end that can't hear a dataset's clips whole. Raises ValueError."""
        if self.front_end.seconds < seconds:
            raise ValueError(f"{self.path} hears {self.front_end.seconds:.1f} s at {self.front_end.sample_rate} Hz, a "
                             f"clip of {what} lasts {seconds} s: its front end does not fit. Use a checkpoint with at "
                             f"least {100 * seconds} frames (pretrain.py --frames)")

    def audio(self, clips, workers):
        """Unit embeddings (N, D) and which clips could be read (N,)."""
        return embed_all([clip.audio for clip in clips], self.front_end.load,
                         lambda wave, length: self.encoder(self.front_end(wave, length)),
                         self.dimensions, self.device, workers, "audio")

    def images(self, clips, workers):
        """Unit embeddings (N, D) of the clips' second frames, and which could be read (N,)."""
        return embed_all([clip.frames[:2][-1] for clip in clips], partial(load_image, size=self.clip.image_size),
                         self.clip.encode_image, self.dimensions, self.device, workers, "frames")

    @torch.no_grad()
    def texts(self, texts):
        """Unit embeddings (M, D)."""
        parts = [self.clip.encode_text(self.tokenizer(texts[i:i + 256]).to(self.device)).float().cpu()
                 for i in range(0, len(texts), 256)]
        return F.normalize(torch.cat(parts), dim=1)


def prompted(labels, prompt):
    """Class names as the text encoder reads them."""
    return [f"{prompt} {label}".strip() for label in labels]


# --------------------------------------------------------------------------------------- tasks

def readable(clips, ok):
    """The clips that could be read. Raises ValueError if none could."""
    kept = [clip for clip, use in zip(clips, ok.tolist()) if use]
    if not kept:
        raise ValueError(f"not one of {len(clips)} clips could be read, for example {clips[0].audio}; is the dataset "
                         f"unpacked there?")
    return kept


def classification(model, clips, workers):
    """Zero-shot accuracy over the clips' single labels, with and without the prompt."""
    labels = sorted({clip.labels[0] for clip in clips})
    audio, heard = model.audio(clips, workers)
    kept = readable(clips, heard)
    target = torch.tensor([labels.index(clip.labels[0]) for clip in kept])
    fold = torch.tensor([clip.fold for clip in kept])
    result = {"N": len(kept), "unreadable": len(clips) - len(kept), "classes": len(labels),
              "chance": 100 / len(labels)}
    for name, prompt in (("prompt", PROMPT), ("no prompt", "")):
        result[name] = zero_shot(audio[heard], model.texts(prompted(labels, prompt)), target, fold)
    return result


def retrieval(model, clips, workers, embed):
    """Retrieval between what `embed` makes of the clips (audio or frames) and their captions."""
    features, ok = embed(clips, workers)
    kept = readable(clips, ok)
    per_clip = len(kept[0].captions)
    return {"N": len(kept), "unreadable": len(clips) - len(kept), "captions_per_clip": per_clip, "prompt": "none",
            "chance_r1": 100 / len(kept),
            **retrieval_metrics(features[ok], model.texts([c for clip in kept for c in clip.captions]), per_clip)}


def task_toy(model, folder, workers):
    """The toy world's held-out clips: pivoted audio-text retrieval beside CLIP's own image-text, and labels."""
    clips = read_index(folder / "test.jsonl", need=("audio", "frames", "labels", "captions"))
    return {"audio-text": retrieval(model, clips, workers, model.audio),
            "image-text (CLIP itself)": retrieval(model, clips, workers, model.images),
            "zero-shot labels": classification(model, clips, workers)}


def task_esc50(model, folder, workers):
    """ESC-50, or its subset ESC-10: 5 s clips, 5 folds."""
    model.needs(5, "ESC-50")
    return {"zero-shot labels": classification(model, read_esc50(folder), workers)}


def task_clotho(model, folder, workers):
    """Clotho's evaluation split, the first 10 s of each clip (App. D)."""
    model.needs(10, "Clotho, as far as the paper hears it,")
    return {"audio-text": retrieval(model, read_clotho(folder), workers, model.audio)}


TASKS = {"toy": task_toy, "esc50": task_esc50, "clotho": task_clotho}


def show(results):
    """Print results as a table, one part after the other."""
    for part, result in results.items():
        if "a2t_r1" in result:
            print(f"\n{part}: {result['N']} clips, {result['captions_per_clip']} captions a clip, no prompt, "
                  f"{result['unreadable']} unreadable\n{'%':>14} {'R@1':>7} {'R@5':>7} {'R@10':>7} {'median rank':>12}")
            for name, key in (("-> text", "a2t"), ("text ->", "t2a")):
                print(f"{name:>14} " + " ".join(f"{result[f'{key}_r{k}']:7.1f}" for k in (1, 5, 10))
                      + f" {result[f'{key}_median']:12.1f}")
            print(f"{'chance':>14} {result['chance_r1']:7.1f}")
        else:
            print(f"\n{part}: {result['N']} clips, {result['classes']} classes, {result['unreadable']} unreadable\n"
                  f"{'%':>14} {'accuracy':>9}   by fold")
            for name in ("prompt", "no prompt"):
                row = result[name]
                print(f"{name:>14} {row['accuracy']:9.1f}   " + (
                    f"{' '.join(f'{fold:.1f}' for fold in row['fold_accuracy'])}; "
                    f"{row['fold_mean']:.1f} ± {row['fold_std']:.1f}" if "fold_mean" in row else "-"))
            print(f"{'chance':>14} {result['chance']:9.1f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--checkpoint", help="of pretrain.py or finetune.py (out/audioset/pretrain/checkpoint.pt; "
                                             "for --task toy out/toy/pretrain/checkpoint.pt)")
    parser.add_argument("--data", help="the dataset's folder (data/<task>)")
    parser.add_argument("--clip", help="CLIP's weights (those the checkpoint names)")
    parser.add_argument("--vocab", help="the tokenizer's vocabulary (the one the checkpoint names)")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode")
    args = parser.parse_args()
    device = start_ranks()
    folder = dataset_folder(args.data or args.task)
    path = Path(args.checkpoint or f"out/{'toy' if args.task == 'toy' else 'audioset'}/pretrain/checkpoint.pt")
    model = Model(path, args.clip, args.vocab, device)
    results = TASKS[args.task](model, folder, args.workers)
    if ranks()[0] == 0:
        show(results)
        saved = path.with_name(f"{args.task}.json")
        saved.write_text(json.dumps({"task": args.task, "data": str(folder), "model": model.identity,
                                     "versions": versions(), "results": results}, indent=1) + "\n")
        print(f"\nsaved in {saved}")


if __name__ == "__main__":
    run(main)
