"""A user's own sounds: recordings of any length, tagged with labels or searched with words.

    python evaluate.py --task tag --audio street.wav --labels "dog, rain, car horn"
    python evaluate.py --task search --audio RECORDINGS --query "glass breaking"

W  windows of a recording     D  embedding     K  labels
"""
import hashlib
import math
import os
import sys
from contextlib import closing, nullcontext
from functools import partial

import numpy as np
import soundfile
import torch

from data import Unreadable
from processes import Claim, open_array, ranks, stamp, write_whole
from readers import AUDIO, find_files


def recordings(places):
    """Files, and the audio files below folders. Raises FileNotFoundError, ValueError (none)."""
    gone = [place for place in places if not os.path.exists(place)]
    if gone:
        raise FileNotFoundError(f"{gone[0]}: no such file or folder")
    paths = [path for place in places for path in (find_files(place, AUDIO) if os.path.isdir(place) else [place])]
    if not paths:
        raise ValueError(f"{', '.join(places)}: no audio file in it; looked for {', '.join(AUDIO)}")
    return list({os.path.realpath(path): path for path in paths}.values())  # each once


def windows(path, seconds):
    """Starts in seconds of windows that cover a recording, each half over the one before; the last ends where it ends.

    Raises Unreadable.
    """
    try:
        length = soundfile.info(path).duration
    except (OSError, RuntimeError, TypeError, UnicodeError) as error:  # UnicodeError: of the file's name
        raise Unreadable(f"{path}: can't be read as audio ({error})") from None
    if not 0 < length < 1e6:  # a week and a half; streamed files may not know their length
        raise Unreadable(f"{path}: says it lasts {length:g} s; was it cut off? Copying it with an audio tool may help")
    last = max(0.0, length - seconds)
    return [*np.arange(0, last, seconds / 2).tolist(), last]


def remembered(place, dimensions):
    """What `hear` has kept of a recording (W, 1 + D), None where there is nothing, or it is damaged."""
    content = open_array(place)
    if content is None or content.dtype != np.float32 or content.ndim != 2 or content.shape[1] != 1 + dimensions:
        return None
    fits = np.isfinite(content).all() and (abs(np.linalg.norm(content[:, 1:], axis=1) - 1) < 1e-3).all()
    return torch.from_numpy(content.copy()) if fits else None


def save_array(path, array):
    """np.save under just this name."""
    with open(path, "wb") as file:
        np.save(file, array)


def hear(model, paths, cache):
    """Recordings of any length -> [(path, starts of windows (W,), unit embeddings (W, D))], unreadable ones left out.

    Embeddings are kept in the folder `cache`, a file a recording, by its path, size and time and by the model.
    """
    def place(path):
        made_of = (os.path.realpath(path), *stamp(path), model.identity["weights"], model.front_end)
        return cache / f"{hashlib.sha256(repr(made_of).encode()).hexdigest()[:32]}.npy"

    places = {path: place(path) for path in paths}
    heard = {path: remembered(places[path], model.dimensions) for path in paths}     # each (W, 1 + D): start, embedding
    todo, pending = [path for path in paths if heard[path] is None], {}
    first = ranks()[0] == 0
    with closing(Claim(cache / "lock", wait=True)) if todo and first else nullcontext():
        for path in todo:
            try:
                pending[path] = windows(path, model.front_end.seconds)
            except Unreadable as error:
                if first:
                    print(f"skipped: {error}", file=sys.stderr)
            if not pending or (path != todo[-1] and sum(map(len, pending.values())) < 1024):
                continue  # many short files make one batch
            batch = [(path, start) for path, starts in pending.items() for start in starts]
            embeddings, ok = model.embed("audio", batch, model.front_end.load_window)
            counts = [len(starts) for starts in pending.values()]
            for (file, starts), rows, read in zip(pending.items(), embeddings.split(counts), ok.split(counts)):
                heard[file] = torch.cat([torch.tensor(starts)[:, None], rows], 1)[read]
                if read.all() and first:  # what could not be read is tried again next time
                    write_whole(places[file], partial(save_array, array=heard[file].numpy()))
            pending = {}
            model.known.clear()  # heard holds them; many hours need not be held twice
    heard = [(path, content[:, 0].tolist(), content[:, 1:]) for path, content in heard.items()
             if content is not None and len(content)]
    if not heard:
        raise ValueError(f"nothing to listen to: not one of {len(paths)} files could be read")
    return heard


def stretch(start, seconds):
    """A window's place in its recording: 0:10.0-0:20.0."""
    tenths = round(10 * start), round(10 * (start + seconds))
    return "-".join(f"{n // 600}:{n % 600 / 10:04.1f}" for n in tenths)


def tag(model, paths, labels, prompt, cache):
    """Print the five likeliest labels (after the prompt) of each window of each recording, if one fits (Eq. 5)."""
    texts = model.texts(labels, prompt)                                               # (K, D)
    for path, starts, audio in hear(model, paths, cache):
        chances = (math.exp(model.log_scale) * audio @ texts.T).softmax(1)            # (W, K)
        print(f"\n{path}")
        for start, chance in zip(starts, chances):
            best = chance.argsort(descending=True)[:5].tolist()
            print(f"  {stretch(start, model.front_end.seconds)}   "
                  + ", ".join(f"{labels[k]} {100 * chance[k]:.0f} %" for k in best))


def search(model, paths, queries, cache, top):
    """Print the `top` stretches of the recordings that fit each query best, none of which overlap."""
    heard, seconds = hear(model, paths, cache), model.front_end.seconds
    audio = torch.cat([embeddings for *_, embeddings in heard])                       # (W, D)
    places = [(path, start) for path, starts, _ in heard for start in starts]
    for query, cosines in zip(queries, model.texts(queries) @ audio.T):               # (W,)
        print(f"\n{query}")
        found = []
        for i in cosines.argsort(descending=True).tolist():
            path, start = places[i]
            if all(path != other or abs(start - at) >= seconds for other, at in found):
                found.append((path, start))
                print(f"  {cosines[i]:.3f}   {stretch(start, seconds)}   {path}")
            if len(found) == top:
                break
