#!/bin/bash
# PyAV 18.1.0 beside soundfile 0.14.0 (libsndfile), decoding short OGG Vorbis and M4A files.
#
# Expected: both decoders give the samples that were encoded, as many as the file says it has.
# Seen: libsndfile does. PyAV's frames of a Vorbis file end up to 256 samples early or 316 late: the
# last page's position, which says where the sound ends, is not followed, and the last block may be
# missing. Those of AAC in MP4 go on to the end of the last frame of 1,024. What counts tokens by
# samples (40 ms each, say) gets another number for the same file, depending on the reader.
#
#   vorbis 1000 at 16000: libsndfile 1000, PyAV 744, the file says 1000
#   vorbis 16000 at 16000: libsndfile 16000, PyAV 16128, the file says 16000
#   vorbis 44100 at 22050: libsndfile 44100, PyAV 44416, the file says 44100
#   vorbis 44100 at 44100: libsndfile 44100, PyAV 43972, the file says 44100
#   aac 44100 at 44100: PyAV 45056, the file says 44100
#
# Exits 1 if that has changed. Needs python3 and a network.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check av==18.1.0 soundfile==0.14.0 numpy==2.4.6
cat > finding.py <<'P'
import io

import av
import numpy as np
import soundfile


def tone(n, rate):
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(n) / rate)).astype(np.float32)


def decoded(data):
    """Samples that PyAV gives, and those that the file says it has."""
    file = av.open(io.BytesIO(data))
    stream = file.streams.audio[0]
    said = int(stream.duration * stream.time_base * stream.rate)
    return sum(frame.samples for frame in file.decode(audio=0)), said


def aac(n, rate):
    data = io.BytesIO()
    file = av.open(data, "w", format="mp4")
    stream = file.add_stream("aac", rate=rate)
    stream.layout = "mono"
    frame = av.AudioFrame.from_ndarray(tone(n, rate)[None], format="fltp", layout="mono")
    frame.sample_rate, frame.pts = rate, 0
    for packet in [*stream.encode(frame), *stream.encode(None)]:
        file.mux(packet)
    file.close()
    return data.getvalue()


seen = []
for n, rate in ((1000, 16000), (16000, 16000), (44100, 22050), (44100, 44100)):
    data = io.BytesIO()
    soundfile.write(data, tone(n, rate), rate, format="OGG", subtype="VORBIS")
    theirs = len(soundfile.read(io.BytesIO(data.getvalue()))[0])
    ours, said = decoded(data.getvalue())
    print(f"vorbis {n} at {rate}: libsndfile {theirs}, PyAV {ours}, the file says {said}")
    assert theirs == said == n, "the behaviour has changed"
    seen.append(ours - n)
ours, said = decoded(aac(44100, 44100))
print(f"aac 44100 at 44100: PyAV {ours}, the file says {said}")
assert said == 44100, "the behaviour has changed"
assert [*seen, ours - said] == [-256, 128, 316, -128, 956], "the behaviour has changed"
P
venv/bin/python finding.py
