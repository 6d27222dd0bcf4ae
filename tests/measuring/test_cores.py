"""adaskip_cpp.measuring.cores: the cores of this machine."""

import os

from adaskip_cpp.measuring.cores import physical_cores


def test_there_is_a_core_to_run_on() -> None:
    assert 1 <= physical_cores() <= (os.cpu_count() or 1)
