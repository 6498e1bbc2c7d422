"""The processors that a process may use: affinity, and the quotas of either version of control groups."""

import os
from pathlib import Path

import pytest

from vitreg.archive import ray_engine as engine
from vitreg.data.cpus import usable_cpus


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight of sixteen processors are this process's."""
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


OWN, CPU = "proc/self/cgroup", "sys/fs/cgroup"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({OWN: "0::/\n"}, 8),
        ({OWN: "0::/\n", f"{CPU}/cpu.max": "max 100000\n"}, 8),
        ({OWN: "0::/\n", f"{CPU}/cpu.max": "200000 100000\n"}, 2),
        ({OWN: "0::/\n", f"{CPU}/cpu.max": "250000 100000\n"}, 2),
        ({OWN: "0::/\n", f"{CPU}/cpu.max": "50000 100000\n"}, 1),
        ({OWN: "0::/\n", f"{CPU}/cpu.max": "1600000 100000\n"}, 8),
        ({OWN: "0::/a/b\n", f"{CPU}/a/b/cpu.max": "max 100000", f"{CPU}/a/cpu.max": "300000 100000"}, 3),
        ({OWN: "0::/a/b\n", f"{CPU}/a/b/cpu.max": "400000 100000", f"{CPU}/a/cpu.max": "600000 100000"}, 4),
        ({OWN: "0::/elsewhere\n", f"{CPU}/cpu.max": "500000 100000"}, 5),
        (
            {
                OWN: "7:memory:/x\n4:cpu,cpuacct:/docker/1\n0::/\n",
                f"{CPU}/cpu/cpu.cfs_quota_us": "300000\n",
                f"{CPU}/cpu/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        (
            {
                OWN: "4:cpu,cpuacct:/slurm/job\n",
                f"{CPU}/cpu,cpuacct/slurm/job/cpu.cfs_quota_us": "600000\n",
                f"{CPU}/cpu,cpuacct/slurm/job/cpu.cfs_period_us": "100000\n",
            },
            6,
        ),
        (
            {
                OWN: "4:cpu:/\n",
                f"{CPU}/cpu/cpu.cfs_quota_us": "-1\n",
                f"{CPU}/cpu/cpu.cfs_period_us": "100000\n",
            },
            8,
        ),
        ({OWN: "nonsense\n\n:\n", f"{CPU}/cpu.max": "many\n"}, 8),
        ({OWN: "0::/\n", f"{CPU}/cpu.max": "100000 0\n"}, 8),
    ],
)
def test_quotas(eight, tmp_path, files, expected):
    assert usable_cpus(tree(tmp_path, files)) == expected


def test_where_there_is_no_affinity(monkeypatch, tmp_path):
    """On macOS and Windows."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    for count, expected in ((6, 6), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda count=count: count)
        assert usable_cpus(tmp_path) == expected


@pytest.mark.parametrize(("workers", "expected"), [(None, 3), (2, 3), (5, 5)])
def test_ray_is_told_of_them(monkeypatch, workers, expected):
    """So many workers as were asked for have room all the same."""
    ray = pytest.importorskip("ray")
    told = {}
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(engine, "usable_cpus", lambda: 3)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda *args, **options: told.update(options))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with engine.ray_session(workers):
        assert told["num_cpus"] == expected
