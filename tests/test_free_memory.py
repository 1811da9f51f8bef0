"""What memory is left, by files of the system that are made up here."""

import pytest

from dpsgd.free_memory import free_memory

MIB = 2**20


@pytest.fixture
def system(tmp_path):
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    groups.mkdir()
    (proc / "meminfo").write_text("MemTotal: 9000000 kB\nMemAvailable:    1048576 kB\n")
    (proc / "self" / "statm").write_text("25600 5 5 5 5 5 5")  # 100 MiB of pages of 4 KiB
    return proc, groups


def group(folder, most, used, cached=0):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(most)
    (folder / "memory.current").write_text(used)
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")


def test_what_the_machine_has(system):
    assert free_memory(*system) == 1024 * MIB


def test_a_container_may_have_less(system):
    proc, groups = system
    group(groups, f"{500 * MIB}", f"{200 * MIB}")
    assert free_memory(proc, groups) == 300 * MIB


def test_caches_of_files_are_left(system):
    proc, groups = system
    group(groups, f"{500 * MIB}", f"{200 * MIB}", cached=50 * MIB)
    assert free_memory(proc, groups) == 350 * MIB


def test_the_tightest_group_on_the_way_counts(system):
    proc, groups = system
    (proc / "self" / "cgroup").write_text("0::/jobs/mine\n")
    group(groups / "jobs" / "mine", "max", f"{200 * MIB}")
    group(groups / "jobs", f"{300 * MIB}", f"{250 * MIB}")
    assert free_memory(proc, groups) == 50 * MIB


def test_groups_of_the_first_version(system):
    proc, groups = system
    (proc / "self" / "cgroup").write_text("5:cpu:/\n3:memory:/mine\n")
    folder = groups / "memory" / "mine"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(f"{400 * MIB}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{100 * MIB}\n")
    assert free_memory(proc, groups) == 300 * MIB


def test_a_limit_on_the_address_space(system):
    assert free_memory(*system, address_space=150 * MIB) == 50 * MIB
    assert free_memory(*system, address_space=50 * MIB) == 0


def test_a_system_that_tells_nothing(tmp_path):
    assert free_memory(tmp_path, tmp_path) > 0


def test_this_system():
    assert free_memory() > 0
