# SPDX-License-Identifier: Apache-2.0
"""What the machine can do to a run, each in one line: what happened, and the remedy.

The libraries that write checkpoints report a full disk or a missing permission as errors of their
own, with the system's words inside; those words are looked for.
"""

import errno
import importlib.util
import re


class UserError(ValueError):
    """A mistake that the user can fix; the message is one line: the value and the remedy."""


class MachineError(RuntimeError):
    """The machine failed, or training did; the message is one line: what, and the remedy."""


def nearest_multiples(value: int, step: int, least: int = 0) -> str:
    """The multiples of `step` below and above `value`, for a message: '96 or 104'.

    least: a multiple of `step` that none may be less than; 0: `step` itself.
    """
    down = value // step * step
    near = {max(multiple, least or step) for multiple in (down, down + step)}
    return " or ".join(map(str, sorted(near)))


# Import name -> name on the index, of the packages that only some commands need.
OPTIONAL = {
    "gcsfs": "gcsfs",
    "gradio": "gradio",
    "huggingface_hub": "huggingface_hub",
    "kubernetes": "kubernetes",
    "libtpu": "'jax[tpu]'",
    "pyarrow": "pyarrow",
    "qwix": "qwix",
    "s3fs": "s3fs",
    "torch": "torch",
}


def install(*modules: str) -> str:
    """The command that installs these keys of OPTIONAL, in a clone and beside a wheel alike."""
    return f"pip install {' '.join(OPTIONAL[module] for module in modules)}"


def require(what: str, *modules: str, otherwise: str = "") -> None:
    """Raises UserError where one of `modules`, keys of OPTIONAL, is not installed.

    what: what needs them, with its verb. otherwise: another way out, as in ', or plan for cpu'.
    """
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"{what}; {install(*missing)}{otherwise}")


REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space or lower `keep`, then rerun the command",
    errno.EDQUOT: "the disk quota is used up; free some space, then rerun the command",
    errno.EFBIG: "a file exceeds the size limit; raise ulimit -f, or use another file system",
    errno.EROFS: "the file system is read-only; use a --workdir that can be written",
    errno.EACCES: "permission denied; use a --workdir that this user may write, or chown it",
    errno.EPERM: "operation not permitted; use a --workdir that this user may write",
    errno.EIO: "the disk reports an error; check it, and continue in a copy of the workdir",
    errno.ESTALE: "the network file system lost the file; mount it again",
    errno.ENOTDIR: "a file exists where a folder is needed; remove it, or use another --workdir",
    errno.EEXIST: "a file exists where a folder is needed; remove it, or use another --workdir",
    errno.EISDIR: "a folder exists where a file is needed; remove it, or use another --workdir",
    errno.ENAMETOOLONG: "the name is too long; use a shorter --workdir",
    errno.ELOOP: "a link leads back to itself; remove it, or use another --workdir",
    errno.EMFILE: "too many open files; raise `ulimit -n` or lower data.workers and data.threads",
    errno.ENOMEM: "no memory left on this host; lower batch_size, data.prefetch or data.workers",
}
# The system's words for the same, as they stand in messages of C++ libraries.
_WORDS = {
    "No space left on device": errno.ENOSPC,
    "Disk quota exceeded": errno.EDQUOT,
    "File too large": errno.EFBIG,
    "Read-only file system": errno.EROFS,
    "Permission denied": errno.EACCES,
    "Input/output error": errno.EIO,
}
_DEVICE = (
    "the device is out of memory; lower batch_size (accumulate=N splits the batch into N "
    "microbatches), set remat=blocks, or shard the weights with mesh.fsdp; to resume with the "
    "first two changed, set allow_change=('batch_size','accumulate')"
)


def explain(error: BaseException) -> str | None:
    """One line for an error that the machine caused; None for any other, which is a bug."""
    for cause in _chain(error):
        line = _explain_one(cause)
        if line is not None:
            return line
    return None


def _chain(error: BaseException | None) -> list[BaseException]:
    """The error, and those that led to it."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _explain_one(error: BaseException) -> str | None:
    if isinstance(error, MachineError):
        return str(error)
    text = " ".join(str(error).split())
    if isinstance(error, OSError):
        number = errno.EACCES if isinstance(error, PermissionError) else error.errno
        number = error.errno if error.errno in REMEDIES else number
        if number in REMEDIES:
            return f"{error.filename or 'a file'}: {REMEDIES[number]}"
        return None
    for words, number in _WORDS.items():
        if words in text:
            file = re.search(r"\"(/[^\"]+)\"", text)
            return f"{file[1] if file else 'a file'}: {REMEDIES[number]}"
    if isinstance(error, MemoryError):
        return REMEDIES[errno.ENOMEM]
    name = type(error).__name__
    exhausted = "RESOURCE_EXHAUSTED" in text or "Out of memory" in text
    if name in ("XlaRuntimeError", "JaxRuntimeError") and exhausted:
        wanted = re.search(r"allocat\w+ ([\d.]+ ?\w*[Bb](?:ytes)?\b|\d+ bytes)", text)
        return _DEVICE + (f" (it wanted {wanted[1]} more)" if wanted else "")
    return None
