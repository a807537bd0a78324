"""A worker process: proves one clip after the other, encoding it anew where asked. Started by pool.py.

It reads tasks from its standard input, one JSON object per line, and answers each with a line on its standard output.
A file that crashes or hangs a decoder takes only this process with it; and it ends by itself when its parent is gone
(its input closes) or when a clip takes too long (SIGALRM), so nothing is left behind.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import av

from tools.shard.encode import CODECS, EncodeOptions, encode
from vmjepa.data.probe_video import DECODER_ERROR, TOO_LARGE, UNREADABLE, BadClipError, ClipInfo, open_clip, probe
from vmjepa.data.shard_writer import MAX_CLIP_BYTES

ENCODER_ERROR = "encoder error"
MEMORY_LIMIT = 6 << 30  # bytes of address space; ordinary clips take a tenth of it, 4K AV1 about half
_STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


def prove(task: dict[str, Any]) -> dict[str, Any]:
    """Probes the clip of a task, as it will be packed.

    task: path, encode (fields of EncodeOptions, or null), target (file name without extension for an encoded clip).
    Returns clip (fields of ClipInfo), file (what to pack), length, sha256. Raises BadClipError; OSError when `target`
    cannot be written.
    """
    path = task["path"]
    with open_clip(path) as video:
        clip = probe(video)
        if not task["encode"]:
            return _proof(clip, path, video)
        options = EncodeOptions(**task["encode"])
        path = f"{task['target']}.{CODECS[options.codec].extension}"
        video.seek(0)
        try:
            encode(video, clip, Path(path), options)
        except (OSError, av.FFmpegError) as error:  # not all of FFmpeg's errors are OSErrors
            if error.errno in _STORAGE_ERRORS:
                raise
            what = f"{CODECS[options.codec].encoder}, from {clip.width}x{clip.height} pixels"
            raise BadClipError(ENCODER_ERROR, f"{what}: {error.strerror or error}") from None
    with open_clip(path) as video:
        encoded = probe(video)
        if encoded.frames != clip.frames:
            raise BadClipError(ENCODER_ERROR, f"{encoded.frames} of {clip.frames} frames came out")
        return _proof(encoded, path, video)


def _proof(clip: ClipInfo, path: str, video: BinaryIO) -> dict[str, Any]:
    length = os.fstat(video.fileno()).st_size
    if length > MAX_CLIP_BYTES:
        raise BadClipError(TOO_LARGE, f"{length} bytes; a tar member holds {MAX_CLIP_BYTES}")
    video.seek(0)
    return {
        "clip": asdict(clip),
        "file": path,
        "length": length,
        "sha256": hashlib.file_digest(video, "sha256").hexdigest(),  # type: ignore[arg-type]
    }


def answer(task: dict[str, Any]) -> dict[str, Any]:
    """`prove`, with failures as part of the answer: reason and detail, or the number of a storage error."""
    try:
        return prove(task)
    except BadClipError as error:
        return {"reason": error.reason, "detail": error.detail}
    except MemoryError:
        return {"reason": DECODER_ERROR, "detail": "needs more memory than a worker may use"}
    except OSError as error:
        if error.errno in _STORAGE_ERRORS:
            return {"storage_error": error.errno}
        return {"reason": UNREADABLE, "detail": error.strerror or str(error)}


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, resource.getrlimit(resource.RLIMIT_AS)[1]))
    tasks, answers = sys.stdin, os.fdopen(os.dup(1), "w")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)  # some codec libraries print
    os.dup2(silence, 2)
    print("ready", file=answers, flush=True)
    for line in tasks:
        task = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, task["seconds"])
        reply = json.dumps(answer(task))
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(reply, file=answers, flush=True)


if __name__ == "__main__":
    main()
