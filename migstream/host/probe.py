"""Ask a host what it offers. Works on scratch VMs of its own, so nothing that runs is disturbed."""

from __future__ import annotations
