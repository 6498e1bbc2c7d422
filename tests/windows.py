"""Runs vitreg here as on Windows: `python -X warn_default_encoding windows.py FOLDER PHOTOS`.

Missing are modules and functions that only POSIX has; processes are spawned; text without an encoding, which
would not be UTF-8 there, is an error; files that are open cannot be replaced, renamed over or deleted, and
only what is open for writing can be synced. Prints what was done, as JSON.
"""

import importlib
import json
import multiprocessing
import os
import pkgutil
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

POSIX_MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
POSIX_OS = [
    "fork", "forkpty", "getuid", "geteuid", "getgid", "getegid", "getpgrp", "getpgid", "getsid",
    "setsid", "setuid", "setgid", "killpg", "sched_getaffinity", "sched_setaffinity", "mkfifo",
    "mknod", "statvfs", "fstatvfs", "uname", "nice", "getloadavg", "sysconf", "wait", "wait3",
    "wait4", "chown", "lchown", "fchown", "fchmod", "chroot", "getgroups", "getpriority",
    "setpriority", "posix_fadvise", "posix_fallocate", "pread", "pwrite", "sendfile", "sync",
    "fdatasync", "openpty", "ttyname", "ctermid", "fchdir",
]  # fmt: skip
POSIX_SIGNALS = [
    "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGHUP", "SIGPIPE", "SIGCHLD", "SIGQUIT",
    "SIGSTOP", "SIGCONT", "SIGTSTP", "alarm", "setitimer", "pause", "sigwait", "pthread_sigmask",
    "pthread_kill",
]  # fmt: skip


class Refusal:
    """Refuses modules to vitreg; other packages have a branch for Windows, which they do not take here."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        frame = sys._getframe(1)
        while frame is not None and "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        if name in POSIX_MODULES and frame is not None and _of_vitreg(frame.f_globals):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _of_vitreg(names: dict[str, Any]) -> bool:
    return str(names.get("__name__", "")).partition(".")[0] == "vitreg"


class Without:
    """A module without some names, for vitreg alone: others keep theirs."""

    def __init__(self, module: Any, missing: list[str]) -> None:
        self.__dict__.update(_module=module, _missing=frozenset(missing))

    def __getattr__(self, name: str) -> Any:
        if name in self._missing:
            raise AttributeError(f"module {self._module.__name__!r} has no attribute {name!r}")
        return getattr(self._module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._module, name, value)


def become_windows() -> None:
    for name in POSIX_MODULES:
        sys.modules.pop(name, None)
    sys.meta_path.insert(0, Refusal())
    multiprocessing.set_start_method("spawn")
    warnings.filterwarnings("error", category=EncodingWarning, module=r"vitreg(\..*)?")
    os.replace, os.rename, os.unlink, os.remove, os.fsync = _replace, _rename, _unlink, _unlink, _fsync


def hide_posix() -> list[str]:
    """Take POSIX's functions from vitreg's modules; returns the names of these."""
    import vitreg

    names = [info.name for info in pkgutil.walk_packages(vitreg.__path__, "vitreg.")]
    names = [name for name in names if not name.endswith("__main__")]
    hidden = {os: Without(os, POSIX_OS), signal: Without(signal, POSIX_SIGNALS)}
    for name in names:
        module = importlib.import_module(name)
        for key, value in list(vars(module).items()):
            if value is os or value is signal:
                setattr(module, key, hidden[value])
    return names


_really = {name: getattr(os, name) for name in ("replace", "rename", "unlink", "fsync")}


def _is_open(path: Any) -> bool:
    """Whether this process has the file open, or mapped into memory."""
    real = os.path.realpath(path)
    if not os.path.isfile(real):
        return False
    for descriptor in os.listdir("/proc/self/fd"):
        if os.path.realpath(f"/proc/self/fd/{descriptor}") == real:
            return True
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        return any(line.rstrip("\n").endswith(real) for line in maps)


def _refuse_open(*paths: Any) -> None:
    for path in paths:
        if _is_open(path):
            raise PermissionError(13, "The process cannot access the file: it is being used", os.fspath(path))


def _replace(source: Any, target: Any, **more: Any) -> None:
    _refuse_open(source, target)
    _really["replace"](source, target, **more)


def _rename(source: Any, target: Any, **more: Any) -> None:
    _refuse_open(source)
    if os.path.exists(target):
        raise FileExistsError(17, "Cannot create a file when that file already exists", os.fspath(target))
    _really["rename"](source, target, **more)


def _unlink(path: Any, **more: Any) -> None:
    _refuse_open(path)
    _really["unlink"](path, **more)


def _fsync(descriptor: int) -> None:
    flags = (
        Path(f"/proc/self/fdinfo/{descriptor}").read_text(encoding="utf-8").partition("flags:")[2].split()[0]
    )
    if int(flags, 8) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(9, "Bad file descriptor")
    _really["fsync"](descriptor)


def use_all(folder: Path, photos: Path) -> dict[str, Any]:
    """A diagnosis, a fix saved twice and read back, features from a cache, training in two parts, shards."""
    import timm
    import torch
    from PIL import Image
    from torchvision.transforms import ToTensor
    from training_runs import Hit, Hits, save_classes, tiny

    import vitreg
    from vitreg.features.config import Config
    from vitreg.features.extraction import extract_features
    from vitreg.training.loop import Machine, train
    from vitreg.training.pairs import write_pairs

    torch.manual_seed(0)
    model = timm.models.VisionTransformer(
        img_size=(32, 40), patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=0
    ).eval()
    Image.new("RGB", (40, 32), "red").save(photos / "photo é 日本.png")
    vit = vitreg.wrap(model, ToTensor(), image_size=(32, 40), name="tiny")
    images = vitreg.read_images(photos, vit, batch_size=8, workers=1)
    batches = list(images)  # once: each pass spawns a process
    done: dict[str, Any] = {"images": vitreg.diagnose(vit, batches).images, "failed": images.failed}
    phantom = vitreg.plant(vit, [batch.pixels for batch in batches], 1, rate=0.06)
    report = vitreg.diagnose(phantom.vit, batches)
    cure = vitreg.find_fix(phantom.vit, batches, report=report, kind="registers")
    for _ in range(2):  # the second replaces the first
        cure.save(folder / "fix")
        done["fix"] = vitreg.load_fix(folder / "fix").type
        paths = sorted(photos.glob("*.png"))
    for _ in range(2):
        found = extract_features(vit, paths, ["cls"], Config(workers=0, cache=folder / "cache"))
        done["features"] = len(found.index)
    data = save_classes(folder / "classes", train=4, val=1)
    for workers, Hits.now in ((0, Hit("int", 2)), (1, Hit())):
        machine = Machine("cpu", workers=workers)
        run = train(tiny(data, steps=4, checkpoint_every=1), folder / "run", machine)
        done.setdefault("steps", []).append([run.step, run.interrupted])
    done["log"] = [line["step"] for line in run.log]
    done["shards"] = [path.name for path in write_pairs(data / "train", folder / "#1 shards", per_shard=5)]
    return done


def main() -> None:
    folder = Path(sys.argv[1])
    become_windows()
    modules = hide_posix()
    done = {"modules": modules}
    if len(sys.argv) > 2:
        done |= use_all(folder, Path(sys.argv[2]))
        done["files"] = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    sys.stdout.write(json.dumps(done, default=str) + "\n")


if __name__ == "__main__":
    main()
