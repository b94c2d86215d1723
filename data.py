"""Files to tensors: audio, filterbanks, masking, frames (§3.2.2).

    python data.py toy                       # make the toy world in data/toy (pretrain.py --data toy does it too)
    python data.py extract --segments data/audioset/eval_segments.csv --videos VIDEOS    # videos -> WAV, frames, index
    python data.py stats --data audioset     # mean and std of its log-mel values, for --mean and --std
    python data.py pack --data audioset      # sounds as 16-bit samples in one file, for disks and formats that are slow

B  batch     S  samples of a waveform     T  frames of 10 ms     F  mel bins     R  side of an image in pixels
"""
import math
import warnings
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
import soundfile
import torch
import torchaudio
from PIL import Image


class Unreadable(ValueError):
    """One file that can't be used; the message names it. Training skips and counts it."""


class Silent(Unreadable):
    """A file, or the part of it that was asked for, whose samples are all equal."""


# --------------------------------------------------------------------------------------- audio

LONGEST = 6 * 3600  # seconds of a file that is read whole


def check_rate(path, rate):
    """Raises Unreadable where a file's header names a rate (Hz) that no recording has."""
    if not 1000 <= rate <= 1_000_000:
        raise Unreadable(f"{path}: says it has {rate} samples a second; is its header damaged?")


def resample(wave, rate, new_rate):
    """Waveform (S,) at another rate in Hz, by a filter without delay; odd ratios are met to one in a thousand."""
    if rate == new_rate:
        return wave
    ratio = Fraction(new_rate, rate).limit_denominator(1000)  # exact for usual rates; odd ones need huge filters
    return torchaudio.functional.resample(wave, ratio.denominator, ratio.numerator)


def load_audio(path, sample_rate, seconds=None, start=0.0):
    """First channel of an audio file, `seconds` (all by default) from `start` on -> (S,) float32 in [-1, 1].

    Any format, rate and sample width that libsndfile knows; resampled to `sample_rate` Hz where it differs.
    Raises Unreadable (missing, empty, corrupt, below 25 ms, not finite), Silent.
    """
    try:
        with soundfile.SoundFile(path) as file:
            rate, channels = file.samplerate, file.channels
            check_rate(path, rate)
            if start:
                file.seek(min(round(start * rate), file.frames))
            wanted, parts = math.ceil((seconds or LONGEST) * rate), []
            for at in range(0, wanted, 2 ** 16):  # in pieces: a header may promise any number of samples and channels
                size = min(2 ** 16, wanted - at)
                parts.append(file.read(size, dtype="float32", always_2d=True)[:, 0].copy())
                if len(parts[-1]) < size:
                    break
            else:  # the file goes on
                if seconds is None:
                    raise Unreadable(f"{path}: longer than {LONGEST // 3600} hours; cut it")
    except (OSError, RuntimeError, TypeError, UnicodeError) as error:  # soundfile's; a .raw file; a name not in UTF-8
        raise Unreadable(f"{path}: can't be read as audio ({error})") from None
    if channels > 1:
        warnings.warn("some audio has more than one channel: its first is used (§3.2.2)", stacklevel=1)
    wave = np.concatenate(parts)                                                     # (S,)
    if len(wave) < 0.025 * rate:
        raise Unreadable(f"{path}: {1000 * len(wave) / rate:.0f} ms of audio; one frame needs 25 ms")
    if not np.isfinite(wave).all():
        raise Unreadable(f"{path}: holds NaN or infinite samples")
    if wave.min() == wave.max():
        raise Silent(f"{path}: silent (every sample of its first channel is equal)")
    return resample(torch.from_numpy(wave), rate, sample_rate).clamp(-1, 1)


def floating(waves):
    """16-bit samples -> float32 in [-1, 1); float32 stays as it is."""
    return waves.float() / 32768 if waves.dtype == torch.int16 else waves


def window_and_shift(sample_rate):
    """Samples of a frame's window (25 ms), and from one frame to the next (10 ms); rounded down, as Kaldi does."""
    return int(sample_rate * 0.025), int(sample_rate * 0.010)


