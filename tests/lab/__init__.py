"""The kernel lab: this project's tests on real KVM/arm64 and KVM/AMD of stock Debian kernels, in emulation.

`python -m tests.lab fetch` once (about a minute, 440 MB in the cache), then
`python -m tests.lab run --arch arm64 --kernel 6.1 -- COMMAND` (3 to 7 s and the command's time; no hardware
virtualization is needed). From Python: `boot.run(kernels.kernel("arm64", "6.1"), ["uname", "-r"])`.

The command runs as root in a copy of this checkout, with the project and its dependencies installed, an
empty stdin, and MIGSTREAM_LAB, _ARCH, _KERNEL, _CPU, _FEATURES and _MODE in its environment. Files that it
writes below its working folder come back; what it writes to /tmp does not. Time in a guest measures nothing.

Rooms: kernels (the table) · sources, apt, layers, fetch (network to cache) · cache, cpio (storage) ·
project, image, init.sh (what goes in) · boot, console, files (what comes out) · tier (for pytest) ·
__main__ (the command line).
"""
