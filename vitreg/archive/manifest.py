"""What an extraction has made so far, gathered from the shards' own entries: a killed driver loses nothing.

found = Extraction.read("features/")       # from manifest.json, which a run writes when it ends
print(found)
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from vitreg.archive.plan import DOCUMENT
from vitreg.archive.storage import Storage
from vitreg.archive.worker import DONE, entry_name
from vitreg.data.listing import FailedImage
from vitreg.errors import ArchiveError

MANIFEST = "manifest.json"
_SHOWN = 5  # reasons and photos that are printed


@dataclass
class Extraction:
    """The manifest of an output folder.

    `complete`: all planned shards are done. `images` counts good photos, `failed` names the others. `files`
    with features, and their `bytes`; the shards' entries (done/*.json) name each. `seconds` are sums over the
    workers' threads; `plan` is plan.json.
    """

    out: str
    plan: dict[str, Any]
    done: int = 0
    images: int = 0
    failed: list[FailedImage] = field(default_factory=list)
    files: int = 0
    bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    workers: list[dict[str, Any]] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return bool(self.done == self.plan["shards"])

    @staticmethod
    def gather(out: Storage, done: list[int]) -> "Extraction":
        """Read the entries of these shards."""
        found = Extraction(out.url, json.loads(out.read(DOCUMENT)))
        workers: dict[str, dict[str, Any]] = {}
        for content in out.read_all([entry_name(index) for index in done]):
            entry = json.loads(content)
            found.done += 1
            found.images += entry["images"]
            found.failed += [FailedImage(image["name"], image["reason"]) for image in entry["failed"]]
            found.files += len(entry["files"])
            found.bytes += sum(file["bytes"] for file in entry["files"])
            for what, seconds in entry["seconds"].items():
                found.seconds[what] = round(found.seconds.get(what, 0.0) + seconds, 3)
            _merge(workers, entry["worker"])
        found.workers = list(workers.values())
        return found

    @staticmethod
    def read(out: str) -> "Extraction":
        """Raises ArchiveError where no run has ended yet."""
        place = Storage.at(out)
        if not place.has(MANIFEST):
            raise ArchiveError(f"{out} has no {MANIFEST}: no run has ended there. Run vitreg features again.")
        document = json.loads(place.read(MANIFEST))
        del document["complete"]
        failed = [FailedImage(image["name"], image["reason"]) for image in document.pop("failed")]
        return Extraction(out=out, failed=failed, **document)

    def to_json(self) -> dict[str, Any]:
        """Plain values: what manifest.json holds."""
        document = asdict(self)
        del document["out"]  # it may be copied elsewhere
        document["failed"] = [{"name": image.path, "reason": image.reason} for image in self.failed]
        return {"complete": self.complete, **document}

    def __str__(self) -> str:
        state = "complete" if self.complete else "NOT complete: the same command goes on"
        shards = f"{self.done} of {self.plan['shards']} shards, {state}"
        size = f"{self.files} files, {self.bytes / 1e6:,.1f} MB"
        lines = [f"{self.images} images, {len(self.failed)} not read; {shards}", f"{self.out}: {size}"]
        lines += [
            f"  {name}: {' x '.join(map(str, shape))}"
            for name, shape in self.plan["settings"]["features"].items()
        ]
        lines += [self.limits(), *self._failures()] if self.seconds else []
        return "\n".join(lines)

    def limits(self) -> str:
        """Where the workers' time went, and what that says."""
        seconds = {"waiting for photos": 0.0, "forward": 0.0, "waiting for the disk": 0.0} | self.seconds
        shares = {
            "decoding limits": seconds["waiting for photos"],
            "the forward pass limits": seconds["forward"],
            "writing limits": seconds["waiting for the disk"],
        }
        verdict = max(shares, key=lambda what: shares[what])
        spent = ", ".join(
            f"{what} {self.seconds.get(what, 0.0):.1f} s" for what in ("decode", "forward", "write")
        )
        waited = f"waited {seconds['waiting for photos']:.1f} s for photos"
        stalled = f"{seconds['waiting for the disk']:.1f} s for the disk"
        return f"time of the workers' threads: {spent}; the model {waited} and {stalled}: {verdict}"

    def _failures(self) -> list[str]:
        if not self.failed:
            return []
        reasons = Counter(image.reason for image in self.failed)
        first = {image.reason: image.path for image in reversed(self.failed)}
        lines = [f"  {n} x {why} (first: {first[why]})" for why, n in reasons.most_common(_SHOWN)]
        more = [f"  and {len(reasons) - _SHOWN} other reasons"] if len(reasons) > _SHOWN else []
        return [f"not read (all of them are in {MANIFEST}):", *lines, *more]


def finished(out: Storage) -> list[int]:
    """The shards whose entries are there."""
    names = [name.partition(".") for name in out.names(DONE)]
    return [int(number) for number, _, ending in names if number.isdigit() and ending == "json"]


def _merge(workers: dict[str, dict[str, Any]], worker: dict[str, Any]) -> None:
    """One line per kind of worker: what it ran, and the most memory that one held."""
    key = json.dumps({name: value for name, value in worker.items() if name != "peak_mib"}, sort_keys=True)
    peaks = [peak for x in (worker, workers.get(key, worker)) if (peak := x["peak_mib"]) is not None]
    workers[key] = {**worker, "peak_mib": max(peaks, default=None)}
