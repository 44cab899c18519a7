"""Waiting for nodes: what `ray status` tells of autoscalers, here as Ray 2.60 has printed it."""

import pytest

from fashion.cluster.nodes import AutoscalerStatus, parse_status

NO_AUTOSCALER = """\
======== Autoscaler status: 2026-11-28 04:58:42.896624 ========
Node status
---------------------------------------------------------------
Active:
 1 node_8d0e6ab23fc318b01fb10e41562b2c4cd12de33e44f091fcdc90eb3c
Pending:
 (no pending nodes)
Recent failures:
 (no failures)

Resources
---------------------------------------------------------------
Total Usage:
 0.0/2.0 CPU
 0B/12.33GiB memory

From request_resources:
 (none)
Pending Demands:
 (no resource demands)
"""
[BY_HAND] = [line for line in NO_AUTOSCALER.splitlines() if "node_" in line]
NOTHING_UP = NO_AUTOSCALER.replace(BY_HAND, " (no active nodes)")
STARTING = """\
======== Autoscaler status: 2026-11-28 05:03:14.373417 ========
Node status
---------------------------------------------------------------
Active:
 1 ray.head.default
Idle:
 1 worker
Pending:
 fffffffffffffffffffffffffffffffffffffffffffffffffff00001: worker, uninitialized
 10.0.0.7: worker, setting-up
Recent failures:
 (no failures)
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (NO_AUTOSCALER, AutoscalerStatus(False, 0, "2026-11-28 04:58:42.896624")),
        (NOTHING_UP, AutoscalerStatus(True, 0, "2026-11-28 04:58:42.896624")),
        (STARTING, AutoscalerStatus(True, 2, "2026-11-28 05:03:14.373417")),
        ("No cluster status. It may take a few seconds for the Ray internal services to start up.", None),
        ("", None),
    ],
)
def test_an_autoscaler_is_told_from_nodes_that_were_started_by_hand(
    text: str, expected: AutoscalerStatus | None
) -> None:
    assert parse_status(text) == (expected or AutoscalerStatus(False, 0, ""))