@lru_cache
def window_and_mel_bins(sample_rate, mels, device):
    """Hanning window (25 ms,), FFT length, and triangular mel bins as Kaldi has them; made once.

    The mel bins are cut into four bands, each with the slice of FFT bins that it covers and a matrix (covered FFT bins,
    F / 4): in the whole matrix nearly everything is zero.
    """
    length, _ = window_and_shift(sample_rate)
    fft = 2 ** math.ceil(math.log2(length))

    low, high = (1127 * math.log(1 + hertz / 700) for hertz in (20, sample_rate / 2))  # in mel
    width = (high - low) / (mels + 1)
    edges = low + torch.arange(mels + 2) * width     # (F + 2,) float32, as Kaldi's: in double they differ by 1e-5
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]                         # (F,)
    mel = 1127 * (1 + torch.arange(fft // 2 + 1)[:, None] * (sample_rate / fft) / 700).log()  # (FFT bins, 1)
    rising, falling = (mel - left) / (centre - left), (right - mel) / (right - centre)   # (FFT bins, F)
    triangles = torch.minimum(rising, falling).clamp(min=0)                          # (FFT bins, F)
    bands = []
    for band in triangles.to(device).tensor_split(4, dim=1):                         # (FFT bins, F / 4)
        covered = band.any(1).nonzero().flatten().tolist() or [0]  # narrow bins may lie between two of the FFT's
        covered = slice(covered[0], covered[-1] + 1)
        bands.append((covered, band[covered].contiguous()))
    return torch.hann_window(length, periodic=False, device=device), fft, bands


def fbank(waves, sample_rate, mels=128):
    """Kaldi's log-mel filterbanks: waveforms (B, S) -> (B, T, F), on any device (§3.2.2).

    25 ms Hanning window every 10 ms, no energy, no dither: torchaudio.compliance.kaldi.fbank for a batch, its
    roundings included (the quietest bins lie 100 dB below the loudest, where the order of two operations shows).
    """
    window, fft, bands = window_and_mel_bins(sample_rate, mels, waves.device)
    length, shift = window_and_shift(sample_rate)
    if waves.shape[1] < length:
        raise ValueError(f"{waves.shape[1]} samples; one frame at {sample_rate} Hz needs {length}")
    out = []
    # A CPU's temporaries stay in its cache if it takes some 5 s of sound at a time; a GPU wants many clips at once.
    for x in waves.split(max(1, (2 ** 18 if waves.device.type == "cpu" else 2 ** 25) // waves.shape[1])):
        frames = x.unfold(1, length, shift)                                          # (b, T, 25 ms)
        # as Kaldi does. differs from the paper, which takes off the waveform's mean first (§3.2.2): it goes with this
        frames = frames - frames.mean(2, keepdim=True)
        padded = frames.new_zeros(*frames.shape[:2], fft)                            # (b, T, FFT)
        emphasised = frames[:, :, 1:] - 0.97 * frames[:, :, :-1]  # the first sample needs none: its window is 0
        torch.mul(emphasised, window[1:], out=padded[:, :, 1:length])
        spectrum = torch.fft.rfft(padded)                                            # (b, T, FFT bins)
        power = (spectrum.real.square() + spectrum.imag.square()).flatten(0, 1)      # (b·T, FFT bins)
        energy = torch.cat([power[:, covered] @ band for covered, band in bands], 1)  # (b·T, F)
        energy = energy.unflatten(0, frames.shape[:2])                               # (b, T, F)
        out.append(energy.clamp(min=torch.finfo(torch.float32).eps).log())
    return torch.cat(out)                                                            # (B, T, F)


@dataclass(frozen=True)
class FrontEnd:
    """What stands between a waveform and the audio encoder; travels inside every checkpoint."""
    sample_rate: int = 44_100   # Hz, AudioSet's files' own
    mels: int = 128             # mel bins
    frames: int = 1000          # of 10 ms
    mean: float = -4.93839311   # of AudioSet's log-mel values at 44.1 kHz
    std: float = 5.75751113

    @property
    def seconds(self):
        """How much of a clip the encoder hears."""
        return self.frames * 0.010

    @property
    def samples(self):
        """Samples that fill all frames (a window reaches 15 ms past its frame)."""
        length, shift = window_and_shift(self.sample_rate)
        return (self.frames - 1) * shift + length

    def padded(self, wave):
        """A waveform's first `samples`, zero-padded on the right; its length."""
        wave = wave[:self.samples]
        return torch.nn.functional.pad(wave, (0, self.samples - len(wave))), len(wave)

    def load(self, path, start=0.0):
        """Audio file from `start` s on -> (samples,) zero-padded; its length. Raises Unreadable."""
        # 0.1 s more: the last window reaches 15 ms further, and so does the resampling filter
        return self.padded(load_audio(path, self.sample_rate, self.seconds + 0.1, start))

    def load_window(self, place):
        """The same for a window (path, start) of a long recording, which may be silent for a while."""
        try:
            return self.load(*place)
        except Silent:
            return torch.zeros(self.samples), self.samples

    def __call__(self, waves, lengths):
        """Padded waveforms (B, samples) float32 or int16, lengths (B,) -> normalised filterbanks (B, 1, T, F)."""
        x = fbank(floating(waves), self.sample_rate, self.mels)                      # (B, T, F)
        length, shift = window_and_shift(self.sample_rate)
        heard = 1 + (lengths - length) // shift                                      # (B,) frames
        padding = torch.arange(self.frames, device=x.device) >= heard[:, None]       # (B, T)
        # differs from the paper, which does not say: zeros on the right *before* normalising, as in the authors' code
        x = x.masked_fill(padding[:, :, None], 0.0)
        return ((x - self.mean) / self.std)[:, None]                                 # (B, 1, T, F)


def mask(x, draws):
    """One band of up to 1/5 of the frames and one of up to 1/4 of the mel bins set to 0, the mean (§3.2.2).

    x: (B, 1, T, F) normalised filterbanks; draws: (B, 4) uniform in [0, 1): width and place of either band.
    """
    # differs from the paper, which masks "one-fifth" and "one-forth": widths are drawn, as in the authors' code
    for dim, share, width, place in ((2, 5, draws[:, 0], draws[:, 1]), (3, 4, draws[:, 2], draws[:, 3])):
        size = x.shape[dim]
        width = (width * (size // share)).floor()                                    # (B,)
        start = (place * (size - width)).floor()                                     # (B,)
        at = torch.arange(size, device=x.device)
        band = (at >= start[:, None]) & (at < (start + width)[:, None])              # (B, T) or (B, F)
        x = x.masked_fill(band[:, None, :, None] if dim == 2 else band[:, None, None, :], 0.0)
    return x


# -------------------------------------------------------------------------------------- images

IMAGE_MEAN, IMAGE_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's


def preprocess_image(image, size=224):
    """PIL image of any mode -> (3, R, R) float32: shorter side to R (bicubic), centre crop, CLIP's normalisation."""
    if image.mode.startswith("I;16"):  # 16-bit grey, which PIL would clip instead of scale
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image = image.convert("RGB")
    width, height = image.size
    short = min(width, height)
    image = image.resize((int(size * width / short), int(size * height / short)), Image.Resampling.BICUBIC)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32)          # (R, R, 3)
    pixels = (pixels / 255 - np.array(IMAGE_MEAN, np.float32)) / np.array(IMAGE_STD, np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()                                    # (3, R, R)


def load_image(path, size=224):
    """Image file -> (3, R, R) float32. Raises Unreadable (missing, corrupt, truncated)."""
    try:
        with Image.open(path) as image:
            return preprocess_image(image, size)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Unreadable(f"{path}: can't be read as an image ({error})") from None


if __name__ == "__main__":
    from prepare import main  # it imports this file
    from processes import run

    run(main)
