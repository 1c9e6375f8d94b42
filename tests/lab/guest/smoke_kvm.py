"""Runs in a lab guest: its /dev/kvm makes a VM with a vCPU. Prints one line; exits 1 when it is not so."""

from __future__ import annotations

import fcntl
import os
import sys

_KVM_GET_API_VERSION = 0xAE00
_KVM_CREATE_VM = 0xAE01
_KVM_CREATE_VCPU = 0xAE41
# It has been 12 since Linux 2.6.22, and KVM's documentation says to refuse any other.
_API_VERSION = 12


def main() -> int:
    """Ask the kernel; the exit status for the shell."""
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    version = fcntl.ioctl(kvm, _KVM_GET_API_VERSION, 0)
    vm = fcntl.ioctl(kvm, _KVM_CREATE_VM, 0)
    vcpu = fcntl.ioctl(vm, _KVM_CREATE_VCPU, 0)
    print(f"{os.environ['MIGSTREAM_LAB']}: Linux {os.uname().release}, KVM API {version}, vCPU fd {vcpu}")
    return 0 if version == _API_VERSION else 1


if __name__ == "__main__":
    sys.exit(main())
