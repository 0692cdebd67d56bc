"""Stands in the runner's place and becomes the runner, on a machine whose name for itself is the 32-bit one."""

from __future__ import annotations

import ctypes
import os
import sys

PER_LINUX32 = 0x0008

if ctypes.CDLL(None, use_errno=True).personality(PER_LINUX32) < 0:
    sys.exit("the container's profile has no personality")
os.execv(sys.executable, [sys.executable, "-I", "-S", "-B", "/opt/mayfly/__main__.pyc", *sys.argv[1:]])
